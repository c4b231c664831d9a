#pragma once

#include <cstdint>

namespace compressm {

typedef std::uint16_t BFloat16;  // the upper half of a float's bits

}  // namespace compressm
