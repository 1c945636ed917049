// Products of a batch of matrices in global memory, on the whole device.
//
// Matrices are tiles, as in a block's shared memory. A block computes 4 x 4 of the upper triangle of a result, from
// panels of tiles that it copies as they are while it multiplies the ones before.
#pragma once
#include "launch.cuh"
#include "number.cuh"
#include "tiles.cuh"

namespace isqrt::cuda {

/// From tile to tile in global memory, whose sectors have 32 bytes: what lies across them is read twice.
ISQRT_FN constexpr int grid_tile_bytes(int64_t element_size) { return (tile_bytes(element_size) + 31) / 32 * 32; }

/// Symmetric matrices of a batch, one after the other: the tiles of their upper triangles, zero outside C x C. For
/// warpgroups, whose operands have 4 x 4 tiles, those on the diagonal are stored in full: after the triangle come the
/// mirror images of tiles beside it, six for each four rows.
struct GridShape {
  int64_t batch;
  int channels;
  bool for_warpgroups = false;

  static constexpr int kGroup = 4, kMirrored = kGroup * (kGroup - 1) / 2;  // tiles

  ISQRT_FN int rows() const { return tile_rows(channels); }  // of tiles
  ISQRT_FN int tiles() const { return tile_count(channels); }
  ISQRT_FN int stored() const { return tiles() + (for_warpgroups ? kMirrored * groups() : 0); }
  ISQRT_FN int groups() const { return (rows() + kGroup - 1) / kGroup; }
  template <class T> ISQRT_FN int64_t bytes() const { return batch * stored() * grid_tile_bytes(sizeof(T)); }

  template <class T> __device__ OtherTile numbered(char* A, int64_t sample, int number) const {
    return {A + (sample * stored() + number) * grid_tile_bytes(sizeof(T))};
  }
  template <class T> __device__ OtherTile tile(char* A, int64_t sample, const TilePlace& at) const {
    return numbered<T>(A, sample, at.number());
  }
  /// Of the tile at (row, column), which may be one of those that are stored in full.
  __device__ int number(int row, int column) const {
    if (row <= column) return TilePlace{row, column}.number();
    const int r = row % kGroup;
    return tiles() + row / kGroup * kMirrored + r * (r - 1) / 2 + column % kGroup;
  }
  __device__ bool is_mirrored(const TilePlace& at) const {
    return for_warpgroups && at.I < at.J && at.I / kGroup == at.J / kGroup;
  }
  template <class T> __device__ T element(char* A, int64_t sample, int i, int j) const {
    return element_of<T>([&](const TilePlace& at) { return tile<T>(A, sample, at); }, i, j);
  }
};

/// Of A, whose transpose is `transpose`: A itself where it is symmetric.
template <class T>
__device__ __forceinline__ void write_tile(const GridShape& shape, char* A, char* transpose, int64_t sample,
                                           const TilePlace& at, WarpTile<T>& tile, bool may_be_mirrored,
                                           bool may_be_diagonal = true) {
  const auto packed = Tiles<T>::pack(tile);
  Tiles<T>::write(shape.tile<T>(A, sample, at), packed, may_be_diagonal && at.I == at.J && A == transpose);
  if constexpr (sizeof(T) == 4)
    if (may_be_mirrored && shape.is_mirrored(at)) {
      const OtherTile image = shape.numbered<T>(transpose, sample, shape.number(at.J, at.I));
      Tiles<T>::write(image, Tiles<T>::transposed(packed), false);
    }
}

/// The product of dual numbers L + e dL and R + e dR, e e = 0: what a step of the iteration and of its derivative is
/// made of, and a product of C x C matrices in each of its terms. With left = {dL, L} and right = {R, dR}
///     result[0] = alpha dF + beta dG + gamma (dL R + L dR)
///     result[1] = alpha  F + beta  G + gamma  L R
/// or that of left[0] right[0] alone, where not `dual`. `added` are {alpha, {dF, F}} and {beta, {dG, G}}: nothing where
/// null. result[1] is not wanted where null.
/// Left operands are symmetric. A right one that is not takes what is under the diagonal from the upper triangle of its
/// transpose; a result that is not is that triangle of one, whose transpose is the result of another product.
struct GridProduct {
  struct Operand {
    char *upper, *transpose;
  };
  struct Addend {
    double factor;
    char* matrix[2];
  };
  static constexpr int kAddends = 2;
  Operand left[2], right[2], result[2];
  Addend added[kAddends];
  double gamma;
  bool dual;
};

/// Products of one launch, all of them dual or none: no operand is the result of another.
struct GridProducts {
  static constexpr int kMost = 2;
  int count = 0;
  GridProduct product[kMost];
};

/// Which square of so many tiles each way of the upper triangle is a block's to compute, of which product and sample.
struct GridShare {
  int product, sample;
  TilePlace first;

