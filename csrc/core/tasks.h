// Tasks that run in parallel, each with scratch memory of its thread.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <cstdint>

namespace compressm {

// body(task, scratch) for all tasks.
template <typename Body>
void for_each_task(int64_t tasks, int64_t scratch_floats, const Body& body) {
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const at::Tensor scratch = at::empty({scratch_floats}, at::kFloat);
    for (int64_t task = begin; task < end; ++task) body(task, scratch.data_ptr<float>());
  });
}

}  // namespace compressm
