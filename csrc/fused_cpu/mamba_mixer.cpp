// A whole Mamba-1 mixer, (batch, L, d_model) -> (batch, L, d_model), as one op; all float32.
//
//   x, z = hidden W_in;  u = silu(conv(x));  [low, B, C] = u W_x;  delta = low W_dt
//   out = scan(u, softplus(delta + dt_bias), -exp(A_log), B, C, D) silu(z) W_out
//
// The batch is cut into pieces of whole sequences.  A thread takes a piece through all steps, whose results are then in its
// cache, and no step waits for other threads.  Every piece has partial gradients of its own, added in a fixed order.
#include "core/torch.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "causal_conv1d/causal_conv1d_sequences.h"
#include "core/autograd.h"
#include "core/checks.h"
#include "core/partial_sums.h"
#include "core/tasks.h"
#include "core/tensor.h"
#include "selective_scan/selective_scan_tensors.h"

namespace compressm {
namespace {

constexpr std::size_t kKept = 8;  // tensors that the backward needs of a piece

// The arguments as the steps read them.
struct Mixer {
  int64_t batch, length, model, inner, rank, states;
  Tensor hidden;                                   // (batch L, d_model)
  Tensor w_in, w_mix, w_dt, w_out;                 // w_dt (R, d_inner), the others as the layer has them
  Tensor taps, conv_bias, A, D, dt_bias;           // taps (width, d_inner)
  OptionalTensor in_bias, out_bias;

  Mixer(const Tensor& hidden_states, const Tensor& in_weight, const OptionalTensor& in_bias_, const Tensor& conv_weight,
        const OptionalTensor& conv_bias_, const Tensor& x_weight, const Tensor& dt_weight, const Tensor& dt_bias_,
        const Tensor& A_log, const Tensor& D_, const Tensor& out_weight, const OptionalTensor& out_bias_) {
    TORCH_CHECK(hidden_states.dim() == 3 && A_log.dim() == 2 && dt_weight.dim() == 2 && conv_weight.dim() == 3,
                "expected hidden (batch, L, d_model), A_log (d_inner, N), dt_weight (d_inner, R) and conv_weight (d_inner, 1, "
                "width)");
    batch = hidden_states.size(0), length = hidden_states.size(1), model = hidden_states.size(2);
    inner = A_log.size(0), states = A_log.size(1), rank = dt_weight.size(1);
    hidden = dense(hidden_states, "hidden", hidden_states.sizes()).view({batch * length, model});
    w_in = dense(in_weight, "in_weight", {2 * inner, model});
    w_mix = dense(x_weight, "x_weight", {rank + 2 * states, inner});
    w_dt = dense(dt_weight, "dt_weight", {inner, rank}).t().contiguous();
    w_out = dense(out_weight, "out_weight", {model, inner});
    taps = dense(conv_weight, "conv_weight", {inner, 1, conv_weight.size(2)}).select(1, 0).t().contiguous();
    conv_bias = conv_bias_ ? dense(*conv_bias_, "conv_bias", {inner}) : at::zeros({inner}, taps.options());
    A = at::exp(dense(A_log, "A_log", {inner, states})).neg_();
    D = dense(D_, "D", {inner}), dt_bias = dense(dt_bias_, "dt_bias", {inner});
    if (in_bias_) in_bias = dense(*in_bias_, "in_bias", {2 * inner});
    if (out_bias_) out_bias = dense(*out_bias_, "out_bias", {model});
  }

