// Cross-entropy of scores on CPU, forward and backward.  The backward computes the softmax again from the row's normalizers,
// so that of all that is as large as the scores only their gradient is written.
#include "core/torch.h"
#include "fused_cpu/cross_entropy.h"

#include <ATen/ops/div.h>
#include <ATen/ops/full.h>

#include <algorithm>
#include <numeric>
#include <string_view>
#include <tuple>
#include <type_traits>

#include "core/autograd.h"
#include "core/checks.h"

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
void backward_of(const Rows& rows, const float* normalizers, const float* grad, int64_t pitch, void* grad_scores) {
  in_parts<Element>(rows, [&](const Scores<Element>& part, int64_t begin) {
    Element* to = static_cast<Element*>(grad_scores) + begin * part.classes;
    row_kernels<Element>().backward(part, normalizers + 2 * begin, grad + begin * pitch, pitch, to);
  });
}

enum class Reduction { none, mean, sum };

Reduction reduction_of(std::string_view name) {
  TORCH_CHECK(name == "none" || name == "mean" || name == "sum", "reduction: expected none, mean or sum, got ", name);
  return name == "none" ? Reduction::none : name == "mean" ? Reduction::mean : Reduction::sum;
}

// By what the sum of the losses is divided; there is nothing to divide by where all rows are ignored.
double divisor(const Rows& rows, Reduction reduction) {
  if (reduction != Reduction::mean) return 1;
  const int64_t* each = rows.targets.const_data_ptr<int64_t>();
  return static_cast<double>(rows.scores.size(0) - std::count(each, each + rows.scores.size(0), rows.ignored));
}

// scores (rows, classes), targets (rows) -> loss (rows) or, reduced, () and normalizers (rows, 2), float32.
std::tuple<Tensor, Tensor> cross_entropy(const Tensor& scores, const Tensor& targets, int64_t ignore_index,
                                         std::string_view reduction) {
  const Reduction reduce = reduction_of(reduction);
  const Rows rows(scores, targets, ignore_index);
  const auto options = scores.options().dtype(at::kFloat);
  Tensor losses = at::empty({scores.size(0)}, options), normalizers = at::empty({scores.size(0), 2}, options);
  const auto run = scores.scalar_type() == at::kBFloat16 ? forward_of<BFloat16> : forward_of<float>;
  run(rows, losses.data_ptr<float>(), normalizers.data_ptr<float>());
  if (reduce == Reduction::none) return {losses, normalizers};
  const float* each = losses.const_data_ptr<float>();
  const double total = std::accumulate(each, each + losses.numel(), 0.0);
  return {at::full({}, total / divisor(rows, reduce), options), normalizers};
}

// The gradient of scores, as they are.
Tensor cross_entropy_backward(const Tensor& grad, const Tensor& scores, const Tensor& targets, const Tensor& normalizers,
                              int64_t ignore_index, std::string_view reduction) {
  const Reduction reduce = reduction_of(reduction);
  const bool reduced = reduce != Reduction::none;
  const Rows rows(scores, targets, ignore_index);
  Tensor grads = reduced ? dense(grad, "grad_loss", {}) : dense(grad, "grad_loss", {scores.size(0)});
  if (reduced) grads = at::div(grads, divisor(rows, reduce));
  const Tensor kept = dense(normalizers, "normalizers", {scores.size(0), 2});
  Tensor grad_scores = at::empty(scores.sizes(), scores.options());
  const auto run = scores.scalar_type() == at::kBFloat16 ? backward_of<BFloat16> : backward_of<float>;
  run(rows, kept.const_data_ptr<float>(), grads.const_data_ptr<float>(), reduced ? 0 : 1, grad_scores.data_ptr());
  return grad_scores;
}

TORCH_LIBRARY_FRAGMENT(compressm_cpp, m) {
  m.def("cross_entropy(Tensor scores, Tensor targets, int ignore_index, str reduction) -> (Tensor loss, Tensor normalizers)",
        torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(cross_entropy)));
  m.def("cross_entropy_backward(Tensor grad_loss, Tensor scores, Tensor targets, Tensor normalizers, int ignore_index,"
        " str reduction) -> (Tensor grad_scores)",
        torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(cross_entropy_backward)));
  register_gradient(m, "cross_entropy");
}

}  // namespace
}  // namespace compressm
