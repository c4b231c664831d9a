// The tables of the tau-blocked LTI scan (compressm/kernels/lti_scan/block.py has the formulas) and their adjoint.
//
// All complex numbers are planar.  response[j] = [Re(C lam^j), -Im(C lam^j)] is (H_out, 2n) for j = 0 .. tau; its first
// block is w_out, the others are the blocked w_out.
#include "core/torch.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "core/autograd.h"
#include "core/checks.h"
#include "lti_scan/lti_scan.h"

namespace compressm {
namespace {

using NoAutocast = c10::impl::ExcludeDispatchKeyGuard;  // which would round the small products

// lam^j for j = 0 .. tau, (tau + 1, n), formed in double.
struct Powers {
  std::vector<float> re, im;
  Powers(const Tensor& log_decay, const Tensor& phase, int64_t tau) {
    const int64_t n = log_decay.numel();
    const float *decay = log_decay.const_data_ptr<float>(), *angle = phase.const_data_ptr<float>();
    re.resize((tau + 1) * n);
    im.resize((tau + 1) * n);
    for (int64_t j = 0; j <= tau; ++j) {
      for (int64_t k = 0; k < n; ++k) {
        const double modulus = std::exp(j * static_cast<double>(decay[k])), turn = j * static_cast<double>(angle[k]);
        re[j * n + k] = static_cast<float>(modulus * std::cos(turn));
        im[j * n + k] = static_cast<float>(modulus * std::sin(turn));
      }
    }
  }
};

struct Sizes {
  int64_t n, channels, outputs, tau;
};

// The system whose tables are made, contiguous.
struct System {
  Sizes sizes;
  Tensor log_decay, phase, w_in, w_out;
  System(const Tensor& decay, const Tensor& angle, const Tensor& in, const Tensor& out, int64_t tau) {
    TORCH_CHECK(tau > 0, "tau: expected a positive number, got ", tau);
    TORCH_CHECK(in.dim() == 2 && out.dim() == 2, "expected w_in (2N, H) and w_out (H_out, 2N)");
    sizes = {decay.numel(), in.size(1), out.size(0), tau};
    log_decay = dense(decay, "log_decay", {sizes.n});
    phase = dense(angle, "phase", {sizes.n});
    w_in = dense(in, "w_in", {2 * sizes.n, sizes.channels});
    w_out = dense(out, "w_out", {sizes.outputs, 2 * sizes.n});
  }
};

// [lam^(tau-1) B, ..., lam B, B] of B (n, H): (2n, tau H).
Tensor blocked_inputs(const Powers& p, const Tensor& w_in, const Sizes& s) {
  Tensor table = at::empty({2 * s.n, s.tau * s.channels}, w_in.options());
  const float *b_re = w_in.const_data_ptr<float>(), *b_im = b_re + s.n * s.channels;
  float *re = table.data_ptr<float>(), *im = re + s.n * s.tau * s.channels;
  for (int64_t k = 0; k < s.n; ++k) {
    for (int64_t i = 0; i < s.tau; ++i) {
      const float q_re = p.re[(s.tau - 1 - i) * s.n + k], q_im = p.im[(s.tau - 1 - i) * s.n + k];
      const int64_t to = (k * s.tau + i) * s.channels, from = k * s.channels;
      for (int64_t c = 0; c < s.channels; ++c) {
        re[to + c] = q_re * b_re[from + c] - q_im * b_im[from + c];
        im[to + c] = q_re * b_im[from + c] + q_im * b_re[from + c];
      }
    }
  }
  return table;
}

// response[1 .. tau] of w_out (H_out, 2n): (tau H_out, 2n).
Tensor blocked_outputs(const Powers& p, const Tensor& w_out, const Sizes& s) {
  Tensor table = at::empty({s.tau * s.outputs, 2 * s.n}, w_out.options());
  for (int64_t j = 1; j <= s.tau; ++j) {
    const float *p_re = &p.re[j * s.n], *p_im = &p.im[j * s.n];
    for (int64_t o = 0; o < s.outputs; ++o) {
      const float *c_re = w_out.const_data_ptr<float>() + o * 2 * s.n, *c_im = c_re + s.n;
      float *re = table.data_ptr<float>() + ((j - 1) * s.outputs + o) * 2 * s.n, *im = re + s.n;
      for (int64_t k = 0; k < s.n; ++k) {
        re[k] = c_re[k] * p_re[k] + c_im[k] * p_im[k];
        im[k] = c_im[k] * p_re[k] - c_re[k] * p_im[k];
      }
    }
  }
  return table;
}

// response[0 .. tau - 1] as one matrix (tau H_out, 2n).
Tensor first_responses(const Tensor& w_out, const Tensor& table_out, const Sizes& s) {
  return at::cat({w_out, table_out.narrow(0, 0, (s.tau - 1) * s.outputs)});
}

// Calls body(row in the impulse response, first float in the Toeplitz matrix) for every row of H floats of its lower blocks.
template <typename Body>
void for_lower_rows(const Sizes& s, const Body& body) {
  for (int64_t i = 0; i < s.tau; ++i) {
    for (int64_t o = 0; o < s.outputs; ++o) {
      for (int64_t k = 0; k <= i; ++k) {
        body((i - k) * s.outputs + o, ((i * s.outputs + o) * s.tau + k) * s.channels);
      }
    }
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lti_tables(const Tensor& log_decay, const Tensor& phase,
                                                              const Tensor& w_in, const Tensor& w_out,
                                                              const OptionalTensor& D, int64_t tau) {
  const NoAutocast guard(c10::DispatchKey::AutocastCPU);
  const System system(log_decay, phase, w_in, w_out, tau);
  const Sizes& s = system.sizes;
  const Powers p(system.log_decay, system.phase, tau);
  const Tensor table_in = blocked_inputs(p, system.w_in, s), table_out = blocked_outputs(p, system.w_out, s);
  const Tensor impulse = at::mm(first_responses(system.w_out, table_out, s), system.w_in);  // (tau H_out, H)
  if (D) {
    TORCH_CHECK(s.outputs == s.channels, "D: expected as many outputs as inputs");
    impulse.narrow(0, 0, s.outputs).diagonal().add_(dense(*D, "D", {s.channels}));
  }
  Tensor feed = at::zeros({s.tau * s.outputs, s.tau * s.channels}, w_in.options());
  const float* from = impulse.const_data_ptr<float>();
  float* to = feed.data_ptr<float>();
  for_lower_rows(s, [&](int64_t row, int64_t at) { std::copy_n(from + row * s.channels, s.channels, to + at); });
  return {system.log_decay * tau, system.phase * tau, table_in, table_out, feed};
}

namespace {

// Adds the adjoint of blocked_inputs to grad_in (2n, H) and to the powers' gradients (tau + 1, n).
void add_input_adjoint(const Powers& p, const Tensor& w_in, const Tensor& grad_table, Tensor& grad_in,
                       std::vector<float>& power_re, std::vector<float>& power_im, const Sizes& s) {
  const float *b_re = w_in.const_data_ptr<float>(), *b_im = b_re + s.n * s.channels;
  const float *g_re = grad_table.const_data_ptr<float>(), *g_im = g_re + s.n * s.tau * s.channels;
  float *grad_re = grad_in.data_ptr<float>(), *grad_im = grad_re + s.n * s.channels;
  for (int64_t k = 0; k < s.n; ++k) {
    for (int64_t i = 0; i < s.tau; ++i) {
      const int64_t power = (s.tau - 1 - i) * s.n + k, at = (k * s.tau + i) * s.channels, own = k * s.channels;
      const float q_re = p.re[power], q_im = p.im[power];
      float sum_re = 0, sum_im = 0;
      for (int64_t c = 0; c < s.channels; ++c) {
        grad_re[own + c] += q_re * g_re[at + c] + q_im * g_im[at + c];
        grad_im[own + c] += q_re * g_im[at + c] - q_im * g_re[at + c];
        sum_re += g_re[at + c] * b_re[own + c] + g_im[at + c] * b_im[own + c];
        sum_im += g_im[at + c] * b_re[own + c] - g_re[at + c] * b_im[own + c];
      }
      power_re[power] += sum_re;
      power_im[power] += sum_im;
    }
  }
}

// Adds the adjoint of response[j] = [Re(C lam^j), -Im(C lam^j)], j = 1 .. tau, to grad_out (H_out, 2n) and the powers'.
void add_output_adjoint(const Powers& p, const Tensor& w_out, const Tensor& grad_table, Tensor& grad_out,
                        std::vector<float>& power_re, std::vector<float>& power_im, const Sizes& s) {
  for (int64_t j = 1; j <= s.tau; ++j) {
    const float *p_re = &p.re[j * s.n], *p_im = &p.im[j * s.n];
    float *sum_re = &power_re[j * s.n], *sum_im = &power_im[j * s.n];
    for (int64_t o = 0; o < s.outputs; ++o) {
      const float *c_re = w_out.const_data_ptr<float>() + o * 2 * s.n, *c_im = c_re + s.n;
      const float *g_re = grad_table.const_data_ptr<float>() + ((j - 1) * s.outputs + o) * 2 * s.n, *g_im = g_re + s.n;
      float *grad_re = grad_out.data_ptr<float>() + o * 2 * s.n, *grad_im = grad_re + s.n;
      for (int64_t k = 0; k < s.n; ++k) {
        grad_re[k] += g_re[k] * p_re[k] - g_im[k] * p_im[k];
        grad_im[k] += g_re[k] * p_im[k] + g_im[k] * p_re[k];
        sum_re[k] += g_re[k] * c_re[k] + g_im[k] * c_im[k];
        sum_im[k] += g_re[k] * c_im[k] - g_im[k] * c_re[k];
      }
    }
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lti_tables_backward(
    const OptionalTensor& grad_blocked_decay, const OptionalTensor& grad_blocked_phase,
    const OptionalTensor& grad_blocked_in, const OptionalTensor& grad_blocked_out, const OptionalTensor& grad_blocked_feed,
    const Tensor& log_decay, const Tensor& phase, const Tensor& w_in, const Tensor& w_out, const Tensor& blocked_out,
    int64_t tau) {
  const NoAutocast guard(c10::DispatchKey::AutocastCPU);
  const System system(log_decay, phase, w_in, w_out, tau);
  const Sizes& s = system.sizes;
  const Powers p(system.log_decay, system.phase, tau);
  const auto gradient = [&](const OptionalTensor& grad, const char* name, at::IntArrayRef shape) {
    return grad ? dense(*grad, name, shape) : at::zeros(shape, w_in.options());
  };
  const Tensor table_decay = gradient(grad_blocked_decay, "grad_blocked_decay", {s.n});
  const Tensor table_phase = gradient(grad_blocked_phase, "grad_blocked_phase", {s.n});
  const Tensor grad_table_in = gradient(grad_blocked_in, "grad_blocked_in", {2 * s.n, tau * s.channels});
  const Tensor grad_table_out = gradient(grad_blocked_out, "grad_blocked_out", {tau * s.outputs, 2 * s.n});
  const Tensor grad_feed = gradient(grad_blocked_feed, "grad_blocked_feed", {tau * s.outputs, tau * s.channels});
  const Tensor table_out = dense(blocked_out, "blocked_out", {tau * s.outputs, 2 * s.n});
  Tensor grad_impulse = at::zeros({tau * s.outputs, s.channels}, w_in.options());
  const float* feed = grad_feed.const_data_ptr<float>();
  float* impulse = grad_impulse.data_ptr<float>();
  for_lower_rows(s, [&](int64_t row, int64_t at) {
    for (int64_t c = 0; c < s.channels; ++c) impulse[row * s.channels + c] += feed[at + c];
  });
  const Tensor grad_response = at::mm(grad_impulse, system.w_in.t());  // of response[0 .. tau - 1]
  Tensor grad_in = at::mm(first_responses(system.w_out, table_out, s).t(), grad_impulse).contiguous();
  Tensor grad_out = grad_response.narrow(0, 0, s.outputs).clone(), grad_table = grad_table_out.clone();
  grad_table.narrow(0, 0, (tau - 1) * s.outputs).add_(grad_response.narrow(0, s.outputs, (tau - 1) * s.outputs));
  std::vector<float> power_re((tau + 1) * s.n, 0.0f), power_im((tau + 1) * s.n, 0.0f);
  add_input_adjoint(p, system.w_in, grad_table_in, grad_in, power_re, power_im, s);
  add_output_adjoint(p, system.w_out, grad_table, grad_out, power_re, power_im, s);
  Tensor grad_decay = table_decay * tau, grad_phase = table_phase * tau;
  for (int64_t k = 0; k < s.n; ++k) {
    double decay = 0, angle = 0;
    for (int64_t j = 1; j <= tau; ++j) {
      const int64_t at = j * s.n + k;
      const double g_re = power_re[at], g_im = power_im[at], re = p.re[at], im = p.im[at];
      decay += j * (g_re * re + g_im * im);
      angle += j * (g_im * re - g_re * im);
    }
    grad_decay.data_ptr<float>()[k] += static_cast<float>(decay);
    grad_phase.data_ptr<float>()[k] += static_cast<float>(angle);
  }
  const Tensor first = grad_impulse.narrow(0, 0, s.outputs);
  return {grad_decay, grad_phase, grad_in, grad_out,
          s.outputs == s.channels ? first.diagonal().clone() : at::empty({0}, w_in.options())};
}

namespace {

TORCH_LIBRARY_FRAGMENT(compressm_cpp, m) {
  m.def("lti_tables(Tensor log_decay, Tensor phase, Tensor w_in, Tensor w_out, Tensor? D, int tau)"
        " -> (Tensor blocked_decay, Tensor blocked_phase, Tensor blocked_in, Tensor blocked_out, Tensor blocked_feed)",
        torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(lti_tables)));
  m.def("lti_tables_backward(Tensor? grad_blocked_decay, Tensor? grad_blocked_phase, Tensor? grad_blocked_in,"
        " Tensor? grad_blocked_out, Tensor? grad_blocked_feed, Tensor log_decay, Tensor phase, Tensor w_in, Tensor w_out,"
        " Tensor blocked_out, int tau)"
        " -> (Tensor grad_log_decay, Tensor grad_phase, Tensor grad_w_in, Tensor grad_w_out, Tensor grad_D)",
        torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(lti_tables_backward)));
  register_gradient(m, "lti_tables");
}

}  // namespace
}  // namespace compressm
