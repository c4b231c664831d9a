// The selective scan and its gradient as functions of tensors on the CPU.
#pragma once

#include <cstdint>
#include <tuple>

#include "core/tensor.h"

namespace compressm {

constexpr std::int64_t kScanParts = 16;  // tasks of a backward to aim for

// u, delta and z are float32 or bfloat16, all else is float32.  Returns (out, last state (sequences, D, N), checkpoints
// (tiles, N, D), output in front of the gate), the first and last as u; the last two are empty unless train (and with a gate).
std::tuple<Tensor, Tensor, Tensor, Tensor> selective_scan(const Tensor& u, const Tensor& delta, const Tensor& A,
                                                          const Tensor& B, const Tensor& C, const OptionalTensor& D,
                                                          const OptionalTensor& z, const OptionalTensor& delta_bias,
                                                          const OptionalTensor& initial_state,
                                                          const OptionalTensor& cu_seqlens, bool softplus, bool train);

// Of (u, delta, A, B, C, D, z, delta_bias, initial_state); empty for an argument that is None.
using ScanGradientTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

ScanGradientTensors selective_scan_gradients(const OptionalTensor& grad_out, const OptionalTensor& grad_last, const Tensor& u,
                                             const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
                                             const OptionalTensor& D, const OptionalTensor& z,
                                             const OptionalTensor& delta_bias, const OptionalTensor& initial_state,
                                             const OptionalTensor& cu_seqlens, const Tensor& checkpoints, const Tensor& y,
                                             bool softplus, std::int64_t parts);

}  // namespace compressm
