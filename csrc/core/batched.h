// Calls on batched tensors: torch.func.vmap, and is_grads_batched of torch.autograd.grad, whose batches are of an older kind.
// The headers of the two kinds do not go together in one file.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

#include <cstdint>
#include <vector>

namespace compressm {

// Calls an op that returns tensors, once for each of a batch where there is one: torch's own fallback takes no lists of tensors.
void call_for_each(const c10::OperatorHandle& op, torch::jit::Stack& stack);

// One kind of batches; a tensor may be part of several, one at each level.
struct BatchKind {
  int64_t (*innermost)(const at::Tensor& t);                          // its deepest level, 0 for a tensor in no batch
  bool (*has)(const at::Tensor& t, int64_t level);                    // whether it is part of the batch at a level
  int64_t (*size)(const at::Tensor& t, int64_t level);                // of that batch
  at::Tensor (*member)(const at::Tensor& t, int64_t level, int64_t i);  // number i of it
  at::Tensor (*joined)(const std::vector<at::Tensor>& members, int64_t level);
};

const BatchKind& transform_batches();
const BatchKind& gradient_batches();

}  // namespace compressm
