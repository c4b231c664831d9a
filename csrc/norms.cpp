// Layer and RMS normalisation over the last axis on CPU, forward and backward.
//
// The rows are cut into chunks whose number depends on the shape alone.  Each has its own partial gradients of weight and
// bias, added in order; mean and variance are computed again in the backward, which costs less than reading them.
#include "norms.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "autograd.h"
#include "checks.h"
#include "ops.h"
#include "partial_sums.h"

namespace compressm {
namespace {

constexpr int64_t kChunk = 8192;  // floats, about
constexpr int64_t kRows = 16;     // fewest of a chunk; a multiple of every kernel's rows of a tile

struct Chunks {
  int64_t length, rows, chunk;
  explicit Chunks(const Tensor& x)
      : length(x.size(-1)), rows(x.numel() / length), chunk(std::max(kRows, kChunk / length / kRows * kRows)) {}
  int64_t count() const { return (rows + chunk - 1) / chunk; }
  // Calls body(index, first float, rows) for every chunk.
  template <typename Body>
  void for_each(const Body& body) const {
    at::parallel_for(0, count(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) body(k, k * chunk * length, std::min(chunk, rows - k * chunk));
    });
  }
};

}  // namespace

Tensor norm_forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, double eps, bool centred) {
  TORCH_CHECK(x.dim() > 0 && x.numel() > 0, "x: expected rows");
  const Chunks chunks(x);
  const Tensor input = dense(x, "x", x.sizes()), scale = dense(weight, "weight", {chunks.length});
  const Tensor shift = bias ? dense(*bias, "bias", {chunks.length}) : at::zeros_like(scale);
  const Norm norm{scale.const_data_ptr<float>(), shift.const_data_ptr<float>(), chunks.length, static_cast<float>(eps),
                  centred};
  Tensor out = at::empty(x.sizes(), x.options());
  const float* in = input.const_data_ptr<float>();
  float* y = out.data_ptr<float>();
  chunks.for_each([&](int64_t, int64_t at, int64_t rows) { norm_kernels().forward(norm, in + at, y + at, rows); });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> norm_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, double eps,
                                                 bool centred) {
  TORCH_CHECK(x.dim() > 0 && x.numel() > 0, "x: expected rows");
  const Chunks chunks(x);
  const int64_t length = chunks.length, sums = centred ? 2 : 1;
  const Tensor input = dense(x, "x", x.sizes()), grad_rows = dense(grad, "grad_out", x.sizes());
  const Tensor scale = dense(weight, "weight", {length});
  const Norm norm{scale.const_data_ptr<float>(), nullptr, length, static_cast<float>(eps), centred};
  Tensor grad_x = at::empty(x.sizes(), x.options()), partials = at::empty({chunks.count(), sums, length}, x.options());
  const float *in = input.const_data_ptr<float>(), *g = grad_rows.const_data_ptr<float>();
  float *gx = grad_x.data_ptr<float>(), *partial = partials.data_ptr<float>();
  chunks.for_each([&](int64_t index, int64_t at, int64_t rows) {
    float* own = partial + index * sums * length;
    norm_kernels().backward(norm, in + at, g + at, gx + at, own, own + length, rows);
  });
  const Tensor total = sum_partials(partials);
  if (!centred) return {grad_x, total, at::empty({0}, x.options())};
  return {grad_x, total.narrow(0, 0, length).clone(), total.narrow(0, length, length).clone()};
}

namespace {

struct NormOp {
  static constexpr const char *name = "norm", *passed = "";
};

TORCH_LIBRARY_FRAGMENT(compressm_cpp, m) {
  m.def("norm(Tensor x, Tensor weight, Tensor? bias, float eps, bool centred) -> (Tensor out)",
        torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(norm_forward)));
  m.def("norm_backward(Tensor grad_out, Tensor x, Tensor weight, float eps, bool centred)"
        " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
        torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(norm_backward)));
  register_gradient<NormOp>(m);
}

}  // namespace
}  // namespace compressm
