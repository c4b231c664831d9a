// A linear layer of few inputs behind their standardisation on CPU, for data that have no gradient:
//
//   out = ((x - mean) / std) W^T + bias,   x (..., K) bytes or floats, W (H, K)
//
// A product with so few inputs is bound by what it writes, and its input is small as bytes: x is standardised again in the
// backward.  Rows are cut into chunks whose number depends on the shape alone, each with its own sums for the gradient.
#include "core/torch.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "core/autograd.h"
#include "core/checks.h"
#include "core/partial_sums.h"

namespace compressm {
namespace {

using at::Tensor;
using std::int64_t;

constexpr int kMaxInputs = 8;
constexpr int64_t kChunk = 8192;  // floats of the output, about
constexpr int64_t kRows = 16;     // fewest of a chunk

// All arguments but the weight's values, contiguous.
struct Layer {
  Tensor x, mean, std;
  int64_t inputs, outputs, rows, chunk;
  Layer(const Tensor& data, const Tensor& means, const Tensor& stds, const Tensor& weight) {
    TORCH_CHECK(data.dim() > 0 && weight.dim() == 2, "expected x (..., K) and weight (H, K)");
    inputs = data.size(-1), outputs = weight.size(0);
    TORCH_CHECK(inputs > 0 && inputs <= kMaxInputs && outputs > 0, "expected 1 to ", kMaxInputs, " inputs, and outputs");
    rows = data.numel() / inputs;
    TORCH_CHECK(data.scalar_type() == at::kByte || data.scalar_type() == at::kFloat, "x: expected uint8 or float32");
    x = dense(data, "x", data.sizes(), data.scalar_type());
    mean = dense(means, "mean", {inputs}), std = dense(stds, "std", {inputs});
    chunk = std::max(kRows, kChunk / outputs);
  }
  int64_t chunks() const { return (rows + chunk - 1) / chunk; }
  // Calls body(chunk, first row, standardised rows (count, K), count) for every chunk.
  template <typename Body>
  void for_each_chunk(const Body& body) const {
    at::parallel_for(0, chunks(), 1, [&](int64_t begin, int64_t end) {
      std::vector<float> buffer(chunk * inputs);
      for (int64_t k = begin; k < end; ++k) {
        const int64_t first = k * chunk, count = std::min(chunk, rows - first);
        if (x.scalar_type() == at::kByte) {
          standardise(x.const_data_ptr<std::uint8_t>() + first * inputs, buffer.data(), count);
        } else {
          standardise(x.const_data_ptr<float>() + first * inputs, buffer.data(), count);
        }
        body(k, first, buffer.data(), count);
      }
    });
  }

 private:
  template <typename Element>
  void standardise(const Element* from, float* to, int64_t count) const {
    const float *m = mean.const_data_ptr<float>(), *s = std.const_data_ptr<float>();
    const auto column = [&](int64_t i, int64_t pitch) {
      for (int64_t r = 0; r < count; ++r) to[r * pitch + i] = (static_cast<float>(from[r * pitch + i]) - m[i]) / s[i];
    };
    if (inputs == 1) return column(0, 1);
    for (int64_t i = 0; i < inputs; ++i) column(i, inputs);
  }
};

// out (count, H) of x (count, K); columns (K, H) is the weight transposed.
template <int K>
void forward_rows(const float* x, const float* columns, const float* bias, float* out, int64_t count, int64_t outputs) {
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t h = 0; h < outputs; ++h) {
      float sum = bias[h];
      for (int i = 0; i < K; ++i) sum += x[r * K + i] * columns[i * outputs + h];
      out[r * outputs + h] = sum;
    }
  }
}

typedef float Four __attribute__((vector_size(16)));

