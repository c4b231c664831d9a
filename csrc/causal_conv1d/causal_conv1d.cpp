// The short causal convolution on CPU: out_t = act(sum_k w_k x_{t - K + 1 + k} + b), depthwise, forward and backward.
//
// A sequence is cut into stretches of kConvStretch steps.  Each is computed on its own: its backward also computes the K - 1
// steps behind it, which its inputs feed.  Stretches have their own partial gradients of weight and bias, added in a fixed
// order.  Tensors lie as (batch, L, D) rows of channels (causal_conv1d_channels.cpp), or as (batch, D, L) rows of steps; rows
// are dense, their distance is arbitrary.
#include "core/torch.h"

#include <algorithm>
#include <array>
#include <tuple>

#include "core/autograd.h"
#include "causal_conv1d/causal_conv1d.h"
#include "causal_conv1d/causal_conv1d_sequences.h"
#include "core/tensor.h"
#include "core/partial_sums.h"

namespace compressm {
namespace {

using Gradients = ConvGradientTensors;

constexpr int64_t kVector = 16;  // floats
constexpr int64_t kBuffer = kConvStretch + 2 * kVector;

int64_t round_up(int64_t n) { return (n + kVector - 1) / kVector * kVector; }

int64_t stretches_of(int64_t length) { return (length + kConvStretch - 1) / kConvStretch; }

void check_steps(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& state) {
  TORCH_CHECK(x.dim() == 3 && weight.dim() == 2, "expected x (batch, D, L) and weight (D, width)");
  check_conv_width(weight.size(1));
  check_conv_rows(x, "x", x.sizes());
  check_conv_dense(weight, "weight", {x.size(1), weight.size(1)});
  check_conv_dense(bias, "bias", {x.size(1)});
  check_conv_dense(state, "initial_states", {x.size(0), x.size(1), weight.size(1) - 1});
}

// Calls body(sequence, channel, stretch, filter) for every row's every stretch.
template <typename Body>
void for_each_stretch(const Tensor& x, const Tensor& weight, const Tensor& bias, bool silu, const Body& body) {
  const int64_t channels = x.size(1), stretches = stretches_of(x.size(2)), width = weight.size(1);
  at::parallel_for(0, x.size(0) * channels * stretches, 16, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t channel = index / stretches % channels;
      const ConvFilter filter{weight.const_data_ptr<float>() + channel * width, 1,
                              bias.const_data_ptr<float>() + channel, static_cast<int>(width), silu};
      body(index / stretches / channels, channel, index % stretches, filter);
    }
  });
}

// The `count` inputs from step start - (width - 1) on, zeros behind them; those in front of step 0 come from the state.
void gather_inputs(const Tensor& x, const Tensor& state, int64_t sequence, int64_t channel, int64_t start, int64_t count,
                   std::array<float, kBuffer + kMaxConvWidth>& buffer) {
  const int64_t before = state.size(2), from_state = std::max<int64_t>(0, before - start);
  const float* row = x.const_data_ptr<float>() + sequence * x.stride(0) + channel * x.stride(1);
  std::copy_n(state.const_data_ptr<float>() + (sequence * x.size(1) + channel + 1) * before - from_state, from_state,
              buffer.begin());
  std::copy_n(row + (start - before + from_state), count - from_state, buffer.begin() + from_state);
  std::fill(buffer.begin() + count, buffer.end(), 0.0f);
}

// x, out (batch, D, L), weight (D, width), bias (D,), state (batch, D, width - 1).
Tensor steps_forward(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& state, bool silu) {
  check_steps(x, weight, bias, state);
  const int64_t channels = x.size(1), length = x.size(2), before = weight.size(1) - 1;
  Tensor out = at::empty(x.sizes(), x.options());
  float* y = out.data_ptr<float>();
  for_each_stretch(x, weight, bias, silu, [&](int64_t sequence, int64_t channel, int64_t stretch, const ConvFilter& filter) {
    const int64_t start = stretch * kConvStretch, own = std::min(kConvStretch, length - start);
    std::array<float, kBuffer + kMaxConvWidth> inputs;
    std::array<float, kBuffer> result;
    gather_inputs(x, state, sequence, channel, start, own + before, inputs);
    conv_kernels().forward_steps(filter, inputs.data(), result.data(), round_up(own));
    std::copy_n(result.begin(), own, y + (sequence * channels + channel) * length + start);
  });
  return out;
}

