// The gated delta rule on CPU: S = diag(exp g_t) S_{t-1}, S_t = S + beta_t k_t (v_t - S^T k_t)^T, o_t = scale S_t^T q_t.
// Each head of the values has its state.
//
// A sequence is cut into chunks.  In one, with S the state in front of it, E the decays from its beginning to each step, and N
// and P the products k_t k_s and scale q_t k_s of steps s < t and s <= t, decayed from s to t,
//
//   X = V - (K o E) S - N (beta X)     what a step finds missing, by forward substitution
//   O = scale (Q o E) S + P (beta X)
//
// and what is behind it is S decayed plus (K o decays to the end)^T (beta X).  N and P know no state (`products`, by chunks);
// the states pass from chunk to chunk, each column of values by itself (`forward`, by strips of columns).  Backwards the
// gradients of the states pass likewise (`backward`), with Z = D - N^T (beta Z) where D are the gradients of beta X, so that V
// gets beta Z; what is left needs all columns, but the chunk alone (`gradients`).  No two tasks write to one place, and what
// they are depends on sizes alone, so that the number of threads changes no bit of a result.
//
// States are (K, pitch) floats, pitch being V in whole vectors; what is beyond V is zero.  The kernels are compiled once per
// instruction set (gated_delta_rule_*.cpp include the .inc files under different target pragmas).
#pragma once

#include <cstdint>

#include "chunked/chunk.h"
#include "core/bfloat16.h"
#include "core/isa.h"

namespace compressm {

struct DeltaInputs {
  std::int64_t length, shared, heads, keys, values, chunk;  // shared: heads of keys; chunk: most steps of one
  bool channelwise, normalize;                              // a decay for each channel of the keys; q and k of length one
  float scale;
  HeadRows q, k, v, g, beta;
};

// Columns [first, first + count) of the values of a head.
struct DeltaStrip {
  std::int64_t head, first, count;
};

// What lies between the kernels: of the steps of each chunk and head, rows of N (negative) and P as wide as a chunk in whole
// vectors, and of X and Z as wide as a state; the states in front of the chunks, (chunks, heads, K, pitch), and the gradients
// of those behind them.
struct DeltaBetween {
  float *within, *scores, *missing, *adjoint, *states, *state_grads;
};

struct DeltaGradients {
  HeadRows out;               // given
  HeadRows q, k, v, g, beta;  // written
};

// One token of a head.  g is one number or one a channel of the keys.
struct DeltaStep {
  const float *q, *k, *v, *g;
  float beta, scale;
  bool channelwise, normalize;
  std::int64_t keys, values;
};

struct DeltaKernels {
  std::int64_t width;

  // Floats of scratch that any of the following needs; aligned to 64 bytes.
  std::int64_t (*scratch)(const DeltaInputs& in);

  // N and P of the heads that share the keys of head `shared`.
  void (*products)(const DeltaInputs& in, const Chunk& chunk, std::int64_t shared, const DeltaBetween& between,
                   float* scratch);

  // A strip of columns of a chunk: its outputs, or, where `out` is null, X; `state`, whose rows are `pitch` floats apart,
  // passes from in front of the chunk to behind it.
  void (*forward)(const DeltaInputs& in, const Chunk& chunk, const DeltaStrip& strip, const DeltaBetween& between,
                  float* state, std::int64_t pitch, const HeadRows* out, float* scratch);

  // Likewise the gradient of v, and Z; the gradient of the state passes from behind the chunk to in front of it.
  void (*backward)(const DeltaInputs& in, const DeltaGradients& grad, const Chunk& chunk, const DeltaStrip& strip,
                   const DeltaBetween& between, float* state, std::int64_t pitch, float* scratch);

  // The gradients of q and k of head `shared`, and of g and beta of the heads that share it.
  void (*gradients)(const DeltaInputs& in, const DeltaGradients& grad, const Chunk& chunk, std::int64_t shared,
                    const DeltaBetween& between, float* scratch);

  // Reads a dense state (keys, values) and writes one, which may be the same, and the output; scratch: three rows of keys in
  // whole vectors.
  void (*step)(const DeltaStep& step, const float* from, float* to, float* out, float* scratch);
};

COMPRESSM_KERNELS(DeltaKernels, delta_kernels)

}  // namespace compressm
