#include "core/torch.h"
#include "core/batched.h"

#include <ATen/functorch/BatchedTensorImpl.h>
#include <ATen/ops/stack.h>

#include <algorithm>

namespace compressm {
namespace {

using at::Tensor;

int64_t innermost(const Tensor& t) {
  const auto* batched = at::functorch::maybeGetBatchedImpl(t);
  return batched ? batched->level() : 0;
}

int64_t size(const Tensor& t, int64_t) {
  const auto* batched = at::functorch::maybeGetBatchedImpl(t);
  return batched->value().size(batched->bdim());
}

Tensor member(const Tensor& t, int64_t, int64_t i) {
  const auto* batched = at::functorch::maybeGetBatchedImpl(t);
  return batched->value().select(batched->bdim(), i);
}

Tensor joined(const std::vector<Tensor>& members, int64_t level) {
  return at::functorch::makeBatched(at::stack(members), 0, level);
}

void call_for_each_of(const BatchKind& kind, int64_t level, const c10::OperatorHandle& op, torch::jit::Stack& stack) {
  const auto taken = [&](const c10::IValue& value) {
    return value.isTensor() && value.toTensor().defined() && kind.has(value.toTensor(), level);
  };
  const int64_t count = kind.size(std::find_if(stack.begin(), stack.end(), taken)->toTensor(), level);
  TORCH_CHECK(count > 0, op.schema().name(), ": expected a batch with members");
  std::vector<std::vector<Tensor>> results(op.schema().returns().size());
  for (int64_t i = 0; i < count; ++i) {
    torch::jit::Stack one;
    for (const c10::IValue& value : stack) {
      one.push_back(taken(value) ? c10::IValue(kind.member(value.toTensor(), level, i)) : value);
    }
    call_for_each(op, one);
    for (std::size_t k = 0; k < results.size(); ++k) results[k].push_back(one[k].toTensor());
  }
  stack.clear();
  for (const std::vector<Tensor>& members : results) {
    stack.emplace_back(members[0].defined() ? kind.joined(members, level) : Tensor());
  }
}

}  // namespace

const BatchKind& transform_batches() {
  static const BatchKind kind{innermost, [](const Tensor& t, int64_t level) { return innermost(t) == level; }, size, member,
                              joined};
  return kind;
}

void call_for_each(const c10::OperatorHandle& op, torch::jit::Stack& stack) {
  for (const BatchKind* kind : {&transform_batches(), &gradient_batches()}) {
    int64_t level = 0;
    for (const c10::IValue& value : stack) {
      if (value.isTensor() && value.toTensor().defined()) level = std::max(level, kind->innermost(value.toTensor()));
    }
    if (level > 0) return call_for_each_of(*kind, level, op, stack);
  }
  op.callBoxed(&stack);
}

}  // namespace compressm