// The gradient of state (width - 1) in front of a sequence, from d at its first steps.
void state_gradient(const ConvFilter& filter, const float* d, float* grad_state) {
  for (int i = 0; i < filter.width - 1; ++i) {
    float sum = 0.0f;
    for (int k = 0; k <= i; ++k) sum += filter.weight[k] * d[i - k];
    grad_state[i] = sum;
  }
}

Gradients steps_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& bias,
                         const Tensor& state, bool silu) {
  check_steps(x, weight, bias, state);
  check_conv_rows(grad, "grad_out", x.sizes());
  const int64_t batch = x.size(0), channels = x.size(1), length = x.size(2), width = weight.size(1), before = width - 1;
  const int64_t stretches = stretches_of(length);
  Tensor grad_x = at::empty(x.sizes(), x.options());
  Tensor grad_state = length > 0 ? at::empty_like(state) : at::zeros_like(state);
  Tensor partials = at::empty({batch * stretches, channels, width + 1}, x.options());
  float *gx = grad_x.data_ptr<float>(), *gs = grad_state.data_ptr<float>(), *sums = partials.data_ptr<float>();
  for_each_stretch(x, weight, bias, silu, [&](int64_t sequence, int64_t channel, int64_t stretch, const ConvFilter& filter) {
    const int64_t start = stretch * kConvStretch, own = std::min(kConvStretch, length - start), row = sequence * channels + channel;
    const int64_t held = std::min(own + before, length - start);
    std::array<float, kBuffer + kMaxConvWidth> inputs;
    std::array<float, kBuffer> g, d, result;
    gather_inputs(x, state, sequence, channel, start, held + before, inputs);
    std::copy_n(grad.const_data_ptr<float>() + sequence * grad.stride(0) + channel * grad.stride(1) + start, held, g.begin());
    std::fill(g.begin() + held, g.end(), 0.0f);
    conv_kernels().backward_steps(filter, inputs.data(), g.data(), d.data(), result.data(), kBuffer, own,
                                  sums + ((sequence * stretches + stretch) * channels + channel) * (width + 1));
    std::copy_n(result.begin(), own, gx + row * length + start);
    if (stretch == 0) state_gradient(filter, d.data(), gs + row * before);
  });
  const Tensor total = sum_partials(partials).view({channels, width + 1});
  return {grad_x, total.narrow(1, 0, width).clone(at::MemoryFormat::Contiguous), total.select(1, width).clone(),
          grad_state};
}

// The tensor itself where its last axis is dense in memory, else a copy.
Tensor dense_rows(const Tensor& t) { return t.stride(-1) == 1 ? t : t.contiguous(); }

// x (batch, D, L), weight (D, width) and what may be missing, in the layout of the form that computes them: the one that reads
// x in place, or rows of channels for packed sequences.
struct Arguments {
  bool like_x;    // whether the form has x's layout
  bool channels;  // rows of channels: (batch, L, D), (width, D), (D,), (states, width - 1, D)
  Tensor x, weight, bias;
  OptionalTensor state;
  ConvSequences sequences;

