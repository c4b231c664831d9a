// The short causal convolution on CPU: out_t = act(sum_k w_k x_{t - K + 1 + k} + b), depthwise, forward and backward.
//
// A sequence is cut into stretches of kStretch steps.  Each is computed on its own: its backward also computes the K - 1
// steps behind it, which its inputs feed.  Stretches have their own partial gradients of weight and bias, added in a fixed
// order.  Tensors lie as (batch, L, D) rows of channels, or as (batch, D, L) rows of steps; rows are dense, their distance
// is arbitrary.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <tuple>
#include <type_traits>

#include "autograd.h"
#include "causal_conv1d.h"
#include "ops.h"
#include "partial_sums.h"

namespace compressm {
namespace {

using Gradients = ConvGradientTensors;

constexpr int64_t kStretch = 256;   // steps
constexpr int64_t kChannels = 512;  // of one task
constexpr int64_t kBlock = 8;       // steps of all channels of a task in one go
constexpr int64_t kVector = 16;     // floats
constexpr int64_t kBuffer = kStretch + 2 * kVector;

template <typename Element>
const ConvRowKernels<Element>& row_kernels() {
  if constexpr (std::is_same_v<Element, float>) {
    return conv_kernels().floats;
  } else {
    return conv_kernels().halves;
  }
}

template <typename Element>
const Element* data_of(const Tensor& t) {
  return static_cast<const Element*>(t.const_data_ptr());
}

void check_rows(const Tensor& t, const char* name, at::IntArrayRef shape, at::ScalarType type = at::kFloat) {
  TORCH_CHECK(t.device().is_cpu() && t.scalar_type() == type && t.sizes() == shape &&
                  (t.numel() == 0 || t.stride(-1) == 1 || t.size(-1) == 1),
              name, ": expected a CPU tensor of ", type, " of shape ", shape, " with dense rows");
}

void check_dense(const Tensor& t, const char* name, at::IntArrayRef shape, at::ScalarType type = at::kFloat) {
  check_rows(t, name, shape, type);
  TORCH_CHECK(t.is_contiguous(), name, ": expected a contiguous tensor");
}

void check_width(int64_t width) {
  TORCH_CHECK(width >= 1 && width <= kMaxConvWidth, "weight: expected 1 to ", kMaxConvWidth, " taps, got ", width);
}

int64_t round_up(int64_t n) { return (n + kVector - 1) / kVector * kVector; }

int64_t stretches_of(int64_t length) { return (length + kStretch - 1) / kStretch; }

// A task of the channel form: the steps [start, stop) of the channels [channel, channel + channels) of one sequence.
struct Task {
  int64_t sequence, stretch, start, stop, channel, channels;
};

struct Tasks {
  int64_t batch, length, channels, stretches, blocks;
  Tasks(int64_t batch, int64_t length, int64_t channels)
      : batch(batch),
        length(length),
        channels(channels),
        stretches(stretches_of(length)),
        blocks((channels + kChannels - 1) / kChannels) {}
  int64_t count() const { return batch * stretches * blocks; }
  Task at(int64_t index) const {
    const int64_t channel = index % blocks * kChannels, stretch = index / blocks % stretches, start = stretch * kStretch;
    return {index / blocks / stretches, stretch, start, std::min(start + kStretch, length), channel,
            std::min(kChannels, channels - channel)};
  }
};

// The rows of x (batch, L, D) with the width - 1 rows of state (batch, width - 1, D) in front.
template <typename Element>
struct Inputs {
  const Element *x, *state;
  int64_t batch_stride, row_stride, before, channels;
  Inputs(const Tensor& x, const Tensor& state)
      : x(data_of<Element>(x)),
        state(data_of<Element>(state)),
        batch_stride(x.stride(0)),
        row_stride(x.stride(1)),
        before(state.size(1)),
        channels(x.size(2)) {}
  const Element* row(int64_t sequence, int64_t t) const {
    return t >= 0 ? x + sequence * batch_stride + t * row_stride : state + (sequence * before + before + t) * channels;
  }
};

ConvFilter channel_filter(const Tensor& weight, const Tensor& bias, int64_t channel, bool silu) {
  return {weight.const_data_ptr<float>() + channel, weight.size(1), bias.const_data_ptr<float>() + channel,
          static_cast<int>(weight.size(0)), silu};
}

// x and state are float32 or bfloat16, and so are the results that are as large; all else is float32.
void check_channels(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& state) {
  TORCH_CHECK(x.dim() == 3 && weight.dim() == 2, "expected x (batch, L, D) and weight (width, D)");
  check_width(weight.size(0));
  const at::ScalarType type = x.scalar_type() == at::kBFloat16 ? at::kBFloat16 : at::kFloat;
  check_rows(x, "x", x.sizes(), type);
  check_dense(weight, "weight", {weight.size(0), x.size(2)});
  check_dense(bias, "bias", {x.size(2)});
  check_dense(state, "state", {x.size(0), weight.size(0) - 1, x.size(2)}, type);
}

template <typename Element>
Tensor channels_forward_of(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& state, bool silu) {
  const Tasks tasks(x.size(0), x.size(1), x.size(2));
  Tensor out = at::empty(x.sizes(), x.options());
  const Inputs<Element> inputs(x, state);
  const int64_t before = inputs.before;
  Element* y = static_cast<Element*>(out.data_ptr());
  at::parallel_for(0, tasks.count(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const Task task = tasks.at(index);
      const ConvFilter filter = channel_filter(weight, bias, task.channel, silu);
      for (int64_t t = task.start; t < task.stop; t += kBlock) {
        const int64_t rows = std::min(kBlock, task.stop - t);
        std::array<const Element*, kBlock + kMaxConvWidth> in{};
        std::array<Element*, kBlock> target{};
        for (int64_t r = 0; r < rows + before; ++r) in[r] = inputs.row(task.sequence, t - before + r) + task.channel;
        for (int64_t r = 0; r < rows; ++r) {
          target[r] = y + (task.sequence * tasks.length + t + r) * tasks.channels + task.channel;
        }
        row_kernels<Element>().forward(filter, in.data(), target.data(), rows, task.channels);
      }
    }
  });
  return out;
}

}  // namespace

