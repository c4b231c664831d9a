// Mamba-2's scan on CPU: S_t = exp(step_t A) S_{t-1} + step_t x_t B_t^T, out_t = (S_t C_t + D x_t) silu(z_t), per head.
// Without `scaled` the step sizes only decay: what is written is x_t B_t^T.
//
// A sequence is cut into chunks.  Each chunk adds to its heads' states (`write`), the states pass from chunk to chunk
// (`carry`), and each chunk reads the state in front of it and its own steps (`outputs`).  The backward does the same with
// gradients, from the last chunk to the first, and computes the states anew.  Tasks are a chunk and a group of heads, which
// share B and C: no two write to one place, so that the number of threads changes no bit of a result.  Where there are enough
// sequences for all threads, each goes through whole sequences instead, the same way with the same bits.
//
// States are (N, pitch) floats, pitch being P in whole vectors; what is beyond P is zero.  The kernels are compiled once per
// instruction set (ssd_*.cpp include ssd_*.inc under different target pragmas); the set is the one that isa() names.
#pragma once

#include <cstdint>

#include "chunked/chunk.h"
#include "core/bfloat16.h"
#include "core/isa.h"

namespace compressm {

using SsdRows = HeadRows;  // of heads or of groups

struct SsdInputs {
  std::int64_t heads, channels, groups, states, chunk;  // chunk: most steps of one
  bool softplus, scaled;
  float low, high;  // limits of a step
  SsdRows x, dt, B, C, z;
  const float *A, *D, *bias;  // (heads), (heads, channels) or null, (heads) or null; contiguous
  float* steps;               // (chunks, heads, step_floats): what `write` finds of the step sizes and all others read
};

struct SsdGradients {
  SsdRows out;                        // given
  SsdRows x, dt, B, C, z;             // written
  const float *states, *state_grads;  // (chunks, heads, N, pitch): the states in front of the chunks, dL/d those behind them
  float *A, *D, *bias;                // (chunks, heads), (chunks, heads, channels), (chunks, heads): each chunk's share
};

struct SsdKernels {
  std::int64_t width;

  // Floats of scratch that any of the following needs; aligned to 64 bytes.
  std::int64_t (*scratch)(const SsdInputs& in);

  // Floats of what is kept of the step sizes of a chunk and a head; a multiple of 16.
  std::int64_t (*step_floats)(const SsdInputs& in);

  // What the chunk adds to the states of the group's heads, and (chunks, heads) what is left of those in front of it.
  void (*write)(const SsdInputs& in, const Chunk& chunk, std::int64_t group, float* states, float* left, float* scratch);

  // Walks over `chunks` chunks, `pitch` floats from one to the next (negative: backwards), of `floats` numbers of a state: what
  // a chunk adds is replaced by the state in front of it, and `state` passes from the first to behind the last.
  void (*carry)(float* state, float* added, std::int64_t pitch, const float* left, std::int64_t left_pitch,
                std::int64_t chunks, std::int64_t floats);

  // From the `states` in front of all chunks; or from those of the group's heads alone, `carried` (heads, N, pitch), which then
  // become those behind the chunk, without `write`.
  void (*outputs)(const SsdInputs& in, const Chunk& chunk, std::int64_t group, const float* states, float* carried,
                  const SsdRows& out, float* scratch);

  // What the chunk's outputs add to the gradients of the states in front of it.
  void (*read)(const SsdInputs& in, const SsdRows& grad_out, const Chunk& chunk, std::int64_t group, float* state_grads,
               float* scratch);

  // All gradients of the chunk's inputs; with `carried`, the gradients of the group's states behind the chunk, which become
  // those in front of it, without `read` and grad.state_grads.
  void (*gradients)(const SsdInputs& in, const SsdGradients& grad, const Chunk& chunk, std::int64_t group, float* carried,
                    float* scratch);
};

COMPRESSM_KERNELS(SsdKernels, ssd_kernels)

}  // namespace compressm
