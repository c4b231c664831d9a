#include "core/torch.h"
#include "core/autograd.h"

#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cstddef>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/batched.h"

namespace compressm {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr const char* kNamespace = "compressm_cpp::";
constexpr const char* kWayOut =
    "Compute on the reference, which torch differentiates in any mode: backend=\"reference\" of the function, "
    "COMPRESSM_BACKEND=reference for all, or float64 tensors";

c10::OperatorHandle find(const std::string& name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow((kNamespace + name).c_str(), "");
}

std::optional<std::size_t> index_of(const std::vector<c10::Argument>& arguments, const std::string& name) {
  const auto at = std::find_if(arguments.begin(), arguments.end(), [&](const auto& a) { return a.name() == name; });
  if (at == arguments.end()) return std::nullopt;
  return at - arguments.begin();
}

bool is_tensor(const c10::Argument& argument) {
  return argument.type()->isSubtypeOf(*c10::OptionalType::ofTensor());
}

// What follows the prefix; nothing if the name does not begin with it.
std::optional<std::string> after(const std::string& prefix, const std::string& name) {
  if (!name.starts_with(prefix)) return std::nullopt;
  return name.substr(prefix.size());
}

// Where the arguments of a backward come from, and where its results go.
class Formula {
 public:
  Formula(const std::string& op, const std::string& passed);

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

// The arguments that ops pass on, by the name of the op, and the formulas of those that were differentiated.
struct Known {
  std::mutex mutex;
  std::map<std::string, std::string> passed;
  std::map<std::string, Formula> formulas;
};

Known& known() {
  static Known& all = *new Known;
  return all;
}

const Formula& formula_of(const c10::OperatorHandle& op) {
  const std::string name = op.schema().name().substr(std::char_traits<char>::length(kNamespace));
  const std::lock_guard lock(known().mutex);
  const auto found = known().formulas.find(name);
  if (found != known().formulas.end()) return found->second;
  return known().formulas.emplace(name, Formula(name, known().passed.at(name))).first->second;
}

// The tensor, or one without elements and gradient for None, as torch's functions take defined tensors only.
const at::Tensor& tensor_of(const c10::IValue& value) {
  static const at::Tensor& none = *new at::Tensor(at::empty({0}));
  return value.isNone() ? none : value.toTensor();
}

// Raises where a tensor carries a tangent: an op that dropped it would answer with a derivative of zero.
void refuse_tangents(const c10::OperatorHandle& op, const torch::jit::Stack& stack) {
  const std::size_t count = op.schema().arguments().size();
  for (std::size_t i = 0; i < count; ++i) {
    const c10::IValue& value = torch::jit::peek(stack, i, count);
    if (value.isTensor() && value.toTensor().defined()) {
      TORCH_CHECK_NOT_IMPLEMENTED(!value.toTensor()._fw_grad(0).defined(), op.schema().name(),
                                  ": compressm's compiled kernels have no forward-mode derivative. ", kWayOut);
    }
  }
}

// Passes the results of a backward on; its own backward is not there.
struct OnceDifferentiable : torch::autograd::Function<OnceDifferentiable> {
  static variable_list forward(AutogradContext* ctx, const c10::OperatorHandle* op, const variable_list* results,
                               at::TensorList) {
    ctx->saved_data["op"] = op->schema().name();
    return *results;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list&) {
    TORCH_CHECK_NOT_IMPLEMENTED(false, ctx->saved_data.at("op").toStringRef(),
                                ": compressm's compiled kernels have no second derivative. ", kWayOut);
  }
};

// The autograd kernel of a backward: runs it, and raises where its results are differentiated in turn.
void call_once_differentiable(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  refuse_tangents(op, *stack);
  const std::size_t count = op.schema().arguments().size(), results = op.schema().returns().size();
  variable_list tensors;
  bool wanted = false;
  for (std::size_t i = 0; at::GradMode::is_enabled() && i < count; ++i) {
    const c10::IValue& value = torch::jit::peek(*stack, i, count);
    if (value.isTensor()) {
      tensors.push_back(tensor_of(value));
      wanted |= tensors.back().requires_grad();
    }
  }
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    op.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
  }
  if (!wanted) return;
  variable_list outputs;
  for (std::size_t i = 0; i < results; ++i) {
    if (torch::jit::peek(*stack, i, results).toTensor().defined()) {
      outputs.push_back(torch::jit::peek(*stack, i, results).toTensor());
    }
  }
  outputs = OnceDifferentiable::apply(&op, &outputs, at::TensorList(tensors));
  auto next = outputs.begin();
  for (std::size_t i = 0; i < results; ++i) {
    c10::IValue& result = torch::jit::peek(*stack, i, results);
    if (result.toTensor().defined()) result = *next++;
  }
}

Formula::Formula(const std::string& op, const std::string& passed) : op_(find(op)), backward_(find(op + "_backward")) {
  const auto &arguments = op_.schema().arguments(), &outputs = op_.schema().returns();
  const auto tensor = [&](const std::string& name) {
    const auto index = index_of(arguments, name);
    TORCH_INTERNAL_ASSERT(index && is_tensor(arguments[*index]), op, ": no tensor argument ", name);
    return static_cast<std::size_t>(std::find(tensors_.begin(), tensors_.end(), *index) - tensors_.begin());
  };
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    if (is_tensor(arguments[i])) tensors_.push_back(i);
  }
  has_list_ = outputs.back().type()->kind() == c10::TypeKind::ListType;
  const std::size_t tensors = outputs.size() - has_list_;  // that the op returns
  std::vector<bool> has_grad(tensors, false);
  for (const c10::Argument& wanted : backward_.schema().arguments()) {
    const std::string& name = wanted.name();
    if (const auto argument = index_of(arguments, name)) {
      sources_.push_back({is_tensor(arguments[*argument]) ? Kind::argument : Kind::setting, *argument});
    } else if (const auto output = index_of(outputs, name)) {
      sources_.push_back({*output < tensors ? Kind::output : Kind::list, *output});
    } else if (const auto needed = after("need_", name)) {
      sources_.push_back({Kind::need, tensor(*needed)});
    } else {
      const auto differentiated = after("grad_", name);
      const auto output_of_grad = differentiated ? index_of(outputs, *differentiated) : std::nullopt;
      TORCH_INTERNAL_ASSERT(output_of_grad, op, "_backward: what is the argument ", name, "?");
      sources_.push_back({Kind::grad, *output_of_grad});
      has_grad[*output_of_grad] = true;
    }
  }
  for (std::size_t i = 0; i < tensors; ++i) {
    if (!has_grad[i]) without_.push_back(i);
  }
  for (const c10::Argument& result : backward_.schema().returns()) {
    const auto name = after("grad_", result.name());
    TORCH_INTERNAL_ASSERT(name, op, "_backward: what is the result ", result.name(), "?");
    targets_.push_back(tensor(*name));
  }
  if (!passed.empty()) passed_ = tensor(passed);
}

