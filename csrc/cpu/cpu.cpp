#include "cpu.h"

#include <torch/csrc/stable/ops.h>

#include "kernels.h"

namespace isqrt::cpu {
namespace {

/// The table of kernels of one level.
#if defined(__x86_64__)
#define ISQRT_KERNELS(level, table) \
  ((level) == EngineKind::kAvx512 ? avx512::table : (level) == EngineKind::kAvx2 ? avx2::table : portable::table)
#else
#define ISQRT_KERNELS(level, table) (static_cast<void>(level), portable::table)
#endif

template <class Task> void run(const Task& task, void (*work)(const Task&, Items&), int64_t count) {
  const int64_t threads = torch::stable::get_num_threads();
  Items items(count, threads);
  torch::stable::parallel_for(0, count < threads ? count : threads, 1, [&](int64_t, int64_t) { work(task, items); });
}

}  // namespace

template <class X> void pool(const PoolTask<X>& task, EngineKind level) {
  const PoolKernels<X> kernels = ISQRT_KERNELS(level, pool_kernels<X>());
  run(task, kernels.pool, task.x.batch * task.chunks.count);
  run(task, kernels.merge, task.x.batch);
}

template <class X> void pool_backward(const PoolBackwardTask<X>& task, EngineKind level) {
  run(task, ISQRT_KERNELS(level, pool_kernels<X>()).pool_backward, task.x.batch * task.chunks.count);
}

template <class X> void root(const RootTask<X>& task, EngineKind level) {
  run(task, ISQRT_KERNELS(level, root_kernels<X>()).root, task.batch);
}

template <class X> void root_backward(const RootBackwardTask<X>& task, EngineKind level) {
  run(task, ISQRT_KERNELS(level, root_kernels<X>()).root_backward, task.batch);
}

#define ISQRT_INSTANTIATE(X)                                           \
  template void pool(const PoolTask<X>&, EngineKind);                  \
  template void pool_backward(const PoolBackwardTask<X>&, EngineKind); \
  template void root(const RootTask<X>&, EngineKind);                  \
  template void root_backward(const RootBackwardTask<X>&, EngineKind);
ISQRT_INSTANTIATE(float)
ISQRT_INSTANTIATE(double)
ISQRT_INSTANTIATE(Half)
ISQRT_INSTANTIATE(BFloat16)

}  // namespace isqrt::cpu
