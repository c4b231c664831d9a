// The sequences of a causal convolution: whole rows of a batch, or what cu_seqlens or seq_idx say.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "causal_conv1d/causal_conv1d.h"
#include "core/tensor.h"

namespace compressm {

constexpr std::int64_t kConvStretch = 256;  // steps

inline void check_conv_rows(const Tensor& t, const char* name, at::IntArrayRef shape, at::ScalarType type = at::kFloat) {
  TORCH_CHECK(t.device().is_cpu() && t.scalar_type() == type && t.sizes() == shape &&
                  (t.numel() == 0 || t.stride(-1) == 1 || t.size(-1) == 1),
              name, ": expected a CPU tensor of ", type, " of shape ", shape, " with dense rows");
}

inline void check_conv_dense(const Tensor& t, const char* name, at::IntArrayRef shape, at::ScalarType type = at::kFloat) {
  check_conv_rows(t, name, shape, type);
  TORCH_CHECK(t.is_contiguous(), name, ": expected a contiguous tensor");
}

inline void check_conv_width(int64_t width) {
  TORCH_CHECK(width >= 1 && width <= kMaxConvWidth, "weight: expected 1 to ", kMaxConvWidth, " taps, got ", width);
}

// Steps [start, stop) of a row.  In front of them lies row `state` of the states, or zeros where that is negative.  Unless
// `whole`, only the steps with this index of its own are the sequence's; the others are zeros to it.
struct ConvSequence {
  std::int64_t row, start, stop, state, index;
  bool whole;
};

struct ConvSequences {
  std::vector<ConvSequence> all;
  std::vector<std::int64_t> index;  // of each step, where seq_idx was given
  bool gaps = false;                // whether there are steps that no sequence has

  bool has_empty() const {
    return std::any_of(all.begin(), all.end(), [](const ConvSequence& s) { return s.start == s.stop; });
  }
};

inline ConvSequences conv_rows(std::int64_t batch, std::int64_t length) {
  ConvSequences sequences;
  for (std::int64_t row = 0; row < batch; ++row) sequences.all.push_back({row, 0, length, row, 0, true});
  return sequences;
}

inline bool conv_integers(const Tensor& t) {
  return t.device().is_cpu() && (t.scalar_type() == at::kInt || t.scalar_type() == at::kLong);
}

// Sequence i of the one row is its steps from cu_seqlens[i] to cu_seqlens[i + 1].
inline ConvSequences conv_packed(const Tensor& cu_seqlens, std::int64_t batch, std::int64_t length) {
  TORCH_CHECK(batch == 1 && conv_integers(cu_seqlens) && cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1,
              "cu_seqlens: expected int32 or int64 (sequences + 1,) on the CPU and a batch of 1");
  const Tensor bounds = cu_seqlens.to(at::kLong).contiguous();
  const std::int64_t *at = bounds.const_data_ptr<std::int64_t>(), count = bounds.size(0) - 1;
  TORCH_CHECK_VALUE(at[0] == 0 && at[count] == length, "cu_seqlens: expected numbers from 0 to L = ", length);
  ConvSequences sequences;
  for (std::int64_t i = 0; i < count; ++i) {
    TORCH_CHECK_VALUE(at[i] <= at[i + 1], "cu_seqlens: expected numbers that rise");
    sequences.all.push_back({0, at[i], at[i + 1], i, 0, true});
  }
  return sequences;
}

// A step sees the earlier ones of its own index, as far as `width` taps reach: steps of one index that are nearer to each
// other than that are one sequence.  Steps of a negative index are padding.
inline ConvSequences conv_indexed(const Tensor& seq_idx, std::int64_t batch, std::int64_t length, std::int64_t width) {
  TORCH_CHECK(conv_integers(seq_idx) && seq_idx.sizes() == at::IntArrayRef({batch, length}),
              "seq_idx: expected int32 or int64 of shape (batch, L) on the CPU");
  const Tensor dense = seq_idx.to(at::kLong).contiguous();
  const std::int64_t* given = dense.const_data_ptr<std::int64_t>();
  ConvSequences sequences;
  sequences.index.assign(given, given + batch * length);
  const std::int64_t reach = std::max<std::int64_t>(1, width - 1);
  std::vector<ConvSequence> open;  // those of this row that a step can still see, the oldest first
  const auto close = [&](const auto& ended) {
    const auto last = std::stable_partition(open.begin(), open.end(), ended);
    sequences.all.insert(sequences.all.end(), open.begin(), last);
    open.erase(open.begin(), last);
  };
  for (std::int64_t row = 0; row < batch; ++row) {
    for (std::int64_t t = 0; t < length; ++t) {
      const std::int64_t index = sequences.index[row * length + t];
      close([&](const ConvSequence& s) { return s.stop <= t - reach; });
      sequences.gaps |= index < 0;
      if (index < 0) continue;
      const auto own = std::find_if(open.begin(), open.end(), [&](const ConvSequence& s) { return s.index == index; });
      if (own == open.end()) {
        open.push_back({row, t, t + 1, -1, index, true});
      } else {
        own->whole &= own->stop == t;
        own->stop = t + 1;
      }
    }
    close([](const ConvSequence&) { return true; });
  }
  return sequences;
}

// The convolution of x (batch, L, D) with weight (width, D), bias (D,) and state (states, width - 1, D) in front of the
// sequences, and its gradients, of (x, weight, bias, state).  x and state are float32 or bfloat16, weight and bias float32.
using ConvGradientTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Tensor conv_sequences(const Tensor& x, const Tensor& weight, const Tensor& bias, const OptionalTensor& state,
                      const ConvSequences& sequences, bool silu);
ConvGradientTensors conv_sequences_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& bias,
                                            const OptionalTensor& state, const ConvSequences& sequences, bool silu);

}  // namespace compressm
