// The LTI scan and its tables as functions of float32 tensors on the CPU.
#pragma once

#include <tuple>

#include "core/tensor.h"

namespace compressm {

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

}  // namespace compressm
