#include "batched.h"

#include <ATen/ATen.h>
#include <ATen/LegacyBatchedTensorImpl.h>
#include <ATen/functorch/BatchedTensorImpl.h>

#include <algorithm>
#include <optional>
#include <vector>

namespace compressm {
namespace {

using at::Tensor;

// One level of batches; those of is_grads_batched are of an older kind than torch.func's.
struct Batch {
  bool legacy;
  int64_t level;

  // Where the batch lies in the memory of a tensor; nothing for a tensor that is no part of it.
  std::optional<int64_t> dim(const Tensor& t) const {
    if (legacy) {
      if (const auto* batched = at::maybeGetBatchedImpl(t)) {
        for (const at::BatchDim& each : batched->bdims()) {
          if (each.level() == level) return each.dim();
        }
      }
    } else if (const auto* batched = at::functorch::maybeGetBatchedImpl(t)) {
      if (batched->level() == level) return batched->bdim();
    }
    return std::nullopt;
  }

  int64_t size(const Tensor& t) const { return value(t).size(*dim(t)); }

  // Number i of the batch, still batched where there are further levels.
  Tensor member(const Tensor& t, int64_t i) const {
    const int64_t own = *dim(t);
    Tensor one = value(t).select(own, i);
    if (!legacy) return one;
    at::BatchDims rest;
    for (const at::BatchDim& each : at::maybeGetBatchedImpl(t)->bdims()) {
      if (each.level() != level) rest.emplace_back(each.level(), each.dim() - (each.dim() > own));
    }
    return rest.empty() ? one : at::makeBatched(one, rest);
  }

  Tensor joined(const std::vector<Tensor>& members) const {
    const Tensor all = at::stack(members);
    return legacy ? at::addBatchDim(all, level, 0) : at::functorch::makeBatched(all, 0, level);
  }

 private:
  const Tensor& value(const Tensor& t) const {
    return legacy ? at::maybeGetBatchedImpl(t)->value() : at::functorch::maybeGetBatchedImpl(t)->value();
  }
};

// The innermost level of the tensors on the stack; nothing where none is batched.
std::optional<Batch> innermost(const torch::jit::Stack& stack) {
  std::optional<Batch> found;
  for (const c10::IValue& value : stack) {
    if (!value.isTensor() || !value.toTensor().defined()) continue;
    const Tensor& t = value.toTensor();
    std::optional<Batch> own;
    if (const auto* batched = at::functorch::maybeGetBatchedImpl(t)) {
      own = {false, batched->level()};
    } else if (const auto* batched = at::maybeGetBatchedImpl(t)) {
      own = {true, batched->bdims().back().level()};
    }
    const auto deeper = [&] { return own->legacy == found->legacy ? own->level > found->level : found->legacy; };
    if (own && (!found || deeper())) found = own;
  }
  return found;
}

}  // namespace

void call_for_each(const c10::OperatorHandle& op, torch::jit::Stack& stack) {
  const std::optional<Batch> batch = innermost(stack);
  if (!batch) return op.callBoxed(&stack);
  const auto taken = [&](const c10::IValue& value) {
    return value.isTensor() && value.toTensor().defined() && batch->dim(value.toTensor());
  };
  const int64_t count = batch->size(std::find_if(stack.begin(), stack.end(), taken)->toTensor());
  TORCH_CHECK(count > 0, op.schema().name(), ": expected a batch with members");
  std::vector<std::vector<Tensor>> results(op.schema().returns().size());
  for (int64_t i = 0; i < count; ++i) {
    torch::jit::Stack one;
    for (const c10::IValue& value : stack) {
      one.push_back(taken(value) ? c10::IValue(batch->member(value.toTensor(), i)) : value);
    }
    call_for_each(op, one);
    for (std::size_t k = 0; k < results.size(); ++k) results[k].push_back(one[k].toTensor());
  }
  stack.clear();
  for (const std::vector<Tensor>& members : results) {
    stack.emplace_back(members[0].defined() ? batch->joined(members) : Tensor());
  }
}

}  // namespace compressm
