// Short depthwise causal convolutions, fused with bias and SiLU, in two memory layouts.
//
// The kernels are compiled once per instruction set (causal_conv1d_*.cpp include causal_conv1d_kernels.inc under different
// target pragmas); the set is the one that isa() names.
#pragma once

#include <cstdint>

#include "core/bfloat16.h"
#include "core/isa.h"

namespace compressm {

constexpr int kMaxConvWidth = 8;

// Tap k of channel c is weight[k * tap_stride + c].
struct ConvFilter {
  const float* weight;
  std::int64_t tap_stride;
  const float* bias;
  int width;
  bool silu;
};

// For rows of channels, of floats or BFloat16.
template <typename Element>
struct ConvRowKernels {
  // out[r] = act(sum_k w_k x[r + k] + b) for `rows` rows of `channels` elements.  x holds rows + width - 1 rows, the oldest
  // first.
  void (*forward)(const ConvFilter& filter, const Element* const* x, Element* const* out, std::int64_t rows,
                  std::int64_t channels);

  // Its adjoint, walking with time.  grad[r]: dL/d out[r].  pending (width - 1, channels): gradients of the inputs x[0..]
  // that later rows still add to; the finished one of row r goes to grad_x[r].  grad_weight (width + 1, grad_stride): the
  // rows' share of the gradients of the taps and, last, of the bias is added; null leaves it out.
  void (*backward)(const ConvFilter& filter, const Element* const* x, const Element* const* grad, Element* const* grad_x,
                   std::int64_t rows, std::int64_t channels, float* pending, float* grad_weight,
                   std::int64_t grad_stride);
};

struct ConvKernels {
  ConvRowKernels<float> floats;
  ConvRowKernels<BFloat16> halves;

  // One channel's row of steps: out[t] = act(sum_k w_k x[t + k] + b) for `count` steps, a multiple of 16.
  void (*forward_steps)(const ConvFilter& filter, const float* x, float* out, std::int64_t count);

  // Its adjoint: d[t] = dL/d(sum at t) for `count` steps (a multiple of 16, at least own + width - 1); grad_x[t] =
  // sum_k w_k d[t + width - 1 - k] for the first `own` steps, rounded up to 16; grad_weight (width + 1): the sums over the
  // first `own` steps for taps and bias.
  void (*backward_steps)(const ConvFilter& filter, const float* x, const float* grad, float* d, float* grad_x,
                         std::int64_t count, std::int64_t own, float* grad_weight);
};

COMPRESSM_KERNELS(ConvKernels, conv_kernels)

}  // namespace compressm
