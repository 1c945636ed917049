// Kernels and launchers of covariance pooling and its gradient.
#include "covariance_engine.cuh"
#include "cuda.h"

namespace isqrt::cuda {
namespace {

constexpr int64_t tiles_along(int64_t channels, int64_t side) { return (channels + side - 1) / side; }
constexpr int64_t triangle(int64_t n) { return n * (n + 1) / 2; }

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

template <class X> __global__ void __launch_bounds__(kPanelThreads) pool_kernel(const PoolTask<X> task, int64_t tiles) {
  const BlockOfTriangle block(tiles, task.chunks.count);
  const int64_t C = task.x.channels, part = block.sample * task.chunks.count + block.chunk;
  PoolEngine<X> engine(task.x, block.sample, block.I, block.J);
  accumulate_covariance(engine, task.chunks.first(block.chunk), task.chunks.last(block.chunk));
  engine.write(task.partial_mean + part * C, task.partial_moment + part * C * C);
}

template <class X>
__global__ void __launch_bounds__(MergeEngine<X>::kThreads) merge_kernel(const PoolTask<X> task, int64_t tiles) {
  const BlockOfTriangle block(tiles, 1);
  MergeEngine<X> engine(task, block.sample, block.I, block.J);
  merge_covariances(engine, task.chunks);
}

template <class X>
__global__ void __launch_bounds__(kPanelThreads) pool_backward_kernel(const PoolBackwardTask<X> task, int64_t tiles) {
  const int64_t block = blockIdx.x, chunk = block / tiles % task.chunks.count;
  PoolBackwardEngine<X> engine(task, block / tiles / task.chunks.count, block % tiles);
  covariance_backward(engine, task.chunks.first(chunk), task.chunks.last(chunk));
}

}  // namespace

template <class X> void pool(const PoolTask<X>& task, void* stream) {
  const int64_t batch = task.x.batch, C = task.x.channels;
  const int64_t pool_tiles = tiles_along(C, kPanelColumns), merge_tiles = tiles_along(C, MergeEngine<X>::kTile);
  launch("pool", pool_kernel<X>, triangle(pool_tiles) * task.chunks.count * batch, kPanelThreads,
         PoolEngine<X>::kSharedBytes, stream, task, pool_tiles);
  launch("merge", merge_kernel<X>, triangle(merge_tiles) * batch, MergeEngine<X>::kThreads,
         MergeEngine<X>::kSharedBytes, stream, task, merge_tiles);
}

template <class X> void pool_backward(const PoolBackwardTask<X>& task, void* stream) {
  const int64_t channel_tiles = tiles_along(task.x.channels, kPanelColumns);
  launch("pool_backward", pool_backward_kernel<X>, channel_tiles * task.chunks.count * task.x.batch, kPanelThreads,
         PoolBackwardEngine<X>::kSharedBytes, stream, task, channel_tiles);
}

#define ISQRT_INSTANTIATE(X)                     \
  template void pool(const PoolTask<X>&, void*); \
  template void pool_backward(const PoolBackwardTask<X>&, void*);
ISQRT_INSTANTIATE(float)
ISQRT_INSTANTIATE(double)
ISQRT_INSTANTIATE(Half)
ISQRT_INSTANTIATE(BFloat16)

}  // namespace isqrt::cuda
