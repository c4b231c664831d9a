// Ops that others are made of, as functions of tensors on the CPU.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <tuple>
#include <vector>

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

// All that follows takes and returns float32.

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

// Complex numbers are planar: log_decay and phase (N,), w_in (2N, H) = [Re B; Im B], w_out (H_out, 2N) = [Re C, -Im C].

// The LTI scan of u (batch, L, H) from initial_state (batch, 2N), tiles of `rows`; shifted: the output sees h_{t-1}; feed (H,)
// or (H_out, H).  Returns y (batch, L, H_out), the last state and `saved`: every state if `store`, else one a tile.
std::tuple<Tensor, Tensor, Tensor> lti_core(const Tensor& u, const Tensor& log_decay, const Tensor& phase, const Tensor& w_in,
                                            const Tensor& w_out, const OptionalTensor& feed,
                                            const OptionalTensor& initial_state, bool shifted, bool store, int64_t rows);

// Of (u, log_decay, phase, w_in, w_out, feed, initial_state); u's is empty unless need_u, feed's without feed.
using CoreGradientTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

CoreGradientTensors lti_core_backward(const OptionalTensor& grad_y, const OptionalTensor& grad_last, const Tensor& u,
                                      const Tensor& log_decay, const Tensor& phase, const Tensor& w_in, const Tensor& w_out,
                                      const OptionalTensor& feed, const OptionalTensor& initial_state, const Tensor& saved,
                                      bool shifted, bool stored, int64_t rows, bool need_u);

// (log_decay, phase, w_in (2N, tau H), w_out (tau H_out, 2N), feed (tau H_out, tau H)) of the system of tau steps at a time.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lti_tables(const Tensor& log_decay, const Tensor& phase,
                                                              const Tensor& w_in, const Tensor& w_out,
                                                              const OptionalTensor& D, int64_t tau);

// Gradients of (log_decay, phase, w_in, w_out, D) from the tables', None for zero; `blocked_out` is the table w_out.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lti_tables_backward(
    const OptionalTensor& grad_blocked_decay, const OptionalTensor& grad_blocked_phase,
    const OptionalTensor& grad_blocked_in, const OptionalTensor& grad_blocked_out, const OptionalTensor& grad_blocked_feed,
    const Tensor& log_decay, const Tensor& phase, const Tensor& w_in, const Tensor& w_out, const Tensor& blocked_out,
    int64_t tau);

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
