// The selective scan on CPU: checks, tasks and the sums of partial gradients around the kernels of selective_scan.h.
//
// Forward tasks are (sequence, group, up to kScanBlocks blocks of channels).  The backward walks segments of time from the
// last to the first; in one segment its tasks are (lane of sequences, group, share of the group's blocks).  Lanes and shares
// depend on shapes alone and every sum has a fixed order, so that the number of threads changes no bit of a result.
#include "core/torch.h"

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "core/autograd.h"
#include "core/tasks.h"
#include "core/tensor.h"
#include "core/partial_sums.h"
#include "selective_scan/selective_scan.h"
#include "selective_scan/selective_scan_tensors.h"

namespace compressm {
namespace {

constexpr int64_t kSegmentTiles = 8;  // tiles of a segment

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

void check(const Tensor& t, const char* name, at::IntArrayRef shape, at::ScalarType type = at::kFloat) {
  TORCH_CHECK(t.device().is_cpu() && t.scalar_type() == type && t.sizes() == shape, name, ": expected a ",
              type == at::kFloat ? "float32" : "bfloat16", " CPU tensor of shape ", shape, ", got ", t.sizes(), " of ",
              t.scalar_type());
}

void check(const OptionalTensor& t, const char* name, at::IntArrayRef shape, at::ScalarType type = at::kFloat) {
  if (t) check(*t, name, shape, type);
}

// The kernels read what they do not write through the same kind of view.
ScanRows rows_of(const Tensor& t) {
  return {const_cast<void*>(t.const_data_ptr()), t.scalar_type() == at::kBFloat16, t.stride(0), t.stride(1), t.stride(2)};
}

ScanMixing mixing_of(const Tensor& t) {
  return {const_cast<float*>(t.const_data_ptr<float>()), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

// The arguments of a scan, checked; holds the contiguous copies of small ones that the kernels point to.
struct Scan {
  int64_t batch, channels, length, states, groups;
  Tensor A, D, bias, initial;
  ScanInputs in{};
  std::vector<ScanSequence> sequences;
  int64_t tiles;  // room for saved states

  Scan(const Tensor& u, const Tensor& delta, const Tensor& a, const Tensor& B, const Tensor& C, const OptionalTensor& d,
       const OptionalTensor& z, const OptionalTensor& delta_bias, const OptionalTensor& initial_state,
       const OptionalTensor& cu_seqlens, bool softplus) {
    TORCH_CHECK(u.dim() == 3 && a.dim() == 2 && B.dim() == 4, "expected u (batch, D, L), A (D, N) and B (batch, G, N, L)");
    batch = u.size(0), channels = u.size(1), length = u.size(2), states = a.size(1), groups = B.size(1);
    TORCH_CHECK(groups > 0 && channels % groups == 0, "B: expected a number of groups that divides D, got ", groups);
    const at::ScalarType wide = u.scalar_type() == at::kBFloat16 ? at::kBFloat16 : at::kFloat;
    check(u, "u", {batch, channels, length}, wide);
    check(delta, "delta", {batch, channels, length}, wide);
    check(a, "A", {channels, states});
    check(B, "B", {batch, groups, states, length});
    check(C, "C", {batch, groups, states, length});
    check(d, "D", {channels});
    check(z, "z", {batch, channels, length}, wide);
    check(delta_bias, "delta_bias", {channels});
    pack(cu_seqlens);
    check(initial_state, "initial_state", {count(), channels, states});
    A = a.contiguous();
    in.channels = channels, in.states = states, in.group_channels = channels / groups, in.softplus = softplus;
    in.u = rows_of(u), in.delta = rows_of(delta), in.B = mixing_of(B), in.C = mixing_of(C);
    if (z) in.z = rows_of(*z);
    in.A = A.const_data_ptr<float>();
    in.D = hold(D, d), in.bias = hold(bias, delta_bias), in.initial = hold(initial, initial_state);
  }

  int64_t count() const { return static_cast<int64_t>(sequences.size()); }
  int64_t blocks() const { return ceil_div(in.group_channels, selective_scan_kernels().width); }

  // Zeros where packed sequences leave room for states that they do not have.
  void clear_unused(const Tensor& checkpoints) const {
    for (int64_t i = 0; i < count(); ++i) {
      const int64_t used = sequences[i].first_tile + sequences[i].tiles();
      const int64_t end = i + 1 < count() ? sequences[i + 1].first_tile : tiles;
      if (used < end) checkpoints.narrow(0, used, end - used).zero_();
    }
  }

  int64_t longest() const {
    int64_t most = 0;
    for (const ScanSequence& sequence : sequences) most = std::max(most, sequence.length);
    return most;
  }

 private:
  static const float* hold(Tensor& place, const OptionalTensor& t) {
    if (!t) return nullptr;
    place = t->contiguous();
    return place.const_data_ptr<float>();
  }

  void pack(const OptionalTensor& cu_seqlens) {
    if (!cu_seqlens) {
      const int64_t each = ceil_div(length, kScanTile);
      tiles = batch * each;
      for (int64_t b = 0; b < batch; ++b) sequences.push_back({b, b, 0, length, b * each});
      return;
    }
    TORCH_CHECK(batch == 1 && cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 2 && cu_seqlens->device().is_cpu() &&
                    (cu_seqlens->scalar_type() == at::kInt || cu_seqlens->scalar_type() == at::kLong),
                "cu_seqlens: expected int32 or int64 (sequences + 1,) on the CPU and a batch of 1");
    const Tensor bounds = cu_seqlens->to(at::kLong).contiguous();
    const int64_t* at = bounds.const_data_ptr<int64_t>();
    const int64_t pieces = bounds.size(0) - 1;
    TORCH_CHECK(at[0] == 0 && at[pieces] == length, "cu_seqlens: expected numbers from 0 to L = ", length);
    tiles = length / kScanTile + pieces;  // every sequence ends with at most one incomplete tile
    for (int64_t i = 0; i < pieces; ++i) {
      TORCH_CHECK(at[i] <= at[i + 1], "cu_seqlens: expected numbers that rise");
      sequences.push_back({i, 0, at[i], at[i + 1] - at[i], at[i] / kScanTile + i});
    }
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> selective_scan(
    const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C, const OptionalTensor& D,
    const OptionalTensor& z, const OptionalTensor& delta_bias, const OptionalTensor& initial_state,
    const OptionalTensor& cu_seqlens, bool softplus, bool train) {
  const Scan scan(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, softplus);
  const auto options = A.options();
  Tensor out = at::empty_like(u), last = at::empty({scan.count(), scan.channels, scan.states}, options);
  Tensor checkpoints = train ? at::empty({scan.tiles, scan.states, scan.channels}, options) : at::empty({0}, options);
  if (train) scan.clear_unused(checkpoints);
  Tensor y = train && z ? at::empty_like(u) : at::empty({0}, u.options());
  ScanOutputs outputs{rows_of(out), {}, last.data_ptr<float>(), train ? checkpoints.data_ptr<float>() : nullptr};
  if (train && z) outputs.y = rows_of(y);
  const int64_t parts = ceil_div(scan.blocks(), kScanBlocks), tasks = scan.count() * scan.groups * parts;
  for_each_task(tasks, selective_scan_kernels().forward_scratch(scan.states), [&](int64_t task, float* scratch) {
    const int64_t first = task % parts * kScanBlocks;
    const ScanBlocks blocks{task / parts % scan.groups, first, std::min(kScanBlocks, scan.blocks() - first)};
    selective_scan_kernels().forward(scan.in, outputs, scan.sequences[task / parts / scan.groups], blocks, scratch);
  });
  return {out, last, checkpoints, y};
}

namespace {

// How the backward's tasks share the work: lanes of sequences, each with about as many steps, and shares of the blocks.
struct Shares {
  int64_t lanes, shares, segment;
  std::vector<int64_t> first;  // of each lane's sequences, and the end
  Shares(const Scan& scan, int64_t parts) {
    lanes = std::clamp<int64_t>(scan.count(), 1, parts);
    shares = std::clamp<int64_t>(parts / (lanes * scan.groups), 1, std::max<int64_t>(scan.blocks(), 1));
    segment = shares == 1 ? std::max<int64_t>(ceil_div(scan.longest(), kScanTile), 1) : kSegmentTiles;
    const int64_t steps = scan.batch * scan.length;
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const auto begins = [&](const ScanSequence& s) { return (s.batch * scan.length + s.start) * lanes < lane * steps; };
      const auto at = std::partition_point(scan.sequences.begin(), scan.sequences.end(), begins);
      first.push_back(at - scan.sequences.begin());
    }
    first.push_back(scan.count());
  }
};

// grad (batch, G, N, L), its stretch of each sequence, from partials (shares, sequences, G, N, segment steps).
void add_shares(const Scan& scan, const Shares& shares, const Tensor& partials, const ScanMixing& grad, int64_t low) {
  const int64_t steps = shares.segment * kScanTile, rows = scan.count() * scan.groups * scan.states;
  const float* from = partials.const_data_ptr<float>();
  at::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t n = row % scan.states, group = row / scan.states % scan.groups;
      const ScanSequence& sequence = scan.sequences[row / scan.states / scan.groups];
      const int64_t start = low * kScanTile, stop = std::min(start + steps, sequence.length);
      float* to = grad.at(sequence.batch, group, sequence.start) + n * grad.state;
      for (int64_t t = start; t < stop; ++t) {
        float sum = 0;
        for (int64_t k = 0; k < shares.shares; ++k) sum += from[(k * rows + row) * steps + t - start];
        to[t * grad.time] = sum;
      }
    }
  });
}

struct Partials {
  Tensor B, C, A, D, bias;  // one row per share, or per lane of sequences
  Partials(const Scan& scan, const Shares& shares, const at::TensorOptions& options) {
    const int64_t held = shares.shares == 1 ? 0 : shares.shares;
    B = at::empty({held, scan.count(), scan.groups, scan.states, shares.segment * kScanTile}, options);
    C = at::empty_like(B);
    A = at::zeros({shares.lanes, scan.states, scan.channels}, options);
    D = at::zeros({shares.lanes, scan.channels}, options);
    bias = at::zeros({shares.lanes, scan.channels}, options);
  }
};

void backward_segments(const Scan& scan, const ScanGradients& gradients, const Tensor& grad_B, const Tensor& grad_C,
                       const Shares& shares, Partials& partials) {
  const int64_t blocks = scan.blocks(), tiles = ceil_div(scan.longest(), kScanTile);
  const int64_t tasks = shares.lanes * scan.groups * shares.shares;
  for (int64_t low = (ceil_div(tiles, shares.segment) - 1) * shares.segment; low >= 0; low -= shares.segment) {
    for_each_task(tasks, selective_scan_kernels().backward_scratch(scan.states), [&](int64_t task, float* scratch) {
      const int64_t share = task % shares.shares, lane = task / shares.shares / scan.groups;
      const int64_t begin = blocks * share / shares.shares, end = blocks * (share + 1) / shares.shares;
      const ScanBlocks own{task / shares.shares % scan.groups, begin, end - begin};
      const bool whole = shares.shares == 1;
      const ScanMixingSums sums{mixing_of(whole ? grad_B : partials.B[share]), mixing_of(whole ? grad_C : partials.C[share]),
                                whole};
      ScanGradients grad = gradients;
      grad.A = partials.A[lane].data_ptr<float>();
      grad.D = partials.D[lane].data_ptr<float>();
      grad.bias = partials.bias[lane].data_ptr<float>();
      selective_scan_kernels().backward(scan.in, grad, sums, scan.sequences.data() + shares.first[lane],
                         shares.first[lane + 1] - shares.first[lane], own, low, low + shares.segment, scratch);
    });
    if (shares.shares > 1) {
      add_shares(scan, shares, partials.B, mixing_of(grad_B), low);
      add_shares(scan, shares, partials.C, mixing_of(grad_C), low);
    }
  }
}

}  // namespace

ScanGradientTensors selective_scan_gradients(const OptionalTensor& maybe_grad, const OptionalTensor& grad_last,
                                             const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
                                             const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
                                             const OptionalTensor& delta_bias, const OptionalTensor& initial_state,
                                             const OptionalTensor& cu_seqlens, const Tensor& checkpoints, const Tensor& y,
                                             bool softplus, int64_t parts) {
  const Scan scan(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, softplus);
  const Tensor grad_out = maybe_grad ? *maybe_grad : at::zeros_like(u);
  check(grad_out, "grad_out", u.sizes(), u.scalar_type());
  check(grad_last, "grad_last", {scan.count(), scan.channels, scan.states});
  check(checkpoints, "checkpoints", {scan.tiles, scan.states, scan.channels});
  TORCH_CHECK(checkpoints.is_contiguous(), "checkpoints: expected a contiguous tensor");
  if (z) check(y, "y", u.sizes(), u.scalar_type());
  const Tensor grad_B = at::empty_like(B), grad_C = at::empty_like(C);
  if (scan.channels == 0) grad_B.zero_(), grad_C.zero_();
  const auto options = A.options();
  const auto like = [&](const OptionalTensor& t) { return t ? at::empty_like(*t) : at::empty({0}, u.options()); };
  Tensor grad_u = like(u), grad_delta = like(delta), grad_z = like(z);
  Tensor state = at::zeros({scan.count(), scan.states, scan.channels}, options);
  if (grad_last) state.copy_(grad_last->transpose(1, 2));
  const Shares shares(scan, parts);
  Partials partials(scan, shares, options);
  ScanGradients gradients{};
  gradients.out = rows_of(grad_out), gradients.u = rows_of(grad_u), gradients.delta = rows_of(grad_delta);
  if (z) gradients.y = rows_of(y), gradients.z = rows_of(grad_z);
  gradients.checkpoints = checkpoints.const_data_ptr<float>(), gradients.state = state.data_ptr<float>();
  backward_segments(scan, gradients, grad_B, grad_C, shares, partials);
  Tensor grad_A = like(A), grad_D = like(D), grad_bias = like(delta_bias), grad_initial = like(initial_state);
  grad_A.copy_(sum_partials(partials.A).view({scan.states, scan.channels}).t());
  if (D) grad_D.copy_(sum_partials(partials.D));
  if (delta_bias) grad_bias.copy_(sum_partials(partials.bias));
  if (initial_state) grad_initial.copy_(state.transpose(1, 2));
  return {grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias, grad_initial};
}

namespace {

ScanGradientTensors selective_scan_backward(const OptionalTensor& grad_out, const OptionalTensor& grad_last, const Tensor& u,
                                            const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
                                            const OptionalTensor& D, const OptionalTensor& z,
                                            const OptionalTensor& delta_bias, const OptionalTensor& initial_state,
                                            const OptionalTensor& cu_seqlens, const Tensor& checkpoints, const Tensor& y,
                                            bool softplus) {
  return selective_scan_gradients(grad_out, grad_last, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens,
                                  checkpoints, y, softplus, kScanParts);
}

TORCH_LIBRARY_FRAGMENT(compressm_cpp, m) {
  m.def("selective_scan(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias,"
        " Tensor? initial_state, Tensor? cu_seqlens, bool softplus, bool train)"
        " -> (Tensor out, Tensor last, Tensor checkpoints, Tensor y)",
        torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(selective_scan)));
  m.def("selective_scan_backward(Tensor? grad_out, Tensor? grad_last, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C,"
        " Tensor? D, Tensor? z, Tensor? delta_bias, Tensor? initial_state, Tensor? cu_seqlens, Tensor checkpoints, Tensor y,"
        " bool softplus) -> (Tensor grad_u, Tensor grad_delta, Tensor grad_A, Tensor grad_B, Tensor grad_C, Tensor grad_D,"
        " Tensor grad_z, Tensor grad_delta_bias, Tensor grad_initial_state)",
        torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(selective_scan_backward)));
  register_gradient(m, "selective_scan");
}

}  // namespace
}  // namespace compressm
