// The decode step of the selective scan on CPU: one token of every entry of a batch, whose states are rows of a pool.
//
// Tasks are (entry, head); each reads and writes the rows of its states in place where they are float32 and no entry meets
// another one's, so that the number of threads changes no bit of a result.
#include "core/torch.h"

#include <ATen/MemoryOverlap.h>

#include <algorithm>
#include <vector>

#include "core/pool.h"
#include "core/tensor.h"
#include "selective_scan/selective_scan.h"

namespace compressm {
namespace {

void check(const Tensor& t, const char* name, at::IntArrayRef shape) {
  TORCH_CHECK(t.device().is_cpu() && t.is_floating_point() && t.sizes() == shape, name,
              ": expected a real CPU tensor of shape ", shape, ", got ", t.sizes(), " of ", t.scalar_type());
}

void check(const OptionalTensor& t, const char* name, at::IntArrayRef shape) {
  if (t) check(*t, name, shape);
}

// Whether there is but one number along the last `axes` axes, in memory too.
bool one(const Tensor& t, int64_t axes) {
  bool same = t.numel() > 0;
  for (int64_t axis = t.dim() - axes; axis < t.dim(); ++axis) same &= t.size(axis) == 1 || t.stride(axis) == 0;
  return same;
}

Tensor first_of(Tensor t, int64_t axes) {
  for (; axes > 0; --axes) t = t.select(-1, 0);
  return t;
}

// The arguments of a step, and where those of an entry's head begin.
struct Step {
  int64_t batch, heads, width, states, groups;
  bool softplus, tied;
  Numbers x, dt, A, B, C, D, z, bias;

  Step(const Tensor& state, const Tensor& x_, const Tensor& dt_, const Tensor& A_, const Tensor& B_, const Tensor& C_,
       const OptionalTensor& D_, const OptionalTensor& z_, const OptionalTensor& dt_bias, bool softplus)
      : softplus(softplus) {
    TORCH_CHECK(state.dim() == 4 && x_.dim() == 3 && B_.dim() == 3, "expected state (pool, H, P, N), x (batch, H, P) and B "
                "(batch, G, N)");
    batch = x_.size(0), heads = state.size(1), width = state.size(2), states = state.size(3), groups = B_.size(1);
    TORCH_CHECK(groups > 0 && heads % groups == 0, "B: expected a number of groups that divides H, got ", groups);
    TORCH_CHECK(x_.scalar_type() != at::kDouble && state.scalar_type() != at::kDouble, "expected float32 or half precision");
    check(state, "state", state.sizes());
    check(x_, "x", {batch, heads, width});
    check(dt_, "dt", {batch, heads, width});
    check(A_, "A", {heads, width, states});
    check(B_, "B", {batch, groups, states});
    check(C_, "C", {batch, groups, states});
    check(D_, "D", {heads, width});
    check(z_, "z", {batch, heads, width});
    check(dt_bias, "dt_bias", {heads, width});
    tied = one(A_, 2) && one(dt_, 1) && (!dt_bias || one(*dt_bias, 1));
    x = Numbers(x_), B = Numbers(B_), C = Numbers(C_), D = Numbers(D_), z = Numbers(z_);
    A = Numbers(tied ? first_of(A_, 2) : A_), dt = Numbers(tied ? first_of(dt_, 1) : dt_);
    if (dt_bias) bias = Numbers(tied ? first_of(*dt_bias, 1) : *dt_bias);
  }

  ScanStep at(int64_t entry, int64_t head) const {
    const int64_t row = entry * heads + head, mixing = (entry * groups + head / (heads / groups)) * states;
    return {x.at(row * width), dt.at(tied ? row : row * width), A.at(tied ? head : head * width * states), B.at(mixing),
            C.at(mixing), D.at(head * width), z.at(row * width), bias.at(tied ? head : head * width), softplus, tied, width,
            states};
  }
};

// Entry i's step from row from[i] to row to[i] of a float32 pool with dense heads; zero for an entry that has none.
Tensor run(const Step& step, const Tensor& pool, const std::vector<int64_t>& from, const std::vector<int64_t>& to) {
  Tensor out = at::empty({step.batch, step.heads, step.width}, pool.options());
  float *state = pool.data_ptr<float>(), *y = out.data_ptr<float>();
  const int64_t row = pool.stride(0), head = pool.stride(1);
  const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, step.width * step.states));
  at::parallel_for(0, step.batch * step.heads, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t i = task / step.heads, h = task % step.heads;
      if (from[i] < 0) {
        std::fill_n(y + task * step.width, step.width, 0.0f);
        continue;
      }
      selective_scan_kernels().step(step.at(i, h), state + from[i] * row + h * head, state + to[i] * row + h * head,
                                    y + task * step.width);
    }
  });
  return out;
}

// One step: the picked rows of state (pool, H, P, N) in place; the output (batch, H, P) in x's dtype, zero for an entry that
// picks none.  B and C are (batch, G, N); an index that is negative or `pad` picks no row.
Tensor selective_step(Tensor state, const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
                      const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& dt_bias,
                      const OptionalTensor& state_batch_indices, const OptionalTensor& dst_state_batch_indices, bool softplus,
                      int64_t pad) {
  at::assert_no_internal_overlap(state);
  const Step step(state, x, dt, A, B, C, D, z, dt_bias, softplus);
  const Slots slots(step.batch, state.size(0), state_batch_indices, dst_state_batch_indices, pad);
  return step_in_pool(state, slots, [&](const Tensor& pool, const std::vector<int64_t>& from, const std::vector<int64_t>& to) {
           return run(step, pool, from, to);
         }).to(x.scalar_type());
}

TORCH_LIBRARY_FRAGMENT(compressm_cpp, m) {
  m.def("selective_step(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z,"
        " Tensor? dt_bias, Tensor? state_batch_indices, Tensor? dst_state_batch_indices, bool softplus, int pad) -> Tensor",
        &selective_step);
}

}  // namespace
}  // namespace compressm