variable_list Formula::forward(AutogradContext* ctx, c10::DispatchKeySet keys, const torch::jit::Stack& arguments) const {
  torch::jit::Stack stack = arguments;
  {
    at::AutoDispatchBelowADInplaceOrView guard;  // results that are views inside of the op are plain tensors outside
    op_.redispatchBoxed(keys, &stack);
  }
  variable_list outputs, saved, list;
  if (has_list_) list = torch::jit::pop(stack).toTensorVector();
  for (const c10::IValue& output : stack) outputs.push_back(output.toTensor());
  const auto& wanted = backward_.schema().arguments();
  for (std::size_t k = 0; k < sources_.size(); ++k) {
    const Source& source = sources_[k];
    if (source.kind == Kind::argument) {
      const c10::IValue& argument = arguments[source.index];
      saved.push_back(argument.isNone() ? at::Tensor() : argument.toTensor());
    }
    if (source.kind == Kind::output) saved.push_back(outputs[source.index]);
    if (source.kind == Kind::setting) ctx->saved_data[wanted[k].name()] = arguments[source.index];
  }
  saved.insert(saved.end(), list.begin(), list.end());
  ctx->save_for_backward(std::move(saved));
  ctx->set_materialize_grads(false);
  return outputs;
}

variable_list Formula::backward(AutogradContext* ctx, const variable_list& grads) const {
  variable_list results(tensors_.size());
  if (passed_ && ctx->needs_input_grad(*passed_)) results[*passed_] = grads[0];
  const auto needed = [&](std::size_t tensor) { return ctx->needs_input_grad(tensor); };
  const auto arrives = [&](const Source& source) { return source.kind == Kind::grad && grads[source.index].defined(); };
  if (std::none_of(targets_.begin(), targets_.end(), needed)) return results;
  if (std::none_of(sources_.begin(), sources_.end(), arrives)) return results;
  const auto& wanted = backward_.schema().arguments();
  const variable_list saved = ctx->get_saved_variables();
  const auto single = [](const Source& source) { return source.kind == Kind::argument || source.kind == Kind::output; };
  const std::size_t listed = saved.size() - static_cast<std::size_t>(std::count_if(sources_.begin(), sources_.end(), single));
  auto next = saved.begin();
  torch::jit::Stack stack;
  const auto push = [&](const at::Tensor& tensor) { stack.push_back(tensor.defined() ? c10::IValue(tensor) : c10::IValue()); };
  for (std::size_t k = 0; k < sources_.size(); ++k) {
    const Source& source = sources_[k];
    switch (source.kind) {
      case Kind::grad:
        push(grads[source.index]);
        break;
      case Kind::argument:
      case Kind::output:
        push(*next++);
        break;
      case Kind::list:
        stack.emplace_back(variable_list(saved.end() - static_cast<std::ptrdiff_t>(listed), saved.end()));
        break;
      case Kind::setting:
        stack.push_back(ctx->saved_data.at(wanted[k].name()));
        break;
      case Kind::need:
        stack.emplace_back(needed(source.index));
        break;
    }
  }
  call_for_each(backward_, stack);
  for (std::size_t k = 0; k < targets_.size(); ++k) {
    if (needed(targets_[k])) results[targets_[k]] = stack[k].toTensor();
  }
  return results;
}

