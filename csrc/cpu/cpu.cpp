#include "cpu.h"

#include <torch/csrc/stable/ops.h>

#include "kernels.h"

namespace isqrt::cpu {
namespace {

template <class T> const Kernels<T>& kernels(EngineKind level) {
#if defined(__x86_64__)
  if (level == EngineKind::kAvx512) return avx512::kernels<T>();
  if (level == EngineKind::kAvx2) return avx2::kernels<T>();
#endif
  return portable::kernels<T>();
}

template <class Task> void run(const Task& task, void (*work)(const Task&, int64_t, int64_t), int64_t items) {
  torch::stable::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) { work(task, begin, end); });
}

}  // namespace

template <class T> void pool(const PoolTask<T>& task, EngineKind level) {
  run(task, kernels<T>(level).pool, task.x.batch * task.chunks.count);
  run(task, kernels<T>(level).merge, task.x.batch);
}

template <class T> void pool_backward(const PoolBackwardTask<T>& task, EngineKind level) {
  run(task, kernels<T>(level).pool_backward, task.x.batch * task.chunks.count);
}

template <class T> void root(const RootTask<T>& task, EngineKind level) {
  run(task, kernels<T>(level).root, task.batch);
}

template <class T> void root_backward(const RootBackwardTask<T>& task, EngineKind level) {
  run(task, kernels<T>(level).root_backward, task.batch);
}

#define ISQRT_INSTANTIATE(T)                                           \
  template void pool(const PoolTask<T>&, EngineKind);                  \
  template void pool_backward(const PoolBackwardTask<T>&, EngineKind); \
  template void root(const RootTask<T>&, EngineKind);                  \
  template void root_backward(const RootBackwardTask<T>&, EngineKind);
ISQRT_INSTANTIATE(float)
ISQRT_INSTANTIATE(double)

}  // namespace isqrt::cpu