Tensor conv_channels(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& state, bool silu) {
  check_channels(x, weight, bias, state);
  const auto run = x.scalar_type() == at::kBFloat16 ? channels_forward_of<BFloat16> : channels_forward_of<float>;
  return run(x, weight, bias, state, silu);
}

namespace {

// Where the gradients of one task's inputs go: rows of grad_x, of grad_state in front of it, or nowhere.
template <typename Element>
struct Targets {
  Element *grad_x, *grad_state;
  int64_t length, channels, before;
  Element* row(const Task& task, int64_t s, Element* nowhere) const {
    if (s >= task.stop || s < (task.start == 0 ? -before : task.start)) return nowhere;
    if (s < 0) return grad_state + (task.sequence * before + before + s) * channels + task.channel;
    return grad_x + (task.sequence * length + s) * channels + task.channel;
  }
};

void copy_row(const float* from, int64_t count, float* to) { std::copy_n(from, count, to); }
void copy_row(const float* from, int64_t count, BFloat16* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = c10::BFloat16(from[i]).x;
}

template <typename Element>
void channels_backward_task(const Tasks& tasks, const Task& task, const ConvFilter& filter, const Inputs<Element>& inputs,
                            const Tensor& grad, const Targets<Element>& targets, float* grad_weight) {
  const int64_t before = inputs.before, last = std::min(task.stop + before, tasks.length);
  std::array<float, (kMaxConvWidth - 1) * kChannels> pending;
  std::array<Element, kChannels> nowhere;
  std::fill_n(pending.begin(), before * task.channels, 0.0f);
  const Element* g = data_of<Element>(grad) + task.sequence * grad.stride(0) + task.channel;
  for (int64_t t = task.start, rows = 0; t < last; t += rows) {
    const bool own = t < task.stop;
    rows = std::min(kBlock, (own ? task.stop : last) - t);
    std::array<const Element*, kBlock + kMaxConvWidth> in{};
    std::array<const Element*, kBlock> from{};
    std::array<Element*, kBlock> to{};
    for (int64_t r = 0; r < rows + before; ++r) in[r] = inputs.row(task.sequence, t - before + r) + task.channel;
    for (int64_t r = 0; r < rows; ++r) {
      from[r] = g + (t + r) * grad.stride(1);
      to[r] = targets.row(task, t + r - before, nowhere.data());
    }
    row_kernels<Element>().backward(filter, in.data(), from.data(), to.data(), rows, task.channels, pending.data(),
                                    own ? grad_weight : nullptr, tasks.channels);
  }
  if (last < tasks.length) return;
  for (int64_t i = 0; i < before; ++i) {
    copy_row(pending.data() + i * task.channels, task.channels, targets.row(task, last - before + i, nowhere.data()));
  }
}

template <typename Element>
Gradients channels_backward_of(const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& bias,
                               const Tensor& state, bool silu) {
  const Tasks tasks(x.size(0), x.size(1), x.size(2));
  const int64_t width = weight.size(0);
  Tensor grad_x = at::empty(x.sizes(), x.options()), grad_state = at::empty_like(state);
  Tensor partials = at::zeros({tasks.batch * tasks.stretches, width + 1, tasks.channels}, weight.options());
  const Inputs<Element> inputs(x, state);
  const Targets<Element> targets{static_cast<Element*>(grad_x.data_ptr()), static_cast<Element*>(grad_state.data_ptr()),
                                 tasks.length, tasks.channels, width - 1};
  float* sums = partials.data_ptr<float>();
  at::parallel_for(0, tasks.count(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const Task task = tasks.at(index);
      float* own = sums + (task.sequence * tasks.stretches + task.stretch) * (width + 1) * tasks.channels + task.channel;
      channels_backward_task(tasks, task, channel_filter(weight, bias, task.channel, silu), inputs, grad, targets, own);
    }
  });
  const Tensor total = sum_partials(partials).view({width + 1, tasks.channels});
  return {grad_x, total.narrow(0, 0, width).clone(), total[width].clone(), grad_state};
}

}  // namespace

