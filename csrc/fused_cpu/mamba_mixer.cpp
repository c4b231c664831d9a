// A whole Mamba-1 mixer, (batch, L, d_model) -> (batch, L, d_model), as one op.
//
//   x, z = hidden W_in;  u = silu(conv(x));  [low, B, C] = u W_x;  delta = low W_dt
//   out = scan(u, softplus(delta + dt_bias), -exp(A_log), B, C, D) silu(z) W_out
//
// It is made of torch's matrix products and of the ops in ops.h; nothing of autograd, dispatch or Python runs between them.
// Products are computed in bfloat16 where `half`, with float32 for all that the scan and the convolution take as float32.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "core/autograd.h"
#include "core/ops.h"

namespace compressm {
namespace {

// Sizes, and the arguments as the products and the kernels read them.
struct Mixer {
  int64_t batch, length, model, inner, rank, states, width;
  Tensor hidden;                         // (batch L, d_model)
  Tensor w_x, w_z, w_mix, w_out;         // in the dtype of the products
  Tensor w_dt;                           // (R, d_inner), likewise
  Tensor taps, conv_bias, before;        // (width, d_inner), (d_inner,), (batch, width - 1, d_inner)
  Tensor A, D, dt_bias;                  // float32

  Mixer(const Tensor& hidden_states, const Tensor& in_weight, const Tensor& conv_weight, const OptionalTensor& conv_bias_,
        const Tensor& x_weight, const Tensor& dt_weight, const Tensor& dt_bias_, const Tensor& A_log, const Tensor& D_,
        const Tensor& out_weight, bool half) {
    TORCH_CHECK(hidden_states.dim() == 3 && A_log.dim() == 2 && dt_weight.dim() == 2 && conv_weight.dim() == 3,
                "expected hidden (batch, L, d_model), A_log (d_inner, N), dt_weight (d_inner, R) and conv_weight (d_inner, 1, "
                "width)");
    batch = hidden_states.size(0), length = hidden_states.size(1), model = hidden_states.size(2);
    inner = A_log.size(0), states = A_log.size(1), rank = dt_weight.size(1), width = conv_weight.size(2);
    check(in_weight, "in_weight", {2 * inner, model});
    check(conv_weight, "conv_weight", {inner, 1, width});
    check(x_weight, "x_weight", {rank + 2 * states, inner});
    check(dt_weight, "dt_weight", {inner, rank});
    check(dt_bias_, "dt_bias", {inner});
    check(D_, "D", {inner});
    check(out_weight, "out_weight", {model, inner});
    if (conv_bias_) check(*conv_bias_, "conv_bias", {inner});
    const at::ScalarType type = half ? at::kBFloat16 : at::kFloat;
    hidden = hidden_states.to(type).reshape({batch * length, model});
    const Tensor w_in = in_weight.to(type);
    w_x = w_in.narrow(0, 0, inner), w_z = w_in.narrow(0, inner, inner);
    w_mix = x_weight.to(type), w_dt = dt_weight.to(type).t().contiguous(), w_out = out_weight.to(type);
    taps = conv_weight.select(1, 0).t().to(at::kFloat).contiguous();
    conv_bias = conv_bias_ ? conv_bias_->to(at::kFloat).contiguous() : at::zeros({inner}, taps.options());
    before = at::zeros({batch, width - 1, inner}, hidden.options());
    A = at::exp(A_log.to(at::kFloat)).neg_();
    D = D_.to(at::kFloat), dt_bias = dt_bias_.to(at::kFloat);
  }

  // (batch L, channels) as (batch, L, channels), and as (batch, channels, L).
  Tensor sequences(const Tensor& rows) const { return rows.view({batch, length, rows.size(1)}); }
  Tensor planes(const Tensor& rows) const { return sequences(rows).transpose(1, 2); }
  // B or C (batch, 1, N, L) of mix (batch L, R + 2N).
  Tensor part_B(const Tensor& mix) const { return planes(mix).narrow(1, rank, states).unsqueeze(1); }
  Tensor part_C(const Tensor& mix) const { return planes(mix).narrow(1, rank + states, states).unsqueeze(1); }