  void check_decay() const {
    const float* a = A.const_data_ptr<float>();
    const bool finite = std::all_of(a, a + A.numel(), [](float number) { return std::isfinite(number); });
    TORCH_CHECK_VALUE(finite, "A_log: expected numbers with a finite exponential, got NaN or larger ones");
  }
  Tensor w_half(int64_t half) const { return w_in.narrow(0, half * inner, inner); }  // of x, of z
  // (rows, channels) as (sequences, channels, L); B or C (sequences, 1, N, L) of mix (rows, R + 2N).
  Tensor planes(const Tensor& rows) const { return rows.view({-1, length, rows.size(1)}).transpose(1, 2); }
  Tensor mixing(const Tensor& mix, int64_t which) const {
    return planes(mix).narrow(1, rank + which * states, states).unsqueeze(1);
  }
  // (rows, channels) of (sequences, channels, L) with channels next to each other.
  static Tensor rows(const Tensor& planes) { return planes.transpose(1, 2).view({-1, planes.size(1)}); }
};

// Whole sequences of the batch, and the rows of (batch L, ...) that are theirs.
struct Piece {
  int64_t index, sequences, first_row, count;
  Piece(const Mixer& m, int64_t index, int64_t pieces) : index(index) {
    const int64_t first = m.batch * index / pieces;
    sequences = m.batch * (index + 1) / pieces - first;
    first_row = first * m.length, count = sequences * m.length;
  }
  Tensor of(const Tensor& rows) const { return rows.narrow(0, first_row, count); }
};

// rows (M, k) times weight (n, k) transposed.
Tensor project(const Tensor& rows, const Tensor& weight, const OptionalTensor& bias) {
  return bias ? at::addmm(*bias, rows, weight.t()) : at::mm(rows, weight.t());
}

// x, z, u, mix, delta (rows, ...), the scan's checkpoints, its output in front of the gate and behind it.
std::vector<Tensor> forward_piece(const Mixer& m, const Piece& piece, Tensor to, bool train) {
  const Tensor hidden = piece.of(m.hidden);
  const auto half = [&](int64_t which) {
    const OptionalTensor bias = m.in_bias ? OptionalTensor(m.in_bias->narrow(0, which * m.inner, m.inner)) : std::nullopt;
    return project(hidden, m.w_half(which), bias);
  };
  const Tensor x = half(0), z = half(1);
  const Tensor u = conv_sequences(x.view({piece.sequences, m.length, m.inner}), m.taps, m.conv_bias, std::nullopt,
                                  conv_rows(piece.sequences, m.length), true)
                       .view({-1, m.inner});
  const Tensor mix = project(u, m.w_mix, std::nullopt), delta = at::mm(mix.narrow(1, 0, m.rank), m.w_dt);
  const auto [scanned, last, checkpoints, y] =
      selective_scan(m.planes(u), m.planes(delta), m.A, m.mixing(mix, 0), m.mixing(mix, 1), m.D, m.planes(z), m.dt_bias,
                     std::nullopt, std::nullopt, true, train);
  const Tensor gated = Mixer::rows(scanned);
  if (m.out_bias) {
    at::addmm_out(to, *m.out_bias, gated, m.w_out.t());
  } else {
    at::mm_out(to, gated, m.w_out.t());
  }
  if (!train) return {};
  return {x, z, u, mix, delta, checkpoints, Mixer::rows(y), gated};
}

// Returns out, and what the backward needs: kKept tensors for each of the pieces where `train`.
std::tuple<Tensor, std::vector<Tensor>> mamba_mixer(const Tensor& hidden, const Tensor& in_weight,
                                                    const OptionalTensor& in_bias, const Tensor& conv_weight,
                                                    const OptionalTensor& conv_bias, const Tensor& x_weight,
                                                    const Tensor& dt_weight, const Tensor& dt_bias, const Tensor& A_log,
                                                    const Tensor& D, const Tensor& out_weight, const OptionalTensor& out_bias,
                                                    int64_t pieces, bool train) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCPU);
  const Mixer m(hidden, in_weight, in_bias, conv_weight, conv_bias, x_weight, dt_weight, dt_bias, A_log, D, out_weight, out_bias);
  m.check_decay();
  TORCH_CHECK(0 < pieces && pieces <= m.batch, "pieces: expected 1 to ", m.batch, ", got ", pieces);
  const Tensor out = at::empty(hidden.sizes(), m.hidden.options()), rows = out.view({-1, m.model});
  std::vector<Tensor> kept(train ? pieces * kKept : 0);
  for_each_task(pieces, 0, [&](int64_t task, float*) {
    const Piece piece(m, task, pieces);
    std::vector<Tensor> own = forward_piece(m, piece, piece.of(rows), train);
    std::move(own.begin(), own.end(), kept.begin() + static_cast<std::ptrdiff_t>(task * own.size()));
  });
  return {out, kept};
}

// Partial gradients of the parameters, a row for each piece.
class Sums {
 public:
  enum Part { in_weight, in_bias, taps, conv_bias, x_weight, dt_weight, dt_bias, A, D, out_weight, out_bias, parts };

