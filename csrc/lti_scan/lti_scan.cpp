// The LTI scan on CPU: y_t = W_out h_t + F u_t, h_t = lam h_{t-1} + W_in u_t, all complex numbers planar (re | im).
//
// Rows (sequence, time) are cut into tiles that fit a core's L2 cache.  Per tile: one matrix product in, the scan in
// place, one matrix product out, so that neither W_in u nor h of the whole sequence has to live in memory.  The backward
// walks the tiles in reverse; the states come from `saved`, either stored in full or recomputed from one state per tile.
// Lanes are fixed groups of sequences with their own partial weight gradients, added in a fixed order.
#include "core/torch.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <tuple>
#include <vector>

#include "core/autograd.h"
#include "core/checks.h"
#include "diagonal_scan/diagonal_scan.h"
#include "lti_scan/lti_scan.h"

namespace compressm {
namespace {

constexpr int64_t kMaxLanes = 16;

void check_rows(const Tensor& t, const char* name, int64_t dim) {
  TORCH_CHECK(t.device().is_cpu() && t.scalar_type() == at::kFloat && t.is_contiguous() && t.dim() == dim, name,
              ": expected a contiguous float32 CPU tensor of ", dim, " dimensions");
}

void check_real(const Tensor& t, const char* name, at::IntArrayRef shape) {
  TORCH_CHECK(t.device().is_cpu() && t.is_floating_point() && t.sizes() == shape, name,
              ": expected a real CPU tensor of shape ", shape, ", got ", t.sizes());
}

struct Eigenvalues {
  Tensor re, im;
  Eigenvalues(const Tensor& log_decay, const Tensor& phase, int64_t n2) {
    check_real(log_decay, "log_decay", {n2 / 2});
    check_real(phase, "phase", {n2 / 2});
    const Tensor modulus = log_decay.to(at::kDouble).exp(), angle = phase.to(at::kDouble);
    re = (modulus * angle.cos()).to(at::kFloat).contiguous();
    im = (modulus * angle.sin()).to(at::kFloat).contiguous();
  }
};

// How (batch, length) rows fall into tiles of at most `rows` rows: several whole sequences, or a stretch of one.
struct Tiling {
  int64_t batch, length, group, steps, chunks, items, lanes;
  Tiling(int64_t batch, int64_t length, int64_t rows)
      : batch(batch),
        length(length),
        group(std::clamp<int64_t>(rows / length, 1, std::max<int64_t>(1, (batch + kMaxLanes - 1) / kMaxLanes))),
        steps(std::min(rows, length)),
        chunks((length + steps - 1) / steps),
        items((batch + group - 1) / group),
        lanes(std::min(items, kMaxLanes)) {}
  int64_t lane_begin(int64_t lane) const { return lane * items / lanes; }
};

// Raises unless w_in (2n, H), w_out (H_out, 2n), feed and initial_state fit u (batch, L, H), and tiles have rows.
void check_system(const Tensor& u, const Tensor& w_in, const Tensor& w_out, const OptionalTensor& feed,
                  const OptionalTensor& initial_state, int64_t rows) {
  TORCH_CHECK(u.dim() == 3, "u: expected (batch, L, H)");
  check_rows(w_in, "w_in", 2);
  check_rows(w_out, "w_out", 2);
  const int64_t channels = u.size(2), n2 = w_in.size(0), outputs = w_out.size(0);
  TORCH_CHECK(n2 % 2 == 0 && w_in.size(1) == channels && w_out.size(1) == n2, "expected w_in (2N, ", channels,
              ") and w_out (H_out, 2N), got ", w_in.sizes(), " and ", w_out.sizes());
  if (feed) {
    const bool fits = feed->dim() == 1 ? feed->size(0) == channels && outputs == channels
                                       : feed->dim() == 2 && feed->size(0) == outputs && feed->size(1) == channels;
    TORCH_CHECK(fits && feed->device().is_cpu() && feed->scalar_type() == at::kFloat, "feed: expected float32 (", channels,
                ",) for as many outputs, or (", outputs, ", ", channels, "), got ", feed->sizes());
  }
  if (initial_state) check_real(*initial_state, "initial_state", {u.size(0), n2});
  TORCH_CHECK(rows > 0, "rows: expected a positive number, got ", rows);
}

struct Tile {
  int64_t sequence, sequences, start, steps, chunk;  // of one item
  int64_t row(const Tiling& tiling) const { return sequence * tiling.length + start; }
  int64_t rows() const { return sequences * steps; }
};

Tile tile_at(const Tiling& tiling, int64_t item, int64_t chunk) {
  const int64_t sequence = item * tiling.group, start = chunk * tiling.steps;
  return {sequence, std::min(tiling.group, tiling.batch - sequence), start,
          std::min(tiling.steps, tiling.length - start), chunk};
}

// Lanes in parallel when there are enough of them, else one after the other with parallel matrix products.
template <typename Body>
void for_each_lane(int64_t lanes, const Body& body) {
  if (lanes >= at::get_num_threads()) {
    at::parallel_for(0, lanes, 1, [&](int64_t begin, int64_t end) {
      at::AutoDispatchBelowADInplaceOrView guard;
      for (int64_t lane = begin; lane < end; ++lane) body(lane);
    });
  } else {
    for (int64_t lane = 0; lane < lanes; ++lane) body(lane);
  }
}

void add_feedthrough(Tensor y, const Tensor& u, const OptionalTensor& feed) {
  if (!feed) return;
  if (feed->dim() == 1) {
    y.addcmul_(u, *feed);
  } else {
    y.addmm_(u, feed->t());
  }
}

}  // namespace

// saved is every state (batch, length, 2n) if store, else the state in front of each tile (batch, chunks, 2n).
std::tuple<Tensor, Tensor, Tensor> lti_core(const Tensor& input, const Tensor& log_decay, const Tensor& phase,
                                            const Tensor& w_in, const Tensor& w_out, const OptionalTensor& feed,
                                            const OptionalTensor& initial_state, bool shifted, bool store, int64_t rows) {
  const Tensor u = dense(input, "u", input.sizes());
  check_system(u, w_in, w_out, feed, initial_state, rows);
  const int64_t batch = u.size(0), length = u.size(1), channels = u.size(2), n2 = w_in.size(0), outputs = w_out.size(0);
  const Eigenvalues lam(log_decay, phase, n2);
  Tensor y = at::empty({batch, length, outputs}, u.options());
  Tensor last = initial_state ? initial_state->to(at::kFloat).clone(at::MemoryFormat::Contiguous)
                              : at::zeros({batch, n2}, u.options());
  if (batch * length == 0) return {y, last, at::empty({batch, 0, n2}, u.options())};
  const Tiling tiling(batch, length, rows);
  Tensor saved = at::empty({batch, store ? length : tiling.chunks, n2}, u.options());
  const Tensor u_rows = u.view({batch * length, channels}), y_rows = y.view({batch * length, outputs});
  const Tensor w_in_t = w_in.t(), w_out_t = w_out.t();
  float* carry = last.data_ptr<float>();
  for_each_lane(tiling.lanes, [&](int64_t lane) {
    Tensor buffer = store ? saved.view({batch * length, n2}) : at::empty({tiling.group * tiling.steps, n2}, u.options());
    for (int64_t item = tiling.lane_begin(lane); item < tiling.lane_begin(lane + 1); ++item) {
      for (int64_t chunk = 0; chunk < tiling.chunks; ++chunk) {
        const Tile tile = tile_at(tiling, item, chunk);
        const int64_t row = tile.row(tiling), count = tile.rows();
        Tensor h = buffer.narrow(0, store ? row : 0, count);
        const Tensor u_tile = u_rows.narrow(0, row, count);
        Tensor y_tile = y_rows.narrow(0, row, count);
        at::mm_out(h, u_tile, w_in_t);
        for (int64_t s = 0; s < tile.sequences; ++s) {
          float* state = carry + (tile.sequence + s) * n2;
          if (!store) {
            std::copy_n(state, n2, saved.data_ptr<float>() + ((tile.sequence + s) * tiling.chunks + chunk) * n2);
          }
          float* states = h.data_ptr<float>() + s * tile.steps * n2;
          scan_kernels().scan(states, states, n2, tile.steps, n2 / 2, lam.re.data_ptr<float>(), lam.im.data_ptr<float>(),
                              state, shifted);
        }
        at::mm_out(y_tile, h, w_out_t);
        add_feedthrough(y_tile, u_tile, feed);
      }
    }
  });
  return {y, last, saved};
}

namespace {

struct LanePartials {
  Tensor w_in, w_out, feed, log_decay, phase;
};

struct BackwardInputs {
  Tensor grad_y, u, w_in, w_out, saved, initial_state;
  OptionalTensor feed;
  bool shifted, stored, need_u;
};

// The states of one tile: a view of the stored ones, or recomputed into `buffer`.
Tensor tile_states(const BackwardInputs& in, const Tiling& tiling, const Tile& tile, const Eigenvalues& lam,
                   const Tensor& u_tile, Tensor& buffer, Tensor& carry) {
  const int64_t n2 = in.w_in.size(0);
  if (in.stored) return in.saved.view({tiling.batch * tiling.length, n2}).narrow(0, tile.row(tiling), tile.rows());
  Tensor h = buffer.narrow(0, 0, tile.rows());
  at::mm_out(h, u_tile, in.w_in.t());
  for (int64_t s = 0; s < tile.sequences; ++s) {
    const float* start = in.saved.const_data_ptr<float>() + ((tile.sequence + s) * tiling.chunks + tile.chunk) * n2;
    std::copy_n(start, n2, carry.data_ptr<float>());
    float* states = h.data_ptr<float>() + s * tile.steps * n2;
    scan_kernels().scan(states, states, n2, tile.steps, n2 / 2, lam.re.data_ptr<float>(), lam.im.data_ptr<float>(),
                        carry.data_ptr<float>(), in.shifted);
  }
  return h;
}

const float* state_before(const BackwardInputs& in, const Tiling& tiling, const Tile& tile, int64_t s) {
  const int64_t n2 = in.w_in.size(0), sequence = tile.sequence + s;
  if (tile.start == 0) return in.initial_state.const_data_ptr<float>() + sequence * n2;
  if (in.stored) return in.saved.const_data_ptr<float>() + (sequence * tiling.length + tile.start - 1) * n2;
  return in.saved.const_data_ptr<float>() + (sequence * tiling.chunks + tile.chunk) * n2;
}

void backward_tile(const BackwardInputs& in, const Tiling& tiling, const Tile& tile, const Eigenvalues& lam, Tensor& g,
                   const Tensor& h, float* grad_state, const Tensor& grad_u, LanePartials& sums) {
  const int64_t n2 = in.w_in.size(0), row = tile.row(tiling), count = tile.rows();
  const Tensor u_tile = in.u.view({tiling.batch * tiling.length, in.u.size(2)}).narrow(0, row, count);
  const Tensor gy_tile = in.grad_y.view({tiling.batch * tiling.length, in.grad_y.size(2)}).narrow(0, row, count);
  at::mm_out(g, gy_tile, in.w_out);
  for (int64_t s = 0; s < tile.sequences; ++s) {
    scan_kernels().adjoint(g.data_ptr<float>() + s * tile.steps * n2, h.const_data_ptr<float>() + s * tile.steps * n2,
                           state_before(in, tiling, tile, s), n2, tile.steps, n2 / 2, lam.re.data_ptr<float>(),
                           lam.im.data_ptr<float>(), grad_state + (tile.sequence + s) * n2,
                           sums.log_decay.data_ptr<double>(), sums.phase.data_ptr<double>(), in.shifted);
  }
  sums.w_in.addmm_(g.t(), u_tile);
  sums.w_out.addmm_(gy_tile.t(), h);
  if (in.feed) {
    if (in.feed->dim() == 1) {
      sums.feed.add_((gy_tile * u_tile).sum(0));
    } else {
      sums.feed.addmm_(gy_tile.t(), u_tile);
    }
  }
  if (!in.need_u) return;
  Tensor gu_tile = grad_u.view({tiling.batch * tiling.length, in.u.size(2)}).narrow(0, row, count);
  at::mm_out(gu_tile, g, in.w_in);
  if (in.feed && in.feed->dim() == 1) gu_tile.addcmul_(gy_tile, *in.feed);
  if (in.feed && in.feed->dim() == 2) gu_tile.addmm_(gy_tile, *in.feed);
}

}  // namespace

CoreGradientTensors lti_core_backward(
    const OptionalTensor& grad_out, const OptionalTensor& grad_last, const Tensor& input, const Tensor& log_decay,
    const Tensor& phase, const Tensor& w_in, const Tensor& w_out, const OptionalTensor& feed,
    const OptionalTensor& initial_state, const Tensor& saved, bool shifted, bool stored, int64_t rows, bool need_u) {
  const Tensor u = dense(input, "u", input.sizes());
  check_system(u, w_in, w_out, feed, initial_state, rows);
  check_rows(saved, "saved", 3);
  const int64_t batch = u.size(0), length = u.size(1), n2 = w_in.size(0), outputs = w_out.size(0);
  const Tensor grad_y = grad_out ? dense(*grad_out, "grad_y", {batch, length, outputs})
                                 : at::zeros({batch, length, outputs}, u.options());
  const auto options = u.options();
  const Eigenvalues lam(log_decay, phase, n2);
  if (grad_last) check_real(*grad_last, "grad_last", {batch, n2});
  Tensor grad_u = need_u ? at::empty_like(u) : at::empty({0}, options);
  Tensor grad_state = grad_last ? grad_last->to(at::kFloat).clone(at::MemoryFormat::Contiguous)
                                : at::zeros({batch, n2}, options);
  const Tiling tiling(std::max<int64_t>(batch, 1), std::max<int64_t>(length, 1), rows);
  const int64_t kept = batch * length == 0 ? 0 : stored ? length : tiling.chunks;
  TORCH_CHECK(saved.sizes() == at::IntArrayRef({batch, kept, n2}), "saved: expected what lti_core returns, got ",
              saved.sizes());
  const int64_t lanes = batch * length == 0 ? 0 : tiling.lanes, held = std::max<int64_t>(lanes, 1);
  const auto partial = [&](const Tensor& like) {
    std::vector<int64_t> shape = like.sizes().vec();
    shape.insert(shape.begin(), held);
    return at::zeros(shape, options);
  };
  Tensor w_in_sums = partial(w_in), w_out_sums = partial(w_out);
  Tensor feed_sums = feed ? partial(*feed) : at::zeros({held, 0}, options);
  Tensor lam_sums = at::zeros({held, n2}, options.dtype(at::kDouble));
  const BackwardInputs in{grad_y, u, w_in, w_out, saved,
                          initial_state ? initial_state->to(at::kFloat).contiguous() : at::zeros({batch, n2}, options),
                          feed, shifted, stored, need_u};
  for_each_lane(lanes, [&](int64_t lane) {
    LanePartials sums{w_in_sums[lane], w_out_sums[lane], feed_sums[lane], lam_sums[lane].narrow(0, 0, n2 / 2),
                      lam_sums[lane].narrow(0, n2 / 2, n2 / 2)};
    const int64_t most = tiling.group * tiling.steps;
    Tensor g_buffer = at::empty({most, n2}, options), carry = at::empty({n2}, options);
    Tensor h_buffer = stored ? Tensor() : at::empty({most, n2}, options);
    const Tensor u_rows = u.view({batch * length, u.size(2)});
    for (int64_t item = tiling.lane_begin(lane); item < tiling.lane_begin(lane + 1); ++item) {
      for (int64_t chunk = tiling.chunks - 1; chunk >= 0; --chunk) {
        const Tile tile = tile_at(tiling, item, chunk);
        const Tensor u_tile = u_rows.narrow(0, tile.row(tiling), tile.rows());
        const Tensor h = tile_states(in, tiling, tile, lam, u_tile, h_buffer, carry);
        Tensor g = g_buffer.narrow(0, 0, tile.rows());
        backward_tile(in, tiling, tile, lam, g, h, grad_state.data_ptr<float>(), grad_u, sums);
      }
    }
  });
  const Tensor grad_lam = lam_sums.sum(0).to(log_decay.scalar_type());
  return {grad_u,           grad_lam.narrow(0, 0, n2 / 2).clone(), grad_lam.narrow(0, n2 / 2, n2 / 2).clone(),
          w_in_sums.sum(0), w_out_sums.sum(0),                     feed_sums.sum(0),
          grad_state};
}

namespace {

// All states (batch, length, 2n) of h_t = lam h_{t-1} + x_t; reverse walks time backwards.
Tensor diagonal_scan(const Tensor& x, const Tensor& log_decay, const Tensor& phase, const OptionalTensor& initial_state,
                     bool reverse) {
  check_rows(x, "x", 3);
  const int64_t batch = x.size(0), length = x.size(1), n2 = x.size(2);
  const Eigenvalues lam(log_decay, phase, n2);
  if (initial_state) check_real(*initial_state, "initial_state", {batch, n2});
  Tensor h = at::empty_like(x);
  Tensor carry = initial_state ? initial_state->to(at::kFloat).clone(at::MemoryFormat::Contiguous)
                               : at::zeros({batch, n2}, x.options());
  if (x.numel() == 0) return h;
  const int64_t first = reverse ? (length - 1) * n2 : 0;
  at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      scan_kernels().scan(x.const_data_ptr<float>() + b * length * n2 + first,
                          h.data_ptr<float>() + b * length * n2 + first, reverse ? -n2 : n2, length, n2 / 2,
                          lam.re.data_ptr<float>(), lam.im.data_ptr<float>(), carry.data_ptr<float>() + b * n2, false);
    }
  });
  return h;
}

