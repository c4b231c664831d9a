// The causal convolution in rows of channels, (batch, L, D), for sequences that are rows or parts of rows.
#include "core/torch.h"

#include <algorithm>
#include <array>
#include <type_traits>
#include <vector>

#include "causal_conv1d/causal_conv1d.h"
#include "causal_conv1d/causal_conv1d_sequences.h"
#include "core/tensor.h"
#include "core/partial_sums.h"

namespace compressm {
namespace {

using Gradients = ConvGradientTensors;

constexpr int64_t kChannels = 512;  // of one task
constexpr int64_t kBlock = 8;       // steps of all channels of a task in one go

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

// Steps [start, stop) of a sequence.
struct Piece {
  const ConvSequence* sequence;
  int64_t start, stop;
};

// The work of the channel form: a task is a group of pieces and a block of channels.  A group is a stretch of one sequence, or
// as many short sequences of one row as a stretch holds, and has its own partial gradients.
struct Tasks {
  int64_t channels, blocks;
  std::vector<Piece> pieces;
  std::vector<std::size_t> first;  // piece of each group, and the end

  Tasks(const ConvSequences& sequences, int64_t channels)
      : channels(channels), blocks((channels + kChannels - 1) / kChannels) {
    int64_t row = -1, steps = 0;
    for (const ConvSequence& sequence : sequences.all) {
      for (int64_t start = sequence.start; start < sequence.stop; start += kConvStretch) {
        const Piece piece{&sequence, start, std::min(start + kConvStretch, sequence.stop)};
        steps += piece.stop - piece.start;
        if (sequence.row != row || steps > kConvStretch) {
          first.push_back(pieces.size());
          row = sequence.row, steps = piece.stop - piece.start;
        }
        pieces.push_back(piece);
      }
    }
    first.push_back(pieces.size());
  }

  int64_t groups() const { return static_cast<int64_t>(first.size()) - 1; }

  // body(group, first channel, channels, pieces) for all tasks in parallel.
  template <typename Body>
  void for_each(const Body& body) const {
    at::parallel_for(0, groups() * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t group = task / blocks, channel = task % blocks * kChannels;
        body(group, channel, std::min(kChannels, channels - channel),
             c10::ArrayRef<Piece>(pieces.data() + first[group], pieces.data() + first[group + 1]));
      }
    });
  }
};

// The rows of x (batch, L, D) and what a sequence sees in front of its own: rows of state (states, width - 1, D), or zeros.
template <typename Element>
struct Inputs {
  const Element *x, *state;
  int64_t batch_stride, row_stride, length, before, channels;
  const int64_t* index;
  std::array<Element, kChannels> zeros{};

  Inputs(const Tensor& x, const OptionalTensor& state, const ConvSequences& sequences, int64_t width)
      : x(data_of<Element>(x)),
        state(state ? data_of<Element>(*state) : nullptr),
        batch_stride(x.stride(0)),
        row_stride(x.stride(1)),
        length(x.size(1)),
        before(width - 1),
        channels(x.size(2)),
        index(sequences.index.data()) {}

  bool owns(const ConvSequence& s, int64_t t) const { return s.whole || index[s.row * length + t] == s.index; }

  const Element* row(const ConvSequence& s, int64_t t, int64_t channel) const {
    if (t >= s.start) return owns(s, t) ? x + s.row * batch_stride + t * row_stride + channel : zeros.data();
    if (state == nullptr || s.state < 0) return zeros.data();
    return state + (s.state * before + before + t - s.start) * channels + channel;
  }
};

ConvFilter channel_filter(const Tensor& weight, const Tensor& bias, int64_t channel, bool silu) {
  return {weight.const_data_ptr<float>() + channel, weight.size(1), bias.const_data_ptr<float>() + channel,
          static_cast<int>(weight.size(0)), silu};
}

