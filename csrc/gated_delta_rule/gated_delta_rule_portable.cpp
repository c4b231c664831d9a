// The kernels of the gated delta rule compiled for portable.
#include "gated_delta_rule/gated_delta_rule.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <type_traits>

#define COMPRESSM_ISA portable
#define COMPRESSM_WIDTH 4
#include "gated_delta_rule/gated_delta_rule_steps.inc"
#include "gated_delta_rule/gated_delta_rule_step.inc"
#include "gated_delta_rule/gated_delta_rule_forward.inc"
#include "gated_delta_rule/gated_delta_rule_backward.inc"
#include "gated_delta_rule/gated_delta_rule_gradients.inc"