struct Differentiable : torch::autograd::Function<Differentiable> {
  static variable_list forward(AutogradContext* ctx, const Formula* formula, c10::DispatchKeySet keys,
                               const torch::jit::Stack* arguments, at::TensorList) {
    ctx->saved_data["formula"] = reinterpret_cast<int64_t>(formula);  // formulas live as long as the process
    return formula->forward(ctx, keys, *arguments);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto* formula = reinterpret_cast<const Formula*>(ctx->saved_data.at("formula").toInt());
    variable_list results = formula->backward(ctx, grads);
    results.insert(results.begin(), 3, at::Tensor());  // of `formula`, `keys` and `arguments`
    return results;
  }
};

// The autograd kernel of an op.
void call_differentiable(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  refuse_tangents(op, *stack);
  const std::size_t count = op.schema().arguments().size();
  const c10::DispatchKeySet below = keys & c10::after_ADInplaceOrView_keyset;
  const Formula* formula = at::GradMode::is_enabled() ? &formula_of(op) : nullptr;
  variable_list tensors;
  bool wanted = false;
  if (formula) {
    for (const std::size_t i : formula->tensors()) {
      tensors.push_back(tensor_of(torch::jit::peek(*stack, i, count)));
      wanted |= tensors.back().requires_grad();
    }
  }
  if (!wanted) {
    at::AutoDispatchBelowADInplaceOrView guard;
    op.redispatchBoxed(below, stack);
    return;
  }
  const torch::jit::Stack arguments(stack->end() - static_cast<std::ptrdiff_t>(count), stack->end());
  variable_list outputs = Differentiable::apply(formula, below, &arguments, at::TensorList(tensors));
  for (const std::size_t i : formula->without()) outputs[i] = outputs[i].detach();
  torch::jit::drop(*stack, count);
  for (at::Tensor& output : outputs) stack->emplace_back(std::move(output));
  if (formula->has_list()) stack->emplace_back(c10::List<at::Tensor>());
}

}  // namespace

void register_gradient(torch::Library& library, const char* name, const char* passed) {
  {
    const std::lock_guard lock(known().mutex);
    known().passed[name] = passed;
  }
  const auto key = c10::DispatchKey::AutogradCPU;
  library.impl(name, torch::dispatch(key, torch::CppFunction::makeFromBoxedFunction<&call_differentiable>()));
  library.impl((std::string(name) + "_backward").c_str(),
               torch::dispatch(key, torch::CppFunction::makeFromBoxedFunction<&call_once_differentiable>()));
}

}  // namespace compressm
