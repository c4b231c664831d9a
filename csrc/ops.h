// Ops that others are made of, as functions of tensors on the CPU.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <tuple>

namespace compressm {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The selective scan.  u, delta and z are float32 or bfloat16, all else is float32.  Returns (out, last state (sequences, D,
// N), checkpoints (tiles, N, D), output in front of the gate), the first and the last as u; the last two are empty unless
// train (and there is a gate).
std::tuple<Tensor, Tensor, Tensor, Tensor> selective_forward(
    const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C, const OptionalTensor& D,
    const OptionalTensor& z, const OptionalTensor& delta_bias, const OptionalTensor& initial_state,
    const OptionalTensor& cu_seqlens, bool softplus, bool train);

// Of (u, delta, A, B, C, D, z, delta_bias, initial_state); empty for an argument that is None.
using ScanGradientTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Its gradients; those of B and C are written to grad_B and grad_C.
ScanGradientTensors selective_backward(const Tensor& grad_out, const OptionalTensor& grad_last, const Tensor& u,
                                       const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
                                       const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& delta_bias,
                                       const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens,
                                       const Tensor& checkpoints, const Tensor& y, bool softplus, const Tensor& grad_B,
                                       const Tensor& grad_C);

// The causal convolution of x (batch, L, D) with weight (width, D), bias (D,) and state (batch, width - 1, D) in front.  x and
// state are float32 or bfloat16, weight and bias float32.
Tensor conv_channels(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& state, bool silu);

// Of x, weight, bias and state.
using ConvGradientTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;

ConvGradientTensors conv_channels_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& bias,
                                           const Tensor& state, bool silu);

}  // namespace compressm
