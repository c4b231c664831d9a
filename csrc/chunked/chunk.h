// What a kernel knows of a chunk, and of the tensors whose steps are cut into chunks.
#pragma once

#include <cstdint>

namespace compressm {

// Steps [start, start + steps) of row `row`; chunks are numbered over all sequences.
struct Chunk {
  std::int64_t row, start, steps, index;
};

// A (batch, time, head, ...) tensor of floats and the strides of these axes; a fourth is contiguous.
struct HeadRows {
  float* data = nullptr;
  std::int64_t batch = 0, time = 0, head = 0;
  float* at(const Chunk& chunk, std::int64_t h) const { return data + chunk.row * batch + chunk.start * time + h * head; }
};

}  // namespace compressm
