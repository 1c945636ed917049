// Kernels and launchers of covariance pooling and its gradient.
#include <algorithm>
#include <cstdlib>

#include "covariance_engine.cuh"
#include "cuda.h"
#include "merge_engine.cuh"

namespace isqrt::cuda {
namespace {

constexpr int64_t triangle(int64_t n) { return n * (n + 1) / 2; }

/// Blocks that a multiprocessor's registers shall hold, so that some multiply while others wait for memory.
template <class X> constexpr int kBlocks = sizeof(X) == 8 ? 1 : kHasClusters ? 3 : 2;
template <class X, bool kPositionsInRows>
constexpr int kPoolBlocks = sizeof(X) == 2 && !kPositionsInRows ? 2 : kBlocks<X>;  // three would spill

/// Which tile (I, J), I <= J, of which chunk and sample a block has. Grids are flat: only x may exceed 65535.
struct BlockOfTriangle {
  unsigned I, J, chunk, sample;

  __device__ BlockOfTriangle(unsigned tiles, unsigned chunks) : J(0) {
    const unsigned pairs = tiles * (tiles + 1) / 2, block = blockIdx.x, pair = block % pairs;
    while ((J + 1) * (J + 2) / 2 <= pair) ++J;
    I = pair - J * (J + 1) / 2;
    chunk = block / pairs % chunks;
    sample = block / pairs / chunks;
  }
};

template <class X, bool kPositionsInRows>
__global__ void __launch_bounds__(kPanelThreads, kPoolBlocks<X, kPositionsInRows>)
    pool_kernel(const PoolTask<X> task, unsigned tiles, bool packets) {
  wait_for_kernels_before();
  const BlockOfTriangle block(tiles, unsigned(task.chunks.count));
  using T = Compute<X>;
  const int64_t C = task.x.channels, part = int64_t(block.sample) * task.chunks.count + block.chunk;
  const int64_t first = task.chunks.first(block.chunk), last = task.chunks.last(block.chunk);
  PoolEngine<X, kPositionsInRows> engine(task.x, block.sample, int(block.I), int(block.J), first, packets);
  accumulate_covariance(engine, first, last);
  const bool alone = task.chunks.count == 1;  // there is nothing to merge
  engine.write((alone ? task.mean : task.partial_mean) + part * C,
               (alone ? task.sigma : task.partial_moment) + part * C * C,
               alone ? T(1.0 / double(task.chunks.positions)) : T(1), alone);
}

template <class X>
__global__ void __launch_bounds__(MergeEngine<X>::kMostThreads) merge_kernel(const PoolTask<X> task, unsigned tiles) {
  wait_for_kernels_before();
  MergeEngine<X> engine(task, int(blockIdx.x % tiles), blockIdx.x / tiles);
  merge_covariances(engine, task.chunks);
}

template <class X>
__global__ void __launch_bounds__(RescueEngine<X>::kThreads, 1) rescue_kernel(const PoolTask<X> task) {
  wait_for_kernels_before();
  RescueEngine<X> engine(task, blockIdx.x);
  rescue_covariance<X>(engine);
}

template <class X, bool kPositionsInRows>
__global__ void __launch_bounds__(kPanelThreads, kBlocks<X>)
    pool_backward_kernel(const PoolBackwardTask<X> task, unsigned tiles, bool packets, bool packets_out) {
  wait_for_kernels_before();
  const unsigned chunks = unsigned(task.chunks.count), block = blockIdx.x, chunk = block / tiles % chunks;
  const int64_t first = task.chunks.first(chunk), last = task.chunks.last(chunk);
  PoolBackwardEngine<X, kPositionsInRows> engine(task, block / tiles / chunks, int(block % tiles), packets,
                                                 packets_out);
  covariance_backward(engine, first, last);
}

/// A kernel's blocks come while those of the kernel before are there still: some multiprocessors would get three of
/// them and others one. Where two for each are enough they ask for so much shared memory that no third one finds room.
int64_t shared_bytes_for_two(int64_t blocks, int64_t needed) {
  const Limits device = limits(current_device("pooling"));
  const bool two_each = blocks > device.multiprocessors && blocks <= 2 * device.multiprocessors;
  return two_each ? std::max(needed, device.shared_bytes / 3) : needed;
}

/// True where neighbouring positions lie nearer to each other than neighbouring channels.
template <class X> bool positions_in_rows(const FeatureMaps<const X>& x) {
  return std::abs(x.stride_w) <= std::abs(x.stride_c);
}

}  // namespace

template <class X> void pool(const PoolTask<X>& task, void* stream) {
  const int64_t batch = task.x.batch, C = task.x.channels;
  const int64_t pool_tiles = divide_up(C, kPanelVectors);
  const auto run = [&](auto in_rows) {
    const int64_t blocks = triangle(pool_tiles) * task.chunks.count * batch;
    launch("pool", pool_kernel<X, in_rows>, blocks, kPanelThreads,
           shared_bytes_for_two(blocks, PoolEngine<X, in_rows>::shared_bytes(pool_tiles == 1)), stream, task,
           unsigned(pool_tiles), in_packets<in_rows>(task.x, task.chunks));
  };
  positions_in_rows(task.x) ? run(std::true_type()) : run(std::false_type());
  if (task.chunks.count > 1) {
    using Engine = MergeEngine<X>;
    const int tiles = Engine::tiles(C), warps = Engine::warps(task.chunks.count);
    launch("merge", merge_kernel<X>, tiles * batch, warps * kWarp, Engine::shared_bytes(warps), stream, task,
           unsigned(tiles));
  }
  launch("rescue", rescue_kernel<X>, batch, RescueEngine<X>::kThreads, RescueEngine<X>::kSharedBytes, stream, task);
}

template <class X> void pool_backward(const PoolBackwardTask<X>& task, void* stream) {
  const int64_t channel_tiles = divide_up(task.x.channels, kPanelVectors);
  const auto run = [&](auto in_rows) {
    const int64_t blocks = channel_tiles * task.chunks.count * task.x.batch;
    launch("pool_backward", pool_backward_kernel<X, in_rows>, blocks, kPanelThreads,
           shared_bytes_for_two(blocks, PoolBackwardEngine<X, in_rows>::kSharedBytes), stream, task,
           unsigned(channel_tiles), in_packets<in_rows>(task.x, task.chunks),
           in_packets<true>(task.grad_x, task.chunks));
  };
  positions_in_rows(task.x) ? run(std::true_type()) : run(std::false_type());
}

#define ISQRT_INSTANTIATE(X)                     \
  template void pool(const PoolTask<X>&, void*); \
  template void pool_backward(const PoolBackwardTask<X>&, void*);
ISQRT_INSTANTIATE(float)
ISQRT_INSTANTIATE(double)
ISQRT_INSTANTIATE(Half)
ISQRT_INSTANTIATE(BFloat16)

}  // namespace isqrt::cuda
