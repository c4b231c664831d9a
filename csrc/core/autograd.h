// The gradient of an op, made from the op of its backward: their schemas say how the two fit together.
//
//   scale(Tensor x, Tensor? bias, float by) -> (Tensor y, Tensor largest, Tensor[] kept)
//   scale_backward(Tensor? grad_y, Tensor x, Tensor[] kept, float by, bool need_x) -> (Tensor grad_x, Tensor grad_bias)
//
// An argument of the backward is one of
// - `grad_<output>`: that output's gradient; `Tensor?` where it can be missing, as it can be if two outputs have one;
// - an argument or an output of the op, by its name;
// - `need_<argument>`: whether that argument's gradient is asked for.
// It returns `grad_<argument>`s.  Outputs of which it takes no gradient have none.  A list, the last output, is for the
// backward alone: a caller who asks for a gradient gets an empty one.  Where no gradient comes in at all none goes out, as in
// torch's own functions.  The backward's own derivative and forward-mode derivatives are refused, with the way out.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <cstddef>
#include <optional>
#include <string>
#include <vector>

namespace compressm {

// Where the arguments of a backward come from, and where its results go.
class Formula {
 public:
  // `passed`: an argument whose gradient is that of the first output, "" for none.
  Formula(const std::string& op, const char* passed);

  const c10::OperatorHandle& op() const { return op_; }
  const std::vector<std::size_t>& tensors() const { return tensors_; }  // indices of the op's tensor arguments
  const std::vector<std::size_t>& without() const { return without_; }  // outputs that have no gradient
  bool has_list() const { return has_list_; }                           // whether the last output is a list

  // The outputs of the op but the list, run by the kernel of `keys`; `ctx` keeps what the backward needs.
  torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx, c10::DispatchKeySet keys,
                                         const torch::jit::Stack& arguments) const;
  // One gradient for every tensor argument.
  torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                          const torch::autograd::variable_list& grads) const;

 private:
  enum class Kind { grad, argument, output, list, setting, need };
  struct Source {
    Kind kind;
    std::size_t index;  // of the output, of the argument, or (need) of the tensor argument
  };
  c10::OperatorHandle op_, backward_;
  std::vector<std::size_t> tensors_;
  std::vector<Source> sources_;       // of every argument of the backward
  std::vector<std::size_t> targets_;  // of every result of the backward: which of the tensor arguments
  std::vector<std::size_t> without_;
  bool has_list_ = false;
  std::optional<std::size_t> passed_;
};

// The tensor, or one without elements and gradient for None, as torch's functions take defined tensors only.
const at::Tensor& tensor_of(const c10::IValue& value);

// Raises where a tensor carries a tangent: an op that dropped it would answer with a derivative of zero.
void refuse_tangents(const c10::OperatorHandle& op, const torch::jit::Stack& stack);

// The autograd kernel of a backward: runs it, and raises where its results are differentiated in turn.
void call_once_differentiable(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack);

// `Op` names the op (`Op::name`) and may name an argument that is passed on (`Op::passed`, else "").
template <typename Op>
struct Differentiable : torch::autograd::Function<Differentiable<Op>> {
  static const Formula& formula() {
    static const Formula formula(Op::name, Op::passed);
    return formula;
  }

  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx, c10::DispatchKeySet keys,
                                                const torch::jit::Stack* arguments, at::TensorList) {
    return formula().forward(ctx, keys, *arguments);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    torch::autograd::variable_list results = formula().backward(ctx, grads);
    results.insert(results.begin(), 2, at::Tensor());  // of `keys` and `arguments`
    return results;
  }

  // The autograd kernel.
  static void call(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
    refuse_tangents(op, *stack);
    const std::size_t count = op.schema().arguments().size();
    torch::autograd::variable_list tensors;
    bool wanted = false;
    if (at::GradMode::is_enabled()) {
      for (const std::size_t i : formula().tensors()) {
        tensors.push_back(tensor_of(torch::jit::peek(*stack, i, count)));
        wanted |= tensors.back().requires_grad();
      }
    }
    const c10::DispatchKeySet below = keys & c10::after_ADInplaceOrView_keyset;
    if (!wanted) {
      at::AutoDispatchBelowADInplaceOrView guard;
      op.redispatchBoxed(below, stack);
      return;
    }
    const torch::jit::Stack arguments(stack->end() - static_cast<std::ptrdiff_t>(count), stack->end());
    torch::autograd::variable_list outputs = Differentiable::apply(below, &arguments, at::TensorList(tensors));
    for (const std::size_t i : formula().without()) outputs[i] = outputs[i].detach();
    torch::jit::drop(*stack, count);
    for (at::Tensor& output : outputs) stack->emplace_back(std::move(output));
    if (formula().has_list()) stack->emplace_back(c10::List<at::Tensor>());
  }
};

// Registers the gradient of `Op` in the library that defines it and `<Op::name>_backward`.
template <typename Op>
void register_gradient(torch::Library& library) {
  const std::string backward = std::string(Op::name) + "_backward";
  library.impl(Op::name, torch::dispatch(c10::DispatchKey::AutogradCPU,
                                         torch::CppFunction::makeFromBoxedFunction<&Differentiable<Op>::call>()));
  library.impl(backward.c_str(), torch::dispatch(c10::DispatchKey::AutogradCPU,
                                                 torch::CppFunction::makeFromBoxedFunction<&call_once_differentiable>()));
}

}  // namespace compressm
