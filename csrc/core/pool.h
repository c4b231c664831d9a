// A decode step's tensors, and the rows of a pool of states that the entries of a batch read and write.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/tensor.h"

namespace compressm {

// The tensor in float32; an axis along which it is expanded stays so.
inline Tensor floats(const Tensor& t) {
  if (t.scalar_type() == at::kFloat) return t;
  Tensor narrow = t;
  for (int64_t axis = 0; axis < t.dim(); ++axis) {
    if (t.stride(axis) == 0 && t.size(axis) > 1) narrow = narrow.narrow(axis, 0, 1);
  }
  return narrow.to(at::kFloat).expand(t.sizes());
}

// The numbers of a tensor in float32, one after the other; null where there is none.
class Numbers {
 public:
  Numbers() = default;
  explicit Numbers(const Tensor& t) : held_(floats(t).contiguous()), data_(held_.const_data_ptr<float>()) {}
  explicit Numbers(const OptionalTensor& t) {
    if (t) *this = Numbers(*t);
  }
  const float* at(int64_t offset) const { return data_ == nullptr ? nullptr : data_ + offset; }

 private:
  Tensor held_;
  const float* data_ = nullptr;
};

// Rows of the pool that the entries of a batch read and write, negative for none.
struct Slots {
  std::vector<int64_t> from, to;
  std::vector<int64_t> writer;  // of each row of the pool: the last entry that writes it, or a negative number
  bool apart = true;            // whether every entry writes, and none a row that another one reads or writes

  Slots(int64_t batch, int64_t pool, const OptionalTensor& indices, const OptionalTensor& targets, int64_t pad)
      : writer(pool, -1) {
    from = rows(indices, "state_batch_indices", batch, pool, pad);
    to = targets ? rows(targets, "dst_state_batch_indices", batch, pool, pad) : from;
    for (int64_t i = 0; i < batch; ++i) {
      if (from[i] < 0) to[i] = -1;
      if (to[i] < 0) {
        apart &= from[i] < 0;
        continue;
      }
      apart &= writer[to[i]] < 0;
      writer[to[i]] = i;
    }
    for (int64_t i = 0; i < batch; ++i) apart &= from[i] < 0 || writer[from[i]] < 0 || writer[from[i]] == i;
  }

 private:
  static std::vector<int64_t> rows(const OptionalTensor& indices, const char* name, int64_t batch, int64_t pool, int64_t pad) {
    std::vector<int64_t> rows(batch);
    if (!indices) {
      TORCH_CHECK(batch == pool, "state: expected ", batch, " rows, one for each entry of x, got ", pool);
      for (int64_t i = 0; i < batch; ++i) rows[i] = i;
      return rows;
    }
    TORCH_CHECK(indices->device().is_cpu() && indices->sizes() == at::IntArrayRef({batch}) &&
                    (indices->scalar_type() == at::kInt || indices->scalar_type() == at::kLong),
                name, ": expected int32 or int64 (batch,) on the CPU");
    const Tensor wide = indices->to(at::kLong).contiguous();
    const int64_t* given = wide.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < batch; ++i) {
      rows[i] = given[i] == pad ? -1 : std::max<int64_t>(given[i], -1);
      TORCH_CHECK_VALUE(rows[i] < pool, name, ": expected rows of a pool of ", pool, ", got ", given[i]);
    }
    return rows;
  }
};

// Whether the states of a head lie one after the other in memory.
inline bool dense_heads(const Tensor& state) {
  return state.numel() == 0 || ((state.size(3) == 1 || state.stride(3) == 1) &&
                                (state.size(2) == 1 || state.stride(2) == state.size(3)));
}

// The picked rows of `state` in place by run(pool, from, to), entry i's step from row from[i] to row to[i] of a float32 pool
// with dense heads, of none where from[i] is negative.  Its result.
template <typename Run>
Tensor step_in_pool(const Tensor& state, const Slots& slots, const Run& run) {
  if (state.scalar_type() == at::kFloat && slots.apart && dense_heads(state)) {
    return run(state, slots.from, slots.to);
  }
  std::vector<int64_t> read, own(slots.from.size(), -1), kept, written;  // rows of the pool and of the copies
  for (std::size_t i = 0; i < slots.from.size(); ++i) {
    if (slots.from[i] < 0) continue;
    own[i] = static_cast<int64_t>(read.size());
    read.push_back(slots.from[i]);
    if (slots.to[i] < 0 || slots.writer[slots.to[i]] != static_cast<int64_t>(i)) continue;
    kept.push_back(own[i]), written.push_back(slots.to[i]);
  }
  const Tensor copies = state.index_select(0, at::tensor(read, at::kLong)).to(at::kFloat).contiguous();
  const Tensor out = run(copies, own, own);
  state.index_copy_(0, at::tensor(written, at::kLong),
                    copies.index_select(0, at::tensor(kept, at::kLong)).to(state.scalar_type()));
  return out;
}

}  // namespace compressm
