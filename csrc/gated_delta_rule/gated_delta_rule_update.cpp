// The decode step of the gated delta rule on CPU: one token of every entry of a batch, whose states are rows of a pool.
//
// Tasks are (entry, head); each reads and writes the rows of its states in place where they are float32 and no entry meets
// another one's, so that the number of threads changes no bit of a result.
#include "core/torch.h"

#include <ATen/MemoryOverlap.h>

#include <algorithm>
#include <vector>

#include "core/pool.h"
#include "core/tensor.h"
#include "gated_delta_rule/gated_delta_rule.h"

namespace compressm {
namespace {

void check(const Tensor& t, const char* name, at::IntArrayRef shape) {
  TORCH_CHECK(t.device().is_cpu() && t.is_floating_point() && t.scalar_type() != at::kDouble && t.sizes() == shape, name,
              ": expected a CPU tensor of shape ", shape, " in float32 or half precision, got ", t.sizes(), " of ",
              t.scalar_type());
}

// The arguments of a step, and where those of an entry's head begin.
struct Token {
  int64_t batch, shared, heads, keys, values;
  bool channelwise, normalize;
  float scale;
  Numbers q, k, v, g, beta;

  Token(const Tensor& state, const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& g_, const Tensor& beta_,
        double scale, bool normalize)
      : channelwise(g_.dim() == 3), normalize(normalize), scale(static_cast<float>(scale)) {
    TORCH_CHECK(state.dim() == 4 && q_.dim() == 3, "expected state (pool, HV, K, V) and q (batch, H, K)");
    batch = q_.size(0), shared = q_.size(1), heads = state.size(1), keys = state.size(2), values = state.size(3);
    TORCH_CHECK(shared > 0 && heads % shared == 0, "q: expected a number of heads that divides HV, got ", shared);
    check(state, "state", state.sizes());
    check(q_, "q", {batch, shared, keys});
    check(k_, "k", {batch, shared, keys});
    check(v_, "v", {batch, heads, values});
    check(beta_, "beta", {batch, heads});
    if (channelwise) check(g_, "g", {batch, heads, keys});
    else check(g_, "g", {batch, heads});
    q = Numbers(q_), k = Numbers(k_), v = Numbers(v_), g = Numbers(g_), beta = Numbers(beta_);
  }

  DeltaStep at(int64_t entry, int64_t head) const {
    const int64_t row = entry * heads + head, key = (entry * shared + head / (heads / shared)) * keys;
    return {q.at(key), k.at(key), v.at(row * values), g.at(channelwise ? row * keys : row), *beta.at(row), scale, channelwise,
            normalize, keys, values};
  }
};

// Entry i's step from row from[i] to row to[i] of a float32 pool with dense heads; zero for an entry that has none.
Tensor run(const Token& token, const Tensor& pool, const std::vector<int64_t>& from, const std::vector<int64_t>& to) {
  Tensor out = at::empty({token.batch, token.heads, token.values}, pool.options());
  float *state = pool.data_ptr<float>(), *o = out.data_ptr<float>();
  const int64_t row = pool.stride(0), head = pool.stride(1);
  const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, token.keys * token.values));
  at::parallel_for(0, token.batch * token.heads, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(3 * (token.keys + 16));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t i = task / token.heads, h = task % token.heads;
      if (from[i] < 0) {
        std::fill_n(o + task * token.values, token.values, 0.0f);
        continue;
      }
      delta_kernels().step(token.at(i, h), state + from[i] * row + h * head, state + to[i] * row + h * head,
                           o + task * token.values, scratch.data());
    }
  });
  return out;
}

// One step: the picked rows of state (pool, HV, K, V) in place; the output (batch, HV, V) in v's dtype, zero for an entry that
// picks none.  An index that is negative or `pad` picks no row.
Tensor gated_delta_rule_step(Tensor state, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
                             const Tensor& beta, const OptionalTensor& state_batch_indices,
                             const OptionalTensor& dst_state_batch_indices, double scale, bool normalize, int64_t pad) {
  at::assert_no_internal_overlap(state);
  const Token token(state, q, k, v, g, beta, scale, normalize);
  const Slots slots(token.batch, state.size(0), state_batch_indices, dst_state_batch_indices, pad);
  return step_in_pool(state, slots, [&](const Tensor& pool, const std::vector<int64_t>& from, const std::vector<int64_t>& to) {
           return run(token, pool, from, to);
         }).to(v.scalar_type());
}

TORCH_LIBRARY_FRAGMENT(compressm_cpp, m) {
  m.def("gated_delta_rule_step(Tensor(a!) state, Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta,"
        " Tensor? state_batch_indices, Tensor? dst_state_batch_indices, float scale, bool normalize, int pad) -> Tensor",
        &gated_delta_rule_step);
}

}  // namespace
}  // namespace compressm
