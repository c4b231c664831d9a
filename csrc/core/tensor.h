// The names of tensors.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace compressm {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

}  // namespace compressm
