// The kernels of the gated delta rule compiled for avx2.
#include "gated_delta_rule/gated_delta_rule.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>

#include "core/isa_avx2.inc"
#include "gated_delta_rule/gated_delta_rule_steps.inc"
#include "gated_delta_rule/gated_delta_rule_step.inc"
#include "gated_delta_rule/gated_delta_rule_forward.inc"
#include "gated_delta_rule/gated_delta_rule_backward.inc"
#include "gated_delta_rule/gated_delta_rule_gradients.inc"
#include "core/isa_end.inc"
#endif