// x and state are float32 or bfloat16, and so are the results that are as large; all else is float32.
void check_channels(const Tensor& x, const Tensor& weight, const Tensor& bias, const OptionalTensor& state, int64_t states) {
  TORCH_CHECK(x.dim() == 3 && weight.dim() == 2, "expected x (batch, L, D) and weight (width, D)");
  check_conv_width(weight.size(0));
  const at::ScalarType type = x.scalar_type() == at::kBFloat16 ? at::kBFloat16 : at::kFloat;
  check_conv_rows(x, "x", x.sizes(), type);
  check_conv_dense(weight, "weight", {weight.size(0), x.size(2)});
  check_conv_dense(bias, "bias", {x.size(2)});
  if (state) check_conv_dense(*state, "initial_states", {states, weight.size(0) - 1, x.size(2)}, type);
}

template <typename Element>
Tensor channels_forward_of(const Tensor& x, const Tensor& weight, const Tensor& bias, const OptionalTensor& state,
                           const ConvSequences& sequences, bool silu) {
  const Tasks tasks(sequences, x.size(2));
  Tensor out = sequences.gaps ? at::zeros(x.sizes(), x.options()) : at::empty(x.sizes(), x.options());
  const Inputs<Element> inputs(x, state, sequences, weight.size(0));
  const int64_t before = inputs.before;
  Element* y = static_cast<Element*>(out.data_ptr());
  tasks.for_each([&](int64_t, int64_t channel, int64_t channels, c10::ArrayRef<Piece> pieces) {
    const ConvFilter filter = channel_filter(weight, bias, channel, silu);
    std::array<Element, kChannels> nowhere;
    for (const Piece& piece : pieces) {
      const ConvSequence& sequence = *piece.sequence;
      for (int64_t t = piece.start; t < piece.stop; t += kBlock) {
        const int64_t rows = std::min(kBlock, piece.stop - t);
        std::array<const Element*, kBlock + kMaxConvWidth> in{};
        std::array<Element*, kBlock> to{};
        for (int64_t r = 0; r < rows + before; ++r) in[r] = inputs.row(sequence, t - before + r, channel);
        for (int64_t r = 0; r < rows; ++r) {
          to[r] = inputs.owns(sequence, t + r) ? y + (sequence.row * inputs.length + t + r) * tasks.channels + channel
                                               : nowhere.data();
        }
        row_kernels<Element>().forward(filter, in.data(), to.data(), rows, channels);
      }
    }
  });
  return out;
}

}  // namespace

Tensor conv_sequences(const Tensor& x, const Tensor& weight, const Tensor& bias, const OptionalTensor& state,
                        const ConvSequences& sequences, bool silu) {
  check_channels(x, weight, bias, state, static_cast<int64_t>(sequences.all.size()));
  const auto run = x.scalar_type() == at::kBFloat16 ? channels_forward_of<BFloat16> : channels_forward_of<float>;
  return run(x, weight, bias, state, sequences, silu);
}

