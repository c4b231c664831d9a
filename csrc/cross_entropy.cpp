// Cross-entropy of scores on CPU, forward and backward.  The backward computes the softmax again from the row's normalizers,
// so that of all that is as large as the scores only their gradient is written.
#include "cross_entropy.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <type_traits>

#include "autograd.h"
#include "checks.h"

namespace compressm {
namespace {

using at::Tensor;
using std::int64_t;

constexpr int64_t kGrain = 16384;  // scores that a thread should have at least

template <typename Element>
const CrossEntropyRows<Element>& row_kernels() {
  if constexpr (std::is_same_v<Element, float>) {
    return cross_entropy_kernels().floats;
  } else {
    return cross_entropy_kernels().halves;
  }
}

// The rows, contiguous: scores float32 or bfloat16, targets classes or `ignored`.
struct Rows {
  Tensor scores, targets;
  int64_t ignored;
  Rows(const Tensor& all_scores, const Tensor& all_targets, int64_t ignored) : ignored(ignored) {
    TORCH_CHECK(all_scores.dim() == 2 && all_scores.size(1) > 0, "scores: expected (rows, classes)");
    const bool half = all_scores.scalar_type() == at::kBFloat16;
    scores = dense(all_scores, "scores", all_scores.sizes(), half ? at::kBFloat16 : at::kFloat);
    targets = dense(all_targets, "targets", {scores.size(0)}, at::kLong);
    const int64_t *each = targets.const_data_ptr<int64_t>(), classes = scores.size(1);
    for (int64_t r = 0; r < scores.size(0); ++r) {
      TORCH_CHECK_INDEX(each[r] == ignored || (each[r] >= 0 && each[r] < classes), "targets: expected classes from 0 to ",
                        classes - 1, " or ignore_index = ", ignored, ", got ", each[r]);
    }
  }
};

// Calls body(some rows of the scores, the first of them) for parts of the rows on all threads.
template <typename Element, typename Body>
void in_parts(const Rows& rows, const Body& body) {
  const auto* values = static_cast<const Element*>(rows.scores.const_data_ptr());
  const int64_t *each = rows.targets.const_data_ptr<int64_t>(), classes = rows.scores.size(1);
  at::parallel_for(0, rows.scores.size(0), std::max<int64_t>(1, kGrain / classes), [&](int64_t begin, int64_t end) {
    body(Scores<Element>{values + begin * classes, each + begin, end - begin, classes, rows.ignored}, begin);
  });
}

template <typename Element>
void forward_of(const Rows& rows, float* losses, float* normalizers) {
  in_parts<Element>(rows, [&](const Scores<Element>& part, int64_t begin) {
    row_kernels<Element>().forward(part, losses + begin, normalizers + 2 * begin);
  });
}

template <typename Element>
void backward_of(const Rows& rows, const float* normalizers, const float* grad, void* grad_scores) {
  in_parts<Element>(rows, [&](const Scores<Element>& part, int64_t begin) {
    Element* to = static_cast<Element*>(grad_scores) + begin * part.classes;
    row_kernels<Element>().backward(part, normalizers + 2 * begin, grad + begin, to);
  });
}

// scores (rows, classes), targets (rows) -> losses (rows) and normalizers (rows, 2), float32.
std::tuple<Tensor, Tensor> cross_entropy(const Tensor& scores, const Tensor& targets, int64_t ignore_index) {
  const Rows rows(scores, targets, ignore_index);
  const auto options = scores.options().dtype(at::kFloat);
  Tensor losses = at::empty({scores.size(0)}, options), normalizers = at::empty({scores.size(0), 2}, options);
  const auto run = scores.scalar_type() == at::kBFloat16 ? forward_of<BFloat16> : forward_of<float>;
  run(rows, losses.data_ptr<float>(), normalizers.data_ptr<float>());
  return {losses, normalizers};
}

// The gradient of scores, as they are.
Tensor cross_entropy_backward(const Tensor& grad, const Tensor& scores, const Tensor& targets, const Tensor& normalizers,
                              int64_t ignore_index) {
  const Rows rows(scores, targets, ignore_index);
  const Tensor grads = dense(grad, "grad_losses", {scores.size(0)});
  const Tensor kept = dense(normalizers, "normalizers", {scores.size(0), 2});
  Tensor grad_scores = at::empty(scores.sizes(), scores.options());
  const auto run = scores.scalar_type() == at::kBFloat16 ? backward_of<BFloat16> : backward_of<float>;
  run(rows, kept.const_data_ptr<float>(), grads.const_data_ptr<float>(), grad_scores.data_ptr());
  return grad_scores;
}

struct CrossEntropyOp {
  static constexpr const char *name = "cross_entropy", *passed = "";
};

TORCH_LIBRARY_FRAGMENT(compressm_cpp, m) {
  m.def("cross_entropy(Tensor scores, Tensor targets, int ignore_index) -> (Tensor losses, Tensor normalizers)",
        torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(cross_entropy)));
  m.def("cross_entropy_backward(Tensor grad_losses, Tensor scores, Tensor targets, Tensor normalizers, int ignore_index)"
        " -> (Tensor grad_scores)",
        torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(cross_entropy_backward)));
  register_gradient<CrossEntropyOp>(m);
}

}  // namespace
}  // namespace compressm
