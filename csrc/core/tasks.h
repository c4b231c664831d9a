// Tasks that run in parallel, each with scratch memory of its thread.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace compressm {

// body(task, scratch) for all tasks.  A thread begins with a share of its own, the same in every call, whose memory it has
// near; when that is done it takes tasks of the others' shares, so that no thread waits for a slower one.
template <typename Body>
void for_each_task(int64_t tasks, int64_t scratch_floats, const Body& body) {
  const int64_t threads = std::min<int64_t>(tasks, at::get_num_threads());
  std::vector<std::atomic<int64_t>> next(threads);
  const auto first = [&](int64_t share) { return tasks * share / threads; };
  for (int64_t share = 0; share < threads; ++share) next[share] = first(share);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const at::Tensor scratch = at::empty({scratch_floats}, at::kFloat);
    for (int64_t own = begin; own < end; ++own) {
      for (int64_t behind = 0; behind < threads; ++behind) {
        const int64_t share = (own + behind) % threads;
        for (int64_t task; (task = next[share]++) < first(share + 1);) body(task, scratch.data_ptr<float>());
      }
    }
  });
}

}  // namespace compressm