namespace {

// Where the gradients of a piece's inputs go: rows of grad_x, of grad_state in front of its sequence, or nowhere.
template <typename Element>
struct Targets {
  const Inputs<Element>& inputs;
  Element *grad_x, *grad_state;
  Element* row(const Piece& piece, int64_t t, int64_t channel, Element* nowhere) const {
    const ConvSequence& s = *piece.sequence;
    if (t >= piece.start && t < piece.stop && inputs.owns(s, t)) {
      return grad_x + (s.row * inputs.length + t) * inputs.channels + channel;
    }
    if (t >= s.start || piece.start > s.start || grad_state == nullptr || s.state < 0) return nowhere;
    return grad_state + (s.state * inputs.before + inputs.before + t - s.start) * inputs.channels + channel;
  }
};

void copy_row(const float* from, int64_t count, float* to) { std::copy_n(from, count, to); }
void copy_row(const float* from, int64_t count, BFloat16* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = c10::BFloat16(from[i]).x;
}

// The piece's share of the gradients of all channels from `channel` on; grad (batch, L, D).
template <typename Element>
void backward_piece(const Piece& piece, const ConvFilter& filter, const Targets<Element>& targets, const Tensor& grad,
                    int64_t channel, int64_t channels, float* grad_weight) {
  const Inputs<Element>& inputs = targets.inputs;
  const ConvSequence& sequence = *piece.sequence;
  const int64_t before = inputs.before, last = std::min(piece.stop + before, sequence.stop);
  std::array<float, (kMaxConvWidth - 1) * kChannels> pending;
  std::array<Element, kChannels> nowhere;
  std::fill_n(pending.begin(), before * channels, 0.0f);
  const Element* g = data_of<Element>(grad) + sequence.row * grad.stride(0) + channel;
  for (int64_t t = piece.start, rows = 0; t < last; t += rows) {
    const bool own = t < piece.stop;
    rows = std::min(kBlock, (own ? piece.stop : last) - t);
    std::array<const Element*, kBlock + kMaxConvWidth> in{};
    std::array<const Element*, kBlock> from{};
    std::array<Element*, kBlock> to{};
    for (int64_t r = 0; r < rows + before; ++r) in[r] = inputs.row(sequence, t - before + r, channel);
    for (int64_t r = 0; r < rows; ++r) {
      from[r] = inputs.owns(sequence, t + r) ? g + (t + r) * grad.stride(1) : inputs.zeros.data();
      to[r] = targets.row(piece, t + r - before, channel, nowhere.data());
    }
    row_kernels<Element>().backward(filter, in.data(), from.data(), to.data(), rows, channels, pending.data(),
                                    own ? grad_weight : nullptr, inputs.channels);
  }
  if (last < sequence.stop) return;
  for (int64_t i = 0; i < before; ++i) {
    copy_row(pending.data() + i * channels, channels, targets.row(piece, last - before + i, channel, nowhere.data()));
  }
}

template <typename Element>
Gradients channels_backward_of(const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& bias,
                               const OptionalTensor& state, const ConvSequences& sequences, bool silu) {
  const Tasks tasks(sequences, x.size(2));
  const int64_t width = weight.size(0);
  Tensor grad_x = sequences.gaps ? at::zeros(x.sizes(), x.options()) : at::empty(x.sizes(), x.options());
  Tensor grad_state;
  if (state) grad_state = sequences.has_empty() ? at::zeros_like(*state) : at::empty_like(*state);
  Tensor partials = at::zeros({tasks.groups(), width + 1, tasks.channels}, weight.options());
  const Inputs<Element> inputs(x, state, sequences, width);
  const Targets<Element> targets{inputs, static_cast<Element*>(grad_x.data_ptr()),
                                 state ? static_cast<Element*>(grad_state.data_ptr()) : nullptr};
  float* sums = partials.data_ptr<float>();
  tasks.for_each([&](int64_t group, int64_t channel, int64_t channels, c10::ArrayRef<Piece> pieces) {
    const ConvFilter filter = channel_filter(weight, bias, channel, silu);
    float* own = sums + group * (width + 1) * tasks.channels + channel;
    for (const Piece& piece : pieces) backward_piece(piece, filter, targets, grad, channel, channels, own);
  });
  const Tensor total = sum_partials(partials).view({width + 1, tasks.channels});
  return {grad_x, total.narrow(0, 0, width).clone(), total[width].clone(), grad_state};
}

}  // namespace

Gradients conv_sequences_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& bias,
                            const OptionalTensor& state, const ConvSequences& sequences, bool silu) {
  check_channels(x, weight, bias, state, static_cast<int64_t>(sequences.all.size()));
  check_conv_rows(grad, "grad_out", x.sizes(), x.scalar_type());
  const auto run = x.scalar_type() == at::kBFloat16 ? channels_backward_of<BFloat16> : channels_backward_of<float>;
  return run(grad, x, weight, bias, state, sequences, silu);
}

}  // namespace compressm
