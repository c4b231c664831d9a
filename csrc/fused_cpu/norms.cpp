// Layer and RMS normalisation over the last axis on CPU, forward and backward.
//
// The rows are cut into chunks whose number depends on the shape alone.  Each has its own partial gradients of weight and
// bias, added in order; mean and variance are computed again in the backward, which costs less than reading them.
#include "core/torch.h"
#include "fused_cpu/norms.h"

#include <ATen/ops/div.h>
#include <ATen/ops/full.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>

#include "core/autograd.h"
#include "core/checks.h"
#include "fused_cpu/ops.h"
#include "core/partial_sums.h"

namespace compressm {
namespace {

constexpr int64_t kChunk = 8192;  // floats, about
constexpr int64_t kRows = 16;     // fewest of a chunk; a multiple of every kernel's rows of a tile

// Rows in sequences that no chunk crosses.
struct Chunks {
  int64_t length, sequences, rows, chunk, each;  // floats of a row, sequences, rows of one, of a chunk, chunks of one
  Chunks(const Tensor& x, int64_t rows_of_one)
      : length(x.size(-1)),
        sequences(x.numel() / length / rows_of_one),
        rows(rows_of_one),
        chunk(std::max(kRows, kChunk / length / kRows * kRows)),
        each((rows + chunk - 1) / chunk) {}
  int64_t count() const { return sequences * each; }
  // Calls body(index, sequence, first float, rows) for every chunk.
  template <typename Body>
  void for_each(const Body& body) const {
    at::parallel_for(0, count(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const int64_t sequence = k / each, row = k % each * chunk;
        body(k, sequence, (sequence * rows + row) * length, std::min(chunk, rows - row));
      }
    });
  }
};

// All rows as one sequence.
Chunks chunks_of(const Tensor& x) {
  TORCH_CHECK(x.dim() > 0 && x.numel() > 0, "x: expected rows");
  return Chunks(x, x.numel() / x.size(-1));
}

// Whether every sequence of x (batch, L, H) has the same gradient in all its rows, and no memory for more.
bool shared_by_rows(const Tensor& grad, const Tensor& x) {
  return x.dim() == 3 && grad.sizes() == x.sizes() && x.size(1) > 1 && grad.stride(1) == 0;
}

}  // namespace

Tensor norm_forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, double eps, bool centred) {
  if (x.numel() == 0) return at::empty_like(x);
  const Chunks chunks = chunks_of(x);
  const Tensor input = dense(x, "x", x.sizes()), scale = dense(weight, "weight", {chunks.length});
  const Tensor shift = bias ? dense(*bias, "bias", {chunks.length}) : at::zeros_like(scale);
  const Norm norm{scale.const_data_ptr<float>(), shift.const_data_ptr<float>(), chunks.length, static_cast<float>(eps),
                  centred};
  Tensor out = at::empty(x.sizes(), x.options());
  const float* in = input.const_data_ptr<float>();
  float* y = out.data_ptr<float>();
  chunks.for_each([&](int64_t, int64_t, int64_t at, int64_t rows) { norm_kernels().forward(norm, in + at, y + at, rows); });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> norm_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, double eps,
                                                 bool centred) {
  if (x.numel() == 0) return {at::empty_like(x), at::zeros_like(weight), at::zeros({centred ? weight.numel() : 0}, x.options())};
  const bool shared = shared_by_rows(grad, x);
  const Chunks chunks = shared ? Chunks(x, x.size(1)) : chunks_of(x);
  const int64_t length = chunks.length, sums = centred ? 2 : 1;
  const Tensor input = dense(x, "x", x.sizes()), scale = dense(weight, "weight", {length});
  const Tensor grad_rows =
      shared ? dense(grad.select(1, 0), "grad_out", {x.size(0), length}) : dense(grad, "grad_out", x.sizes());
  const Norm norm{scale.const_data_ptr<float>(), nullptr, length, static_cast<float>(eps), centred};
  Tensor grad_x = at::empty(x.sizes(), x.options()), partials = at::zeros({chunks.count(), sums, length}, x.options());
  const float *in = input.const_data_ptr<float>(), *g = grad_rows.const_data_ptr<float>();
  float *gx = grad_x.data_ptr<float>(), *partial = partials.data_ptr<float>();
  chunks.for_each([&](int64_t index, int64_t sequence, int64_t at, int64_t rows) {
    float* own = partial + index * sums * length;
    const float* grads = g + (shared ? sequence * length : at);
    norm_kernels().backward(norm, in + at, grads, shared ? 0 : length, gx + at, own, own + length, rows);
  });
  const Tensor total = sum_partials(partials);
  if (!centred) return {grad_x, total, at::empty({0}, x.options())};
  return {grad_x, total.narrow(0, 0, length).clone(), total.narrow(0, length, length).clone()};
}

