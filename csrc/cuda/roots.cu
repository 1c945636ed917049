// Kernels and launchers of the matrix root and its gradient: one block a sample, or a cluster of them, and nothing but
// shared memory.
#include "../tasks.h"
#include "cluster_engine.cuh"
#include "cuda.h"

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

template <Variant kVariant, class Engine, class T>
__device__ __forceinline__ void run_root(Engine& e, const RootTask<T, Elements<T>>& task, int64_t sample) {
  const int64_t C = task.sigma.channels;
  const auto sigma = task.sigma.sample(sample);
  const auto result = task.result.sample(sample);
  const auto factor = [&] { return task.scale ? 1 / task.scale[sample] : T(1); };
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

template <Variant kVariant, class Engine, class T>
__device__ __forceinline__ void run_root_backward(Engine& e, const RootBackwardTask<T, Elements<const T>>& task,
                                                  int64_t sample) {
  const int64_t C = task.sigma.channels;
  const auto sigma = task.sigma.sample(sample);
  const auto grad = task.grad.sample(sample);
  const auto result = task.grad_sigma.sample(sample);
  if constexpr (kVariant == Variant::kMean)
    e.write(matrix_root_mean_backward(e, sigma, grad, task.steps, C), result);
  else
    e.write(matrix_root_backward(e, sigma, grad, task.steps, task.root), result);
}

template <class T, int kSlots, Variant kVariant>
__global__ void __launch_bounds__(most_threads(kMostChannels<T, false, kVariant>), 1)
    root_kernel(const RootTask<T, Elements<T>> task) {
  wait_for_kernels_before();
  MatrixEngine<T, kSlots, kVariant == Variant::kInFull> e(int(task.sigma.channels));
  run_root<kVariant>(e, task, blockIdx.x);
}

template <class T, int kSlots, Variant kVariant>
__global__ void __launch_bounds__(most_threads(kMostChannels<T, true, kVariant>), 1)
    root_backward_kernel(const RootBackwardTask<T, Elements<const T>> task) {
  wait_for_kernels_before();
  MatrixEngine<T, kSlots, kVariant == Variant::kInFull> e(int(task.sigma.channels));
  run_root_backward<kVariant>(e, task, blockIdx.x);
}

/// In a cluster each result of a step that is an operand, too, has a spare matrix: Y and Z, and their derivatives.
constexpr int spares(bool backward) { return backward ? 4 : 2; }
template <bool kBackward>
constexpr int kMostClusterChannels = max_matrix_channels(sizeof(float), matrices(kBackward, false) + spares(kBackward));

template <Variant kVariant>
__global__ void __launch_bounds__(kWarp* kMostClusterWarps, 1)
    root_cluster_kernel(const RootTask<float, Elements<float>> task, const __grid_constant__ Program program) {
  ClusterEngine<kVariant == Variant::kMean> e(int(task.sigma.channels), program);
  wait_for_kernels_before();
  run_root<kVariant>(e, task, blockIdx.x / cluster_size());
}

template <Variant kVariant>
__global__ void __launch_bounds__(kWarp* kMostClusterWarps, 1)
    root_backward_cluster_kernel(const RootBackwardTask<float, Elements<const float>> task,
                                 const __grid_constant__ Program program) {
  ClusterEngine<kVariant == Variant::kMean> e(int(task.sigma.channels), program);
  wait_for_kernels_before();
  run_root_backward<kVariant>(e, task, blockIdx.x / cluster_size());
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

template <class Task, class Record>
void launch_cluster(const char* name, void (*kernel)(Task, Program), int64_t channels, bool backward, bool mean,
                    const Record& record, void* stream, const Task& task) {
  const int64_t shared_bytes = cluster_shared_bytes(channels, sizeof(float), backward, task.steps.any_in_full());
  if (shared_bytes == 0)
    throw std::runtime_error(std::string(name) + ": a cluster has no such steps, or not so many channels");
  if (task.blocks > kMostClusterBlocks || (task.blocks & (task.blocks - 1)))
    throw std::runtime_error(std::string(name) + ": " + std::to_string(task.blocks) +
                             " blocks of a cluster are not 1, 2, 4 or 8");
  const int C = int(channels), threads = cluster_threads(C);
  const Program program = record(task.steps, task.root, mean, task.blocks * threads / kWarp, C,
                                 matrices(backward, false), spares(backward));
  launch_clusters(name, kernel, task.batch, task.blocks, threads, shared_bytes, stream, task, program);
}

/// One block, too, runs the program of a cluster, faster than it would go through the steps, where it has room for the
/// spare matrices.
template <class Task> bool runs_program(const char* name, int64_t channels, bool backward, const Task& task) {
  const int64_t bytes = cluster_shared_bytes(channels, sizeof(float), backward, task.steps.any_in_full());
  return task.blocks > 1 || (bytes > 0 && bytes <= limits(current_device(name)).shared_bytes);
}

template <class T> void launch_root(const RootTask<T, Elements<T>>& task, void* stream) {
  const int64_t C = task.sigma.channels;
  const bool mean = task.result.output == Output::kMean;
  if constexpr (std::is_same_v<T, float>)
    if (runs_program("root", C, false, task))
      return launch_cluster("root", mean ? root_cluster_kernel<Variant::kMean> : root_cluster_kernel<Variant::kMatrix>,
                            C, false, mean, record_root, stream, task);
  const auto choose = [](auto slots, auto variant) { return root_kernel<T, slots, variant>; };
  launch_blocks<kMostSlots<T, false>>("root", choose, C, mean,
                                      root_shared_bytes(C, sizeof(T), false, task.steps.any_in_full()), stream, task);
}

template <class T> void launch_root_backward(const RootBackwardTask<T, Elements<const T>>& task, void* stream) {
  const int64_t C = task.sigma.channels;
  const bool mean = task.grad.output == Output::kMean;
  if constexpr (std::is_same_v<T, float>)
    if (runs_program("root_backward", C, true, task))
      return launch_cluster(
          "root_backward",
          mean ? root_backward_cluster_kernel<Variant::kMean> : root_backward_cluster_kernel<Variant::kMatrix>, C, true,
          mean, record_root_backward, stream, task);
  const auto choose = [](auto slots, auto variant) { return root_backward_kernel<T, slots, variant>; };
  launch_blocks<kMostSlots<T, true>>("root_backward", choose, C, mean,
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

int64_t cluster_shared_bytes(int64_t channels, int64_t element_size, bool backward, bool in_full) {
  const int most = backward ? kMostClusterChannels<true> : kMostClusterChannels<false>;
  if (element_size != sizeof(float) || in_full || channels > most) return 0;
  return matrix_shared_bytes(int(channels), element_size, matrices(backward, false) + spares(backward));
}

Limits limits(int device) {
  return limits(device, reinterpret_cast<const void*>(root_cluster_kernel<Variant::kMatrix>), "limits");
}

std::string architectures() { return ISQRT_CUDA_ARCHITECTURES; }

}  // namespace isqrt::cuda
