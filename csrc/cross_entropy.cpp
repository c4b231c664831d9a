// Cross-entropy of scores on CPU, forward and backward.  The backward computes the softmax again from the row's normalizers,
// so that of all that is as large as the scores only their gradient is written.
#include "cross_entropy.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <type_traits>

#include "diagonal_scan.h"

namespace compressm {
namespace {

using at::Tensor;
using std::int64_t;

constexpr int64_t kGrain = 16384;  // scores that a thread should have at least

const CrossEntropyKernels& kernels() {
#if defined(__x86_64__)
  const std::string name = scan_kernels().name;
  if (name == "avx512") return avx512::cross_entropy_kernels;
  if (name == "avx2") return avx2::cross_entropy_kernels;
#endif
  return portable::cross_entropy_kernels;
}

void check(const Tensor& t, const char* name, at::IntArrayRef shape, at::ScalarType type = at::kFloat) {
  TORCH_CHECK(t.device().is_cpu() && t.scalar_type() == type && t.sizes() == shape && t.is_contiguous(), name,
              ": expected a contiguous CPU tensor of ", type, " of shape ", shape);
}

template <typename Element>
const CrossEntropyRows<Element>& row_kernels() {
  if constexpr (std::is_same_v<Element, float>) {
    return kernels().floats;
  } else {
    return kernels().halves;
  }
}

// Targets must be classes or `ignored`; scores are float32 or bfloat16.
void check_scores(const Tensor& scores, const Tensor& targets, int64_t ignored) {
  TORCH_CHECK(scores.dim() == 2 && scores.size(1) > 0, "scores: expected (rows, classes)");
  check(scores, "scores", scores.sizes(), scores.scalar_type() == at::kBFloat16 ? at::kBFloat16 : at::kFloat);
  check(targets, "targets", {scores.size(0)}, at::kLong);
  const int64_t *each = targets.const_data_ptr<int64_t>(), classes = scores.size(1);
  for (int64_t r = 0; r < scores.size(0); ++r) {
    TORCH_CHECK_INDEX(each[r] == ignored || (each[r] >= 0 && each[r] < classes), "targets: expected classes from 0 to ",
                      classes - 1, " or ignore_index = ", ignored, ", got ", each[r]);
  }
}

// Calls body(some rows of the scores, the first of them) for parts of the rows on all threads.
template <typename Element, typename Body>
void in_parts(const Tensor& scores, const Tensor& targets, int64_t ignored, const Body& body) {
  const auto* values = static_cast<const Element*>(scores.const_data_ptr());
  const int64_t *each = targets.const_data_ptr<int64_t>(), classes = scores.size(1);
  at::parallel_for(0, scores.size(0), std::max<int64_t>(1, kGrain / classes), [&](int64_t begin, int64_t end) {
    body(Scores<Element>{values + begin * classes, each + begin, end - begin, classes, ignored}, begin);
  });
}

template <typename Element>
void forward_of(const Tensor& scores, const Tensor& targets, int64_t ignored, float* losses, float* normalizers) {
  in_parts<Element>(scores, targets, ignored, [&](const Scores<Element>& part, int64_t begin) {
    row_kernels<Element>().forward(part, losses + begin, normalizers + 2 * begin);
  });
}

template <typename Element>
void backward_of(const Tensor& scores, const Tensor& targets, int64_t ignored, const float* normalizers, const float* grad,
                 void* grad_scores) {
  in_parts<Element>(scores, targets, ignored, [&](const Scores<Element>& part, int64_t begin) {
    Element* to = static_cast<Element*>(grad_scores) + begin * part.classes;
    row_kernels<Element>().backward(part, normalizers + 2 * begin, grad + begin, to);
  });
}

// scores (rows, classes), targets (rows) -> losses (rows) and normalizers (rows, 2), float32.
std::tuple<Tensor, Tensor> cross_entropy(const Tensor& scores, const Tensor& targets, int64_t ignored) {
  check_scores(scores, targets, ignored);
  const auto options = scores.options().dtype(at::kFloat);
  Tensor losses = at::empty({scores.size(0)}, options), normalizers = at::empty({scores.size(0), 2}, options);
  const auto run = scores.scalar_type() == at::kBFloat16 ? forward_of<BFloat16> : forward_of<float>;
  run(scores, targets, ignored, losses.data_ptr<float>(), normalizers.data_ptr<float>());
  return {losses, normalizers};
}

// The gradient of scores, as they are.
Tensor cross_entropy_backward(const Tensor& grad, const Tensor& scores, const Tensor& targets, const Tensor& normalizers,
                              int64_t ignored) {
  check_scores(scores, targets, ignored);
  check(grad, "grad", {scores.size(0)});
  check(normalizers, "normalizers", {scores.size(0), 2});
  Tensor grad_scores = at::empty(scores.sizes(), scores.options());
  const auto run = scores.scalar_type() == at::kBFloat16 ? backward_of<BFloat16> : backward_of<float>;
  run(scores, targets, ignored, normalizers.const_data_ptr<float>(), grad.const_data_ptr<float>(), grad_scores.data_ptr());
  return grad_scores;
}

}  // namespace
}  // namespace compressm

TORCH_LIBRARY_FRAGMENT(compressm_cpp, m) {
  m.def("cross_entropy(Tensor scores, Tensor targets, int ignored) -> (Tensor, Tensor)", &compressm::cross_entropy);
  m.def("cross_entropy_backward(Tensor grad, Tensor scores, Tensor targets, Tensor normalizers, int ignored) -> Tensor",
        &compressm::cross_entropy_backward);
}
