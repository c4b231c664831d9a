// Cross-entropy of rows of scores: loss = log(sum_j exp(x_j)) - x_target.
//
// The kernels are compiled once per instruction set (cross_entropy_*.cpp include cross_entropy_kernels.inc under different
// target pragmas); the set is the one that isa() names.
#pragma once

#include <cstdint>

#include "core/bfloat16.h"
#include "core/isa.h"

namespace compressm {

// Dense rows of floats or BFloat16 and the class that each should be; a row whose target is `ignored` has no loss and no
// gradient.
template <typename Element>
struct Scores {
  const Element* values;  // (rows, classes)
  const std::int64_t* targets;
  std::int64_t rows, classes, ignored;
};

template <typename Element>
struct CrossEntropyRows {
  // losses (rows) and normalizers (rows, 2): the largest score m and log(sum_j exp(x_j - m)), apart, as their sum would be
  // rounded where m is large.  Targets are valid.
  void (*forward)(const Scores<Element>& scores, float* losses, float* normalizers);

  // grad_scores (rows, classes) from the gradient of the losses: a number every `pitch` (0 or 1) for a row.
  void (*backward)(const Scores<Element>& scores, const float* normalizers, const float* grad, std::int64_t pitch,
                   Element* grad_scores);
};

struct CrossEntropyKernels {
  CrossEntropyRows<float> floats;
  CrossEntropyRows<BFloat16> halves;
};

COMPRESSM_KERNELS(CrossEntropyKernels, cross_entropy_kernels)

}  // namespace compressm
