// Mamba-2's scan on CPU: checks, tasks and the sums of partial gradients around the kernels of ssd.h.
#include "core/torch.h"
#include "ssd/ssd.h"

#include <algorithm>
#include <optional>
#include <tuple>

#include "chunked/chunks.h"
#include "chunked/tensors.h"
#include "core/autograd.h"
#include "core/partial_sums.h"
#include "core/tasks.h"
#include "core/tensor.h"

namespace compressm {
namespace {

constexpr int64_t kRows = 16;  // of a state, that pass from chunk to chunk in one task

// The arguments of a scan, checked; holds the copies that the kernels point to.
struct Scan {
  int64_t batch, length, heads, channels, groups, states, pitch;
  Tensor x, dt, A, B, C, D, z, bias, initial, steps;
  SsdInputs in{};
  Chunks pieces;

  Scan(const Tensor& given_x, const Tensor& given_dt, const Tensor& a, const Tensor& b, const Tensor& c,
       const OptionalTensor& d, const OptionalTensor& gate, const OptionalTensor& dt_bias, const OptionalTensor& initial_states,
       const OptionalTensor& seq_idx, const OptionalTensor& cu_seqlens, bool softplus, double low, double high, bool scaled,
       int64_t chunk)
      : batch(axis(given_x, 0)), length(axis(given_x, 1)), heads(axis(given_x, 2)), channels(axis(given_x, 3)),
        groups(axis(b, 2)), states(axis(b, 3)), pieces(batch, length, chunk, seq_idx, cu_seqlens) {
    TORCH_CHECK(groups > 0 && heads % groups == 0, "B: expected a number of groups that divides H, got ", groups);
    check(given_x, "x", {batch, length, heads, channels});
    check(given_dt, "dt", {batch, length, heads});
    check(a, "A", {heads});
    check(b, "B", {batch, length, groups, states});
    check(c, "C", {batch, length, groups, states});
    x = readable(given_x), dt = given_dt, A = a.contiguous(), B = readable(b), C = readable(c);
    if (d) {
      check(*d, "D", d->dim() == 2 ? at::IntArrayRef({heads, channels}) : at::IntArrayRef({heads}));
      D = (d->dim() == 2 ? *d : d->unsqueeze(1).expand({heads, channels})).contiguous();
    }
    if (gate) check(*gate, "z", x.sizes()), z = readable(*gate);
    if (dt_bias) check(*dt_bias, "dt_bias", {heads}), bias = dt_bias->contiguous();
    if (initial_states) {
      check(*initial_states, "initial_states", {pieces.states, heads, channels, states});
      initial = initial_states->contiguous();
    }
    const int64_t width = ssd_kernels().width;
    pitch = (channels + width - 1) / width * width;
    in = {heads, channels, groups, states, std::min(chunk, std::max<int64_t>(length, 1)), softplus, scaled,
          static_cast<float>(low), static_cast<float>(high), rows_of(x), rows_of(dt), rows_of(B), rows_of(C), gate ? rows_of(z) : SsdRows{},
          A.const_data_ptr<float>(), pointer(D), pointer(bias), nullptr};
    steps = numbers({pieces.count(), heads, ssd_kernels().step_floats(in)});
    in.steps = steps.data_ptr<float>();
  }

  Tensor numbers(at::IntArrayRef shape) const { return at::empty(shape, A.options()); }
  Tensor chunk_states() const { return numbers({pieces.count(), heads, states, pitch}); }

