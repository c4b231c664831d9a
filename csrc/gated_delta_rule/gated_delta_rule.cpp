// The gated delta rule on CPU: checks and tasks around the kernels of gated_delta_rule.h.
#include "core/torch.h"
#include "gated_delta_rule/gated_delta_rule.h"

#include <algorithm>
#include <tuple>

#include "chunked/chunks.h"
#include "chunked/tensors.h"
#include "core/autograd.h"
#include "core/tasks.h"
#include "core/tensor.h"

namespace compressm {
namespace {

constexpr int64_t kStrip = 64;  // columns of the values of a head whose states one task passes from chunk to chunk

// The arguments of a call, checked; holds the copies that the kernels point to, and what lies between the kernels.
struct Rule {
  int64_t batch, length, shared, heads, keys, values, pitch, strips;
  Tensor q, k, v, g, beta, initial, within, scores;
  DeltaInputs in{};
  DeltaBetween between{};
  Chunks pieces;

  Rule(const Tensor& given_q, const Tensor& given_k, const Tensor& given_v, const Tensor& given_g, const Tensor& given_beta,
       const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens, double scale, bool normalize, int64_t chunk)
      : batch(axis(given_q, 0)), length(axis(given_q, 1)), shared(axis(given_q, 2)), heads(axis(given_v, 2)),
        keys(axis(given_q, 3)), values(axis(given_v, 3)), pieces(batch, length, chunk, {}, cu_seqlens) {
    TORCH_CHECK(shared > 0 && heads % shared == 0, "q: expected a number of heads that divides HV, got ", shared);
    const bool channelwise = given_g.dim() == 4;
    check(given_q, "q", {batch, length, shared, keys});
    check(given_k, "k", {batch, length, shared, keys});
    check(given_v, "v", {batch, length, heads, values});
    check(given_beta, "beta", {batch, length, heads});
    if (channelwise) check(given_g, "g", {batch, length, heads, keys});
    else check(given_g, "g", {batch, length, heads});
    q = readable(given_q), k = readable(given_k), v = readable(given_v), g = readable(given_g), beta = given_beta;
    if (initial_state) {
      check(*initial_state, "initial_state", {pieces.states, heads, keys, values});
      initial = initial_state->contiguous();
    }
    pitch = whole(values), strips = (values + kStrip - 1) / kStrip;
    in = {length, shared, heads, keys, values, std::min(chunk, std::max<int64_t>(length, 1)), channelwise, normalize,
          static_cast<float>(scale), rows_of(q), rows_of(k), rows_of(v), rows_of(g), rows_of(beta)};
    within = of_steps(whole(in.chunk)), scores = of_steps(whole(in.chunk));
    between.within = within.data_ptr<float>(), between.scores = scores.data_ptr<float>();
  }

  Tensor numbers(at::IntArrayRef shape) const { return at::empty(shape, beta.options()); }
  Tensor of_steps(int64_t width) const { return numbers({batch * length * heads, width}); }
  Tensor chunk_states() const { return numbers({pieces.count(), heads, keys, pitch}); }
  Tensor last_states() const { return numbers({pieces.states, heads, keys, values}); }
  static int64_t whole(int64_t count) {
    const int64_t width = delta_kernels().width;
    return (count + width - 1) / width * width;
  }

