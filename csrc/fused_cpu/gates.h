// Dropout behind GELU, and behind a gated linear unit with the residual added: one pass each, forward and backward; the
// latter also with the linear layer in front of it where that is narrow.
//
// A mask is a function of the seed and of the element's index: neither stored nor dependent on threads or vector width.
// Elements come in blocks of kMaskBlock = 64.  Counter 16 b + l of Threefry-2x32 with 13 rounds (Salmon, Moraes, Dror and
// Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011; the fewest rounds that pass BigCrush) under the seed as key
// gives two words, hence four halves, low before high; half h decides about element 64 b + 16 h + l.
//
// The kernels are compiled once per instruction set (gates_*.cpp include gates_kernels.inc under different target pragmas);
// the set is the one that isa() names.
#pragma once

#include <cstdint>

#include "core/isa.h"

namespace compressm {

constexpr std::int64_t kMaskBlock = 64;
constexpr std::int64_t kNarrow = 8;  // most channels of a GatedLinear

// An element is kept where its 16 bits are not below threshold, and multiplied by scale; threshold 0 draws no bits.
struct Dropout {
  std::uint64_t seed;
  std::int32_t threshold;
  float scale;
};

// The linear layer in front of a gate, inputs and channels at most kNarrow each: x W^T + bias = [a | b].
struct GatedLinear {
  const float *weight, *bias;      // (2 channels, inputs), (2 channels)
  std::int64_t inputs, channels;
};

struct GateKernels {
  // out = dropout(gelu(x)) for the elements [begin, end); begin is a multiple of kMaskBlock, here and below.
  void (*gelu)(const float* x, float* out, std::int64_t begin, std::int64_t end, const Dropout& dropout);

  // Its adjoint.
  void (*gelu_backward)(const float* grad, const float* x, float* grad_x, std::int64_t begin, std::int64_t end,
                        const Dropout& dropout);

  // out = residual + dropout(a sigmoid(b)) for the elements [begin, end) of out; row r of pre is [a_r | b_r], of H each.
  void (*glu)(const float* pre, const float* residual, float* out, std::int64_t channels, std::int64_t begin,
              std::int64_t end, const Dropout& dropout);

  // Its adjoint for pre.
  void (*glu_backward)(const float* grad, const float* pre, float* grad_pre, std::int64_t channels, std::int64_t begin,
                       std::int64_t end, const Dropout& dropout);

  // out = residual + dropout(a sigmoid(b)) for the rows [begin, end) of x (rows, inputs), residual and out (rows, channels).
  void (*gated_linear)(const GatedLinear& layer, const float* x, const float* residual, float* out, std::int64_t begin,
                       std::int64_t end, const Dropout& dropout);

  // Its adjoint for x, and for weight and bias the sums over these rows, which are written.
  void (*gated_linear_backward)(const GatedLinear& layer, const float* grad, const float* x, float* grad_x,
                                float* grad_weight, float* grad_bias, std::int64_t begin, std::int64_t end,
                                const Dropout& dropout);
};

COMPRESSM_KERNELS(GateKernels, gate_kernels)

}  // namespace compressm
