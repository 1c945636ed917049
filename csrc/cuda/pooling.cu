// Kernels and launchers of covariance pooling and its gradient.
#include <cstdlib>

#include "covariance_engine.cuh"
#include "cuda.h"
#include "merge_engine.cuh"

namespace isqrt::cuda {
namespace {

constexpr int64_t tiles_along(int64_t channels, int64_t side) { return (channels + side - 1) / side; }
constexpr int64_t triangle(int64_t n) { return n * (n + 1) / 2; }

/// Blocks that a multiprocessor's registers shall hold, so that some multiply while others wait for memory.
template <class X> constexpr int kBlocks = sizeof(X) == 8 ? 1 : 2;

/// Which tile (I, J), I <= J, of which chunk and sample a block has. Grids are flat: only x may exceed 65535.
struct BlockOfTriangle {
  int64_t I, J, chunk, sample;

  __device__ BlockOfTriangle(int64_t tiles, int64_t chunks) : J(0) {
    const int64_t pairs = tiles * (tiles + 1) / 2, block = blockIdx.x, pair = block % pairs;
    while ((J + 1) * (J + 2) / 2 <= pair) ++J;
    I = pair - J * (J + 1) / 2;
    chunk = block / pairs % chunks;
    sample = block / pairs / chunks;
  }
};

template <class X, bool kPositionsInRows>
__global__ void __launch_bounds__(kPanelThreads, kBlocks<X>) pool_kernel(const PoolTask<X> task, int64_t tiles) {
  wait_for_kernels_before();
  const BlockOfTriangle block(tiles, task.chunks.count);
  const int64_t C = task.x.channels, part = block.sample * task.chunks.count + block.chunk;
  const int64_t first = task.chunks.first(block.chunk), last = task.chunks.last(block.chunk);
  PoolEngine<X, kPositionsInRows> engine(task.x, block.sample, block.I, block.J, first, last);
  accumulate_covariance(engine, first, last);
  engine.write(task.partial_mean + part * C, task.partial_moment + part * C * C);
}

template <class X, int kGroups>
__global__ void __launch_bounds__((MergeEngine<X, kGroups>::kThreads))
    merge_kernel(const PoolTask<X> task, int64_t tiles) {
  wait_for_kernels_before();
  const BlockOfTriangle block(tiles, 1);
  MergeEngine<X, kGroups> engine(task, block.sample, block.I, block.J);
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
    pool_backward_kernel(const PoolBackwardTask<X> task, int64_t tiles) {
  wait_for_kernels_before();
  const int64_t block = blockIdx.x, chunk = block / tiles % task.chunks.count;
  const int64_t first = task.chunks.first(chunk), last = task.chunks.last(chunk);
  PoolBackwardEngine<X, kPositionsInRows> engine(task, block / tiles / task.chunks.count, block % tiles, first, last);
  covariance_backward(engine, first, last);
}

/// True where neighbouring positions lie nearer to each other than neighbouring channels.
template <class X> bool positions_in_rows(const FeatureMaps<const X>& x) {
  return std::abs(x.stride_w) <= std::abs(x.stride_c);
}

}  // namespace

template <class X> void pool(const PoolTask<X>& task, void* stream) {
  const int64_t batch = task.x.batch, C = task.x.channels;
  const int64_t pool_tiles = tiles_along(C, kPanelVectors);
  const auto run = [&](auto kernel, int64_t shared_bytes) {
    launch("pool", kernel, triangle(pool_tiles) * task.chunks.count * batch, kPanelThreads, shared_bytes, stream, task,
           pool_tiles);
  };
  const bool diagonal = pool_tiles == 1;
  if (positions_in_rows(task.x))
    run(pool_kernel<X, true>, PoolEngine<X, true>::shared_bytes(diagonal));
  else
    run(pool_kernel<X, false>, PoolEngine<X, false>::shared_bytes(diagonal));
  const auto merge = [&](auto groups) {
    using Engine = MergeEngine<X, groups>;
    const int64_t tiles = tiles_along(C, Engine::kTile);
    launch("merge", merge_kernel<X, groups>, triangle(tiles) * batch, Engine::kThreads, Engine::kSharedBytes, stream,
           task, tiles);
  };
  constexpr int64_t kFewChunks = 4;
  if (task.chunks.count <= kFewChunks)
    merge(std::integral_constant<int, 1>());
  else
    merge(std::integral_constant<int, 4>());
  launch("rescue", rescue_kernel<X>, batch, RescueEngine<X>::kThreads, RescueEngine<X>::kSharedBytes, stream, task);
}

template <class X> void pool_backward(const PoolBackwardTask<X>& task, void* stream) {
  const int64_t channel_tiles = tiles_along(task.x.channels, kPanelVectors);
  const auto run = [&](auto kernel, int64_t shared_bytes) {
    launch("pool_backward", kernel, channel_tiles * task.chunks.count * task.x.batch, kPanelThreads, shared_bytes,
           stream, task, channel_tiles);
  };
  if (positions_in_rows(task.x))
    run(pool_backward_kernel<X, true>, PoolBackwardEngine<X, true>::kSharedBytes);
  else
    run(pool_backward_kernel<X, false>, PoolBackwardEngine<X, false>::kSharedBytes);
}

#define ISQRT_INSTANTIATE(X)                     \
  template void pool(const PoolTask<X>&, void*); \
  template void pool_backward(const PoolBackwardTask<X>&, void*);
ISQRT_INSTANTIATE(float)
ISQRT_INSTANTIATE(double)
ISQRT_INSTANTIATE(Half)
ISQRT_INSTANTIATE(BFloat16)

}  // namespace isqrt::cuda
