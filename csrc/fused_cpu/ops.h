// The parts of the LRU's residual block as functions of float32 tensors on the CPU.
#pragma once

#include <tuple>
#include <vector>

#include "core/tensor.h"

namespace compressm {

// A layer norm, or an RMS norm unless `centred`, of x (..., H) with weight and bias (H,).
Tensor norm_forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, double eps, bool centred);

// Gradients of (x, weight, bias); the last is empty unless `centred`.
std::tuple<Tensor, Tensor, Tensor> norm_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, double eps,
                                                 bool centred);

// dropout(gelu(x)); seed () int64, None for p = 0.
Tensor gelu(const Tensor& x, const OptionalTensor& seed, double p);
Tensor gelu_backward(const Tensor& grad, const Tensor& x, const OptionalTensor& seed, double p);

// residual (..., H) + dropout(a sigmoid(b)) of pre (..., 2H) = [a | b]; the gradient is that of pre.
Tensor glu(const Tensor& pre, const Tensor& residual, const OptionalTensor& seed, double p);
Tensor glu_backward(const Tensor& grad, const Tensor& pre, const OptionalTensor& seed, double p);

// glu of pre = x weight^T + bias for up to kNarrow (gates.h) inputs and channels; gradients of (x, weight, bias).
Tensor gated_linear(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& residual,
                    const OptionalTensor& seed, double p);
std::tuple<Tensor, Tensor, Tensor> gated_linear_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                         const Tensor& bias, const OptionalTensor& seed, double p);

// The LTI scan of an LRU's parameters: nu_log, theta_log, gamma_log (N,), B (N, H), C (H_out, N), D (H,).  Tables of tau steps
// are used where tau > 1.  Returns (y, last state, what the backward needs).
std::tuple<Tensor, Tensor, std::vector<Tensor>> lru_scan(const Tensor& x, const Tensor& nu_log, const Tensor& theta_log,
                                                         const Tensor& gamma_log, const Tensor& B_re, const Tensor& B_im,
                                                         const Tensor& C_re, const Tensor& C_im, const OptionalTensor& D,
                                                         const OptionalTensor& initial_state, int64_t tau, int64_t rows,
                                                         bool store);

// Of (x, nu_log, theta_log, gamma_log, B_re, B_im, C_re, C_im, D, initial_state); x's is empty unless need_x, D's without D.
using LruGradientTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

LruGradientTensors lru_scan_backward(const OptionalTensor& grad_y, const OptionalTensor& grad_last, const Tensor& x,
                                     const Tensor& gamma_log, const OptionalTensor& D, const OptionalTensor& initial_state,
                                     at::TensorList kept, int64_t tau, int64_t rows, bool store, bool need_x);

}  // namespace compressm
