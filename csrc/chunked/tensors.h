// Tensors of floats as the kernels of ops that work in chunks read and write them.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "chunked/chunk.h"
#include "core/tensor.h"

namespace compressm {

inline void check(const Tensor& t, const char* name, at::IntArrayRef shape) {
  TORCH_CHECK(t.device().is_cpu() && t.scalar_type() == at::kFloat && t.sizes() == shape, name,
              ": expected a float32 CPU tensor of shape ", shape, ", got ", t.sizes(), " of ", t.scalar_type());
}

// The tensor, or a copy whose last axis is contiguous where the rows of `dims` axes are read as they lie.
inline Tensor readable(const Tensor& t, int64_t dims = 4) {
  return t.dim() < dims || t.stride(-1) == 1 ? t : t.contiguous();
}

// The kernels read what they do not write through the same kind of view.
inline HeadRows rows_of(const Tensor& t) {
  return {const_cast<float*>(t.const_data_ptr<float>()), t.stride(0), t.stride(1), t.stride(2)};
}

// A tensor that the kernels can write to, laid out as `t` where that is possible; empty for None.
inline Tensor like(const OptionalTensor& t) {
  if (!t) return at::empty({0}, at::kFloat);
  const Tensor found = at::empty_like(*t);
  return readable(found).is_same(found) ? found : at::empty(t->sizes(), t->options());
}

// The gradient in the layout of torch's empty_like.
inline Tensor as_like(const Tensor& grad, const OptionalTensor& t) {
  if (!t) return grad;
  const Tensor home = at::empty_like(*t);
  return home.strides() == grad.strides() ? grad : home.copy_(grad);
}

}  // namespace compressm
