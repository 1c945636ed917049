// Launchers of the matrix root and its gradient on the whole device, for more channels than a block can hold.
#if defined(__CUDACC__)
#pragma nv_diag_suppress 20011, 20014  // the algorithm is for host and device, this engine for the host alone
#endif
#include <algorithm>

#include "cuda.h"
#include "grid_engine.cuh"

namespace isqrt::cuda {
namespace {

/// Those of the algorithm, and the results of a launch whose operands are still needed.
constexpr int kMatrices = 3 + 2, kMatricesBackward = 6 + 4;

/// Samples at a time, so that their matrices stay in the second-level cache of some 50 MB.
int64_t slice(int64_t batch, int64_t channels, int64_t element_size, int matrices) {
  constexpr int64_t kCache = int64_t(40) << 20;
  return std::max<int64_t>(1, std::min(batch, kCache / (element_size * GridShape(1, channels).size() * matrices)));
}

/// f(shape, first sample) for each slice of the batch.
template <class T, class Task, class F>
void for_each_slice(const Task& task, int64_t channels, int matrices, const F& f) {
  const int64_t samples = slice(task.batch, channels, sizeof(T), matrices);
  for (int64_t first = 0; first < task.batch; first += samples)
    f(GridShape(std::min(samples, task.batch - first), channels), first);
}

}  // namespace

template <class T> void grid_root(const RootTask<T>& task, void* stream) {
  for_each_slice<T>(task, task.sigma.channels, kMatrices, [&](const GridShape& shape, int64_t first) {
    GridEngine<T> e(shape, kMatrices, task.workspace, stream);
    typename GridEngine<T>::Matrix Y, Z, ZY;
    e.write(matrix_root(e, task.sigma.sample(first), Y, Z, ZY, task.steps, task.root), task.result.sample(first));
  });
}

template <class T> void grid_root_backward(const RootBackwardTask<T>& task, void* stream) {
  for_each_slice<T>(task, task.sigma.channels, kMatricesBackward, [&](const GridShape& shape, int64_t first) {
    GridEngine<T> e(shape, kMatricesBackward, task.workspace, stream);
    typename GridEngine<T>::Matrix Y, Z, ZY, dY, dZ, dZY;
    e.write(matrix_root_backward(e, task.sigma.sample(first), task.grad.sample(first), Y, Z, ZY, dY, dZ, dZY,
                                 task.steps, task.root),
            task.grad_sigma.sample(first));
  });
}

int64_t grid_workspace_size(int64_t batch, int64_t channels, int64_t element_size, bool backward) {
  const int matrices = backward ? kMatricesBackward : kMatrices;
  const GridShape shape(slice(batch, channels, element_size, matrices), channels);
  return GridEngine<float>::workspace_size(shape, matrices);
}

template void grid_root(const RootTask<float>&, void*);
template void grid_root(const RootTask<double>&, void*);
template void grid_root_backward(const RootBackwardTask<float>&, void*);
template void grid_root_backward(const RootBackwardTask<double>&, void*);

}  // namespace isqrt::cuda
