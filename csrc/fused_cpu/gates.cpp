// GELU and the gated linear unit with dropout on CPU, forward and backward.
//
// Threads take whole blocks of a mask, so that results do not depend on their number.
#include "core/torch.h"
#include "fused_cpu/gates.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "core/autograd.h"
#include "core/checks.h"
#include "fused_cpu/ops.h"
#include "core/partial_sums.h"

namespace compressm {
namespace {

constexpr int64_t kBlocksPerTask = 128;
constexpr int64_t kRowsPerTask = 1024;  // a multiple of kMaskBlock

Dropout dropout_of(const OptionalTensor& seed, double p) {
  TORCH_CHECK(p >= 0 && p <= 1, "p: expected a probability, got ", p);
  TORCH_CHECK(seed.has_value() || p == 0, "seed: expected a tensor where p is not 0");
  if (!seed.has_value()) return {0, 0, 1.0f};
  TORCH_CHECK(seed->device().is_cpu() && seed->scalar_type() == at::kLong && seed->numel() == 1,
              "seed: expected one int64 on the CPU");
  return {static_cast<std::uint64_t>(*seed->const_data_ptr<int64_t>()),
          static_cast<std::int32_t>(std::lrint(p * 65536)), p < 1 ? static_cast<float>(1 / (1 - p)) : 0.0f};
}

// Calls body(begin, end) for ranges of `count` elements that begin at a block.
template <typename Body>
void for_each_range(int64_t count, const Body& body) {
  at::parallel_for(0, (count + kMaskBlock - 1) / kMaskBlock, kBlocksPerTask, [&](int64_t begin, int64_t end) {
    body(begin * kMaskBlock, std::min(end * kMaskBlock, count));
  });
}

// The shape (..., H) of what a gate makes of pre (..., 2H).
std::vector<int64_t> gated_shape(const Tensor& pre) {
  TORCH_CHECK(pre.dim() > 0 && pre.size(-1) % 2 == 0, "pre: expected (..., 2H), got ", pre.sizes());
  std::vector<int64_t> shape = pre.sizes().vec();
  shape.back() /= 2;
  return shape;
}

struct NarrowLayer {
  Tensor x, weight, bias;  // contiguous
  GatedLinear layer;
  int64_t rows;
  NarrowLayer(const Tensor& input, const Tensor& matrix, const Tensor& offset) {
    TORCH_CHECK(input.dim() > 0 && matrix.dim() == 2, "expected x (..., K) and weight (2H, K)");
    const int64_t inputs = input.size(-1), channels = matrix.size(0) / 2;
    TORCH_CHECK(inputs > 0 && channels > 0 && inputs <= kNarrow && channels <= kNarrow, "expected 1 to ", kNarrow,
                " inputs and channels, got ", inputs, " and ", channels);
    x = dense(input, "x", input.sizes());
    weight = dense(matrix, "weight", {2 * channels, inputs});
    bias = dense(offset, "bias", {2 * channels});
    layer = {weight.const_data_ptr<float>(), bias.const_data_ptr<float>(), inputs, channels};
    rows = x.numel() / inputs;
  }
  int64_t tasks() const { return (rows + kRowsPerTask - 1) / kRowsPerTask; }
  // Calls body(task, first row, end) for every task.
  template <typename Body>
  void for_each_task(const Body& body) const {
    at::parallel_for(0, tasks(), 4, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        body(task, task * kRowsPerTask, std::min((task + 1) * kRowsPerTask, rows));
      }
    });
  }
  std::vector<int64_t> output_shape() const {
    std::vector<int64_t> shape = x.sizes().vec();
    shape.back() = layer.channels;
    return shape;
  }
};

}  // namespace

Tensor gelu(const Tensor& x, const OptionalTensor& seed, double p) {
  const Tensor input = dense(x, "x", x.sizes());
  const Dropout dropout = dropout_of(seed, p);
  Tensor out = at::empty(x.sizes(), x.options());
  const float* in = input.const_data_ptr<float>();
  float* y = out.data_ptr<float>();
  for_each_range(x.numel(), [&](int64_t begin, int64_t end) { gate_kernels().gelu(in, y, begin, end, dropout); });
  return out;
}

Tensor gelu_backward(const Tensor& grad, const Tensor& x, const OptionalTensor& seed, double p) {
  const Tensor input = dense(x, "x", x.sizes()), grad_all = dense(grad, "grad_out", x.sizes());
  const Dropout dropout = dropout_of(seed, p);
  Tensor grad_x = at::empty(x.sizes(), x.options());
  const float *g = grad_all.const_data_ptr<float>(), *in = input.const_data_ptr<float>();
  float* out = grad_x.data_ptr<float>();
  for_each_range(x.numel(),
                 [&](int64_t begin, int64_t end) { gate_kernels().gelu_backward(g, in, out, begin, end, dropout); });
  return grad_x;
}