  Sums(const Mixer& m, int64_t pieces, bool need_in_weight, bool need_x_weight, bool need_dt_weight, bool need_out_weight) {
    shapes_.resize(parts, {0});
    if (need_in_weight) shapes_[in_weight] = m.w_in.sizes().vec();
    if (m.in_bias) shapes_[in_bias] = {2 * m.inner};
    shapes_[taps] = m.taps.sizes().vec();
    if (need_x_weight) shapes_[x_weight] = m.w_mix.sizes().vec();
    if (need_dt_weight) shapes_[dt_weight] = {m.inner, m.rank};
    for (const Part part : {conv_bias, dt_bias, D}) shapes_[part] = {m.inner};
    shapes_[A] = m.A.sizes().vec();
    if (need_out_weight) shapes_[out_weight] = m.w_out.sizes().vec();
    if (m.out_bias) shapes_[out_bias] = {m.model};
    for (const auto& shape : shapes_) first_.push_back(first_.back() + c10::multiply_integers(shape));
    rows_ = at::empty({pieces, first_.back()}, m.A.options());
  }
  bool wants(Part part) const { return size(part) > 0; }
  Tensor of(int64_t piece, Part part) const {
    return rows_.select(0, piece).narrow(0, first_[part], size(part)).view(shapes_[part]);
  }
  // Undefined where it is not wanted.
  Tensor total(Part part) const {
    if (!wants(part)) return {};
    return sum_partials(rows_.narrow(1, first_[part], size(part))).view(shapes_[part]);
  }

 private:
  int64_t size(Part part) const { return first_[part + 1] - first_[part]; }
  std::vector<std::vector<int64_t>> shapes_;
  std::vector<int64_t> first_{0};
  Tensor rows_;
};

// to_out (rows, d_model); to_hidden likewise, or undefined where it is not needed.
void backward_piece(const Mixer& m, const Piece& piece, const Tensor& to_out, const Tensor* kept, const Sums& sums,
                    Tensor to_hidden) {
  const Tensor &x = kept[0], &z = kept[1], &u = kept[2], &mix = kept[3], &delta = kept[4], &checkpoints = kept[5];
  const Tensor &y = kept[6], &gated = kept[7];
  const auto product = [&](Sums::Part part, const Tensor& left, const Tensor& right) {
    Tensor to = sums.of(piece.index, part);
    if (sums.wants(part)) at::mm_out(to, left.t(), right);
  };
  product(Sums::out_weight, to_out, gated);
  if (m.out_bias) sums.of(piece.index, Sums::out_bias).copy_(to_out.sum(0));
  const auto [scan_u, scan_delta, scan_A, scan_B, scan_C, scan_D, scan_z, scan_bias, initial] = selective_scan_gradients(
      m.planes(at::mm(to_out, m.w_out)), std::nullopt, m.planes(u), m.planes(delta), m.A, m.mixing(mix, 0), m.mixing(mix, 1),
      m.D, m.planes(z), m.dt_bias, std::nullopt, std::nullopt, checkpoints, m.planes(y), true, 1);
  sums.of(piece.index, Sums::A).copy_(scan_A), sums.of(piece.index, Sums::D).copy_(scan_D);
  sums.of(piece.index, Sums::dt_bias).copy_(scan_bias);

  const Tensor to_delta = Mixer::rows(scan_delta), to_z = Mixer::rows(scan_z), to_mix = at::empty_like(mix);
  Tensor to_low = to_mix.narrow(1, 0, m.rank);
  at::mm_out(to_low, to_delta, m.w_dt.t());
  m.mixing(to_mix, 0).copy_(scan_B), m.mixing(to_mix, 1).copy_(scan_C);
  product(Sums::dt_weight, to_delta, mix.narrow(1, 0, m.rank));
  product(Sums::x_weight, to_mix, u);

  const Tensor to_u = Mixer::rows(scan_u).addmm_(to_mix, m.w_mix);
  const auto sequences = [&](const Tensor& rows) { return rows.view({piece.sequences, m.length, m.inner}); };
  const auto [conv_x, taps, conv_bias, before] = conv_sequences_backward(
      sequences(to_u), sequences(x), m.taps, m.conv_bias, std::nullopt, conv_rows(piece.sequences, m.length), true);
  sums.of(piece.index, Sums::taps).copy_(taps), sums.of(piece.index, Sums::conv_bias).copy_(conv_bias);

  const Tensor halves[] = {conv_x.view({-1, m.inner}), to_z};
  for (int64_t half : {0, 1}) {
    const Tensor& to_half = halves[half];
    if (sums.wants(Sums::in_weight)) {
      Tensor to = sums.of(piece.index, Sums::in_weight).narrow(0, half * m.inner, m.inner);
      at::mm_out(to, to_half.t(), piece.of(m.hidden));
    }
    if (m.in_bias) sums.of(piece.index, Sums::in_bias).narrow(0, half * m.inner, m.inner).copy_(to_half.sum(0));
  }
  if (!to_hidden.defined()) return;
  at::mm_out(to_hidden, halves[0], m.w_half(0));
  to_hidden.addmm_(to_z, m.w_half(1));
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Of (hidden, in_weight, in_bias, conv_weight, conv_bias, x_weight, dt_weight, dt_bias, A_log, D, out_weight, out_bias);
// undefined where not needed.
Gradients mamba_mixer_backward(const Tensor& grad_out, const Tensor& hidden, const Tensor& in_weight,
                               const OptionalTensor& in_bias, const Tensor& conv_weight, const OptionalTensor& conv_bias,
                               const Tensor& x_weight, const Tensor& dt_weight, const Tensor& dt_bias, const Tensor& A_log,
                               const Tensor& D, const Tensor& out_weight, const OptionalTensor& out_bias,
                               at::TensorList kept, int64_t pieces, bool need_hidden, bool need_in_weight, bool need_x_weight,
                               bool need_dt_weight, bool need_out_weight) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCPU);
  TORCH_CHECK(pieces > 0 && kept.size() == pieces * kKept, "kept: expected what mamba_mixer returns with train");
  const Mixer m(hidden, in_weight, in_bias, conv_weight, conv_bias, x_weight, dt_weight, dt_bias, A_log, D, out_weight, out_bias);
  const Tensor to_out = dense(grad_out, "grad_out", hidden.sizes()).view({-1, m.model});
  const Tensor to_hidden = need_hidden ? at::empty_like(m.hidden) : Tensor();
  const Sums sums(m, pieces, need_in_weight, need_x_weight, need_dt_weight, need_out_weight);
  for_each_task(pieces, 0, [&](int64_t task, float*) {
    const Piece piece(m, task, pieces);
    backward_piece(m, piece, piece.of(to_out), kept.data() + task * kKept, sums,
                   need_hidden ? piece.of(to_hidden) : Tensor());
  });
  return {need_hidden ? to_hidden.view(hidden.sizes()) : Tensor(),
          sums.total(Sums::in_weight),
          sums.total(Sums::in_bias),
          sums.total(Sums::taps).t().contiguous().unsqueeze(1),
          conv_bias ? sums.total(Sums::conv_bias) : Tensor(),
          sums.total(Sums::x_weight),
          sums.total(Sums::dt_weight),
          sums.total(Sums::dt_bias),
          sums.total(Sums::A).mul_(m.A),
          sums.total(Sums::D),
          sums.total(Sums::out_weight),
          sums.total(Sums::out_bias)};
}

