#include "cpu.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <deque>
#include <exception>
#include <mutex>
#include <new>
#include <stdexcept>

#include "kernels.h"

namespace isqrt::cpu {

/// The table of kernels of one level.
#if defined(__x86_64__)
#define ISQRT_KERNELS(level, table) \
  ((level) == EngineKind::kAvx512 ? avx512::table : (level) == EngineKind::kAvx2 ? avx2::table : portable::table)
#else
#define ISQRT_KERNELS(level, table) (static_cast<void>(level), portable::table)
#endif

void Stages::run() {
  const int64_t threads = torch::stable::get_num_threads();
  std::vector<std::vector<int64_t>> left;
  std::deque<Queue> queues;
  int64_t workers = 0;
  bool help = false;
  for (const Stage& stage : stages_) {
    left.emplace_back(stage.samples, stage.per_sample);
    queues.emplace_back(stage.samples, stage.per_sample, threads, left.back().data(),
                        queues.empty() ? nullptr : &queues.back());
    workers = std::max(workers, std::min(threads, stage.samples * stage.per_sample * stage.threads));
    help = help || stage.threads > 1;
  }
  Crew crew(workers, help);
  // What a thread throws is kept: of an exception that passes through it parallel_for says no more than that.
  std::exception_ptr failed;
  std::mutex mutex;
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    try {
      SharedLoop& loop = crew.join();
      for (size_t s = 0; s < stages_.size(); ++s) {
        Items items(queues[s], crew, loop);
        stages_[s].work(items);
      }
      crew.help_until(loop, [&] { return queues.back().is_done(); });
    } catch (const std::bad_alloc&) {
      const std::lock_guard<std::mutex> lock(mutex);
      failed = std::make_exception_ptr(std::runtime_error("isqrt_cov: out of memory for a thread's scratch"));
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      failed = std::current_exception();
    }
  });
  stages_.clear();
  if (failed) std::rethrow_exception(failed);
}

/// Threads of use to an item whose loops are over the panels of so many columns: one for four panels of 16, where there
/// are enough of them for SharedLoop::run().
int64_t threads_of_item(int64_t columns) { return columns <= 112 ? 1 : divide_up(columns, 64); }

template <class X> void pool(const PoolTask<X>& task, EngineKind level, Stages& stages) {
  const PoolKernels<X> kernels = ISQRT_KERNELS(level, pool_kernels<X>());
  stages.add(task.x.batch, task.chunks.count, threads_of_item(task.x.channels),
             [=](Items& items) { kernels.pool(task, items); });
  stages.add(task.x.batch, 1, 1, [=](Items& items) { kernels.merge(task, items); });
}

template <class X> void pool_backward(const PoolBackwardTask<X>& task, EngineKind level, Stages& stages) {
  const PoolKernels<X> kernels = ISQRT_KERNELS(level, pool_kernels<X>());
  stages.add(task.x.batch, task.chunks.count, 1, [=](Items& items) { kernels.pool_backward(task, items); });
}

// Those of which each sample is one item: the kernel that `member` is.
#define ISQRT_BY_SAMPLE(function, Task, batch, side, table, member)                                       \
  template <class X> void function(const Task<X>& task, EngineKind level, Stages& stages) {               \
    const auto kernels = ISQRT_KERNELS(level, table<X>());                                                \
    stages.add(task.batch, 1, threads_of_item(side), [=](Items& items) { kernels.member(task, items); }); \
  }
ISQRT_BY_SAMPLE(root, RootTask, batch, task.sigma.channels, root_kernels, root)
ISQRT_BY_SAMPLE(root_backward, RootBackwardTask, batch, task.sigma.channels, root_kernels, root_backward)
ISQRT_BY_SAMPLE(gram, GramTask, x.batch, gram_side(task.x.positions()), gram_kernels, pool)
ISQRT_BY_SAMPLE(expand, ExpandTask, x.batch, task.x.channels, gram_kernels, expand)
ISQRT_BY_SAMPLE(contract, ContractTask, x.batch, gram_side(task.x.positions()), gram_kernels, contract)
ISQRT_BY_SAMPLE(gram_backward, GramBackwardTask, x.batch, task.x.channels, gram_kernels, backward)
#undef ISQRT_BY_SAMPLE

#define ISQRT_INSTANTIATE(X)                                                    \
  template void pool(const PoolTask<X>&, EngineKind, Stages&);                  \
  template void pool_backward(const PoolBackwardTask<X>&, EngineKind, Stages&); \
  template void root(const RootTask<X>&, EngineKind, Stages&);                  \
  template void root_backward(const RootBackwardTask<X>&, EngineKind, Stages&); \
  template void gram(const GramTask<X>&, EngineKind, Stages&);                  \
  template void expand(const ExpandTask<X>&, EngineKind, Stages&);              \
  template void contract(const ContractTask<X>&, EngineKind, Stages&);          \
  template void gram_backward(const GramBackwardTask<X>&, EngineKind, Stages&);
ISQRT_INSTANTIATE(float)
ISQRT_INSTANTIATE(double)
ISQRT_INSTANTIATE(Half)
ISQRT_INSTANTIATE(BFloat16)

}  // namespace isqrt::cpu