Tensor glu(const Tensor& pre, const Tensor& residual, const OptionalTensor& seed, double p) {
  const Tensor halves = dense(pre, "pre", pre.sizes()), stream = dense(residual, "residual", gated_shape(pre));
  const Dropout dropout = dropout_of(seed, p);
  Tensor out = at::empty(residual.sizes(), residual.options());
  const float *in = halves.const_data_ptr<float>(), *rest = stream.const_data_ptr<float>();
  float* y = out.data_ptr<float>();
  for_each_range(out.numel(), [&](int64_t begin, int64_t end) {
    gate_kernels().glu(in, rest, y, out.size(-1), begin, end, dropout);
  });
  return out;
}

Tensor glu_backward(const Tensor& grad, const Tensor& pre, const OptionalTensor& seed, double p) {
  const Tensor halves = dense(pre, "pre", pre.sizes()), grad_all = dense(grad, "grad_out", gated_shape(pre));
  const Dropout dropout = dropout_of(seed, p);
  Tensor grad_pre = at::empty(pre.sizes(), pre.options());
  const float *g = grad_all.const_data_ptr<float>(), *in = halves.const_data_ptr<float>();
  float* out = grad_pre.data_ptr<float>();
  for_each_range(grad.numel(), [&](int64_t begin, int64_t end) {
    gate_kernels().glu_backward(g, in, out, grad.size(-1), begin, end, dropout);
  });
  return grad_pre;
}

Tensor gated_linear(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& residual,
                    const OptionalTensor& seed, double p) {
  const NarrowLayer narrow(x, weight, bias);
  const Tensor stream = dense(residual, "residual", narrow.output_shape());
  const Dropout dropout = dropout_of(seed, p);
  Tensor out = at::empty(residual.sizes(), residual.options());
  const float *in = narrow.x.const_data_ptr<float>(), *rest = stream.const_data_ptr<float>();
  float* y = out.data_ptr<float>();
  narrow.for_each_task([&](int64_t, int64_t begin, int64_t end) {
    gate_kernels().gated_linear(narrow.layer, in, rest, y, begin, end, dropout);
  });
  return out;
}

// Every task has its own sums of the gradients of weight and bias, added in order.
std::tuple<Tensor, Tensor, Tensor> gated_linear_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                         const Tensor& bias, const OptionalTensor& seed,
                                                         double p) {
  const NarrowLayer narrow(x, weight, bias);
  const Tensor grad_all = dense(grad, "grad_out", narrow.output_shape());
  const Dropout dropout = dropout_of(seed, p);
  const int64_t weights = weight.numel(), each = weights + bias.numel();
  Tensor grad_x = at::empty(x.sizes(), x.options()), partials = at::empty({narrow.tasks(), each}, x.options());
  const float *g = grad_all.const_data_ptr<float>(), *in = narrow.x.const_data_ptr<float>();
  float *to = grad_x.data_ptr<float>(), *sums = partials.data_ptr<float>();
  narrow.for_each_task([&](int64_t task, int64_t begin, int64_t end) {
    float* own = sums + task * each;
    gate_kernels().gated_linear_backward(narrow.layer, g, in, to, own, own + weights, begin, end, dropout);
  });
  const Tensor total = sum_partials(partials);
  return {grad_x, total.narrow(0, 0, weights).view(weight.sizes()).clone(), total.narrow(0, weights, each - weights).clone()};
}

namespace {

TORCH_LIBRARY_FRAGMENT(compressm_cpp, m) {
  m.def("gelu_dropout(Tensor x, Tensor? seed, float p) -> (Tensor out)",
        torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(gelu)));
  m.def("gelu_dropout_backward(Tensor grad_out, Tensor x, Tensor? seed, float p) -> (Tensor grad_x)",
        torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(gelu_backward)));
  m.def("glu_dropout_add(Tensor pre, Tensor residual, Tensor? seed, float p) -> (Tensor out)",
        torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(glu)));
  m.def("glu_dropout_add_backward(Tensor grad_out, Tensor pre, Tensor? seed, float p) -> (Tensor grad_pre)",
        torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(glu_backward)));
  m.def("gated_linear(Tensor x, Tensor weight, Tensor bias, Tensor residual, Tensor? seed, float p) -> (Tensor out)",
        torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(gated_linear)));
  m.def("gated_linear_backward(Tensor grad_out, Tensor x, Tensor weight, Tensor bias, Tensor? seed, float p)"
        " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
        torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(gated_linear_backward)));
  register_gradient(m, "gelu_dropout");
  register_gradient(m, "glu_dropout_add", "residual");
  register_gradient(m, "gated_linear", "residual");
}

}  // namespace
}  // namespace compressm
