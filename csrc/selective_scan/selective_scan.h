// The selective scan on CPU: h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t, out_t = (C_t h_t + D u_t) silu(z_t), per channel.
//
// Vector lanes are adjacent channels of one group, a "block".  A sequence is cut into tiles of kScanTile steps; the
// forward keeps the state in front of each tile, and the backward recomputes the states of one tile at a time, walking
// the tiles in reverse.  The kernels are compiled once per instruction set (selective_scan_*.cpp include
// selective_scan_*.inc under different target pragmas); the set is the one that isa() names.
#pragma once

#include <cstdint>

#include "core/bfloat16.h"
#include "core/isa.h"

namespace compressm {

constexpr std::int64_t kScanTile = 32;   // steps between two saved states; STEPS in selective_scan/cpu.py
constexpr std::int64_t kScanBlocks = 4;  // blocks of channels that share one reading of B and C

// A (batch, channel, time) tensor and its strides; data is null where the argument was None.
struct ScanRows {
  void* data = nullptr;
  bool half = false;  // BFloat16, else floats
  std::int64_t batch = 0, channel = 0, time = 0;
  template <typename Element>
  Element* at(std::int64_t b, std::int64_t d, std::int64_t t) const {
    return static_cast<Element*>(data) + b * batch + d * channel + t * time;
  }
};

// A (batch, group, state, time) tensor of floats and its strides.
struct ScanMixing {
  float* data = nullptr;
  std::int64_t batch = 0, group = 0, state = 0, time = 0;
  float* at(std::int64_t b, std::int64_t g, std::int64_t t) const { return data + b * batch + g * group + t * time; }
};

// Steps [start, start + length) of row `batch`; its saved states are the tiles from first_tile on.
struct ScanSequence {
  std::int64_t index, batch, start, length, first_tile;
  std::int64_t tiles() const { return (length + kScanTile - 1) / kScanTile; }
};

struct ScanInputs {
  std::int64_t channels, states, group_channels;  // group_channels: channels that share one row of B and C
  bool softplus;
  ScanRows u, delta, z;
  ScanMixing B, C;
  const float *A, *D, *bias;  // (channels, states), (channels) or null, (channels) or null; contiguous
  const float* initial;       // (sequences, channels, states) contiguous, or null
};

struct ScanOutputs {
  ScanRows out, y;     // y: the output in front of the gate, or null
  float* last;         // (sequences, channels, states)
  float* checkpoints;  // (tiles, states, channels), or null
};

struct ScanGradients {
  ScanRows out, y;           // given: dL/dout and the output in front of the gate (null without z)
  const float* checkpoints;  // as the forward left them
  ScanRows u, delta, z;      // written
  float* state;              // (sequences, states, channels): dL/dh behind the tiles on entry, in front of them on return
  float *A, *D, *bias;       // (states, channels), (channels), (channels): added to
};

// Where the sums over channels that make the gradients of B and C go.  `whole`: the batch axis and t are those of B and C;
// else the batch axis counts sequences and t counts from the first of the tiles on.
struct ScanMixingSums {
  ScanMixing B, C;
  bool whole;
};

// Blocks [block, block + blocks) of one group.
struct ScanBlocks {
  std::int64_t group, block, blocks;
};

// One step of `channels` channels of one batch row that share B and C (states,).  x and z (channels,); A (channels, states),
// dt, D and bias (channels,), or, `tied`, one number of A, dt and bias for all channels; D, z and bias may be null.
struct ScanStep {
  const float *x, *dt, *A, *B, *C, *D, *z, *bias;
  bool softplus, tied;
  std::int64_t channels, states;
};

struct SelectiveScanKernels {
  std::int64_t width;  // channels of a block

  // Floats of scratch that forward and backward need; aligned to 64 bytes.
  std::int64_t (*forward_scratch)(std::int64_t states);
  std::int64_t (*backward_scratch)(std::int64_t states);

  // One whole sequence; at most kScanBlocks blocks.
  void (*forward)(const ScanInputs& in, const ScanOutputs& out, const ScanSequence& sequence, const ScanBlocks& blocks,
                  float* scratch);

  // Tiles [low, high) of `count` sequences (those that have them), for any number of blocks.
  void (*backward)(const ScanInputs& in, const ScanGradients& grad, const ScanMixingSums& sums,
                   const ScanSequence* sequences, std::int64_t count, const ScanBlocks& blocks, std::int64_t low,
                   std::int64_t high, float* scratch);

  // out (channels,) and the state to (channels, states) behind the step from that of `from`, which may be the same memory.
  void (*step)(const ScanStep& step, const float* from, float* to, float* out);
};

COMPRESSM_KERNELS(SelectiveScanKernels, selective_scan_kernels)

}  // namespace compressm
