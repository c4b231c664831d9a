// Cross-entropy of scores on CPU, forward and backward.  The backward computes the softmax again from the row's normalizers,
// so that of all that is as large as the scores only their gradient is written.
#include "cross_entropy.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <string>
#include <tuple>

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

// The arguments, checked; targets must be classes or `ignored`.
Scores scores_of(const Tensor& scores, const Tensor& targets, int64_t ignored) {
  TORCH_CHECK(scores.dim() == 2 && scores.size(1) > 0, "scores: expected (rows, classes)");
  check(scores, "scores", scores.sizes());
  check(targets, "targets", {scores.size(0)}, at::kLong);
  const Scores found{scores.const_data_ptr<float>(), targets.const_data_ptr<int64_t>(), scores.size(0), scores.size(1),
                     ignored};
  for (int64_t r = 0; r < found.rows; ++r) {
    const int64_t target = found.targets[r];
    TORCH_CHECK_INDEX(target == ignored || (target >= 0 && target < found.classes), "targets: expected classes from 0 to ",
                      found.classes - 1, " or ignore_index = ", ignored, ", got ", target);
  }
  return found;
}

// Calls body(rows [begin, end) of the scores, begin) for parts of the rows on all threads.
template <typename Body>
void in_parts(const Scores& all, const Body& body) {
  at::parallel_for(0, all.rows, std::max<int64_t>(1, kGrain / all.classes), [&](int64_t begin, int64_t end) {
    body(Scores{all.values + begin * all.classes, all.targets + begin, end - begin, all.classes, all.ignored}, begin);
  });
}

// scores (rows, classes), targets (rows) -> losses (rows) and normalizers (rows, 2).
std::tuple<Tensor, Tensor> cross_entropy(const Tensor& scores, const Tensor& targets, int64_t ignored) {
  const Scores all = scores_of(scores, targets, ignored);
  Tensor losses = at::empty({all.rows}, scores.options()), normalizers = at::empty({all.rows, 2}, scores.options());
  float *to = losses.data_ptr<float>(), *kept = normalizers.data_ptr<float>();
  in_parts(all, [&](const Scores& part, int64_t begin) { kernels().forward(part, to + begin, kept + 2 * begin); });
  return {losses, normalizers};
}

Tensor cross_entropy_backward(const Tensor& grad, const Tensor& scores, const Tensor& targets, const Tensor& normalizers,
                              int64_t ignored) {
  const Scores all = scores_of(scores, targets, ignored);
  check(grad, "grad", {all.rows});
  check(normalizers, "normalizers", {all.rows, 2});
  Tensor grad_scores = at::empty(scores.sizes(), scores.options());
  const float *g = grad.const_data_ptr<float>(), *kept = normalizers.const_data_ptr<float>();
  float* to = grad_scores.data_ptr<float>();
  in_parts(all, [&](const Scores& part, int64_t begin) {
    kernels().backward(part, kept + 2 * begin, g + begin, to + begin * all.classes);
  });
  return grad_scores;
}

}  // namespace
}  // namespace compressm

TORCH_LIBRARY_FRAGMENT(compressm_cpp, m) {
  m.def("cross_entropy(Tensor scores, Tensor targets, int ignored) -> (Tensor, Tensor)", &compressm::cross_entropy);
  m.def("cross_entropy_backward(Tensor grad, Tensor scores, Tensor targets, Tensor normalizers, int ignored) -> Tensor",
        &compressm::cross_entropy_backward);
}
