// The kernels of Mamba-2's scan compiled for portable.
#include "ssd/ssd.h"

#include <algorithm>
#include <cstring>

#define COMPRESSM_ISA portable
#define COMPRESSM_WIDTH 4
#include "ssd/ssd_steps.inc"
#include "ssd/ssd_forward.inc"
#include "ssd/ssd_backward.inc"
