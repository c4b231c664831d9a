// Sequences cut into chunks of steps, for ops whose states pass from chunk to chunk.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "chunked/chunk.h"

namespace compressm {

// Chunks [first, first + count), with the numbers of its first and its final state; -1: it begins from zero, or ends unseen.
struct Sequence {
  std::int64_t first, count, initial, final;
};

class Chunks {
 public:
  std::vector<Chunk> chunks;
  std::vector<Sequence> sequences;
  std::int64_t states;  // how many initial and final states there are

  // Of `batch` rows of `length` steps, `most` steps a chunk; seq_idx (batch, length) or cu_seqlens (sequences + 1,), as the
  // functions of the ops take them.
  Chunks(std::int64_t batch, std::int64_t length, std::int64_t most, const std::optional<at::Tensor>& seq_idx,
         const std::optional<at::Tensor>& cu_seqlens)
      : most_(most) {
    TORCH_CHECK(most > 0, "chunk: expected a positive number of steps, got ", most);
    states = batch;
    if (cu_seqlens) {
      states = cu_seqlens->size(0) - 1;
      packed(integers(*cu_seqlens, "cu_seqlens"), batch, length);
    } else if (seq_idx) {
      TORCH_CHECK(seq_idx->sizes() == at::IntArrayRef({batch, length}), "seq_idx: expected shape (batch, L)");
      numbered(integers(*seq_idx, "seq_idx"), batch, length);
    } else {
      for (std::int64_t row = 0; row < batch; ++row) add(row, 0, length, row, row);
    }
  }

  std::int64_t count() const { return static_cast<std::int64_t>(chunks.size()); }

 private:
  std::int64_t most_;

  static at::Tensor integers(const at::Tensor& t, const char* name) {
    const bool fits = t.device().is_cpu() && (t.scalar_type() == at::kInt || t.scalar_type() == at::kLong);
    TORCH_CHECK(fits, name, ": expected int32 or int64 on the CPU");
    return t.to(at::kLong).contiguous();
  }

  void packed(const at::Tensor& bounds, std::int64_t batch, std::int64_t length) {
    TORCH_CHECK(batch == 1 && bounds.dim() == 1 && states >= 1, "cu_seqlens: expected (sequences + 1,) and a batch of 1");
    const std::int64_t* at = bounds.const_data_ptr<std::int64_t>();
    TORCH_CHECK(at[0] == 0 && at[states] == length, "cu_seqlens: expected numbers from 0 to L = ", length);
    TORCH_CHECK(std::is_sorted(at, at + states + 1), "cu_seqlens: expected numbers that rise");
    for (std::int64_t i = 0; i < states; ++i) add(0, at[i], at[i + 1], i, i);
  }

  void numbered(const at::Tensor& numbers, std::int64_t batch, std::int64_t length) {
    for (std::int64_t row = 0; row < batch; ++row) {
      const std::int64_t* at = numbers.const_data_ptr<std::int64_t>() + row * length;
      std::int64_t start = 0;
      for (std::int64_t t = 1; t < length; ++t) {
        if (at[t] == at[t - 1]) continue;
        add(row, start, t, start == 0 ? row : -1, -1);
        start = t;
      }
      add(row, start, length, start == 0 ? row : -1, row);
    }
  }

  void add(std::int64_t row, std::int64_t start, std::int64_t stop, std::int64_t initial, std::int64_t final) {
    const std::int64_t first = count();
    for (; start < stop; start += most_) chunks.push_back({row, start, std::min(most_, stop - start), count()});
    sequences.push_back({first, count() - first, initial, final});
  }
};

}  // namespace compressm
