// The CPU engine as ops.cpp sees it: one work item per thread at a time, at a SIMD level chosen at run time.
#pragma once
#include "../plan.h"
#include "../tasks.h"

namespace isqrt::cpu {

template <class X> void pool(const PoolTask<X>& task, EngineKind level);
template <class X> void pool_backward(const PoolBackwardTask<X>& task, EngineKind level);
template <class X> void root(const RootTask<X>& task, EngineKind level);
template <class X> void root_backward(const RootBackwardTask<X>& task, EngineKind level);

}  // namespace isqrt::cpu
