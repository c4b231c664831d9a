// Linear attention whose key channels decay each at its own rate, on CPU: S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T and
// out_t = scale S_t^T q_t, per head, S (K, V).  Where all channels of a head decay alike, it is the scan of csrc/ssd.
//
// Products of matrices over chunks of steps would cost as many operations as the recurrence itself, and an exponential for
// every pair of blocks of steps besides.  So a tile of the state stays in registers and walks over a block of steps; nothing is
// ever divided by a decay, and there are no states between chunks.  The gradients are such walks: of v backwards, with tiles
// whose lanes are values; of k backwards and of q forwards, with tiles whose lanes are keys.  The log decay of a step gets what
// flows past it, of what was written in front of it and is read at it or behind.
//
// Tasks are a sequence, a head and a strip of lanes; no two write to one place, so that the number of threads changes no bit of
// a result.  The kernels are compiled once per instruction set; the set is the one that isa() names.
#pragma once

#include <cstdint>

#include "chunked/chunk.h"
#include "core/isa.h"

namespace compressm {

// Tensors are dense: q and k (batch, length, groups, keys), v (batch, length, heads, values), g (batch, length, heads, keys).
struct AttentionInputs {
  std::int64_t length, groups, heads, keys, values, block;  // block: most steps of a chunk
  float scale;
  const float *q, *k, *v, *g;
};

struct AttentionGradients {
  const float *out, *last, *initial;  // given; of the sequence (heads, keys, values) or null
  float *q, *k, *g, *to_initial;      // written
};

// The chunks of a sequence.
struct ChunkRange {
  const Chunk* first;
  std::int64_t count;
};

struct AttentionKernels {
  std::int64_t strip;  // most lanes of a task

  // Floats of scratch that any of the following needs; aligned to 64 bytes.
  std::int64_t (*scratch)(const AttentionInputs& in);

  // A strip of a head's values: `made` (batch, length, heads, values) gets the outputs, of `given` v, or backwards the gradients
  // of v, of `given` those of the outputs.  States (heads, keys, values) or null: `from` in front of the walk, `to` behind it.
  void (*values)(const AttentionInputs& in, const ChunkRange& chunks, std::int64_t head, std::int64_t strip, const float* from,
                 float* to, const float* given, float* made, bool backwards, float* scratch);

  // A strip of the keys of a group of heads: the gradients of q, k, g and of the states in front of the sequence.
  void (*keys)(const AttentionInputs& in, const ChunkRange& chunks, std::int64_t group, std::int64_t strip,
               const AttentionGradients& grad, float* scratch);
};

COMPRESSM_KERNELS(AttentionKernels, attention_kernels)

}  // namespace compressm