 private:
  static int64_t axis(const Tensor& t, int64_t i) {
    TORCH_CHECK(t.dim() == 4, "expected x (batch, L, H, P) and B (batch, L, G, N)");
    return t.size(i);
  }
  static const float* pointer(const Tensor& t) { return t.defined() ? t.const_data_ptr<float>() : nullptr; }
};

// body(chunk, group, scratch) for all chunks and groups in parallel.
template <typename Body>
void for_each_chunk(const Scan& scan, const Body& body) {
  for_each_task(scan.pieces.count() * scan.groups, ssd_kernels().scratch(scan.in), [&](int64_t task, float* scratch) {
    body(scan.pieces.chunks[task / scan.groups], task % scan.groups, scratch);
  });
}

// Whether threads stay busy with a sequence and a group each, whose chunks then follow each other in one thread: the states
// stay near, and no input is read twice for them.  The bits are the same.
bool by_sequences(const Scan& scan) {
  const int64_t tasks = static_cast<int64_t>(scan.pieces.sequences.size()) * scan.groups, threads = at::get_num_threads();
  int64_t longest = 0;
  for (const Sequence& sequence : scan.pieces.sequences) longest = std::max(longest, sequence.count);
  const int64_t all = scan.pieces.count() * scan.groups, rounds = (tasks + threads - 1) / threads;
  const int64_t busiest = std::min(rounds * longest, (all + longest * (threads - 1)) / threads);  // chunks of a thread, at most
  return 8 * threads * busiest <= 9 * all;
}

// From state (P, N) to `count` rows (count, pitch) from row n on, or back; a state of null is zero, or not asked for.
void load_state(float* rows, const float* state, const Scan& scan, int64_t n, int64_t count) {
  std::fill(rows, rows + count * scan.pitch, 0.0f);
  if (state == nullptr) return;
  for (int64_t p = 0; p < scan.channels; ++p) {
    for (int64_t i = 0; i < count; ++i) rows[i * scan.pitch + p] = state[p * scan.states + n + i];
  }
}
void store_state(float* state, const float* rows, const Scan& scan, int64_t n, int64_t count) {
  if (state == nullptr) return;
  for (int64_t p = 0; p < scan.channels; ++p) {
    for (int64_t i = 0; i < count; ++i) state[p * scan.states + n + i] = rows[i * scan.pitch + p];
  }
}

// The state of a sequence's head in a (states, H, P, N) tensor; null where there is none.
float* state_in(const Tensor& t, int64_t number, int64_t head, const Scan& scan) {
  if (!t.defined() || number < 0) return nullptr;
  return const_cast<float*>(t.const_data_ptr<float>()) + (number * scan.heads + head) * scan.channels * scan.states;
}

// body(chunk, group, states, scratch) for the chunks of all sequences in order, from the first or the last one on: sequences
// and groups in parallel.  `states` (H / G, N, pitch), which the body carries on, come from `first` and go to `last`.
template <typename Body>
void for_each_sequence(const Scan& scan, const Tensor& first, const Tensor& last, bool forwards, const Body& body) {
  const int64_t heads = scan.heads / scan.groups, floats = scan.states * scan.pitch;
  const int64_t scratch_floats = ssd_kernels().scratch(scan.in);
  const int64_t tasks = static_cast<int64_t>(scan.pieces.sequences.size()) * scan.groups;
  for_each_task(tasks, scratch_floats + heads * floats, [&](int64_t task, float* scratch) {
    const Sequence& sequence = scan.pieces.sequences[task / scan.groups];
    const int64_t group = task % scan.groups, from = forwards ? sequence.initial : sequence.final;
    const int64_t to = forwards ? sequence.final : sequence.initial;
    float* const states = scratch + scratch_floats;
    const auto state_of = [&](const Tensor& t, int64_t number, int64_t head) {
      return state_in(t, number, group * heads + head, scan);
    };
    for (int64_t h = 0; h < heads; ++h) load_state(states + h * floats, state_of(first, from, h), scan, 0, scan.states);
    for (int64_t i = 0; i < sequence.count; ++i) {
      body(scan.pieces.chunks[sequence.first + (forwards ? i : sequence.count - 1 - i)], group, states, scratch);
    }
    for (int64_t h = 0; h < heads; ++h) store_state(state_of(last, to, h), states + h * floats, scan, 0, scan.states);
  });
}

// Replaces what every chunk adds by the state that it meets, passing through all sequences forwards (from `first` to `last`,
// (states, H, P, N)) or, with gradients, backwards (from those of the final to those of the initial states).
void carry(const Scan& scan, const Tensor& added, const Tensor& left, const Tensor& first, const Tensor& last, bool forwards) {
  const int64_t parts = (scan.states + kRows - 1) / kRows, per_head = scan.heads * parts;
  const int64_t state_floats = scan.states * scan.pitch, chunk_floats = scan.heads * state_floats;
  const int64_t tasks = static_cast<int64_t>(scan.pieces.sequences.size()) * per_head;
  for_each_task(tasks, kRows * scan.pitch, [&](int64_t task, float* state) {
    const Sequence& sequence = scan.pieces.sequences[task / per_head];
    const int64_t head = task / parts % scan.heads, n = task % parts * kRows, count = std::min(kRows, scan.states - n);
    const int64_t begin = sequence.first + (forwards ? 0 : std::max<int64_t>(sequence.count - 1, 0));
    const int64_t from = forwards ? sequence.initial : sequence.final, to = forwards ? sequence.final : sequence.initial;
    load_state(state, state_in(first, from, head, scan), scan, n, count);
    ssd_kernels().carry(state, added.data_ptr<float>() + begin * chunk_floats + head * state_floats + n * scan.pitch,
                        forwards ? chunk_floats : -chunk_floats, left.const_data_ptr<float>() + begin * scan.heads + head,
                        forwards ? scan.heads : -scan.heads, sequence.count, count * scan.pitch);
    store_state(state_in(last, to, head, scan), state, scan, n, count);
  });
}

std::tuple<Tensor, Tensor> ssd(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
                               const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& dt_bias,
                               const OptionalTensor& initial_states, const OptionalTensor& seq_idx,
                               const OptionalTensor& cu_seqlens, bool softplus, double low, double high, bool scaled,
                               int64_t chunk) {
  const Scan scan(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, softplus, low, high, scaled, chunk);
  const Tensor out = scan.numbers(x.sizes()), last = scan.numbers({scan.pieces.states, scan.heads, scan.channels, scan.states});
  const SsdRows rows = rows_of(out);
  if (by_sequences(scan)) {
    for_each_sequence(scan, scan.initial, last, true, [&](const Chunk& piece, int64_t group, float* state, float* scratch) {
      ssd_kernels().outputs(scan.in, piece, group, nullptr, state, rows, scratch);
    });
    return {out, last};
  }
  const Tensor states = scan.chunk_states(), left = scan.numbers({scan.pieces.count(), scan.heads});
  float *const data = states.data_ptr<float>(), *const left_data = left.data_ptr<float>();
  for_each_chunk(scan, [&](const Chunk& piece, int64_t group, float* scratch) {
    ssd_kernels().write(scan.in, piece, group, data, left_data, scratch);
  });
  carry(scan, states, left, scan.initial, last, true);
  for_each_chunk(scan, [&](const Chunk& piece, int64_t group, float* scratch) {
    ssd_kernels().outputs(scan.in, piece, group, data, nullptr, rows, scratch);
  });
  return {out, last};
}

struct ChunkGradients {
  Tensor x, dt, B, C, z, A, D, bias;
  SsdGradients pointers;

