// Sums of partial gradients that do not depend on the number of threads.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <vector>

namespace compressm {

// Sum over the first axis of (partials, ...), whose rows are dense, in order.
inline at::Tensor sum_partials(const at::Tensor& partials) {
  const std::int64_t count = partials.size(0), n = c10::multiply_integers(partials.sizes().slice(1));
  at::Tensor total = at::empty({n}, partials.options());
  const std::int64_t pitch = partials.stride(0);
  const float* in = partials.const_data_ptr<float>();
  float* out = total.data_ptr<float>();
  at::parallel_for(0, n, 4096, [&](std::int64_t begin, std::int64_t end) {
    std::vector<double> sums(end - begin, 0.0);
    for (std::int64_t p = 0; p < count; ++p) {
      for (std::int64_t j = begin; j < end; ++j) sums[j - begin] += in[p * pitch + j];
    }
    std::copy(sums.begin(), sums.end(), out + begin);
  });
  return total;
}

}  // namespace compressm
