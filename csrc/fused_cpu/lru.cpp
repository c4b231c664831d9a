// The LTI scan of an LRU's parameters as one op.  Its operands are
//
//   lam_k = exp(-exp(nu_k) + i exp(theta_k)),   W_in = [exp(gamma) Re B; exp(gamma) Im B],   W_out = [Re C, -Im C].
#include "core/torch.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "core/autograd.h"
#include "core/checks.h"
#include "fused_cpu/ops.h"
#include "lti_scan/lti_scan.h"

namespace compressm {
namespace {

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

// Gradients of (nu_log, theta_log, gamma_log, B_re, B_im, C_re, C_im) from those of the operands.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lru_operands_backward(
    const Tensor& g_decay, const Tensor& g_phase, const Tensor& g_in, const Tensor& g_out, const Tensor& gamma_log,
    const Tensor& log_decay, const Tensor& phase, const Tensor& w_in) {
  const int64_t n = gamma_log.numel(), channels = w_in.size(1), outputs = g_out.size(0);
  const auto options = w_in.options();
  const Tensor gamma = dense(gamma_log, "gamma_log", {n});
  TORCH_CHECK(log_decay.numel() == n && phase.numel() == n && w_in.size(0) == 2 * n && g_out.size(1) == 2 * n,
              "gamma_log: expected as many states as lru_scan had, got ", n);
  Tensor gamma_sums = at::empty({n}, options);
  Tensor b_re = at::empty({n, channels}, options), b_im = at::empty({n, channels}, options);
  Tensor c_re = at::empty({outputs, n}, options), c_im = at::empty({outputs, n}, options);
  for_rows(n, 2 * channels, [&](int64_t k) {
    const float scale = std::exp(gamma.const_data_ptr<float>()[k]);
    const float *g_re = row_of(g_in, k), *g_im = row_of(g_in, n + k);
    const float *w_re = row_of(w_in, k), *w_im = row_of(w_in, n + k);
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

// What lru_scan keeps, in order: the operands, their tables, the state between the two parts of a sequence, the states of each.
struct Kept {
  Tensor log_decay, phase, w_in, w_out;
  Tensor blocked_decay, blocked_phase, blocked_in, blocked_out, blocked_feed;  // undefined, as all that follows, for a
  Tensor middle, head_states, body_states;                                     // part that has no steps

  std::vector<Tensor> list() const {
    return {log_decay,   phase,       w_in,         w_out,  blocked_decay, blocked_phase,
            blocked_in, blocked_out, blocked_feed, middle, head_states,   body_states};
  }
  static Kept of(at::TensorList list) {
    TORCH_CHECK(list.size() == 12, "kept: expected what lru_scan returns");
    return {list[0], list[1], list[2], list[3], list[4], list[5], list[6], list[7], list[8], list[9], list[10], list[11]};
  }
};

// A sequence is scanned in two parts: its head step by step, and its body, whose steps are a multiple of tau, by tables.
struct Parts {
  int64_t batch, channels, tau, head, body;
  Parts(const Tensor& x, int64_t tau) : batch(x.size(0)), channels(x.size(2)), tau(tau) {
    TORCH_CHECK(tau > 0, "tau: expected a positive number, got ", tau);
    head = tau == 1 ? x.size(1) : x.size(1) % tau;
    body = x.size(1) - head;
  }
  Tensor head_of(const Tensor& t) const { return t.narrow(1, 0, head); }
  // (batch, body / tau, tau channels).
  Tensor body_of(const Tensor& t) const {
    return t.narrow(1, head, body).reshape({batch, body / tau, tau * t.size(2)});
  }
  // Both (batch, L, channels) again; a part without steps is undefined.
  Tensor joined(const Tensor& head_part, const Tensor& body_part, int64_t width) const {
    if (body == 0) return head_part;
    const Tensor rest = body_part.view({batch, body, width});
    return head == 0 ? rest : at::cat({head_part, rest}, 1);
  }
};

// The sum, where one may be undefined.
Tensor plus(const Tensor& a, const Tensor& b) { return a.defined() && b.defined() ? a + b : a.defined() ? a : b; }

}  // namespace

std::tuple<Tensor, Tensor, std::vector<Tensor>> lru_scan(const Tensor& x, const Tensor& nu_log, const Tensor& theta_log,
                                                         const Tensor& gamma_log, const Tensor& B_re, const Tensor& B_im,
                                                         const Tensor& C_re, const Tensor& C_im, const OptionalTensor& D,
                                                         const OptionalTensor& initial_state, int64_t tau, int64_t rows,
                                                         bool store) {
  TORCH_CHECK(x.dim() == 3, "x: expected (batch, L, H)");
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCPU);
  const Parts parts(x, tau);
  Kept k;
  std::tie(k.log_decay, k.phase, k.w_in, k.w_out) = lru_operands(nu_log, theta_log, gamma_log, B_re, B_im, C_re, C_im);
  Tensor head, body, last;
  if (parts.head > 0 || parts.body == 0) {
    std::tie(head, last, k.head_states) =
        lti_core(parts.head_of(x), k.log_decay, k.phase, k.w_in, k.w_out, D, initial_state, false, store, rows);
  }
  if (parts.body > 0) {
    k.middle = last;
    std::tie(k.blocked_decay, k.blocked_phase, k.blocked_in, k.blocked_out, k.blocked_feed) =
        lti_tables(k.log_decay, k.phase, k.w_in, k.w_out, D, tau);
    std::tie(body, last, k.body_states) =
        lti_core(parts.body_of(x), k.blocked_decay, k.blocked_phase, k.blocked_in, k.blocked_out, k.blocked_feed,
                 parts.head > 0 ? OptionalTensor(k.middle) : initial_state, true, store, rows);
  }
  return {parts.joined(head, body, C_re.size(0)), last, k.list()};
}

LruGradientTensors lru_scan_backward(const OptionalTensor& grad_y, const OptionalTensor& grad_last, const Tensor& x,
                                     const Tensor& gamma_log, const OptionalTensor& D, const OptionalTensor& initial_state,
                                     at::TensorList kept, int64_t tau, int64_t rows, bool store, bool need_x) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCPU);
  const Parts parts(x, tau);
  const Kept k = Kept::of(kept);
  const auto part = [&](auto of) { return grad_y ? OptionalTensor((parts.*of)(*grad_y)) : std::nullopt; };
  OptionalTensor grad_state = grad_last;
  Tensor body_x, g_decay, g_phase, g_in, g_out, g_D;
  if (parts.body > 0) {
    const auto [to_x, decay, phase, in, out, feed, start] = lti_core_backward(
        part(&Parts::body_of), grad_state, parts.body_of(x), k.blocked_decay, k.blocked_phase, k.blocked_in, k.blocked_out,
        k.blocked_feed, parts.head > 0 ? OptionalTensor(k.middle) : initial_state, k.body_states, true, store, rows, need_x);
    body_x = to_x, grad_state = start;
    std::tie(g_decay, g_phase, g_in, g_out, g_D) = lti_tables_backward(decay, phase, in, out, feed, k.log_decay, k.phase,
                                                                      k.w_in, k.w_out, k.blocked_out, tau);
    if (!D) g_D = Tensor();
  }
  Tensor head_x;
  if (parts.head > 0 || parts.body == 0) {
    const auto [to_x, decay, phase, in, out, feed, start] =
        lti_core_backward(part(&Parts::head_of), grad_state, parts.head_of(x), k.log_decay, k.phase, k.w_in, k.w_out, D,
                          initial_state, k.head_states, false, store, rows, need_x);
    head_x = to_x, grad_state = start;
    g_decay = plus(g_decay, decay), g_phase = plus(g_phase, phase), g_in = plus(g_in, in), g_out = plus(g_out, out);
    if (D) g_D = plus(g_D, feed);
  }
  const auto [nu, theta, gamma, b_re, b_im, c_re, c_im] =
      lru_operands_backward(g_decay, g_phase, g_in, g_out, gamma_log, k.log_decay, k.phase, k.w_in);
  const Tensor grad_x = need_x ? parts.joined(head_x, body_x, parts.channels) : at::empty({0}, x.options());
  return {grad_x, nu, theta, gamma, b_re, b_im, c_re, c_im, D ? g_D : at::empty({0}, x.options()), *grad_state};
}

namespace {

TORCH_LIBRARY_FRAGMENT(compressm_cpp, m) {
  m.def("lru_scan(Tensor x, Tensor nu_log, Tensor theta_log, Tensor gamma_log, Tensor B_re, Tensor B_im, Tensor C_re,"
        " Tensor C_im, Tensor? D, Tensor? initial_state, int tau, int rows, bool store)"
        " -> (Tensor y, Tensor last, Tensor[] kept)",
        torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(lru_scan)));
  m.def("lru_scan_backward(Tensor? grad_y, Tensor? grad_last, Tensor x, Tensor gamma_log, Tensor? D, Tensor? initial_state,"
        " Tensor[] kept, int tau, int rows, bool store, bool need_x)"
        " -> (Tensor grad_x, Tensor grad_nu_log, Tensor grad_theta_log, Tensor grad_gamma_log, Tensor grad_B_re,"
        " Tensor grad_B_im, Tensor grad_C_re, Tensor grad_C_im, Tensor grad_D, Tensor grad_initial_state)",
        torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(lru_scan_backward)));
  register_gradient(m, "lru_scan");
}

}  // namespace
}  // namespace compressm
