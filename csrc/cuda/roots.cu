// Kernels and launchers of the matrix root and its gradient: one block, and nothing but its shared memory, a sample.
#include "../tasks.h"
#include "cuda.h"
#include "matrix_engine.cuh"

namespace isqrt::cuda {
namespace {

constexpr int kMatrices = 3, kMatricesBackward = 6;

template <class T, int kSlots> __global__ void __launch_bounds__(kMaxWarps* kWarp) root_kernel(const RootTask<T> task) {
  MatrixEngine<T, kSlots> engine(int(task.sigma.channels));
  auto Y = engine.matrix(), Z = engine.matrix(), ZY = engine.matrix();
  const int64_t sample = blockIdx.x;
  const auto result = matrix_root(engine, task.sigma.sample(sample), Y, Z, ZY, task.steps, task.root);
  engine.write(result, task.result.sample(sample));
}

template <class T, int kSlots>
__global__ void __launch_bounds__(kMaxWarps* kWarp) root_backward_kernel(const RootBackwardTask<T> task) {
  MatrixEngine<T, kSlots> engine(int(task.sigma.channels));
  auto Y = engine.matrix(), Z = engine.matrix(), ZY = engine.matrix();
  auto dY = engine.matrix(), dZ = engine.matrix(), dZY = engine.matrix();
  const int64_t sample = blockIdx.x;
  const auto gradient = matrix_root_backward(engine, task.sigma.sample(sample), task.grad.sample(sample), Y, Z, ZY, dY,
                                             dZ, dZY, task.steps, task.root);
  engine.write(gradient, task.grad_sigma.sample(sample));
}

/// One block a sample: `kernel` where each warp has one tile, else `kernel_of_more`.
template <class Task>
void launch_blocks(const char* name, void (*kernel)(Task), void (*kernel_of_more)(Task), int64_t channels,
                   int64_t shared_bytes, void* stream, const Task& task) {
  if (shared_bytes == 0)
    throw std::runtime_error(std::string(name) + ": " + std::to_string(channels) +
                             " channels are more than a block can hold");
  const int C = int(channels);
  launch(name, matrix_slots(C) == 1 ? kernel : kernel_of_more, task.batch, matrix_threads(C), shared_bytes, stream,
         task);
}

}  // namespace

template <class T> void root(const RootTask<T>& task, void* stream) {
  const int64_t C = task.sigma.channels;
  launch_blocks<RootTask<T>>("root", root_kernel<T, 1>, root_kernel<T, kMaxSlots>, C,
                             root_shared_bytes(C, sizeof(T), false), stream, task);
}

template <class T> void root_backward(const RootBackwardTask<T>& task, void* stream) {
  const int64_t C = task.sigma.channels;
  launch_blocks<RootBackwardTask<T>>("root_backward", root_backward_kernel<T, 1>, root_backward_kernel<T, kMaxSlots>, C,
                                     root_shared_bytes(C, sizeof(T), true), stream, task);
}

template void root(const RootTask<float>&, void*);
template void root(const RootTask<double>&, void*);
template void root_backward(const RootBackwardTask<float>&, void*);
template void root_backward(const RootBackwardTask<double>&, void*);

int64_t root_shared_bytes(int64_t channels, int64_t element_size, bool backward) {
  const int matrices = backward ? kMatricesBackward : kMatrices;
  if (channels > max_matrix_channels(element_size, matrices)) return 0;
  return matrix_shared_bytes(int(channels), element_size, matrices);
}

int64_t shared_bytes_limit(int device) {
  int bytes = 0;
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "shared_bytes_limit");
  return bytes;
}

std::string architectures() { return ISQRT_CUDA_ARCHITECTURES; }

}  // namespace isqrt::cuda
