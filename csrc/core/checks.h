// What the kernels ask of tensors.
#pragma once

#include <ATen/core/Tensor.h>

namespace compressm {

// The tensor, contiguous; copied if it has to be.
inline at::Tensor dense(const at::Tensor& t, const char* name, at::IntArrayRef shape, at::ScalarType type = at::kFloat) {
  TORCH_CHECK(t.device().is_cpu() && t.scalar_type() == type && t.sizes() == shape, name, ": expected a CPU tensor of ", type,
              " of shape ", shape);
  return t.contiguous();
}

}  // namespace compressm