namespace {

// The mean over L of the norm of x (batch, L, H): (batch, H).
Tensor norm_mean(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, double eps, bool centred) {
  TORCH_CHECK(x.dim() == 3, "x: expected (batch, L, H)");
  if (x.numel() == 0) return at::full({x.size(0), x.size(2)}, std::numeric_limits<float>::quiet_NaN(), x.options());
  const Chunks chunks(x, x.size(1));
  const int64_t length = chunks.length;
  const Tensor input = dense(x, "x", x.sizes()), scale = dense(weight, "weight", {length});
  const Tensor shift = bias ? dense(*bias, "bias", {length}) : at::zeros_like(scale);
  const Norm norm{nullptr, nullptr, length, static_cast<float>(eps), centred};
  Tensor partials = at::zeros({chunks.count(), length}, x.options()), out = at::empty({x.size(0), length}, x.options());
  const float* in = input.const_data_ptr<float>();
  float* partial = partials.data_ptr<float>();
  chunks.for_each([&](int64_t index, int64_t, int64_t at, int64_t rows) {
    norm_kernels().add_rows(norm, in + at, partial + index * length, rows);
  });
  const float *w = scale.const_data_ptr<float>(), *b = shift.const_data_ptr<float>();
  for (int64_t s = 0; s < chunks.sequences; ++s) {
    for (int64_t c = 0; c < length; ++c) {
      double sum = 0;
      for (int64_t k = 0; k < chunks.each; ++k) sum += partial[(s * chunks.each + k) * length + c];
      out.data_ptr<float>()[s * length + c] = static_cast<float>(sum / static_cast<double>(chunks.rows)) * w[c] + b[c];
    }
  }
  return out;
}

// Gradients of (x, weight, bias); the last is empty unless `centred`.
std::tuple<Tensor, Tensor, Tensor> norm_mean_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, double eps,
                                                      bool centred) {
  TORCH_CHECK(x.dim() == 3, "x: expected (batch, L, H)");
  const Tensor row = at::div(grad, static_cast<double>(x.size(1)));
  return norm_backward(row.unsqueeze(1).expand(x.sizes()), x, weight, eps, centred);
}

TORCH_LIBRARY_FRAGMENT(compressm_cpp, m) {
  m.def("norm(Tensor x, Tensor weight, Tensor? bias, float eps, bool centred) -> (Tensor out)",
        torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(norm_forward)));
  m.def("norm_backward(Tensor grad_out, Tensor x, Tensor weight, float eps, bool centred)"
        " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
        torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(norm_backward)));
  register_gradient(m, "norm");
  m.def("norm_mean(Tensor x, Tensor weight, Tensor? bias, float eps, bool centred) -> (Tensor out)",
        torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(norm_mean)));
  m.def("norm_mean_backward(Tensor grad_out, Tensor x, Tensor weight, float eps, bool centred)"
        " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
        torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(norm_mean_backward)));
  register_gradient(m, "norm_mean");
}

}  // namespace
}  // namespace compressm
