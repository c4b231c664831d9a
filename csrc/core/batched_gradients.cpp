#include "core/torch.h"

#include <ATen/LegacyBatchedTensorImpl.h>
#include <ATen/ops/stack.h>

#include "core/batched.h"

namespace compressm {
namespace {

using at::Tensor;

// Where the batch at a level lies in the memory of a tensor; -1 for a tensor that is no part of it.
int64_t dim_of(const Tensor& t, int64_t level) {
  if (const auto* batched = at::maybeGetBatchedImpl(t)) {
    for (const at::BatchDim& each : batched->bdims()) {
      if (each.level() == level) return each.dim();
    }
  }
  return -1;
}

int64_t innermost(const Tensor& t) {
  const auto* batched = at::maybeGetBatchedImpl(t);
  return batched ? batched->bdims().back().level() : 0;
}

Tensor member(const Tensor& t, int64_t level, int64_t i) {
  const int64_t own = dim_of(t, level);
  const Tensor one = at::maybeGetBatchedImpl(t)->value().select(own, i);
  at::BatchDims rest;
  for (const at::BatchDim& each : at::maybeGetBatchedImpl(t)->bdims()) {
    if (each.level() != level) rest.emplace_back(each.level(), each.dim() - (each.dim() > own));
  }
  return rest.empty() ? one : at::makeBatched(one, rest);
}

}  // namespace

const BatchKind& gradient_batches() {
  static const BatchKind kind{
      innermost, [](const Tensor& t, int64_t level) { return dim_of(t, level) >= 0; },
      [](const Tensor& t, int64_t level) { return at::maybeGetBatchedImpl(t)->value().size(dim_of(t, level)); }, member,
      [](const std::vector<Tensor>& members, int64_t level) { return at::addBatchDim(at::stack(members), level, 0); }};
  return kind;
}

}  // namespace compressm