  /// Squares in each direction, and of a product of a sample.
  static ISQRT_FN int sides(const GridShape& shape, int side) { return (shape.rows() + side - 1) / side; }
  static ISQRT_FN int places(const GridShape& shape, int side) {
    return sides(shape, side) * (sides(shape, side) + 1) / 2;
  }

  /// That of the running block. The most work first: on the diagonal, where some warps are idle, it is less.
  static __device__ GridShare own(const GridProducts& products, const GridShape& shape, int side) {
    const unsigned batch = unsigned(shape.batch), each = products.count * batch, work = blockIdx.x % each;
    const int place = int(blockIdx.x / each), count = sides(shape, side), above = count * (count - 1) / 2;
    TilePlace first{place - above, place - above};
    if (place < above) {
      first = TilePlace::after(place, count - 1);
      ++first.J;
    }
    return {int(work / batch), int(work % batch), {side * first.I, side * first.J}};
  }
};

/// A tile of one of a product's results, which a warp has summed up: of the upper triangle, or nothing is done with it.
template <class T, bool kMayBeMirrored> struct GridResult {
  using Tiles = cuda::Tiles<T>;
  const GridShape& shape;
  const GridProduct& product;
  int number, sample;
  TilePlace at;

  __device__ bool is_wanted() const { return at.I <= at.J && at.J < shape.rows(); }

  /// Whether something is added to it; and that, to be asked for early.
  __device__ bool adds(int addend) const { return product.added[addend].matrix[number]; }
  __device__ __forceinline__ typename Tiles::Packed added(int addend) const {
    return Tiles::read_packed(
        shape.tile<T>(product.added[addend].matrix[number], sample, is_wanted() ? at : TilePlace{0, 0}));
  }
  __device__ __forceinline__ void add(WarpTile<T>& sum, int addend, const typename Tiles::Packed& added) const {
    const T factor = T(product.added[addend].factor);
    sum.combine(Tiles::unpack(added), [&](T& a, T d) { a += factor * d; });
  }
  __device__ __forceinline__ WarpTile<T> scaled(WarpTile<T> sum) const {
    const T gamma = T(product.gamma);
    sum.for_each([&](T& a, int, int) { a *= gamma; });
    return sum;
  }
  __device__ __forceinline__ void store(WarpTile<T>& sum, bool may_be_diagonal = true) const {
    const auto& [upper, transpose] = product.result[number];
    if (is_wanted()) write_tile(shape, upper, transpose, sample, at, sum, kMayBeMirrored, may_be_diagonal);
  }
};

/// 4 x 4 tiles of one product of one sample, 2 x 2 in each of four warps.
template <class T, bool kDual> class GridProductBlock {
  using Tiles = cuda::Tiles<T>;
  using Terms = typename Tiles::Terms;
  using Sum = typename Tiles::Sum;
  static constexpr int kNumbers = kDual ? 2 : 1;  // of an operand, and of the result

 public:
  static constexpr int kSide = 4;  // tiles

 private:
  static constexpr int kWarpSide = 2;
  static constexpr int kOperand = kNumbers * kSide;           // vectors of tiles
  static constexpr int kVectors = 2 * kOperand, kStages = 2;  // rows of the left operand, columns of the right one

 public:
  static constexpr int kThreads = kWarp * (kSide / kWarpSide) * (kSide / kWarpSide);

 private:
  /// So many lanes copy a tile, each thread of one tile for each stage: so deep, in terms, is a stage.
  static constexpr int kCopyLanes = 8, kDepth = kThreads / kCopyLanes / kVectors;
  static constexpr int kStageBytes = kVectors * kDepth * Tiles::kBytes, kLastStage = (kStages - 1) * kStageBytes;

  /// What a vector of tiles is copied from. It lies after the stages, as this block's share does: products need the
  /// registers.
  struct Source {
    const char *upper, *transpose;
    int vector;
  };

 public:
  static constexpr int kSharedBytes = kStages * kStageBytes + int(sizeof(GridShare)) + kVectors * int(sizeof(Source));
  /// As many as have room, in shared memory and in registers, on a multiprocessor of sm_90.
  static constexpr int kBlocks = sizeof(T) == 8 ? 2 : kDual ? 3 : 5;

  __device__ GridProductBlock(const GridProducts& products, const GridShape& shape)
      : products_(products), shape_(shape) {
    prepare();
    const GridShare own = share();
    row_ = own.first.I + warp_row(), column_ = own.first.J + warp_column();
    left_ = opaque(shared_begin() + warp_row() * Tiles::kBytes);
    right_ = opaque(shared_begin() + (kOperand + warp_column()) * Tiles::kBytes);
  }

  __device__ void run() {
    Sum sum[kNumbers][kWarpSide][kWarpSide];  // not of a type that is an array: nvcc 13.0 would not initialise them
    const bool idle = row_ > column_ || column_ >= shape_.rows();
#pragma unroll 1
    for (int stage = 0; stage < kStages - 1; ++stage) start_loading(stage * kDepth, stage * kStageBytes);
    int stage = 0;
#pragma unroll 1
    for (int K = 0; K < shape_.rows(); K += kDepth) {
      copy_async_wait<kStages - 2>();
      __syncthreads();  // what was asked for first is there, and nobody reads the stage before any more
      start_loading(K + (kStages - 1) * kDepth, stage > 0 ? stage - kStageBytes : kLastStage);
      if (!idle) {
#pragma unroll
        for (int k = 0; k < kDepth; ++k)
          if (k == 0 || K + k < shape_.rows()) multiply(sum, K + k, stage + k * kVectors * Tiles::kBytes);
      }
      stage = stage < kLastStage ? stage + kStageBytes : 0;
    }
    // Not before: those of the next kernel that came would sit on some multiprocessors, and leave too few for the rest.
    let_next_kernel_come();
    if (!idle) store(sum);
  }

 private:
  static __device__ GridShare& share() {
    return *reinterpret_cast<GridShare*>(shared_memory<char>() + kStages * kStageBytes);
  }
  static __device__ Source& source(int vector) {
    return reinterpret_cast<Source*>(shared_memory<char>() + kStages * kStageBytes + sizeof(GridShare))[vector];
  }

  /// This warp's tiles in the block; anew wherever they are wanted.
  static __device__ int warp_row() { return int(opaque(threadIdx.x)) / kWarp / 2 * kWarpSide; }
  static __device__ int warp_column() { return int(opaque(threadIdx.x)) / kWarp % 2 * kWarpSide; }

  __device__ void prepare() const {
    if (threadIdx.x < kVectors) {
      const GridShare own = GridShare::own(products_, shape_, kSide);
      if (threadIdx.x == 0) share() = own;
      const int t = int(threadIdx.x), number = t / kSide % kNumbers, last = shape_.rows() - 1;
      const bool right = t >= kOperand;
      const int wanted = (right ? own.first.J : own.first.I) + t % kSide;
      const GridProduct& product = products_.product[own.product];
      const auto& operand = right ? product.right[number] : product.left[number];
      source(t) = {shape_.tile<T>(operand.upper, own.sample, {0, 0}).begin,
                   shape_.tile<T>(operand.transpose, own.sample, {0, 0}).begin, wanted < last ? wanted : last};
    }
    __syncthreads();
  }

  /// Whether of a vector's term K the tile above the diagonal is copied, not the transpose of the one below: the same
  /// for both vectors of a warp, which read it accordingly. On the diagonal either does.
  static __device__ bool is_above(int K, int vector) { return K <= vector / kWarpSide * kWarpSide; }

  /// Terms from K on, the first packets of all tiles, then the second ones.
  __device__ __forceinline__ void start_loading(int K, int stage) const {
    const unsigned thread = opaque(threadIdx.x), slot = thread / kCopyLanes,
                   packet = thread % kCopyLanes * kPacketBytes;
    const int k = K + int(slot / kVectors);
    if (k < shape_.rows()) {
      const Source& of = source(slot % kVectors);
      const bool above = is_above(k, of.vector);
      const TilePlace at = above ? TilePlace{k, of.vector} : TilePlace{of.vector, k};
      const char* from = (above ? of.upper : of.transpose) + at.number() * int64_t(grid_tile_bytes(sizeof(T))) + packet;
      char* to = shared_memory<char>() + stage + slot * Tiles::kBytes + packet;
      constexpr int kRound = kCopyLanes * kPacketBytes;
#pragma unroll
      for (int first = 0; first < Tiles::kBytes; first += kRound)
        if (first + kRound <= Tiles::kBytes || first + packet < Tiles::kBytes)
          copy_async<kPacketBytes>(to + first, from + first);
    }
    copy_async_commit();
  }

  __device__ __forceinline__ void multiply(Sum (&sum)[kNumbers][kWarpSide][kWarpSide], int K, int stage) const {
    constexpr int kValue = kNumbers - 1;                            // L R, to which all others are derivatives
    const bool left_above = K <= row_, right_above = K <= column_;  // as is_above(), for both vectors
    const int left = left_ + stage, right = right_ + stage;
    Terms a[kWarpSide], b[kWarpSide];
    const auto add = [&](int number) {
#pragma unroll
      for (int r = 0; r < kWarpSide; ++r)
#pragma unroll
        for (int c = 0; c < kWarpSide; ++c) sum[number][r][c].multiply_add(a[r], b[c]);
    };
    reader_.left(a, left + kValue * kSide * Tiles::kBytes, left_above);
    if constexpr (kDual) {
      reader_.right(b, right + kSide * Tiles::kBytes, !right_above);
      add(0);
    }
    reader_.right(b, right, !right_above);
    add(kValue);
    if constexpr (kDual) {
      reader_.left(a, left, left_above);
      add(0);
    }
  }

  __device__ __forceinline__ void store(const Sum (&sum)[kNumbers][kWarpSide][kWarpSide]) const {
    const GridShare own = share();
    const GridProduct& product = products_.product[own.product];
    const int row = own.first.I + warp_row(), column = own.first.J + warp_column();
#pragma unroll
    for (int number = 0; number < kNumbers; ++number) {
      if (!product.result[number].upper) return;
      const auto result = [&](int r, int c) {
        return GridResult<T, false>{shape_, product, number, own.sample, {row + r, column + c}};
      };
      const auto for_each = [](const auto& f) {
#pragma unroll
        for (int r = 0; r < kWarpSide; ++r)
#pragma unroll
          for (int c = 0; c < kWarpSide; ++c) f(r, c);
      };
      WarpTile<T> total[kWarpSide][kWarpSide];
      for_each([&](int r, int c) { total[r][c] = result(r, c).scaled(sum[number][r][c].total()); });
#pragma unroll 1
      for (int a = 0; a < GridProduct::kAddends; ++a) {
        if (!result(0, 0).adds(a)) continue;
        typename Tiles::Packed added[kWarpSide][kWarpSide];
        for_each([&](int r, int c) { added[r][c] = result(r, c).added(a); });  // all before the first is waited for
        for_each([&](int r, int c) { result(r, c).add(total[r][c], a, added[r][c]); });
      }
      for_each([&](int r, int c) { result(r, c).store(total[r][c], r == c); });
    }
  }

  const GridProducts& products_;
  const GridShape& shape_;
  int row_, column_;  // of the first of this warp's tiles
  int left_, right_;  // where its vectors are in the first stage
  typename Tiles::Reader reader_;
};

template <class T, bool kDual>
__global__ void __launch_bounds__((GridProductBlock<T, kDual>::kThreads), (GridProductBlock<T, kDual>::kBlocks))
    product_kernel(const GridProducts products, const GridShape shape) {
  wait_for_kernels_before(false);
  GridProductBlock<T, kDual>(products, shape).run();
}

}  // namespace isqrt::cuda