 private:
  static void check(const Tensor& t, const char* name, at::IntArrayRef shape) {
    TORCH_CHECK(t.device().is_cpu() && t.is_floating_point() && t.sizes() == shape, name,
                ": expected a real CPU tensor of shape ", shape, ", got ", t.sizes(), " of ", t.scalar_type());
  }
};

// rows (M, k) times weight (n, k) transposed.
Tensor project(const Tensor& rows, const Tensor& weight, const OptionalTensor& bias = std::nullopt) {
  return bias ? at::addmm(bias->to(rows.scalar_type()), rows, weight.t()) : at::mm(rows, weight.t());
}

OptionalTensor part(const OptionalTensor& t, int64_t start, int64_t length) {
  return t ? OptionalTensor(t->narrow(0, start, length)) : std::nullopt;
}

// (batch L, channels) view of (batch, channels, L) with channels next to each other.
Tensor rows_of(const Tensor& planes) { return planes.transpose(1, 2).view({-1, planes.size(1)}); }

// Whether no number is NaN or infinite.
bool finite(const Tensor& t) {
  const Tensor dense = t.contiguous();
  const auto* bits = static_cast<const std::uint32_t*>(dense.const_data_ptr());
  std::uint32_t found = 0;
  for (int64_t i = 0; i < dense.numel(); ++i) found |= (bits[i] & 0x7f800000u) == 0x7f800000u;
  return found == 0;
}

// Returns out (batch, L, d_model), and what the backward needs, empty unless train: x, z, u (batch L, d_inner), mix (batch L,
// R + 2N) in float32, delta (batch L, d_inner), the scan's checkpoints, its output y in front of the gate and behind it.
std::tuple<Tensor, std::vector<Tensor>> mamba_mixer(const Tensor& hidden, const Tensor& in_weight,
                                                    const OptionalTensor& in_bias, const Tensor& conv_weight,
                                                    const OptionalTensor& conv_bias, const Tensor& x_weight,
                                                    const Tensor& dt_weight, const Tensor& dt_bias, const Tensor& A_log,
                                                    const Tensor& D, const Tensor& out_weight, const OptionalTensor& out_bias,
                                                    bool half, bool train) {
  const Mixer m(hidden, in_weight, conv_weight, conv_bias, x_weight, dt_weight, dt_bias, A_log, D, out_weight, half);
  TORCH_CHECK_VALUE(finite(m.A), "A_log: expected numbers with a finite exponential, got NaN or larger ones");
  const Tensor x = project(m.hidden, m.w_x, part(in_bias, 0, m.inner));
  const Tensor z = project(m.hidden, m.w_z, part(in_bias, m.inner, m.inner));
  const Tensor u = conv_channels(m.sequences(x), m.taps, m.conv_bias, m.before, true).view({-1, m.inner});
  Tensor mix = project(u, m.w_mix);
  const Tensor delta = at::mm(mix.narrow(1, 0, m.rank), m.w_dt);
  mix = mix.to(at::kFloat);
  const auto [scanned, last, checkpoints, y] =
      selective_forward(m.planes(u), m.planes(delta), m.A, m.part_B(mix), m.part_C(mix), m.D, m.planes(z), m.dt_bias,
                        std::nullopt, std::nullopt, true, train);
  const Tensor gated = rows_of(scanned), out = m.sequences(project(gated, m.w_out, out_bias));
  if (!train) return {out, {}};
  return {out, {x, z, u, mix, delta, checkpoints, rows_of(y), gated}};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Of (hidden, in_weight, in_bias, conv_weight, conv_bias, x_weight, dt_weight, dt_bias, A_log, D, out_weight, out_bias);
// undefined where not needed.
Gradients mamba_mixer_backward(const Tensor& grad_out, const Tensor& hidden, const Tensor& in_weight,
                               const OptionalTensor& in_bias, const Tensor& conv_weight, const OptionalTensor& conv_bias,
                               const Tensor& x_weight, const Tensor& dt_weight, const Tensor& dt_bias, const Tensor& A_log,
                               const Tensor& D, const Tensor& out_weight, const OptionalTensor& out_bias,
                               at::TensorList kept, bool half, bool need_hidden, bool need_in_weight, bool need_x_weight,
                               bool need_dt_weight, bool need_out_weight) {
  TORCH_CHECK(kept.size() == 8, "kept: expected what mamba_mixer returns with train");
  const Tensor &x = kept[0], &z = kept[1], &u = kept[2], &mix = kept[3], &delta = kept[4], &checkpoints = kept[5];
  const Tensor &y = kept[6], &gated = kept[7];
  const Mixer m(hidden, in_weight, conv_weight, conv_bias, x_weight, dt_weight, dt_bias, A_log, D, out_weight, half);
  const at::ScalarType type = m.hidden.scalar_type();
  const auto like = [](const Tensor& grad, const Tensor& t) { return grad.to(t.scalar_type()); };
  Gradients grads;
  auto& [g_hidden, g_in, g_in_bias, g_conv, g_conv_bias, g_x, g_dt, g_dt_bias, g_A_log, g_D, g_out, g_out_bias] = grads;

  const Tensor to_out = grad_out.to(type).reshape({-1, m.model});
  if (need_out_weight) g_out = like(at::mm(to_out.t(), gated), out_weight);
  if (out_bias) g_out_bias = like(to_out.sum(0), *out_bias);

  Tensor to_mix = at::empty_like(mix);
  const auto [scan_u, scan_delta, scan_A, scan_B, scan_C, scan_D, scan_z, scan_bias, initial] = selective_backward(
      m.planes(at::mm(to_out, m.w_out)), std::nullopt, m.planes(u), m.planes(delta), m.A, m.part_B(mix), m.part_C(mix), m.D,
      m.planes(z), m.dt_bias, std::nullopt, std::nullopt, checkpoints, m.planes(y), true, m.part_B(to_mix), m.part_C(to_mix));
  g_A_log = like(scan_A.mul_(m.A), A_log), g_D = like(scan_D, D), g_dt_bias = like(scan_bias, dt_bias);

  const Tensor to_delta = rows_of(scan_delta), to_z = rows_of(scan_z);
  to_mix = to_mix.to(type);
  Tensor to_low = to_mix.narrow(1, 0, m.rank);
  at::mm_out(to_low, to_delta, m.w_dt.t());
  if (need_dt_weight) g_dt = like(at::mm(mix.narrow(1, 0, m.rank).to(type).t(), to_delta).t().contiguous(), dt_weight);
  if (need_x_weight) g_x = like(at::mm(to_mix.t(), u), x_weight);

  const Tensor to_u = rows_of(scan_u).addmm_(to_mix, m.w_mix);
  const auto [conv_x, taps, conv_sum, before] =
      conv_channels_backward(m.sequences(to_u), m.sequences(x), m.taps, m.conv_bias, m.before, true);
  g_conv = like(taps.t().contiguous().unsqueeze(1), conv_weight);
  if (conv_bias) g_conv_bias = like(conv_sum, *conv_bias);

  const Tensor to_x = conv_x.view({-1, m.inner});
  if (need_in_weight) {
    g_in = at::empty(in_weight.sizes(), in_weight.options());
    g_in.narrow(0, 0, m.inner).copy_(at::mm(to_x.t(), m.hidden));
    g_in.narrow(0, m.inner, m.inner).copy_(at::mm(to_z.t(), m.hidden));
  }
  if (in_bias) g_in_bias = like(at::cat({to_x.sum(0), to_z.sum(0)}), *in_bias);
  if (need_hidden) g_hidden = like(m.sequences(at::mm(to_x, m.w_x).addmm_(to_z, m.w_z)), hidden);
  return grads;
}

struct MambaMixerOp {
  static constexpr const char *name = "mamba_mixer", *passed = "";
};

TORCH_LIBRARY_FRAGMENT(compressm_cpp, m) {
  m.def("mamba_mixer(Tensor hidden, Tensor in_weight, Tensor? in_bias, Tensor conv_weight, Tensor? conv_bias,"
        " Tensor x_weight, Tensor dt_weight, Tensor dt_bias, Tensor A_log, Tensor D, Tensor out_weight, Tensor? out_bias,"
        " bool half, bool train) -> (Tensor out, Tensor[] kept)",
        torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(mamba_mixer)));
  m.def("mamba_mixer_backward(Tensor grad_out, Tensor hidden, Tensor in_weight, Tensor? in_bias, Tensor conv_weight,"
        " Tensor? conv_bias, Tensor x_weight, Tensor dt_weight, Tensor dt_bias, Tensor A_log, Tensor D, Tensor out_weight,"
        " Tensor? out_bias, Tensor[] kept, bool half, bool need_hidden, bool need_in_weight, bool need_x_weight,"
        " bool need_dt_weight, bool need_out_weight) -> (Tensor grad_hidden, Tensor grad_in_weight, Tensor grad_in_bias,"
        " Tensor grad_conv_weight, Tensor grad_conv_bias, Tensor grad_x_weight, Tensor grad_dt_weight, Tensor grad_dt_bias,"
        " Tensor grad_A_log, Tensor grad_D, Tensor grad_out_weight, Tensor grad_out_bias)",
        torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(mamba_mixer_backward)));
  register_gradient<MambaMixerOp>(m);
}

}  // namespace
}  // namespace compressm
