// Launchers of the matrix root and its gradient on the whole device, for more channels than a block can hold.
#if defined(__CUDACC__)
#pragma nv_diag_suppress 20011, 20014  // the algorithm is for host and device, this engine for the host alone
#endif
#include <algorithm>

#include "cuda.h"
#include "grid_engine.cuh"

namespace isqrt::cuda {
namespace {

/// Those of the algorithm, and the results of a launch whose operands are still needed. (Two steps at once need one
/// more of them, and its memory no longer when Y and Z are computed.)
int matrices(bool backward, bool in_full) { return ((in_full ? 4 : 3) + 2) * (backward ? 2 : 1); }

/// Samples at a time, equally many in each slice, so that their matrices stay in the second-level cache of some 50 MB;
/// of tiles stored twice for warpgroups many are never used.
int64_t slice(int64_t batch, int64_t channels, int64_t element_size, int matrices) {
  constexpr int64_t kCache = int64_t(44) << 20;
  const int64_t most =
      std::max<int64_t>(1, kCache / (int64_t(tile_count(int(channels))) * grid_tile_bytes(element_size) * matrices));
  const int64_t slices = std::max<int64_t>(1, divide_up(batch, most));
  return divide_up(batch, slices);
}

/// f(shape, first sample) for each slice of the batch.
template <class T, class Task, class F>
void for_each_slice(const Task& task, int64_t channels, int matrices, bool warpgroups, const F& f) {
  const int64_t samples = slice(task.batch, channels, sizeof(T), matrices);
  for (int64_t first = 0; first < task.batch; first += samples)
    f(GridShape{std::min(samples, task.batch - first), int(channels), warpgroups}, first);
}

template <class T> void launch_root(const RootTask<T, Elements<T>>& task, bool warpgroups, void* stream) {
  const int count = matrices(false, task.steps.any_in_full());
  for_each_slice<T>(task, task.sigma.channels, count, warpgroups, [&](const GridShape& shape, int64_t first) {
    GridEngine<T> e(shape, count, task.workspace, stream);
    const auto scale = e.number(task.scale ? task.scale + first : nullptr);
    const auto root = matrix_root(e, task.sigma.sample(first), task.steps, task.root);
    const auto result = task.result.sample(first);
    result.output == Output::kMean ? e.write_means(root, result, scale) : e.write(root, result, scale);
  });
}

template <class T>
void launch_root_backward(const RootBackwardTask<T, Elements<const T>>& task, bool warpgroups, void* stream) {
  const int count = matrices(true, task.steps.any_in_full());
  for_each_slice<T>(task, task.sigma.channels, count, warpgroups, [&](const GridShape& shape, int64_t first) {
    GridEngine<T> e(shape, count, task.workspace, stream);
    const auto with_root = [&](const auto& factor, const auto& P) {
      if (!task.value) return;
      const RootView<T> values{task.value, Output::kMatrix, task.sigma.channels};
      e.write(e.result(factor, P), values.sample(first), e.number(nullptr));
    };
    const auto gradient =
        matrix_root_backward(e, task.sigma.sample(first), task.grad.sample(first), task.steps, task.root, with_root);
    e.write(gradient, task.grad_sigma.sample(first), e.number(nullptr));
  });
}

}  // namespace

template <class X> void grid_root(const RootTask<X>& task, bool warpgroups, void* stream) {
  launch_root(with_elements(task), warpgroups, stream);
}
template <class X> void grid_root_backward(const RootBackwardTask<X>& task, bool warpgroups, void* stream) {
  launch_root_backward(with_elements(task), warpgroups, stream);
}

int64_t grid_workspace_size(int64_t batch, int64_t channels, int64_t element_size, bool backward, bool in_full,
                            bool warpgroups) {
  const int count = matrices(backward, in_full);
  const GridShape shape{slice(batch, channels, element_size, count), int(channels), warpgroups};
  return element_size == sizeof(double) ? GridEngine<double>::workspace_size(shape, count)
                                        : GridEngine<float>::workspace_size(shape, count);
}

template void grid_root(const RootTask<float>&, bool, void*);
template void grid_root(const RootTask<double>&, bool, void*);
template void grid_root(const RootTask<Half>&, bool, void*);
template void grid_root(const RootTask<BFloat16>&, bool, void*);
template void grid_root_backward(const RootBackwardTask<float>&, bool, void*);
template void grid_root_backward(const RootBackwardTask<double>&, bool, void*);
template void grid_root_backward(const RootBackwardTask<Half>&, bool, void*);
template void grid_root_backward(const RootBackwardTask<BFloat16>&, bool, void*);

}  // namespace isqrt::cuda
