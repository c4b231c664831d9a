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

#include <torch/library.h>

namespace compressm {

// Registers the gradient of the op `name` in the library that defines it and `<name>_backward`.  `passed` names an argument
// whose gradient is that of the first output, "" for none.
void register_gradient(torch::Library& library, const char* name, const char* passed = "");

}  // namespace compressm
