// Linear attention with decays of key channels on CPU: checks and tasks around the kernels of linear_attention.h.
#include "core/torch.h"
#include "linear_attention/linear_attention.h"

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "chunked/chunks.h"
#include "core/autograd.h"
#include "core/checks.h"
#include "core/tasks.h"
#include "core/tensor.h"

namespace compressm {
namespace {

// The arguments, checked; holds the copies that the kernels point to.
struct Attention {
  int64_t batch, length, groups, heads, keys, values;
  Tensor q, k, v, g, initial;
  Chunks pieces;
  AttentionInputs in{};

  Attention(const Tensor& given_q, const Tensor& given_k, const Tensor& given_v, const Tensor& given_g,
            const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens, double scale, int64_t chunk)
      : batch(axis(given_q, 0)), length(axis(given_q, 1)), groups(axis(given_q, 2)), heads(axis(given_v, 2)),
        keys(axis(given_q, 3)), values(axis(given_v, 3)), q(dense(given_q, "q", {batch, length, groups, keys})),
        k(dense(given_k, "k", {batch, length, groups, keys})), v(dense(given_v, "v", {batch, length, heads, values})),
        g(dense(given_g, "g", {batch, length, heads, keys})), pieces(batch, length, chunk, std::nullopt, cu_seqlens) {
    TORCH_CHECK(groups > 0 && heads % groups == 0, "q: expected a number of heads that divides v's, got ", groups);
    if (initial_state) initial = dense(*initial_state, "initial_state", states_shape());
    in = {length, groups, heads, keys, values, std::min(chunk, std::max<int64_t>(length, 1)), static_cast<float>(scale),
          q.const_data_ptr<float>(), k.const_data_ptr<float>(), v.const_data_ptr<float>(), g.const_data_ptr<float>()};
  }

  std::vector<int64_t> states_shape() const { return {pieces.states, heads, keys, values}; }
  int64_t sequences() const { return static_cast<int64_t>(pieces.sequences.size()); }
  ChunkRange chunks(int64_t sequence) const {
    const Sequence& found = pieces.sequences[sequence];
    return {pieces.chunks.data() + found.first, found.count};
  }

  // A state of a sequence; null where there is no tensor.
  const float* state(const Tensor& t, int64_t sequence) const {
    return t.defined() ? t.const_data_ptr<float>() + sequence * heads * keys * values : nullptr;
  }
  float* state_to_write(const Tensor& t, int64_t sequence) const {
    return t.defined() ? t.data_ptr<float>() + sequence * heads * keys * values : nullptr;
  }

 private:
  static int64_t axis(const Tensor& t, int64_t i) {
    TORCH_CHECK(t.dim() == 4, "expected q (batch, L, H, K) and v (batch, L, HV, V)");
    return t.size(i);
  }
};

int64_t strips(int64_t lanes) { return (lanes + attention_kernels().strip - 1) / attention_kernels().strip; }

std::tuple<Tensor, Tensor> linear_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
                                            const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens, double scale,
                                            int64_t chunk) {
  const Attention a(q, k, v, g, initial_state, cu_seqlens, scale, chunk);
  const Tensor out = at::empty(a.v.sizes(), a.v.options()), last = at::empty(a.states_shape(), a.v.options());
  float* const made = out.data_ptr<float>();
  const int64_t of_head = strips(a.values), of_sequence = a.heads * of_head;
  for_each_task(a.sequences() * of_sequence, attention_kernels().scratch(a.in), [&](int64_t task, float* scratch) {
    const int64_t sequence = task / of_sequence, head = task / of_head % a.heads;
    attention_kernels().values(a.in, a.chunks(sequence), head, task % of_head, a.state(a.initial, sequence),
                               a.state_to_write(last, sequence), a.in.v, made, false, scratch);
  });
  return {out, last};
}

// Of (q, k, v, g, initial_state); empty for an initial state that is None.
using AttentionGradientTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

AttentionGradientTensors linear_attention_backward(const OptionalTensor& grad_out, const OptionalTensor& grad_last,
                                                   const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
                                                   const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens,
                                                   double scale, int64_t chunk) {
  const Attention a(q, k, v, g, initial_state, cu_seqlens, scale, chunk);
  const auto options = a.v.options();
  const Tensor given = grad_out ? dense(*grad_out, "grad_out", a.v.sizes()) : at::zeros(a.v.sizes(), options);
  const Tensor last = grad_last ? dense(*grad_last, "grad_last", a.states_shape()) : Tensor();
  const Tensor none = at::empty({0}, options);
  const auto of_keys = [&] { return a.heads == 0 ? at::zeros(a.q.sizes(), options) : at::empty(a.q.sizes(), options); };
  const Tensor to_q = of_keys(), to_k = of_keys(), to_v = at::empty(a.v.sizes(), options);
  const Tensor to_g = at::empty(a.g.sizes(), options);
  const Tensor to_initial = initial_state ? at::empty(a.states_shape(), options) : Tensor();
  const float* const given_data = given.const_data_ptr<float>();
  float *const q_data = to_q.data_ptr<float>(), *const k_data = to_k.data_ptr<float>(), *const v_data = to_v.data_ptr<float>();
  float* const g_data = to_g.data_ptr<float>();
  const int64_t of_group = strips(a.keys), of_head = strips(a.values);
  const int64_t key_tasks = a.groups * of_group, of_sequence = key_tasks + a.heads * of_head;
  for_each_task(a.sequences() * of_sequence, attention_kernels().scratch(a.in), [&](int64_t task, float* scratch) {
    const int64_t sequence = task / of_sequence, part = task % of_sequence;
    const float* const from = a.state(last, sequence);
    if (part < key_tasks) {
      const AttentionGradients grad{given_data, from, a.state(a.initial, sequence), q_data, k_data, g_data,
                                    a.state_to_write(to_initial, sequence)};
      attention_kernels().keys(a.in, a.chunks(sequence), part / of_group, part % of_group, grad, scratch);
    } else {
      const int64_t place = part - key_tasks;
      attention_kernels().values(a.in, a.chunks(sequence), place / of_head, place % of_head, from, nullptr, given_data, v_data,
                                 true, scratch);
    }
  });
  return {to_q, to_k, to_v, to_g, initial_state ? to_initial : none};
}

TORCH_LIBRARY_FRAGMENT(compressm_cpp, m) {
  m.def("linear_attention(Tensor q, Tensor k, Tensor v, Tensor g, Tensor? initial_state, Tensor? cu_seqlens, float scale,"
        " int chunk) -> (Tensor out, Tensor last)",
        torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(linear_attention)));
  m.def("linear_attention_backward(Tensor? grad_out, Tensor? grad_last, Tensor q, Tensor k, Tensor v, Tensor g,"
        " Tensor? initial_state, Tensor? cu_seqlens, float scale, int chunk)"
        " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_g, Tensor grad_initial_state)",
        torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(linear_attention_backward)));
  register_gradient(m, "linear_attention");
}

}  // namespace
}  // namespace compressm
