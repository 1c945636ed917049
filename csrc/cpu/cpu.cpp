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

template <class Task> void run(const Task& task, void (*work)(const Task&, int64_t, int64_t), int64_t items) {
  torch::stable::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) { work(task, begin, end); });
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

template <class T> void root(const RootTask<T>& task, EngineKind level) {
  run(task, ISQRT_KERNELS(level, root_kernels<T>()).root, task.batch);
}

template <class T> void root_backward(const RootBackwardTask<T>& task, EngineKind level) {
  run(task, ISQRT_KERNELS(level, root_kernels<T>()).root_backward, task.batch);
}

#define ISQRT_INSTANTIATE_POOL(X)                     \
  template void pool(const PoolTask<X>&, EngineKind); \
  template void pool_backward(const PoolBackwardTask<X>&, EngineKind);
#define ISQRT_INSTANTIATE_ROOT(T)                     \
  template void root(const RootTask<T>&, EngineKind); \
  template void root_backward(const RootBackwardTask<T>&, EngineKind);
ISQRT_INSTANTIATE_POOL(float)
ISQRT_INSTANTIATE_POOL(double)
ISQRT_INSTANTIATE_POOL(Half)
ISQRT_INSTANTIATE_POOL(BFloat16)
ISQRT_INSTANTIATE_ROOT(float)
ISQRT_INSTANTIATE_ROOT(double)

}  // namespace isqrt::cpu