  Arguments(const Tensor& x_, const Tensor& weight_, const OptionalTensor& bias_, const OptionalTensor& seq_idx,
            const OptionalTensor& initial_states, const OptionalTensor& cu_seqlens) {
    TORCH_CHECK(x_.dim() == 3 && weight_.dim() == 2, "expected x (batch, D, L) and weight (D, width)");
    TORCH_CHECK(!seq_idx || !(initial_states || cu_seqlens), "seq_idx: expected neither initial_states nor cu_seqlens with it");
    TORCH_CHECK(!initial_states || initial_states->dim() == 3, "initial_states: expected (states, D, width - 1)");
    check_conv_width(weight_.size(1));
    const bool packed = seq_idx || cu_seqlens, channel_rows = x_.stride(1) == 1 && x_.size(1) > 1;
    channels = channel_rows || packed, like_x = channels == channel_rows;
    sequences = seq_idx      ? conv_indexed(*seq_idx, x_.size(0), x_.size(2), weight_.size(1))
                : cu_seqlens ? conv_packed(*cu_seqlens, x_.size(0), x_.size(2))
                             : conv_rows(x_.size(0), x_.size(2));
    bias = bias_ ? bias_->contiguous() : at::zeros({x_.size(1)}, weight_.options());
    if (initial_states) state = turned(*initial_states).contiguous();
    x = dense_rows(turned(x_));
    weight = turned(weight_).contiguous();
  }

  // Between the layouts of the arguments and of the form, either way.
  Tensor turned(const Tensor& t) const { return channels ? t.transpose(-2, -1) : t; }

  // A result as large as x, in x's layout.
  Tensor laid_like_x(const Tensor& t) const { return like_x ? turned(t) : turned(t).contiguous(); }

  Tensor state_or_zeros() const {
    return state ? *state : at::zeros({x.size(0), x.size(1), weight.size(1) - 1}, x.options());
  }
};

// Output (batch, D, L) in x's layout.
Tensor causal_conv1d(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& seq_idx,
                     const OptionalTensor& initial_states, const OptionalTensor& cu_seqlens, bool silu) {
  const Arguments a(x, weight, bias, seq_idx, initial_states, cu_seqlens);
  if (!a.channels) return steps_forward(a.x, a.weight, a.bias, a.state_or_zeros(), silu);
  return a.laid_like_x(conv_sequences(a.x, a.weight, a.bias, a.state, a.sequences, silu));
}

// Gradients of (x, weight, bias, initial_states); the first in x's layout, the last two empty for None.
Gradients causal_conv1d_backward(const Tensor& grad_out, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                 const OptionalTensor& seq_idx, const OptionalTensor& initial_states,
                                 const OptionalTensor& cu_seqlens, bool silu) {
  const Arguments a(x, weight, bias, seq_idx, initial_states, cu_seqlens);
  TORCH_CHECK(grad_out.sizes() == x.sizes(), "grad_out: expected x's shape ", x.sizes(), ", got ", grad_out.sizes());
  const Tensor grad = dense_rows(a.turned(grad_out));
  const auto [to_x, to_weight, to_bias, to_state] =
      a.channels ? conv_sequences_backward(grad, a.x, a.weight, a.bias, a.state, a.sequences, silu)
                 : steps_backward(grad, a.x, a.weight, a.bias, a.state_or_zeros(), silu);
  const auto none = [&] { return at::empty({0}, weight.options()); };
  return {a.laid_like_x(to_x), a.turned(to_weight).contiguous(), bias ? to_bias : none(),
          initial_states ? a.turned(to_state).contiguous() : none()};
}

TORCH_LIBRARY_FRAGMENT(compressm_cpp, m) {
  m.def("causal_conv1d(Tensor x, Tensor weight, Tensor? bias, Tensor? seq_idx, Tensor? initial_states, Tensor? cu_seqlens,"
        " bool silu) -> (Tensor out)",
        torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(causal_conv1d)));
  m.def("causal_conv1d_backward(Tensor grad_out, Tensor x, Tensor weight, Tensor? bias, Tensor? seq_idx,"
        " Tensor? initial_states, Tensor? cu_seqlens, bool silu)"
        " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_initial_states)",
        torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(causal_conv1d_backward)));
  register_gradient(m, "causal_conv1d");
}

}  // namespace
}  // namespace compressm
