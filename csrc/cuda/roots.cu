// Kernels and launchers of the matrix root and its gradient: one block a sample, or a cluster of them, and nothing but
// shared memory.
#if defined(__CUDACC__)
#pragma nv_diag_suppress 20011, 20014  // the algorithm is for host and device, the recorder of programs for the host
#endif
#include "../tasks.h"
#include "cluster_engine.cuh"
#include "cuda.h"
#include "warpgroup_engine.cuh"

namespace isqrt::cuda {
namespace {

/// Those of the algorithm.
constexpr int matrices(bool backward, bool in_full) { return (in_full ? 4 : 3) * (backward ? 2 : 1); }

/// Whether some steps are in full.
enum class Variant { kMirrored, kInFull };

template <Variant kVariant> using constant = std::integral_constant<Variant, kVariant>;

/// Of any C for which a kernel is launched: the most tiles of a warp, and the most threads of a block.
template <class T, bool kBackward, Variant kVariant = Variant::kMirrored>
constexpr int kMostChannels = max_matrix_channels(sizeof(T), matrices(kBackward, kVariant == Variant::kInFull));
template <class T, bool kBackward> constexpr int kMostSlots = matrix_slots(kMostChannels<T, kBackward>);
constexpr int most_threads(int channels) {
  int most = 0;
  for (int c = kTile; c <= channels; c += kTile) most = most < matrix_threads(c) ? matrix_threads(c) : most;
  return most;
}

template <class Engine, class T>
__device__ __forceinline__ void run_root(Engine& e, const RootTask<T, Elements<T>>& task, int64_t sample) {
  const auto result = task.result.sample(sample);
  const auto root = matrix_root(e, task.sigma.sample(sample), task.steps, task.root);
  const T factor = task.scale ? 1 / task.scale[sample] : T(1);
  result.output == Output::kMean ? e.write_means(root, result, factor) : e.write(root, result, factor);
}

template <class Engine, class T>
__device__ __forceinline__ void run_root_backward(Engine& e, const RootBackwardTask<T, Elements<const T>>& task,
                                                  int64_t sample) {
  const auto sigma = task.sigma.sample(sample);
  const auto gradient = matrix_root_backward(e, sigma, task.grad.sample(sample), task.steps, task.root);
  e.write(gradient, task.grad_sigma.sample(sample));
}

template <class T, int kSlots, Variant kVariant>
__global__ void __launch_bounds__(most_threads(kMostChannels<T, false, kVariant>), 1)
    root_kernel(const RootTask<T, Elements<T>> task) {
  wait_for_kernels_before();
  MatrixEngine<T, kSlots, kVariant == Variant::kInFull> e(int(task.sigma.channels));
  run_root(e, task, blockIdx.x);
}

template <class T, int kSlots, Variant kVariant>
__global__ void __launch_bounds__(most_threads(kMostChannels<T, true, kVariant>), 1)
    root_backward_kernel(const RootBackwardTask<T, Elements<const T>> task) {
  wait_for_kernels_before();
  MatrixEngine<T, kSlots, kVariant == Variant::kInFull> e(int(task.sigma.channels));
  run_root_backward(e, task, blockIdx.x);
}

template <bool kInPlace>
__global__ void __launch_bounds__(kWarp* kMostClusterWarps, 1)
    root_cluster_kernel(const RootTask<float, Elements<float>> task, const __grid_constant__ Program program) {
  ClusterEngine<kInPlace> e(int(task.sigma.channels), program);
  wait_for_kernels_before();
  run_root(e, task, blockIdx.x / cluster_size());
}

template <bool kInPlace>
__global__ void __launch_bounds__(kWarp* kMostClusterWarps, 1)
    root_backward_cluster_kernel(const RootBackwardTask<float, Elements<const float>> task,
                                 const __grid_constant__ Program program) {
  ClusterEngine<kInPlace> e(int(task.sigma.channels), program);
  wait_for_kernels_before();
  run_root_backward(e, task, blockIdx.x / cluster_size());
}

__global__ void __launch_bounds__(WarpgroupEngine::kThreads, 1)
    root_warpgroup_kernel(const RootTask<float, Elements<float>> task, const __grid_constant__ Program program) {
  if constexpr (kHasWarpgroups) {
    WarpgroupEngine e(int(task.sigma.channels), program);
    wait_for_kernels_before();
    run_root(e, task, blockIdx.x);
  } else {
    wait_for_kernels_before();
    require_warpgroups();
  }
}

__global__ void __launch_bounds__(WarpgroupEngine::kThreads, 1)
    root_backward_warpgroup_kernel(const RootBackwardTask<float, Elements<const float>> task,
                                   const __grid_constant__ Program program) {
  if constexpr (kHasWarpgroups) {
    WarpgroupEngine e(int(task.sigma.channels), program);
    wait_for_kernels_before();
    run_root_backward(e, task, blockIdx.x);
  } else {
    wait_for_kernels_before();
    require_warpgroups();
  }
}

/// One block a sample, of the kernel that choose(slots, variant) returns, both as types; kSlots where two are not
/// enough and where steps are in full.
template <int kSlots, class Task, class Choose>
void launch_blocks(const char* name, const Choose& choose, int64_t channels, int64_t shared_bytes, void* stream,
                   const Task& task) {
  if (shared_bytes == 0)
    throw std::runtime_error(std::string(name) + ": " + std::to_string(channels) +
                             " channels are more than a block can hold");
  const int C = int(channels);
  constexpr constant<Variant::kMirrored> kMirrored;
  void (*const kernel)(Task) = task.steps.any_in_full()
                                   ? choose(std::integral_constant<int, kSlots>(), constant<Variant::kInFull>())
                               : matrix_slots(C) <= 2 ? choose(std::integral_constant<int, 2>(), kMirrored)
                                                      : choose(std::integral_constant<int, kSlots>(), kMirrored);
  launch(name, kernel, task.batch, matrix_threads(C), shared_bytes, stream, task);
}

/// For each result of a step that is an operand, too: Y and Z, and their derivatives.
constexpr int spare_matrices(bool backward) { return backward ? 4 : 2; }

/// Whether the current device has room for them.
template <class Task> bool has_spares(const char* name, int64_t channels, bool backward, const Task& task) {
  const int count = matrices(backward, false) + spare_matrices(backward);
  return cluster_shared_bytes(channels, sizeof(float), backward, task.steps.any_in_full()) > 0 &&
         matrix_shared_bytes(int(channels), sizeof(float), count) <= limits(current_device(name)).shared_bytes;
}

/// A cluster for each sample, of the kernel that choose(in_place) returns.
template <class Task, class Choose, class Record>
void launch_cluster(const char* name, const Choose& choose, int64_t channels, bool backward, bool has_spares,
                    const Record& record, void* stream, const Task& task) {
  if (cluster_shared_bytes(channels, sizeof(float), backward, task.steps.any_in_full()) == 0)
    throw std::runtime_error(std::string(name) + ": a cluster has no such steps, or not so many channels");
  if (task.blocks > kMostClusterBlocks || (task.blocks & (task.blocks - 1)))
    throw std::runtime_error(std::string(name) + ": " + std::to_string(task.blocks) +
                             " blocks of a cluster are not 1, 2, 4 or 8");
  void (*const kernel)(Task, Program) = has_spares ? choose(std::false_type()) : choose(std::true_type());
  const int C = int(channels), threads = cluster_threads(C);
  const int count = matrices(backward, false), spares = has_spares ? spare_matrices(backward) : 0;
  const ProgramRecorder recorder(task.blocks * threads / kWarp, tile_count(C), count, spares, false);
  const Program program = record(recorder, task.steps, task.root);
  launch_clusters(name, kernel, task.batch, task.blocks, threads, matrix_shared_bytes(C, sizeof(float), count + spares),
                  stream, task, program);
}

/// A block of warpgroups for each sample, with spare matrices: its results never wait until all have read.
template <class Task, class Record>
void launch_warpgroups(const char* name, void (*kernel)(Task, Program), bool backward, const Record& record,
                       void* stream, const Task& task) {
  const int64_t bytes = warpgroup_shared_bytes(task.sigma.channels, sizeof(float), backward, task.steps.any_in_full());
  if (bytes == 0)
    throw std::runtime_error(std::string(name) + ": a block of warpgroups has no such steps, or not so many channels");
  constexpr int kWarps = WarpgroupEngine::kThreads / kWarp;
  const ProgramRecorder recorder(kWarps, 1, matrices(backward, false), spare_matrices(backward), true);
  launch(name, kernel, task.batch, WarpgroupEngine::kThreads, bytes, stream, task,
         record(recorder, task.steps, task.root));
}

template <class T> void launch_root(const RootTask<T, Elements<T>>& task, bool warpgroups, void* stream) {
  const int64_t C = task.sigma.channels;
  if constexpr (std::is_same_v<T, float>) {
    if (warpgroups) return launch_warpgroups("root", root_warpgroup_kernel, false, record_root, stream, task);
    // One block, too, runs the program of a cluster, faster than it would go through the steps, if it has spares.
    const bool spares = has_spares("root", C, false, task);
    const auto choose = [](auto in_place) { return root_cluster_kernel<in_place>; };
    if (task.blocks > 1 || spares) return launch_cluster("root", choose, C, false, spares, record_root, stream, task);
  }
  const auto choose = [](auto slots, auto variant) { return root_kernel<T, slots, variant>; };
  launch_blocks<kMostSlots<T, false>>("root", choose, C,
                                      root_shared_bytes(C, sizeof(T), false, task.steps.any_in_full()), stream, task);
}

template <class T>
void launch_root_backward(const RootBackwardTask<T, Elements<const T>>& task, bool warpgroups, void* stream) {
  const int64_t C = task.sigma.channels;
  if constexpr (std::is_same_v<T, float>) {
    if (warpgroups)
      return launch_warpgroups("root_backward", root_backward_warpgroup_kernel, true, record_root_backward, stream,
                               task);
    const bool spares = has_spares("root_backward", C, true, task);
    const auto choose = [](auto in_place) { return root_backward_cluster_kernel<in_place>; };
    if (task.blocks > 1 || spares)
      return launch_cluster("root_backward", choose, C, true, spares, record_root_backward, stream, task);
  }
  const auto choose = [](auto slots, auto variant) { return root_backward_kernel<T, slots, variant>; };
  launch_blocks<kMostSlots<T, true>>("root_backward", choose, C,
                                     root_shared_bytes(C, sizeof(T), true, task.steps.any_in_full()), stream, task);
}

}  // namespace

template <class X> void root(const RootTask<X>& task, bool warpgroups, void* stream) {
  launch_root(with_elements(task), warpgroups, stream);
}
template <class X> void root_backward(const RootBackwardTask<X>& task, bool warpgroups, void* stream) {
  launch_root_backward(with_elements(task), warpgroups, stream);
}

template void root(const RootTask<float>&, bool, void*);
template void root(const RootTask<double>&, bool, void*);
template void root(const RootTask<Half>&, bool, void*);
template void root(const RootTask<BFloat16>&, bool, void*);
template void root_backward(const RootBackwardTask<float>&, bool, void*);
template void root_backward(const RootBackwardTask<double>&, bool, void*);
template void root_backward(const RootBackwardTask<Half>&, bool, void*);
template void root_backward(const RootBackwardTask<BFloat16>&, bool, void*);

int64_t root_shared_bytes(int64_t channels, int64_t element_size, bool backward, bool in_full) {
  const int count = matrices(backward, in_full);
  if (channels > max_matrix_channels(element_size, count)) return 0;
  return matrix_shared_bytes(int(channels), element_size, count);
}

int64_t cluster_shared_bytes(int64_t channels, int64_t element_size, bool backward, bool in_full) {
  return element_size == sizeof(float) && !in_full ? root_shared_bytes(channels, element_size, backward, false) : 0;
}

int64_t warpgroup_shared_bytes(int64_t channels, int64_t element_size, bool backward, bool in_full) {
  if (element_size != sizeof(float) || channels > kWarpgroupSide || in_full) return 0;
  return sizeof(float) * kSums + (matrices(backward, false) + spare_matrices(backward)) * WholeMatrix::kBytes;
}

Limits limits(int device) {
  return limits(device, reinterpret_cast<const void*>(root_cluster_kernel<false>), "limits");
}

std::string architectures() { return ISQRT_CUDA_ARCHITECTURES; }

}  // namespace isqrt::cuda
