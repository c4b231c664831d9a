// The selective scan kernels compiled for portable.
#include "selective_scan/selective_scan.h"

#include <cstring>

#define COMPRESSM_ISA portable
#define COMPRESSM_WIDTH 4
#include "selective_scan/selective_scan_vector.inc"
#include "selective_scan/selective_scan_forward.inc"
#include "selective_scan/selective_scan_backward.inc"