// Gradients of (x, log_decay, phase, initial_state) of diagonal_scan.
std::tuple<Tensor, Tensor, Tensor, Tensor> diagonal_scan_backward(const Tensor& grad_h, const Tensor& h,
                                                                  const Tensor& log_decay, const Tensor& phase,
                                                                  const OptionalTensor& initial_state, bool reverse) {
  check_rows(h, "h", 3);
  check_real(grad_h, "grad_h", h.sizes());
  const int64_t batch = h.size(0), length = h.size(1), n2 = h.size(2);
  const Eigenvalues lam(log_decay, phase, n2);
  if (initial_state) check_real(*initial_state, "initial_state", {batch, n2});
  Tensor grad_x = grad_h.to(at::kFloat, false, true, at::MemoryFormat::Contiguous);
  Tensor grad_state = at::zeros({batch, n2}, h.options());
  Tensor sums = at::zeros({std::max<int64_t>(batch, 1), n2}, h.options().dtype(at::kDouble));
  const Tensor before = initial_state ? initial_state->to(at::kFloat).contiguous() : at::zeros({batch, n2}, h.options());
  const int64_t first = reverse ? (length - 1) * n2 : 0;
  if (h.numel() > 0) {
    at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        double* sum = sums.data_ptr<double>() + b * n2;
        scan_kernels().adjoint(grad_x.data_ptr<float>() + b * length * n2 + first,
                               h.const_data_ptr<float>() + b * length * n2 + first,
                               before.const_data_ptr<float>() + b * n2, reverse ? -n2 : n2, length, n2 / 2,
                               lam.re.data_ptr<float>(), lam.im.data_ptr<float>(), grad_state.data_ptr<float>() + b * n2,
                               sum, sum + n2 / 2, false);
      }
    });
  }
  const Tensor grad_lam = sums.sum(0).to(log_decay.scalar_type());
  return {grad_x, grad_lam.narrow(0, 0, n2 / 2).clone(), grad_lam.narrow(0, n2 / 2, n2 / 2).clone(), grad_state};
}

