// Kernels and launchers of the matrix root and its gradient: one block, and nothing but its shared memory, a sample.
#include "../tasks.h"
#include "cuda.h"
#include "matrix_engine.cuh"

namespace isqrt::cuda {
namespace {

constexpr int kMatrices = 3, kMatricesBackward = 6;

template <class T>
__global__ void __launch_bounds__(matrix_threads(max_matrix_channels(sizeof(T), kMatrices)))
    root_kernel(const RootTask<T> task) {
  MatrixEngine<T> engine(int(task.sigma.channels));
  auto Y = engine.matrix(), Z = engine.matrix(), ZY = engine.matrix();
  const int64_t sample = blockIdx.x;
  const auto result = matrix_root(engine, task.sigma.sample(sample), Y, Z, ZY, task.steps, task.root);
  engine.write(result, task.result.sample(sample));
}

template <class T>
__global__ void __launch_bounds__(matrix_threads(max_matrix_channels(sizeof(T), kMatricesBackward)))
    root_backward_kernel(const RootBackwardTask<T> task) {
  MatrixEngine<T> engine(int(task.sigma.channels));
  auto Y = engine.matrix(), Z = engine.matrix(), ZY = engine.matrix();
  auto dY = engine.matrix(), dZ = engine.matrix(), dZY = engine.matrix();
  const int64_t sample = blockIdx.x;
  const auto gradient = matrix_root_backward(engine, task.sigma.sample(sample), task.grad.sample(sample), Y, Z, ZY, dY,
                                             dZ, dZY, task.steps, task.root);
  engine.write(gradient, task.grad_sigma.sample(sample));
}

/// Threads of a block for that many channels.
template <class T> int threads(int64_t channels, int matrices) {
  if (channels > max_matrix_channels(sizeof(T), matrices))
    throw std::runtime_error("root: " + std::to_string(channels) + " channels are more than a block can hold");
  return matrix_threads(int(channels));
}

}  // namespace

template <class T> void root(const RootTask<T>& task, void* stream) {
  const int64_t C = task.sigma.channels;
  launch("root", root_kernel<T>, task.batch, threads<T>(C, kMatrices), root_shared_bytes(C, sizeof(T), false), stream,
         task);
}

template <class T> void root_backward(const RootBackwardTask<T>& task, void* stream) {
  const int64_t C = task.sigma.channels;
  launch("root_backward", root_backward_kernel<T>, task.batch, threads<T>(C, kMatricesBackward),
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
