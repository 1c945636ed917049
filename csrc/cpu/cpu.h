// The CPU engine as call.h sees it: work items, one per thread at a time, at a SIMD level chosen at run time.
#pragma once
#include <functional>
#include <vector>

#include "../plan.h"
#include "../tasks.h"

namespace isqrt::cpu {

class Items;

/// Stages of work, which the threads go through one after the other without waiting for each other in between: a sample
/// enters a stage as soon as it has left the one before.
class Stages {
 public:
  /// `work` does items of the stage, so many for each sample, on the calling thread; so many threads are of use to one.
  void add(int64_t samples, int64_t per_sample, int64_t threads, std::function<void(Items&)> work) {
    stages_.push_back({samples, per_sample, threads, std::move(work)});
  }

  /// All that was added, the same number of samples in each stage. What it reads and writes must be there until then.
  void run();

 private:
  struct Stage {
    int64_t samples, per_sample, threads;
    std::function<void(Items&)> work;
  };
  std::vector<Stage> stages_;
};

/// Each adds what it does to `stages`.
template <class X> void pool(const PoolTask<X>& task, EngineKind level, Stages& stages);
template <class X> void pool_backward(const PoolBackwardTask<X>& task, EngineKind level, Stages& stages);
template <class X> void root(const RootTask<X>& task, EngineKind level, Stages& stages);
template <class X> void root_backward(const RootBackwardTask<X>& task, EngineKind level, Stages& stages);
template <class X> void gram(const GramTask<X>& task, EngineKind level, Stages& stages);
template <class X> void expand(const ExpandTask<X>& task, EngineKind level, Stages& stages);
template <class X> void contract(const ContractTask<X>& task, EngineKind level, Stages& stages);
template <class X> void gram_backward(const GramBackwardTask<X>& task, EngineKind level, Stages& stages);

}  // namespace isqrt::cpu
