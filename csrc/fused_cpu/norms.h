// Layer and RMS normalisation of dense rows of floats: out = (x - mean) / sqrt(variance + eps) * weight + bias.
//
// With `centred`, mean and variance are the row's; without, the mean counts as 0 and the variance is the mean square.
// Narrow rows are taken several at a time, a row to a lane; of a wide row each channel is a lane.  The kernels are compiled
// once per instruction set (norms_*.cpp include norms_kernels.inc under different target pragmas); the set is the one that
// isa() names.
#pragma once

#include <cstdint>

#include "core/isa.h"

namespace compressm {

struct Norm {
  const float *weight, *bias;  // (length)
  std::int64_t length;         // of a row
  float eps;
  bool centred;
};

struct NormKernels {
  // x, out (rows, length).
  void (*forward)(const Norm& norm, const float* x, float* out, std::int64_t rows);

  // Adds the sums over the rows of (x - mean) / sqrt(variance + eps) to sums (length).
  void (*add_rows)(const Norm& norm, const float* x, float* sums, std::int64_t rows);

  // The adjoint of forward; grad: dL/dout, a row every `pitch` floats, which is 0 where all rows have the same.  grad_x (rows,
  // length) is written; the sums over these rows are added to grad_weight (length) and, with `centred`, grad_bias (length).
  void (*backward)(const Norm& norm, const float* x, const float* grad, std::int64_t pitch, float* grad_x,
                   float* grad_weight, float* grad_bias, std::int64_t rows);
};

COMPRESSM_KERNELS(NormKernels, norm_kernels)

}  // namespace compressm
