// Kernels and launchers of the matrix root and its gradient: one block, and nothing but its shared memory, a sample.
#include "../tasks.h"
#include "cuda.h"
#include "matrix_engine.cuh"

namespace isqrt::cuda {
namespace {

/// Those of the algorithm.
constexpr int matrices(bool backward, bool in_full) { return (in_full ? 4 : 3) * (backward ? 2 : 1); }

/// What a kernel is compiled for: the matrix or its triangle; the mean, whose last step acts on a vector; or any of
/// them where some steps are in full.
enum class Variant { kMatrix, kMean, kInFull };

template <Variant kVariant> using constant = std::integral_constant<Variant, kVariant>;

/// Of any C for which a kernel is launched: the most tiles of a warp, and the most threads of a block.
template <class T, bool kBackward, Variant kVariant = Variant::kMatrix>
constexpr int kMostChannels = max_matrix_channels(sizeof(T), matrices(kBackward, kVariant == Variant::kInFull));
template <class T, bool kBackward> constexpr int kMostSlots = matrix_slots(kMostChannels<T, kBackward>);
constexpr int most_threads(int channels) {
  int most = 0;
  for (int c = kTile; c <= channels; c += kTile) most = most < matrix_threads(c) ? matrix_threads(c) : most;
  return most;
}

template <class T, int kSlots, Variant kVariant>
__global__ void __launch_bounds__(most_threads(kMostChannels<T, false, kVariant>), 1)
    root_kernel(const RootTask<T, Elements<T>> task) {
  wait_for_kernels_before();
  const int64_t C = task.sigma.channels;
  MatrixEngine<T, kSlots, kVariant == Variant::kInFull> e{int(C)};
  const auto sigma = task.sigma.sample(blockIdx.x);
  const auto result = task.result.sample(blockIdx.x);
  const auto factor = [&] { return task.scale ? 1 / task.scale[blockIdx.x] : T(1); };
  if constexpr (kVariant == Variant::kMean) {
    const auto mean = matrix_root_mean(e, sigma, task.steps, C);
    e.write(mean, result, factor());
  } else {
    const auto root = matrix_root(e, sigma, task.steps, task.root);
    if constexpr (kVariant == Variant::kInFull)
      if (result.output == Output::kMean) return e.write_means(root, result, factor());
    e.write(root, result, factor());
  }
}

template <class T, int kSlots, Variant kVariant>
__global__ void __launch_bounds__(most_threads(kMostChannels<T, true, kVariant>), 1)
    root_backward_kernel(const RootBackwardTask<T, Elements<const T>> task) {
  wait_for_kernels_before();
  const int64_t C = task.sigma.channels;
  MatrixEngine<T, kSlots, kVariant == Variant::kInFull> e{int(C)};
  const auto sigma = task.sigma.sample(blockIdx.x);
  const auto grad = task.grad.sample(blockIdx.x);
  const auto result = task.grad_sigma.sample(blockIdx.x);
  if constexpr (kVariant == Variant::kMean)
    e.write(matrix_root_mean_backward(e, sigma, grad, task.steps, C), result);
  else
    e.write(matrix_root_backward(e, sigma, grad, task.steps, task.root), result);
}

/// One block a sample, of the kernel that choose(slots, variant) returns, both as types; kSlots where two are not
/// enough and where steps are in full.
template <int kSlots, class Task, class Choose>
void launch_blocks(const char* name, const Choose& choose, int64_t channels, bool mean, int64_t shared_bytes,
                   void* stream, const Task& task) {
  if (shared_bytes == 0)
    throw std::runtime_error(std::string(name) + ": " + std::to_string(channels) +
                             " channels are more than a block can hold");
  const int C = int(channels);
  const auto choose_slots = [&](auto variant) {
    return matrix_slots(C) <= 2 ? choose(std::integral_constant<int, 2>(), variant)
                                : choose(std::integral_constant<int, kSlots>(), variant);
  };
  void (*const kernel)(Task) = task.steps.any_in_full()
                                   ? choose(std::integral_constant<int, kSlots>(), constant<Variant::kInFull>())
                               : mean ? choose_slots(constant<Variant::kMean>())
                                      : choose_slots(constant<Variant::kMatrix>());
  launch(name, kernel, task.batch, matrix_threads(C), shared_bytes, stream, task);
}

template <class T> void launch_root(const RootTask<T, Elements<T>>& task, void* stream) {
  const int64_t C = task.sigma.channels;
  const auto choose = [](auto slots, auto variant) { return root_kernel<T, slots, variant>; };
  launch_blocks<kMostSlots<T, false>>("root", choose, C, task.result.output == Output::kMean,
                                      root_shared_bytes(C, sizeof(T), false, task.steps.any_in_full()), stream, task);
}

template <class T> void launch_root_backward(const RootBackwardTask<T, Elements<const T>>& task, void* stream) {
  const int64_t C = task.sigma.channels;
  const auto choose = [](auto slots, auto variant) { return root_backward_kernel<T, slots, variant>; };
  launch_blocks<kMostSlots<T, true>>("root_backward", choose, C, task.grad.output == Output::kMean,
                                     root_shared_bytes(C, sizeof(T), true, task.steps.any_in_full()), stream, task);
}

}  // namespace

template <class X> void root(const RootTask<X>& task, void* stream) { launch_root(with_elements(task), stream); }
template <class X> void root_backward(const RootBackwardTask<X>& task, void* stream) {
  launch_root_backward(with_elements(task), stream);
}

template void root(const RootTask<float>&, void*);
template void root(const RootTask<double>&, void*);
template void root(const RootTask<Half>&, void*);
template void root(const RootTask<BFloat16>&, void*);
template void root_backward(const RootBackwardTask<float>&, void*);
template void root_backward(const RootBackwardTask<double>&, void*);
template void root_backward(const RootBackwardTask<Half>&, void*);
template void root_backward(const RootBackwardTask<BFloat16>&, void*);

int64_t root_shared_bytes(int64_t channels, int64_t element_size, bool backward, bool in_full) {
  const int count = matrices(backward, in_full);
  if (channels > max_matrix_channels(element_size, count)) return 0;
  return matrix_shared_bytes(int(channels), element_size, count);
}

int64_t shared_bytes_limit(int device) {
  int bytes = 0;
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "shared_bytes_limit");
  return bytes;
}

std::string architectures() { return ISQRT_CUDA_ARCHITECTURES; }

}  // namespace isqrt::cuda
