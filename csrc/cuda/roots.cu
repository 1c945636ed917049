// Kernels and launchers of the matrix root and its gradient: one block, and nothing but its shared memory, a sample.
#include "../tasks.h"
#include "cuda.h"
#include "matrix_engine.cuh"

namespace isqrt::cuda {
namespace {

constexpr int kMatrices = 3, kMatricesBackward = 6;

template <class T, int kMatrices> constexpr int kMostSlots = matrix_slots(max_matrix_channels(sizeof(T), kMatrices));

template <class T, int kSlots> __global__ void __launch_bounds__(kMaxWarps* kWarp) root_kernel(const RootTask<T> task) {
  MatrixEngine<T, kSlots> engine(int(task.sigma.channels));
  auto Y = engine.matrix(), Z = engine.matrix(), ZY = engine.matrix();
  const int64_t sample = blockIdx.x;
  const auto result = matrix_root(engine, task.sigma.sample(sample), Y, Z, ZY, task.steps, task.root);
  engine.write(result, task.result.sample(sample));
}

template <class T, int kSlots, bool kMean>
__global__ void __launch_bounds__(kMaxWarps* kWarp) root_kernel(const RootTask<T> task) {
  const int64_t C = task.sigma.channels;
  MatrixEngine<T, kSlots> e{int(C)};
  auto Y = e.matrix(), Z = e.matrix(), ZY = e.matrix();
  const auto sigma = task.sigma.sample(blockIdx.x);
  const auto result = task.result.sample(blockIdx.x);
  if constexpr (kMean) {
    auto sums = e.column(), u = e.column(), v = e.column();
    e.write(matrix_root_mean(e, sigma, Y, Z, ZY, sums, u, v, task.steps, C), result);
  } else {
    e.write(matrix_root(e, sigma, Y, Z, ZY, task.steps, task.root), result);
  }
}

template <class T, int kSlots, bool kMean>
__global__ void __launch_bounds__(kMaxWarps* kWarp) root_backward_kernel(const RootBackwardTask<T> task) {
  const int64_t C = task.sigma.channels;
  MatrixEngine<T, kSlots> e{int(C)};
  auto Y = e.matrix(), Z = e.matrix(), ZY = e.matrix(), dY = e.matrix(), dZ = e.matrix(), dZY = e.matrix();
  const auto sigma = task.sigma.sample(blockIdx.x);
  const auto grad = task.grad.sample(blockIdx.x);
  const auto result = task.grad_sigma.sample(blockIdx.x);
  if constexpr (kMean) {
    auto g = e.column(), sums = e.column(), u = e.column(), v = e.column();
    e.write(matrix_root_mean_backward(e, sigma, grad, Y, Z, ZY, dY, dZ, dZY, g, sums, u, v, task.steps, C), result);
  } else {
    e.write(matrix_root_backward(e, sigma, grad, Y, Z, ZY, dY, dZ, dZY, task.steps, task.root), result);
  }
}

/// One block a sample, of the kernel that choose(slots, mean) returns, both as types; kSlots where one is not enough.
template <int kSlots, class Task, class Choose>
void launch_blocks(const char* name, const Choose& choose, int64_t channels, bool mean, int64_t shared_bytes,
                   void* stream, const Task& task) {
  if (shared_bytes == 0)
    throw std::runtime_error(std::string(name) + ": " + std::to_string(channels) +
                             " channels are more than a block can hold");
  const int C = int(channels);
  const auto choose_slots = [&](auto mean_type) {
    return matrix_slots(C) == 1 ? choose(std::integral_constant<int, 1>(), mean_type)
                                : choose(std::integral_constant<int, kSlots>(), mean_type);
  };
  void (*const kernel)(Task) = mean ? choose_slots(std::true_type()) : choose_slots(std::false_type());
  launch(name, kernel, task.batch, matrix_threads(C), shared_bytes, stream, task);
}

}  // namespace

template <class T> void root(const RootTask<T>& task, void* stream) {
  const int64_t C = task.sigma.channels;
  const auto choose = [](auto slots, auto mean) { return root_kernel<T, slots, mean>; };
  launch_blocks<kMostSlots<T, kMatrices>>("root", choose, C, task.result.output == Output::kMean,
                                          root_shared_bytes(C, sizeof(T), false), stream, task);
}

template <class T> void root_backward(const RootBackwardTask<T>& task, void* stream) {
  const int64_t C = task.sigma.channels;
  const auto choose = [](auto slots, auto mean) { return root_backward_kernel<T, slots, mean>; };
  launch_blocks<kMostSlots<T, kMatricesBackward>>("root_backward", choose, C, task.grad.output == Output::kMean,
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