  ChunkGradients(const Scan& scan, const Tensor& out, const Tensor& states, const Tensor& state_grads)
      : x(like(scan.x)), dt(like(scan.dt)), B(like(scan.B)), C(like(scan.C)), z(like(optional(scan.z))),
        A(scan.numbers({scan.pieces.count(), scan.heads})),
        D(scan.numbers({scan.pieces.count(), scan.heads, scan.D.defined() ? scan.channels : 0})), bias(at::empty_like(A)) {
    pointers = {rows_of(out), rows_of(x), rows_of(dt), rows_of(B), rows_of(C), scan.z.defined() ? rows_of(z) : SsdRows{},
                states.const_data_ptr<float>(), state_grads.defined() ? state_grads.const_data_ptr<float>() : nullptr,
                A.data_ptr<float>(), D.data_ptr<float>(), bias.data_ptr<float>()};
  }

 private:
  static OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }
};

// The states in front of all chunks, whose sequences are done in parallel.
void states_by_sequences(const Scan& scan, const Tensor& states) {
  const int64_t heads = scan.heads / scan.groups, floats = scan.states * scan.pitch;
  float* const data = states.data_ptr<float>();
  const Tensor left = scan.numbers({scan.pieces.count(), scan.heads});
  float* const left_data = left.data_ptr<float>();
  for_each_sequence(scan, scan.initial, {}, true, [&](const Chunk& piece, int64_t group, float* state, float* scratch) {
    ssd_kernels().write(scan.in, piece, group, data, left_data, scratch);
    const int64_t first = piece.index * scan.heads + group * heads;
    for (int64_t h = 0; h < heads; ++h) {
      ssd_kernels().carry(state + h * floats, data + (first + h) * floats, 0, left_data + first + h, 0, 1, floats);
    }
  });
}

// All that the chunks add to gradients, and the gradient of the initial states.
ChunkGradients chunk_gradients(const Scan& scan, const Tensor& out, const Tensor& last, const Tensor& initial) {
  const Tensor states = scan.chunk_states();
  if (by_sequences(scan)) {
    states_by_sequences(scan, states);
    ChunkGradients grad(scan, out, states, {});
    for_each_sequence(scan, last, initial, false, [&](const Chunk& piece, int64_t group, float* state, float* scratch) {
      ssd_kernels().gradients(scan.in, grad.pointers, piece, group, state, scratch);
    });
    return grad;
  }
  const Tensor state_grads = scan.chunk_states(), left = scan.numbers({scan.pieces.count(), scan.heads});
  const SsdRows out_rows = rows_of(out);
  float *const state_data = states.data_ptr<float>(), *const grad_data = state_grads.data_ptr<float>();
  float* const left_data = left.data_ptr<float>();
  for_each_chunk(scan, [&](const Chunk& piece, int64_t group, float* scratch) {
    ssd_kernels().write(scan.in, piece, group, state_data, left_data, scratch);
    ssd_kernels().read(scan.in, out_rows, piece, group, grad_data, scratch);
  });
  carry(scan, states, left, scan.initial, {}, true);
  carry(scan, state_grads, left, last, initial, false);
  ChunkGradients grad(scan, out, states, state_grads);
  for_each_chunk(scan, [&](const Chunk& piece, int64_t group, float* scratch) {
    ssd_kernels().gradients(scan.in, grad.pointers, piece, group, nullptr, scratch);
  });
  return grad;
}

// Of (x, dt, A, B, C, D, z, dt_bias, initial_states); empty for an argument that is None.
using SsdGradientTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

SsdGradientTensors ssd_backward(const OptionalTensor& grad_out, const OptionalTensor& grad_last, const Tensor& x,
                                const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C, const OptionalTensor& D,
                                const OptionalTensor& z, const OptionalTensor& dt_bias, const OptionalTensor& initial_states,
                                const OptionalTensor& seq_idx, const OptionalTensor& cu_seqlens, bool softplus, double low,
                                double high, bool scaled, int64_t chunk) {
  const Scan scan(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, softplus, low, high, scaled, chunk);
  const int64_t states_of = scan.pieces.states;
  const Tensor out = grad_out ? readable(*grad_out) : at::zeros(x.sizes(), x.options());
  check(out, "grad_out", x.sizes());
  if (grad_last) check(*grad_last, "grad_last", {states_of, scan.heads, scan.channels, scan.states});
  const Tensor last = grad_last ? grad_last->contiguous() : Tensor();
  const Tensor initial = initial_states ? scan.numbers(initial_states->sizes()) : Tensor();
  const ChunkGradients grad = chunk_gradients(scan, out, last, initial);
  Tensor of_D = at::empty({0}, A.options()), of_bias = at::empty({0}, A.options());
  if (D) {
    const Tensor sums = sum_partials(grad.D).view({scan.heads, scan.channels});
    of_D = D->dim() == 2 ? sums : sum_partials(sums.t().contiguous());
  }
  if (dt_bias) of_bias = sum_partials(grad.bias);
  return {as_like(grad.x, x), as_like(grad.dt, dt), as_like(sum_partials(grad.A), A), as_like(grad.B, B), as_like(grad.C, C),
          as_like(of_D, D), as_like(grad.z, z), as_like(of_bias, dt_bias),
          as_like(initial_states ? initial : at::empty({0}, A.options()), initial_states)};
}

TORCH_LIBRARY_FRAGMENT(compressm_cpp, m) {
  m.def("ssd(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? initial_states,"
        " Tensor? seq_idx, Tensor? cu_seqlens, bool dt_softplus, float low, float high, bool scaled, int chunk)"
        " -> (Tensor out, Tensor last)",
        torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(ssd)));
  m.def("ssd_backward(Tensor? grad_out, Tensor? grad_last, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D,"
        " Tensor? z, Tensor? dt_bias, Tensor? initial_states, Tensor? seq_idx, Tensor? cu_seqlens, bool dt_softplus, float low,"
        " float high, bool scaled, int chunk) -> (Tensor grad_x, Tensor grad_dt, Tensor grad_A, Tensor grad_B, Tensor grad_C, Tensor grad_D,"
        " Tensor grad_z, Tensor grad_dt_bias, Tensor grad_initial_states)",
        torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(ssd_backward)));
  register_gradient(m, "ssd");
}

}  // namespace
}  // namespace compressm