Gradients conv_channels_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& bias,
                                 const Tensor& state, bool silu) {
  check_channels(x, weight, bias, state);
  check_rows(grad, "grad", x.sizes(), x.scalar_type());
  const auto run = x.scalar_type() == at::kBFloat16 ? channels_backward_of<BFloat16> : channels_backward_of<float>;
  return run(grad, x, weight, bias, state, silu);
}

namespace {

void check_steps(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& state) {
  TORCH_CHECK(x.dim() == 3 && weight.dim() == 2, "expected x (batch, D, L) and weight (D, width)");
  check_width(weight.size(1));
  check_rows(x, "x", x.sizes());
  check_dense(weight, "weight", {x.size(1), weight.size(1)});
  check_dense(bias, "bias", {x.size(1)});
  check_dense(state, "state", {x.size(0), x.size(1), weight.size(1) - 1});
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
    const int64_t start = stretch * kStretch, own = std::min(kStretch, length - start);
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
  check_rows(grad, "grad", x.sizes());
  const int64_t batch = x.size(0), channels = x.size(1), length = x.size(2), width = weight.size(1), before = width - 1;
  const int64_t stretches = stretches_of(length);
  Tensor grad_x = at::empty(x.sizes(), x.options()), grad_state = at::empty_like(state);
  Tensor partials = at::empty({batch * stretches, channels, width + 1}, x.options());
  float *gx = grad_x.data_ptr<float>(), *gs = grad_state.data_ptr<float>(), *sums = partials.data_ptr<float>();
  for_each_stretch(x, weight, bias, silu, [&](int64_t sequence, int64_t channel, int64_t stretch, const ConvFilter& filter) {
    const int64_t start = stretch * kStretch, own = std::min(kStretch, length - start), row = sequence * channels + channel;
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

// x (batch, D, L), weight (D, width) and what may be missing, in the layout of the form that reads x in place.
struct Arguments {
  bool channels;  // rows of channels: (batch, L, D), (width, D), (D,), (batch, width - 1, D)
  Tensor x, weight, bias, state;
  Arguments(const Tensor& x_, const Tensor& weight_, const OptionalTensor& bias_, const OptionalTensor& initial_state) {
    TORCH_CHECK(x_.dim() == 3 && weight_.dim() == 2, "expected x (batch, D, L) and weight (D, width)");
    check_width(weight_.size(1));
    channels = x_.stride(1) == 1 && x_.size(1) > 1;
    bias = bias_ ? bias_->contiguous() : at::zeros({x_.size(1)}, weight_.options());
    state = initial_state ? *initial_state : at::zeros({x_.size(0), x_.size(1), weight_.size(1) - 1}, x_.options());
    x = dense_rows(turned(x_));
    weight = turned(weight_).contiguous(), state = turned(state).contiguous();
  }
  // Between the layouts of the arguments and of the form, either way.
  Tensor turned(const Tensor& t) const { return channels ? t.transpose(-2, -1) : t; }
};

// Output (batch, D, L) in x's layout.
Tensor causal_conv1d(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& initial_state,
                     bool silu) {
  const Arguments a(x, weight, bias, initial_state);
  return a.turned((a.channels ? conv_channels : steps_forward)(a.x, a.weight, a.bias, a.state, silu));
}

// Gradients of (x, weight, bias, initial_state); the first in x's layout, the last two empty for None.
Gradients causal_conv1d_backward(const Tensor& grad_out, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                 const OptionalTensor& initial_state, bool silu) {
  const Arguments a(x, weight, bias, initial_state);
  const auto run = a.channels ? conv_channels_backward : steps_backward;
  const auto [to_x, to_weight, to_bias, to_state] =
      run(dense_rows(a.turned(grad_out)), a.x, a.weight, a.bias, a.state, silu);
  const auto none = [&] { return at::empty({0}, weight.options()); };
  return {a.turned(to_x), a.turned(to_weight).contiguous(), bias ? to_bias : none(),
          initial_state ? a.turned(to_state).contiguous() : none()};
}

struct CausalConv1DOp {
  static constexpr const char *name = "causal_conv1d", *passed = "";
};

TORCH_LIBRARY_FRAGMENT(compressm_cpp, m) {
  m.def("causal_conv1d(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, bool silu) -> (Tensor out)",
        torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(causal_conv1d)));
  m.def("causal_conv1d_backward(Tensor grad_out, Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, bool silu)"
        " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_initial_state)",
        torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(causal_conv1d_backward)));
  register_gradient<CausalConv1DOp>(m);
}

}  // namespace
}  // namespace compressm
