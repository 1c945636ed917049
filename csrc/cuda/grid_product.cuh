// Products of a batch of matrices in global memory, on the whole device.
//
// Matrices are tiles, as in a block's shared memory. A block computes 4 x 4 of the upper triangle of a result, from
// panels of tiles that it copies as they are.
#pragma once
#include "launch.cuh"
#include "number.cuh"
#include "tiles.cuh"

namespace isqrt::cuda {

/// Symmetric matrices of a batch, one after the other: the tiles of their upper triangles, zero outside C x C.
struct GridShape {
  int64_t batch;
  int channels;

  ISQRT_FN int rows() const { return tile_rows(channels); }  // of tiles
  ISQRT_FN int tiles() const { return tile_count(channels); }
  template <class T> ISQRT_FN int64_t bytes() const { return batch * tiles() * tile_bytes(sizeof(T)); }

  template <class T> __device__ OtherTile tile(char* A, int64_t sample, const TilePlace& at) const {
    return {A + (sample * tiles() + at.number()) * tile_bytes(sizeof(T))};
  }
  template <class T> __device__ T element(char* A, int64_t sample, int i, int j) const {
    return element_of<T>([&](const TilePlace& at) { return tile<T>(A, sample, at); }, i, j);
  }
};

template <class T>
__device__ __forceinline__ void write_tile(const GridShape& shape, char* A, int64_t sample, const TilePlace& at,
                                           WarpTile<T>& tile, bool symmetric) {
  Tiles<T>::write(shape.tile<T>(A, sample, at), Tiles<T>::pack(tile), symmetric);
}

/// The product of dual numbers L + e dL and R + e dR, e e = 0: what a step of the iteration and of its derivative is
/// made of, and a product of C x C matrices in each of its terms. With left = {dL, L} and right = {R, dR}
///     result[0] = alpha added[0] + beta (dL R + L dR)
///     result[1] = alpha added[1] + beta  L R
/// or left[0] right[0] alone, where not `dual`. Nothing is added where null, and result[1] is not wanted where null.
/// Left operands are symmetric. A right one that is not takes what is under the diagonal from the upper triangle of its
/// transpose.
struct GridProduct {
  struct Operand {
    char *upper, *transpose;
  };
  Operand left[2], right[2];
  char *result[2], *added[2];
  double alpha, beta;
  bool dual, symmetric;  // are the results
};

/// Products of one launch, all of them dual or none: no operand is the result of another.
struct GridProducts {
  static constexpr int kMost = 2;
  int count = 0;
  GridProduct product[kMost];
};

constexpr int kProductThreads = 128;

/// 4 x 4 tiles of one product of one sample, 2 x 2 in each of four warps.
template <class T, bool kDual> class GridProductBlock {
  using Tiles = cuda::Tiles<T>;
  using Terms = typename Tiles::Terms;
  using Sum = typename Tiles::Sum;
  static constexpr int kWarps = kProductThreads / kWarp;
  static constexpr int kNumbers = kDual ? 2 : 1;         // of an operand, and of the result
  static constexpr int kSide = 4, kWarpSide = 2;         // tiles
  static constexpr int kDepth = sizeof(T) == 8 ? 1 : 2;  // of a panel: tiles of terms
  static constexpr int kStageTiles = 2 * kNumbers * kSide * kDepth, kStages = 2;

  /// Of what is copied to a slot of the panels: the vectors' tile row v, and where tiles (0, v) and (v, 0) are.
  struct Source {
    const char *above, *below;
    int64_t vector;
  };

 public:
  static constexpr int kPanelBytes = kStageTiles * Tiles::kBytes;
  static constexpr int kSharedBytes = kStages * kPanelBytes + kStageTiles * int(sizeof(Source));
  /// As many as have room, in shared memory and in registers, on a multiprocessor of sm_90.
  static constexpr int kBlocks = sizeof(T) == 8 ? 2 : kDual ? 3 : 4;

  /// Blocks in each direction.
  static ISQRT_FN int sides(const GridShape& shape) { return (shape.rows() + kSide - 1) / kSide; }

  __device__ GridProductBlock(const GridProducts& products, const GridShape& shape)
      : products_(products), shape_(shape) {
    const int warp = threadIdx.x / kWarp;
    const Share own = share();
    row_ = kSide * own.place.I + warp / 2 * kWarpSide;
    column_ = kSide * own.place.J + warp % 2 * kWarpSide;
  }

  __device__ void run() {
    Sum sum[kNumbers][kWarpSide][kWarpSide];
    const bool idle = row_ > column_ + 1 || column_ >= shape_.rows();
    prepare();
    start_loading(0);
#pragma unroll 1
    for (int K = 0; K < shape_.rows(); ++K) {
      if (K % kDepth == 0) {
        wait_for_panels();
        if (K + kDepth < shape_.rows()) start_loading(K + kDepth);
      }
      if (!idle) multiply(sum, K);
    }
    __syncthreads();
    if (!idle) store(sum);
  }

 private:
  /// What is this block's to compute; `place` counts in blocks. As all that is opaque here found out anew where it is
  /// wanted: products need the registers.
  struct Share {
    const GridProduct& product;
    int sample;
    TilePlace place;
  };
  __device__ Share share() const {
    const int sides = opaque(GridProductBlock::sides(shape_)), places = sides * (sides + 1) / 2;
    const int block = int(opaque(blockIdx.x)), product = block / places;
    return {products_.product[product % products_.count], product / products_.count,
            TilePlace::after(block % places, sides)};
  }

  /// Where term tile K of a vector is, counted in the block's tiles: panels have first the left operand, of each its
  /// numbers, of each number the vectors, of each vector the terms.
  static __device__ int tile(bool right, int number, int vector, int K) {
    const int slot = ((int(right) * kNumbers + number) * kSide + vector) * kDepth + K % kDepth;
    return shared_begin() + stage(K) * kPanelBytes + slot * Tiles::kBytes;
  }
  static __device__ int stage(int K) { return K / kDepth % kStages; }
  static __device__ char* panels(int K) { return shared_memory<char>() + stage(K) * kPanelBytes; }

  /// After the panels there are the sources, which would take registers that products need.
  static __device__ Source& source(int slot) {
    return reinterpret_cast<Source*>(shared_memory<char>() + kStages * kPanelBytes)[slot];
  }
  __device__ void prepare() const {
    if (threadIdx.x < kStageTiles) {
      const Share own = share();
      const int t = int(threadIdx.x), number = t / (kSide * kDepth) % kNumbers, last = shape_.rows() - 1;
      const bool right = t >= kStageTiles / 2;
      const int wanted = (right ? column_ : row_) / kSide * kSide + t / kDepth % kSide,
                v = wanted < last ? wanted : last;
      const auto& operand = right ? own.product.right[number] : own.product.left[number];
      source(t) = {shape_.tile<T>(operand.upper, own.sample, {0, v}).begin,
                   shape_.tile<T>(operand.transpose, own.sample, {v, 0}).begin, v};
    }
    __syncthreads();
  }

  /// What is copied to slot t of the panels that begin at term tile K; beyond the last tile, which one does not matter.
  __device__ const char* tile_for(int t, int K) const {
    const int wanted = K + t % kDepth, last = shape_.rows() - 1, k = wanted < last ? wanted : last;
    const Source from = source(t);
    return k <= from.vector ? from.above + k * Tiles::kBytes : from.below + int64_t(k) * (k + 1) / 2 * Tiles::kBytes;
  }

  /// Each lane finds out where a tile is, each warp copies whole ones.
  __device__ void start_loading(int K) const {
    static_assert(kStageTiles <= kWarp);
    const int lane = opaque(threadIdx.x) % kWarp;
    const long long begin = reinterpret_cast<long long>(tile_for(lane % kStageTiles, K));
#pragma unroll
    for (int own = 0; own < kStageTiles / kWarps; ++own) {
      const int t = kWarps * own + threadIdx.x / kWarp;
      const char* from = reinterpret_cast<const char*>(__shfl_sync(0xffffffffu, begin, t));
#pragma unroll
      for (int at = 0; at < Tiles::kBytes; at += kWarp * kPacketBytes) {
        const int byte = at + lane * kPacketBytes;
        if (byte < Tiles::kBytes) copy_async<kPacketBytes>(panels(K) + t * Tiles::kBytes + byte, from + byte);
      }
    }
    copy_async_commit();
  }

  /// Those that were asked for last are there, and nobody reads the ones before them any more.
  static __device__ void wait_for_panels() {
    copy_async_wait<0>();
    __syncthreads();
  }

  /// On the other side of the diagonal it is the transpose that was copied.
  __device__ __forceinline__ Terms left(int number, int r, int K) const {
    const int row = opaque(row_);
    return Tiles::left(tile(false, number, row % kSide + r, K), K < row + r);
  }
  __device__ __forceinline__ Terms right(int number, int c, int K) const {
    const int column = opaque(column_);
    return Tiles::right(tile(true, number, column % kSide + c, K), K > column + c);
  }

  __device__ __forceinline__ void multiply(Sum (&sum)[kNumbers][kWarpSide][kWarpSide], int K) const {
    constexpr int kValue = kNumbers - 1;  // L R, to which all others are derivatives
    Terms a[kWarpSide], b[kWarpSide];
#pragma unroll
    for (int r = 0; r < kWarpSide; ++r) a[r] = left(kValue, r, K);
#pragma unroll
    for (int c = 0; c < kWarpSide; ++c) {
      b[c] = right(0, c, K);
#pragma unroll
      for (int r = 0; r < kWarpSide; ++r) sum[kValue][r][c].multiply_add(a[r], b[c]);
    }
    if constexpr (kDual) {
#pragma unroll
      for (int c = 0; c < kWarpSide; ++c) {
        const Terms derivative = right(1, c, K);
#pragma unroll
        for (int r = 0; r < kWarpSide; ++r) sum[0][r][c].multiply_add(a[r], derivative);
      }
#pragma unroll
      for (int r = 0; r < kWarpSide; ++r) {
        const Terms derivative = left(0, r, K);
#pragma unroll
        for (int c = 0; c < kWarpSide; ++c) sum[0][r][c].multiply_add(derivative, b[c]);
      }
    }
  }

  /// By way of shared memory: one after the other, where registers cannot be counted through, and in whole packets.
  __device__ __forceinline__ void store(const Sum (&sum)[kNumbers][kWarpSide][kWarpSide]) const {
    constexpr int kOfNumber = kWarpSide * kWarpSide, kResults = kNumbers * kOfNumber;
    static_assert(kWarps * kResults <= kStages * kStageTiles);
    const int first = shared_begin() + kResults * int(threadIdx.x / kWarp) * Tiles::kBytes;
#pragma unroll
    for (int t = 0; t < kResults; ++t)
      keep(first + t * Tiles::kBytes, sum[t / kOfNumber][t / kWarpSide % kWarpSide][t % kWarpSide].total());
    const Share own = share();
#pragma unroll 1
    for (int t = 0; t < kResults; ++t)
      finish(first + t * Tiles::kBytes, own, t / kOfNumber,
             {row_ + t / kWarpSide % kWarpSide, column_ + t % kWarpSide});
  }

  static __device__ __forceinline__ Pair<T>& kept(int begin, int pair) {
    return at_shared<Pair<T>>(begin + (kWarp * pair + int(threadIdx.x) % kWarp) * int(sizeof(Pair<T>)));
  }
  static __device__ __forceinline__ void keep(int begin, WarpTile<T> total) {
    int pair = 0;
    total.for_each_pair([&](const T* a, int, int) { kept(begin, pair++) = Pair<T>{a[0], a[1]}; });
  }

  __device__ __forceinline__ void finish(int begin, const Share& own, int number, const TilePlace& at) const {
    if (at.I > at.J || at.J >= shape_.rows() || !own.product.result[number]) return;
    const T alpha = T(own.product.alpha), beta = T(own.product.beta);
    WarpTile<T> result;
    int pair = 0;
    result.for_each_pair([&](T* a, int, int) {
      const Pair<T> total = kept(begin, pair++);
      a[0] = beta * total.value[0], a[1] = beta * total.value[1];
    });
    if (own.product.added[number]) {
      const WarpTile<T> added = Tiles::read(shape_.tile<T>(own.product.added[number], own.sample, at));
      result.combine(added, [&](T& a, T d) { a += alpha * d; });
    }
    __syncwarp();
    Tiles::write(OwnTile{begin}, Tiles::pack(result), at.I == at.J && own.product.symmetric);
    __syncwarp();
    TileCopy<T>(OwnTile{begin}).write(shape_.tile<T>(own.product.result[number], own.sample, at));
  }

  const GridProducts& products_;
  const GridShape& shape_;
  int row_, column_;  // of the first of this warp's tiles
};

template <class T, bool kDual>
__global__ void __launch_bounds__(kProductThreads, (GridProductBlock<T, kDual>::kBlocks))
    product_kernel(const GridProducts products, const GridShape shape) {
  wait_for_kernels_before();
  GridProductBlock<T, kDual>(products, shape).run();
}

}  // namespace isqrt::cuda
