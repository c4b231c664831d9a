// What a kernel knows of a chunk.
#pragma once

#include <cstdint>

namespace compressm {

// Steps [start, start + steps) of row `row`; chunks are numbered over all sequences.
struct Chunk {
  std::int64_t row, start, steps, index;
};

}  // namespace compressm
