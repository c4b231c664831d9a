// The kernels of linear attention with decays of key channels compiled for portable.
#include "linear_attention/linear_attention.h"

#include <algorithm>
#include <cstring>

#define COMPRESSM_ISA portable
#define COMPRESSM_WIDTH 4
#include "linear_attention/linear_attention_kernels.inc"
