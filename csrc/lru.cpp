// The operands of an LRU's scan from its parameters, and their adjoint:
//
//   lam_k = exp(-exp(nu_k) + i exp(theta_k)),   W_in = [exp(gamma) Re B; exp(gamma) Im B],   W_out = [Re C, -Im C].
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>

#include "autograd.h"
#include "checks.h"

namespace compressm {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kGrain = 16384;  // floats of a thread

// Calls body(row) for rows of `length` floats, on several threads where there are many.
template <typename Body>
void for_rows(int64_t rows, int64_t length, const Body& body) {
  at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, length)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) body(row);
  });
}

// Row `row` of a matrix.
const float* row_of(const Tensor& t, int64_t row) { return t.const_data_ptr<float>() + row * t.size(1); }
float* row_of(Tensor& t, int64_t row) { return t.data_ptr<float>() + row * t.size(1); }

// (log_decay (n), phase (n), w_in (2n, H), w_out (H_out, 2n)).
std::tuple<Tensor, Tensor, Tensor, Tensor> lru_operands(const Tensor& nu_log, const Tensor& theta_log,
                                                        const Tensor& gamma_log, const Tensor& B_re, const Tensor& B_im,
                                                        const Tensor& C_re, const Tensor& C_im) {
  TORCH_CHECK(B_re.dim() == 2 && C_re.dim() == 2, "expected B (N, H) and C (H_out, N)");
  const int64_t n = nu_log.numel(), channels = B_re.size(1), outputs = C_re.size(0);
  const Tensor nu = dense(nu_log, "nu_log", {n}), theta = dense(theta_log, "theta_log", {n});
  const Tensor gamma = dense(gamma_log, "gamma_log", {n});
  const Tensor b_re = dense(B_re, "B_re", {n, channels}), b_im = dense(B_im, "B_im", {n, channels});
  const Tensor c_re = dense(C_re, "C_re", {outputs, n}), c_im = dense(C_im, "C_im", {outputs, n});
  Tensor log_decay = at::empty({n}, nu.options()), phase = at::empty({n}, nu.options());
  Tensor w_in = at::empty({2 * n, channels}, nu.options()), w_out = at::empty({outputs, 2 * n}, nu.options());
  for (int64_t k = 0; k < n; ++k) {
    log_decay.data_ptr<float>()[k] = -std::exp(nu.const_data_ptr<float>()[k]);
    phase.data_ptr<float>()[k] = std::exp(theta.const_data_ptr<float>()[k]);
  }
  for_rows(n, 2 * channels, [&](int64_t k) {
    const float scale = std::exp(gamma.const_data_ptr<float>()[k]);
    const float *re = row_of(b_re, k), *im = row_of(b_im, k);
    float *to_re = row_of(w_in, k), *to_im = row_of(w_in, n + k);
    for (int64_t c = 0; c < channels; ++c) {
      to_re[c] = scale * re[c];
      to_im[c] = scale * im[c];
    }
  });
  for_rows(outputs, 2 * n, [&](int64_t o) {
    float* to = row_of(w_out, o);
    std::copy_n(row_of(c_re, o), n, to);
    std::transform(row_of(c_im, o), row_of(c_im, o) + n, to + n, [](float x) { return -x; });
  });
  return {log_decay, phase, w_in, w_out};
}

// Gradients of (nu_log, theta_log, gamma_log, B_re, B_im, C_re, C_im) from those of the operands, None for zero.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lru_operands_backward(
    const OptionalTensor& grad_log_decay, const OptionalTensor& grad_phase, const OptionalTensor& grad_w_in,
    const OptionalTensor& grad_w_out, const Tensor& gamma_log, const Tensor& log_decay, const Tensor& phase,
    const Tensor& w_in, const Tensor& w_out) {
  const int64_t n = gamma_log.numel(), channels = w_in.size(1), outputs = w_out.size(0);
  const auto options = w_in.options();
  const auto gradient = [&](const OptionalTensor& grad, const char* name, at::IntArrayRef shape) {
    return grad ? dense(*grad, name, shape) : at::zeros(shape, options);
  };
  const Tensor g_decay = gradient(grad_log_decay, "grad_log_decay", {n});
  const Tensor g_phase = gradient(grad_phase, "grad_phase", {n});
  const Tensor g_in = gradient(grad_w_in, "grad_w_in", {2 * n, channels});
  const Tensor g_out = gradient(grad_w_out, "grad_w_out", {outputs, 2 * n});
  const Tensor gamma = dense(gamma_log, "gamma_log", {n}), weight = dense(w_in, "w_in", {2 * n, channels});
  Tensor gamma_sums = at::empty({n}, options);
  Tensor b_re = at::empty({n, channels}, options), b_im = at::empty({n, channels}, options);
  Tensor c_re = at::empty({outputs, n}, options), c_im = at::empty({outputs, n}, options);
  for_rows(n, 2 * channels, [&](int64_t k) {
    const float scale = std::exp(gamma.const_data_ptr<float>()[k]);
    const float *g_re = row_of(g_in, k), *g_im = row_of(g_in, n + k);
    const float *w_re = row_of(weight, k), *w_im = row_of(weight, n + k);
    float *to_re = row_of(b_re, k), *to_im = row_of(b_im, k);
    double sum = 0;
    for (int64_t c = 0; c < channels; ++c) {
      to_re[c] = scale * g_re[c];
      to_im[c] = scale * g_im[c];
      sum += static_cast<double>(g_re[c]) * w_re[c] + static_cast<double>(g_im[c]) * w_im[c];
    }
    gamma_sums.data_ptr<float>()[k] = static_cast<float>(sum);
  });
  for_rows(outputs, 2 * n, [&](int64_t o) {
    const float* from = row_of(g_out, o);
    std::copy_n(from, n, row_of(c_re, o));
    std::transform(from + n, from + 2 * n, row_of(c_im, o), [](float x) { return -x; });
  });
  return {g_decay * log_decay, g_phase * phase, gamma_sums, b_re, b_im, c_re, c_im};
}

struct LruOperandsOp {
  static constexpr const char *name = "lru_operands", *passed = "";
};

TORCH_LIBRARY_FRAGMENT(compressm_cpp, m) {
  m.def("lru_operands(Tensor nu_log, Tensor theta_log, Tensor gamma_log, Tensor B_re, Tensor B_im, Tensor C_re, Tensor C_im)"
        " -> (Tensor log_decay, Tensor phase, Tensor w_in, Tensor w_out)",
        torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(lru_operands)));
  m.def("lru_operands_backward(Tensor? grad_log_decay, Tensor? grad_phase, Tensor? grad_w_in, Tensor? grad_w_out,"
        " Tensor gamma_log, Tensor log_decay, Tensor phase, Tensor w_in, Tensor w_out)"
        " -> (Tensor grad_nu_log, Tensor grad_theta_log, Tensor grad_gamma_log, Tensor grad_B_re, Tensor grad_B_im,"
        " Tensor grad_C_re, Tensor grad_C_im)",
        torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(lru_operands_backward)));
  register_gradient<LruOperandsOp>(m);
}

}  // namespace
}  // namespace compressm