template <typename Vector>
Vector load(const float* from) {
  Vector v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

template <typename Vector>
void add_to(float* sum, Vector v) {
  v += load<Vector>(sum);
  std::memcpy(sum, &v, sizeof(v));
}

// Adds the sums over the rows to as many columns of sums (K + 1, H) as Count vectors have lanes: of the weight transposed, and
// of the bias.
template <int K, typename Vector, int Count>
void add_columns(const float* x, const float* grad, float* sums, int64_t count, int64_t outputs) {
  constexpr int64_t lanes = sizeof(Vector) / sizeof(float);
  Vector weight[K][Count] = {}, bias[Count] = {};
  for (int64_t r = 0; r < count; ++r) {
    for (int c = 0; c < Count; ++c) {
      const Vector g = load<Vector>(grad + r * outputs + c * lanes);
      for (int i = 0; i < K; ++i) weight[i][c] += g * x[r * K + i];
      bias[c] += g;
    }
  }
  for (int c = 0; c < Count; ++c) {
    for (int i = 0; i < K; ++i) add_to(sums + i * outputs + c * lanes, weight[i][c]);
    add_to(sums + K * outputs + c * lanes, bias[c]);
  }
}

template <int K>
void backward_rows(const float* x, const float* grad, float* sums, int64_t count, int64_t outputs) {
  int64_t h = 0;
  for (; h + 8 <= outputs; h += 8) add_columns<K, Four, 2>(x, grad + h, sums + h, count, outputs);
  for (; h < outputs; ++h) add_columns<K, float, 1>(x, grad + h, sums + h, count, outputs);
}

struct RowKernels {
  void (*forward)(const float*, const float*, const float*, float*, int64_t, int64_t);
  void (*backward)(const float*, const float*, float*, int64_t, int64_t);
};

template <std::size_t... K>
constexpr std::array<RowKernels, sizeof...(K)> kernels_for(std::index_sequence<K...>) {
  return {RowKernels{forward_rows<static_cast<int>(K) + 1>, backward_rows<static_cast<int>(K) + 1>}...};
}

const RowKernels& row_kernels(int64_t inputs) {
  static constexpr auto table = kernels_for(std::make_index_sequence<kMaxInputs>());
  return table[inputs - 1];
}

Tensor standardized_linear(const Tensor& x, const Tensor& mean, const Tensor& std, const Tensor& weight,
                           const std::optional<Tensor>& bias) {
  const Layer layer(x, mean, std, weight);
  const int64_t outputs = layer.outputs;
  const Tensor columns = dense(weight, "weight", {outputs, layer.inputs}).t().contiguous();
  const Tensor offset = bias ? dense(*bias, "bias", {outputs}) : at::zeros({outputs}, columns.options());
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = outputs;
  Tensor out = at::empty(shape, columns.options());
  float* y = out.data_ptr<float>();
  layer.for_each_chunk([&](int64_t, int64_t first, const float* rows, int64_t count) {
    row_kernels(layer.inputs)
        .forward(rows, columns.const_data_ptr<float>(), offset.const_data_ptr<float>(), y + first * outputs, count, outputs);
  });
  return out;
}

// Gradients of (weight, bias).
std::tuple<Tensor, Tensor> standardized_linear_backward(const Tensor& grad, const Tensor& x, const Tensor& mean,
                                                        const Tensor& std, const Tensor& weight) {
  const Layer layer(x, mean, std, weight);
  const int64_t outputs = layer.outputs, each = (layer.inputs + 1) * outputs;
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = outputs;
  const Tensor grads = dense(grad, "grad_out", shape);
  Tensor partials = at::zeros({layer.chunks(), each}, grads.options());
  const float* g = grads.const_data_ptr<float>();
  float* sums = partials.data_ptr<float>();
  layer.for_each_chunk([&](int64_t chunk, int64_t first, const float* rows, int64_t count) {
    row_kernels(layer.inputs).backward(rows, g + first * outputs, sums + chunk * each, count, outputs);
  });
  const Tensor total = sum_partials(partials).view({layer.inputs + 1, outputs});
  return {total.narrow(0, 0, layer.inputs).t().contiguous(), total.select(0, layer.inputs).clone()};
}

TORCH_LIBRARY_FRAGMENT(compressm_cpp, m) {
  m.def("standardized_linear(Tensor x, Tensor mean, Tensor std, Tensor weight, Tensor? bias) -> (Tensor out)",
        torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(standardized_linear)));
  m.def("standardized_linear_backward(Tensor grad_out, Tensor x, Tensor mean, Tensor std, Tensor weight)"
        " -> (Tensor grad_weight, Tensor grad_bias)",
        torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(standardized_linear_backward)));
  register_gradient(m, "standardized_linear");
}

}  // namespace
}  // namespace compressm
