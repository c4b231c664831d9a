// Planar complex diagonal scans over rows of floats.
//
// A row holds n complex numbers as [re_0 .. re_{n-1} | im_0 .. im_{n-1}].  The kernels are compiled once per instruction
// set (diagonal_scan_*.cpp include diagonal_scan_kernels.inc under different target pragmas); the set is the one that isa()
// names.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/isa.h"

namespace compressm {

// h_t = lam h_{t-1} + x_t over `steps` rows.  Row t of x and h starts at t * stride floats (negative stride: backwards).
// carry (2n) holds h_{-1} on entry and the last state on return.  shifted: row t receives h_{t-1} instead of h_t.
// x and h may be the same memory.
using ScanFn = void (*)(const float* x, float* h, std::ptrdiff_t stride, std::int64_t steps, std::int64_t n,
                        const float* lam_re, const float* lam_im, float* carry, bool shifted);

// Adjoint of ScanFn.  Rows are given in forward order and walked from the last to the first.  On entry row t of `g` holds
// dL/d(row t of h); on return it holds dL/dx_t.  carry (2n): dL/d(last state) on entry, dL/dh_{-1} on return.
// h: the forward's output rows, h_before: the state in front of the first row (both as the forward left them).
// grad_log_decay, grad_phase (n): sum over t of Re(conj(g_t) lam h_{t-1}) and Re(conj(g_t) i lam h_{t-1}) is added.
using AdjointFn = void (*)(float* g, const float* h, const float* h_before, std::ptrdiff_t stride, std::int64_t steps,
                           std::int64_t n, const float* lam_re, const float* lam_im, float* carry, double* grad_log_decay,
                           double* grad_phase, bool shifted);

struct ScanKernels {
  ScanFn scan;
  AdjointFn adjoint;
};

COMPRESSM_KERNELS(ScanKernels, scan_kernels)

}  // namespace compressm