TORCH_LIBRARY_FRAGMENT(compressm_cpp, m) {
  m.def("mamba_mixer(Tensor hidden, Tensor in_weight, Tensor? in_bias, Tensor conv_weight, Tensor? conv_bias,"
        " Tensor x_weight, Tensor dt_weight, Tensor dt_bias, Tensor A_log, Tensor D, Tensor out_weight, Tensor? out_bias,"
        " int pieces, bool train) -> (Tensor out, Tensor[] kept)",
        torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(mamba_mixer)));
  m.def("mamba_mixer_backward(Tensor grad_out, Tensor hidden, Tensor in_weight, Tensor? in_bias, Tensor conv_weight,"
        " Tensor? conv_bias, Tensor x_weight, Tensor dt_weight, Tensor dt_bias, Tensor A_log, Tensor D, Tensor out_weight,"
        " Tensor? out_bias, Tensor[] kept, int pieces, bool need_hidden, bool need_in_weight, bool need_x_weight,"
        " bool need_dt_weight, bool need_out_weight) -> (Tensor grad_hidden, Tensor grad_in_weight, Tensor grad_in_bias,"
        " Tensor grad_conv_weight, Tensor grad_conv_bias, Tensor grad_x_weight, Tensor grad_dt_weight, Tensor grad_dt_bias,"
        " Tensor grad_A_log, Tensor grad_D, Tensor grad_out_weight, Tensor grad_out_bias)",
        torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(mamba_mixer_backward)));
  register_gradient(m, "mamba_mixer");
}

}  // namespace
}  // namespace compressm