 private:
  static int64_t axis(const Tensor& t, int64_t i) {
    TORCH_CHECK(t.dim() == 4, "expected q (batch, L, H, K) and v (batch, L, HV, V)");
    return t.size(i);
  }
};

// body(chunk, head of keys, scratch) for all chunks and heads of keys in parallel.
template <typename Body>
void for_each_chunk(const Rule& rule, const Body& body) {
  for_each_task(rule.pieces.count() * rule.shared, delta_kernels().scratch(rule.in), [&](int64_t task, float* scratch) {
    body(rule.pieces.chunks[task / rule.shared], task % rule.shared, scratch);
  });
}

void make_products(const Rule& rule) {
  for_each_chunk(rule, [&](const Chunk& chunk, int64_t shared, float* scratch) {
    delta_kernels().products(rule.in, chunk, shared, rule.between, scratch);
  });
}

// body(sequence, strip, state (keys, pitch), pitch, scratch) for all sequences, heads and strips of columns in parallel; state
// is that of `from`, (states, HV, K, V) or zero, before, and goes to `to` afterwards, unless that is undefined.
template <typename Body>
void for_each_strip(const Rule& rule, const Tensor& from, const Tensor& to, const Body& body) {
  const int64_t pitch = std::min(rule.pitch, kStrip), per_sequence = rule.heads * rule.strips, width = rule.values;
  const int64_t scratch_floats = delta_kernels().scratch(rule.in), tasks = rule.pieces.states * per_sequence;
  for_each_task(tasks, rule.keys * pitch + scratch_floats, [&](int64_t task, float* scratch) {
    const Sequence& sequence = rule.pieces.sequences[task / per_sequence];
    const int64_t head = task / rule.strips % rule.heads, first = task % rule.strips * kStrip;
    const DeltaStrip strip{head, first, std::min(kStrip, width - first)};
    const int64_t place = (sequence.initial * rule.heads + head) * rule.keys * width + first;
    float* const state = scratch + scratch_floats;
    std::fill(state, state + rule.keys * pitch, 0.0f);
    for (int64_t n = 0; from.defined() && n < rule.keys; ++n) {
      std::copy_n(from.const_data_ptr<float>() + place + n * width, strip.count, state + n * pitch);
    }
    body(sequence, strip, state, pitch, scratch);
    for (int64_t n = 0; to.defined() && n < rule.keys; ++n) {
      std::copy_n(state + n * pitch, strip.count, to.data_ptr<float>() + place + n * width);
    }
  });
}

std::tuple<Tensor, Tensor> gated_delta_rule(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
                                            const Tensor& beta, const OptionalTensor& initial_state,
                                            const OptionalTensor& cu_seqlens, double scale, bool normalize, int64_t chunk) {
  const Rule rule(q, k, v, g, beta, initial_state, cu_seqlens, scale, normalize, chunk);
  const Tensor o = rule.numbers(v.sizes()), last = rule.last_states();
  const HeadRows out = rows_of(o);
  make_products(rule);
  for_each_strip(rule, rule.initial, last, [&](const Sequence& sequence, const DeltaStrip& strip, float* state, int64_t pitch,
                                               float* scratch) {
    for (int64_t c = sequence.first; c < sequence.first + sequence.count; ++c) {
      delta_kernels().forward(rule.in, rule.pieces.chunks[c], strip, rule.between, state, pitch, &out, scratch);
    }
  });
  return {o, last};
}

// The state of a strip, as the chunk meets it, to where it lies in (chunks, heads, K, pitch).
void keep(const Rule& rule, const Chunk& chunk, const DeltaStrip& strip, const float* state, int64_t pitch, float* all) {
  float* const to = all + (chunk.index * rule.heads + strip.head) * rule.keys * rule.pitch + strip.first;
  const int64_t columns = Rule::whole(strip.count);
  for (int64_t n = 0; n < rule.keys; ++n) std::copy_n(state + n * pitch, columns, to + n * rule.pitch);
}

// The states in front of all chunks, and X.
void walk_forward(const Rule& rule, const DeltaBetween& between) {
  for_each_strip(rule, rule.initial, {}, [&](const Sequence& sequence, const DeltaStrip& strip, float* state, int64_t pitch,
                                             float* scratch) {
    for (int64_t c = sequence.first; c < sequence.first + sequence.count; ++c) {
      const Chunk& chunk = rule.pieces.chunks[c];
      keep(rule, chunk, strip, state, pitch, between.states);
      delta_kernels().forward(rule.in, chunk, strip, between, state, pitch, nullptr, scratch);
    }
  });
}

// The gradients of the states behind all chunks and of v, and Z; `last` and `initial` are those of the states at the ends.
void walk_backward(const Rule& rule, const DeltaBetween& between, const DeltaGradients& grad, const Tensor& last,
                   const Tensor& initial) {
  for_each_strip(rule, last, initial, [&](const Sequence& sequence, const DeltaStrip& strip, float* state, int64_t pitch,
                                          float* scratch) {
    for (int64_t c = sequence.first + sequence.count - 1; c >= sequence.first; --c) {
      const Chunk& chunk = rule.pieces.chunks[c];
      keep(rule, chunk, strip, state, pitch, between.state_grads);
      delta_kernels().backward(rule.in, grad, chunk, strip, between, state, pitch, scratch);
    }
  });
}

// Of (q, k, v, g, beta, initial_state); empty for an initial state that is None.
using DeltaGradientTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

DeltaGradientTensors gated_delta_rule_backward(const OptionalTensor& grad_o, const OptionalTensor& grad_last, const Tensor& q,
                                               const Tensor& k, const Tensor& v, const Tensor& g, const Tensor& beta,
                                               const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens,
                                               double scale, bool normalize, int64_t chunk) {
  const Rule rule(q, k, v, g, beta, initial_state, cu_seqlens, scale, normalize, chunk);
  const Tensor out = grad_o ? readable(*grad_o) : at::zeros(v.sizes(), v.options());
  check(out, "grad_o", v.sizes());
  if (grad_last) check(*grad_last, "grad_last", {rule.pieces.states, rule.heads, rule.keys, rule.values});
  const Tensor missing = rule.of_steps(rule.pitch), adjoint = rule.of_steps(rule.pitch);
  const Tensor states = rule.chunk_states(), state_grads = rule.chunk_states();
  DeltaBetween between = rule.between;
  between.missing = missing.data_ptr<float>(), between.adjoint = adjoint.data_ptr<float>();
  between.states = states.data_ptr<float>(), between.state_grads = state_grads.data_ptr<float>();
  const Tensor of_q = like(rule.q), of_k = like(rule.k), of_v = like(rule.v), of_g = like(rule.g), of_beta = like(rule.beta);
  const DeltaGradients grad{rows_of(out), rows_of(of_q), rows_of(of_k), rows_of(of_v), rows_of(of_g), rows_of(of_beta)};
  const Tensor initial = initial_state ? rule.last_states() : Tensor();
  make_products(rule);
  walk_forward(rule, between);
  walk_backward(rule, between, grad, grad_last ? grad_last->contiguous() : Tensor(), initial);
  for_each_chunk(rule, [&](const Chunk& piece, int64_t shared, float* scratch) {
    delta_kernels().gradients(rule.in, grad, piece, shared, between, scratch);
  });
  return {as_like(of_q, q), as_like(of_k, k), as_like(of_v, v), as_like(of_g, g), as_like(of_beta, beta),
          as_like(initial_state ? initial : at::empty({0}, v.options()), initial_state)};
}

TORCH_LIBRARY_FRAGMENT(compressm_cpp, m) {
  m.def("gated_delta_rule(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? initial_state, Tensor? cu_seqlens,"
        " float scale, bool normalize, int chunk) -> (Tensor o, Tensor last)",
        torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(gated_delta_rule)));
  m.def("gated_delta_rule_backward(Tensor? grad_o, Tensor? grad_last, Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta,"
        " Tensor? initial_state, Tensor? cu_seqlens, float scale, bool normalize, int chunk) -> (Tensor grad_q, Tensor grad_k,"
        " Tensor grad_v, Tensor grad_g, Tensor grad_beta, Tensor grad_initial_state)",
        torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(gated_delta_rule_backward)));
  register_gradient(m, "gated_delta_rule");
}

}  // namespace
}  // namespace compressm
