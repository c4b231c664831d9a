// Calls on batched tensors: torch.func.vmap, and is_grads_batched of torch.autograd.grad.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

namespace compressm {

// Calls an op that returns tensors, once for each of a batch where there is one: torch's own fallback takes no lists of tensors.
void call_for_each(const c10::OperatorHandle& op, torch::jit::Stack& stack);

}  // namespace compressm
