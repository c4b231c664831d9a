// The residual block of the LRU paper, (batch, L, H) -> (batch, L, H), as one op; all float32.
//
//   n = norm(x);  s = LRU(n);  g = dropout(gelu(s));  [a | b] = g W^T + bias;  out = x + dropout(a sigmoid(b))
//
// It is made of the ops in ops.h; nothing of autograd, dispatch or Python runs between them.
#include "core/torch.h"

#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>

#include <optional>
#include <tuple>
#include <vector>

#include "core/autograd.h"
#include "fused_cpu/gates.h"
#include "fused_cpu/ops.h"

namespace compressm {
namespace {

// The linear layer and its gate: one pass where it is narrow, else torch's product in front of the gate.
struct Gate {
  Tensor weight, bias;
  bool narrow;

  Gate(const Tensor& matrix, const OptionalTensor& offset)
      : weight(matrix), bias(offset ? *offset : at::zeros({matrix.size(0)}, matrix.options())) {
    TORCH_CHECK(weight.dim() == 2, "glu_weight: expected (2H, K)");
    narrow = weight.size(0) / 2 <= kNarrow && weight.size(1) <= kNarrow;
  }
  Tensor product(const Tensor& g) const { return at::linear(g, weight, bias); }
};

// (out, what the backward needs: n, s, g, the product where it is not narrow, and what the scan keeps).
std::tuple<Tensor, std::vector<Tensor>> lru_block(
    const Tensor& x, const Tensor& norm_weight, const OptionalTensor& norm_bias, const Tensor& nu_log,
    const Tensor& theta_log, const Tensor& gamma_log, const Tensor& B_re, const Tensor& B_im, const Tensor& C_re,
    const Tensor& C_im, const Tensor& D, const Tensor& glu_weight, const OptionalTensor& glu_bias,
    const OptionalTensor& gelu_seed, const OptionalTensor& glu_seed, double eps, double p, int64_t tau, int64_t rows,
    bool store) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCPU);
  const Gate gate(glu_weight, glu_bias);
  const Tensor n = norm_forward(x, norm_weight, norm_bias, eps, true);
  const auto [s, last, scan] =
      lru_scan(n, nu_log, theta_log, gamma_log, B_re, B_im, C_re, C_im, D, std::nullopt, tau, rows, store);
  const Tensor g = gelu(s, gelu_seed, p), pre = gate.narrow ? Tensor() : gate.product(g);
  const Tensor out = gate.narrow ? gated_linear(g, gate.weight, gate.bias, x, glu_seed, p) : glu(pre, x, glu_seed, p);
  std::vector<Tensor> kept{n, s, g, pre};
  kept.insert(kept.end(), scan.begin(), scan.end());
  return {out, kept};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                             Tensor>;

Gradients lru_block_backward(const Tensor& grad_out, const Tensor& x, const Tensor& norm_weight, const Tensor& gamma_log,
                             const Tensor& D, const Tensor& glu_weight, const OptionalTensor& glu_bias,
                             const OptionalTensor& gelu_seed, const OptionalTensor& glu_seed, at::TensorList kept, double eps,
                             double p, int64_t tau, int64_t rows, bool store) {
  TORCH_CHECK(kept.size() > 4, "kept: expected what lru_block returns");
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCPU);
  const Tensor &n = kept[0], &s = kept[1], &g = kept[2], &pre = kept[3];
  const Gate gate(glu_weight, glu_bias);
  Tensor to_g, weight, bias;
  if (gate.narrow) {
    std::tie(to_g, weight, bias) = gated_linear_backward(grad_out, g, gate.weight, gate.bias, glu_seed, p);
  } else {
    const Tensor to_pre = glu_backward(grad_out, pre, glu_seed, p).view({-1, gate.weight.size(0)});
    to_g = at::mm(to_pre, gate.weight).view(g.sizes());
    weight = at::mm(to_pre.t(), g.view({-1, g.size(-1)})), bias = to_pre.sum(0);
  }
  const auto [to_n, nu, theta, gamma, b_re, b_im, c_re, c_im, skip, start] =
      lru_scan_backward(gelu_backward(to_g, s, gelu_seed, p), std::nullopt, n, gamma_log, D, std::nullopt, kept.slice(4), tau,
                        rows, store, true);
  const auto [to_x, scale, shift] = norm_backward(to_n, x, norm_weight, eps, true);
  return {to_x.add_(grad_out), scale, shift, nu, theta, gamma, b_re, b_im, c_re, c_im, skip, weight, bias};
}

TORCH_LIBRARY_FRAGMENT(compressm_cpp, m) {
  m.def("lru_block(Tensor x, Tensor norm_weight, Tensor? norm_bias, Tensor nu_log, Tensor theta_log, Tensor gamma_log,"
        " Tensor B_re, Tensor B_im, Tensor C_re, Tensor C_im, Tensor D, Tensor glu_weight, Tensor? glu_bias,"
        " Tensor? gelu_seed, Tensor? glu_seed, float eps, float p, int tau, int rows, bool store)"
        " -> (Tensor out, Tensor[] kept)",
        torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(lru_block)));
  m.def("lru_block_backward(Tensor grad_out, Tensor x, Tensor norm_weight, Tensor gamma_log, Tensor D, Tensor glu_weight,"
        " Tensor? glu_bias, Tensor? gelu_seed, Tensor? glu_seed, Tensor[] kept, float eps, float p, int tau, int rows,"
        " bool store) -> (Tensor grad_x, Tensor grad_norm_weight, Tensor grad_norm_bias, Tensor grad_nu_log,"
        " Tensor grad_theta_log, Tensor grad_gamma_log, Tensor grad_B_re, Tensor grad_B_im, Tensor grad_C_re,"
        " Tensor grad_C_im, Tensor grad_D, Tensor grad_glu_weight, Tensor grad_glu_bias)",
        torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(lru_block_backward)));
  register_gradient(m, "lru_block");
}

}  // namespace
}  // namespace compressm