// Threads that at::parallel_for runs on in these kernels; 1 in a build without OpenMP.
int64_t threads() {
  std::atomic<int64_t> most{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    const int64_t own = at::get_thread_num() + 1;
    int64_t seen = most.load();
    while (seen < own && !most.compare_exchange_weak(seen, own)) {
    }
  });
  return most.load();
}

TORCH_LIBRARY(compressm_cpp, m) {
  m.def("lti_core(Tensor u, Tensor log_decay, Tensor phase, Tensor w_in, Tensor w_out, Tensor? feed, Tensor? initial_state,"
        " bool shifted, bool store, int rows) -> (Tensor y, Tensor last, Tensor saved)",
        torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(lti_core)));
  m.def("lti_core_backward(Tensor? grad_y, Tensor? grad_last, Tensor u, Tensor log_decay, Tensor phase, Tensor w_in,"
        " Tensor w_out, Tensor? feed, Tensor? initial_state, Tensor saved, bool shifted, bool store, int rows, bool need_u)"
        " -> (Tensor grad_u, Tensor grad_log_decay, Tensor grad_phase, Tensor grad_w_in, Tensor grad_w_out,"
        " Tensor grad_feed, Tensor grad_initial_state)",
        torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(lti_core_backward)));
  register_gradient(m, "lti_core");
  m.def("diagonal_scan(Tensor x, Tensor log_decay, Tensor phase, Tensor? initial_state, bool reverse) -> Tensor",
        &diagonal_scan);
  m.def("diagonal_scan_backward(Tensor grad_h, Tensor h, Tensor log_decay, Tensor phase, Tensor? initial_state,"
        " bool reverse) -> (Tensor, Tensor, Tensor, Tensor)",
        &diagonal_scan_backward);
  m.def("threads() -> int", &threads);
}

}  // namespace
}  // namespace compressm
