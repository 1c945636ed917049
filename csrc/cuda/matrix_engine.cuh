// The Engine of newton_schulz.h and normalization.h on one thread block: symmetric C x C matrices in its shared memory.
//
// Only the 16 x 16 tiles of the upper triangle are stored, column by column: tile (I, J), I <= J, is the one numbered
// J (J + 1) / 2 + I, and six matrices of 128 channels in float32 fit into the 227 KiB of a Hopper block. A tile has
// 4 x 4 sub-blocks of 4 x 4 elements, sub-block (p, q) at 16 (4 p + q), and row r of a sub-block lies at slot r ^ p ^ q
// of its four: the 16 threads of a tile, which read along a row or a column of sub-blocks, then meet no bank conflict.
//
// Each tile belongs to 16 threads, each with one 4 x 4 sub-block of it in registers. An operation of the engine begins
// with all threads at one place and ends with a barrier, so that the next one may read what any thread has written.
#pragma once
#include "../normalization.h"
#include "block.cuh"

namespace isqrt::cuda {

constexpr int kTile = 16, kTileSize = kTile * kTile;

/// Tiles in each direction, and of the whole upper triangle.
ISQRT_FN constexpr int tile_rows(int channels) { return (channels + kTile - 1) / kTile; }
ISQRT_FN constexpr int tile_count(int channels) { return tile_rows(channels) * (tile_rows(channels) + 1) / 2; }

/// One thread for each sub-block, in whole warps.
constexpr int matrix_threads(int channels) { return (tile_count(channels) * 16 + kWarp - 1) / kWarp * kWarp; }

/// Elements of shared memory before the matrices: for block_sum, and for the tiles' columns.
constexpr int kSums = 32, kColumns = 48;

constexpr int64_t matrix_shared_bytes(int channels, int64_t element_size, int matrices) {
  return element_size * (kSums + kColumns + int64_t(matrices) * tile_count(channels) * kTileSize);
}

/// The most channels for which that many matrices fit into the shared memory of any device, and one thread a sub-block
/// leaves each of them enough registers.
constexpr int max_matrix_channels(int64_t element_size, int matrices) {
  constexpr int64_t kLargestSharedBytes = 227 * 1024;
  int channels = 128;
  while (matrix_shared_bytes(channels, element_size, matrices) > kLargestSharedBytes) channels -= kTile;
  return channels;
}
static_assert(tile_count(max_matrix_channels(4, 1)) < kColumns);  // one more for a half warp without a tile

template <class T> class MatrixEngine {
 public:
  /// Where a matrix begins in shared memory, in elements.
  struct Matrix {
    int first;
  };

  __device__ explicit MatrixEngine(int channels) : channels_(channels), tiles_(tile_rows(channels)) {
    const int tile = threadIdx.x / 16;
    if (threadIdx.x % 16 == 0) {
      int column = 0;
      while ((column + 1) * (column + 2) / 2 <= tile) ++column;
      columns()[tile] = column;
    }
    __syncthreads();
  }

  __device__ Matrix matrix() {
    const Matrix m{next_};
    next_ += tile_count(channels_) * kTileSize;
    return m;
  }

  template <class Source> __device__ void load(Matrix A, const Source& source) const {
    for_own_rows([&](const Place& own, int r) {
      T row[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) row[c] = symmetric(source, own.i() + r, own.j() + c);
      store4(row_of(A, own, r), row);
    });
    __syncthreads();
  }

  __device__ T trace(Matrix A) const {
    T sum = 0;
    for_own_rows([&](const Place& own, int r) {
      if (own.i() == own.j()) sum += row_of(A, own, r)[r];
    });
    return block_sum(sum, shared_memory<T>());
  }

  /// <sym(source), A>
  template <class Source> __device__ T inner(const Source& source, Matrix A) const {
    T sum = 0;
    for_own_rows([&](const Place& own, int r) {
      const T times = own.I < own.J ? 2 : 1;  // tile (J, I) is not stored
      T row[4];
      load4(row, row_of(A, own, r));
#pragma unroll
      for (int c = 0; c < 4; ++c) sum += times * (symmetric(source, own.i() + r, own.j() + c) * row[c]);
    });
    return block_sum(sum, shared_memory<T>());
  }

  __device__ void divide(Matrix A, T s) const {
    map(A, A, [&](T a, int, int) { return a / s; });
  }
  __device__ void scale(Matrix D, T alpha, Matrix A) const {
    map(D, A, [&](T a, int, int) { return alpha * a; });
  }
  __device__ void identity_plus(Matrix D, T alpha, T beta, Matrix A) const {
    map(D, A, [&](T a, int i, int j) { return beta * a + (i == j && i < channels_ ? alpha : T(0)); });
  }

  __device__ void product(Matrix D, Matrix A, Matrix B) const { combine<false>(D, T(0), T(1), A, B, A, B, 1); }
  __device__ void product(Matrix D, T alpha, T beta, Matrix A, Matrix B) const {
    combine<true>(D, alpha, beta, A, B, A, B, 1);
  }
  __device__ void products(Matrix D, Matrix A1, Matrix B1, Matrix A2, Matrix B2) const {
    combine<false>(D, T(0), T(1), A1, B1, A2, B2, 2);
  }
  __device__ void products(Matrix D, T alpha, T beta, Matrix A1, Matrix B1, Matrix A2, Matrix B2) const {
    combine<true>(D, alpha, beta, A1, B1, A2, B2, 2);
  }

  /// Copies a matrix out in the layout that was asked for; neighbouring threads write neighbouring elements.
  __device__ void write(Matrix A, const RootView<T>& result) const {
    if (result.output == Output::kMean) {
      for (int j = threadIdx.x; j < channels_; j += blockDim.x) result.data[j] = column_sum(A, j) / T(channels_);
      return;
    }
    const bool upper = result.output == Output::kTriu;
    for (int i = threadIdx.x / kWarp; i < channels_; i += blockDim.x / kWarp) {
      T* row = result.data + (upper ? triu_index(i, i, channels_) - i : int64_t(i) * channels_);
      for (int j = threadIdx.x % kWarp; j < channels_; j += kWarp) {
        if (upper && j < i) continue;
        row[j] = i / kTile <= j / kTile ? *element(tile(A, i / kTile, j / kTile), i % kTile, j % kTile)
                                        : *element(tile(A, j / kTile, i / kTile), j % kTile, i % kTile);
      }
    }
  }

 private:
  /// A thread's tile (I, J) and its sub-block (p, q) in there, whose first element is (i, j) of the matrix.
  struct Place {
    int I, J, p, q;
    __device__ int i() const { return kTile * I + 4 * p; }
    __device__ int j() const { return kTile * J + 4 * q; }
  };

  static __device__ int* columns() { return reinterpret_cast<int*>(shared_memory<T>() + kSums); }

  /// This thread's place. Its tile's column is read from shared memory at each operation: kept in registers, it and all
  /// the addresses that follow from it would stay there throughout the kernel, at the expense of the products.
  __device__ __forceinline__ Place place() const {
    const int tile = threadIdx.x / 16, J = columns()[tile];
    return {tile - J * (J + 1) / 2, J, morton_row(threadIdx.x % 16), morton_column(threadIdx.x % 16)};
  }

  /// False in the half warp that has no tile where their number is odd.
  __device__ bool active(const Place& own) const { return own.J < tiles_; }

  static __device__ int tile(Matrix A, int I, int J) { return A.first + (J * (J + 1) / 2 + I) * kTileSize; }

  static __device__ T* row_of_block(int tile, int p, int q, int r) {
    return shared_memory<T>() + tile + 16 * (4 * p + q) + 4 * (r ^ p ^ q);
  }
  static __device__ T* row_of(Matrix A, const Place& own, int r) {
    return row_of_block(tile(A, own.I, own.J), own.p, own.q, r);
  }
  static __device__ T* element(int tile, int row, int column) {
    return row_of_block(tile, row / 4, column / 4, row % 4) + column % 4;
  }

  __device__ T column_sum(Matrix A, int j) const {
    const int J = j / kTile, column = j % kTile;
    T sum = 0;
    for (int I = 0; I < tiles_; ++I)
#pragma unroll
      for (int row = 0; row < kTile; ++row)
        sum += I <= J ? *element(tile(A, I, J), row, column) : *element(tile(A, J, I), column, row);
    return sum;
  }

  /// Element (i, j) of sym(source), 0 outside C x C.
  template <class Source> __device__ T symmetric(const Source& source, int i, int j) const {
    if (i >= channels_ || j >= channels_) return T(0);
    return i <= j ? source.symmetric(i, j) : source.symmetric(j, i);
  }

  /// f(own, r) for each row r of this thread's sub-block.
  template <class F> __device__ __forceinline__ void for_own_rows(const F& f) const {
    const Place own = place();
    if (!active(own)) return;
#pragma unroll
    for (int r = 0; r < 4; ++r) f(own, r);
  }

  /// D = f(A, i, j) elementwise.
  template <class F> __device__ __forceinline__ void map(Matrix D, Matrix A, const F& f) const {
    for_own_rows([&](const Place& own, int r) {
      T row[4];
      load4(row, row_of(A, own, r));
#pragma unroll
      for (int c = 0; c < 4; ++c) row[c] = f(row[c], own.i() + r, own.j() + c);
      store4(row_of(D, own, r), row);
    });
    __syncthreads();
  }

  /// sum += A B for one pair of tiles, A being the stored tile or its transpose, and B likewise. Sub-blocks of a
  /// transposed tile are read as they lie; all indices of their elements are constants, so that transposing them costs
  /// nothing. Among sub-blocks (own, k) or (k, own), row r is at first ^ 4 (r ^ k) + (16 or 64) k, where `first`
  /// depends on the thread and r ^ k is a constant.
  template <bool kTransposedA, bool kTransposedB>
  static __device__ __forceinline__ void multiply_tiles(T (&sum)[4][4], const Place& own, int A, int B) {
    const int a_first = A + (kTransposedA ? 16 + 4 : 64 + 4) * own.p;
    const int b_first = B + (kTransposedB ? 64 + 4 : 16 + 4) * own.q;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      T a[4][4], b[4][4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        load4(a[r], shared_memory<T>() + (a_first ^ 4 * (r ^ k)) + (kTransposedA ? 64 : 16) * k);
        load4(b[r], shared_memory<T>() + (b_first ^ 4 * (r ^ k)) + (kTransposedB ? 16 : 64) * k);
      }
#pragma unroll
      for (int s = 0; s < 4; ++s)
#pragma unroll
        for (int r = 0; r < 4; ++r)
#pragma unroll
          for (int c = 0; c < 4; ++c)
            sum[r][c] += (kTransposedA ? a[s][r] : a[r][s]) * (kTransposedB ? b[c][s] : b[s][c]);
    }
  }

  /// sum += A B in this thread's sub-block. Below the diagonal, A(I, K) is A(K, I)' and B(K, J) is B(J, K)'.
  __device__ __forceinline__ void multiply(T (&sum)[4][4], const Place& own, Matrix A, Matrix B) const {
    const int I = own.I, J = own.J;
    int K = 0;
#pragma unroll 1
    for (; K < I; ++K) multiply_tiles<true, false>(sum, own, tile(A, K, I), tile(B, K, J));
#pragma unroll 1
    for (; K <= J; ++K) multiply_tiles<false, false>(sum, own, tile(A, I, K), tile(B, K, J));
#pragma unroll 1
    for (; K < tiles_; ++K) multiply_tiles<false, true>(sum, own, tile(A, I, K), tile(B, J, K));
  }

  /// D = alpha D + beta (A1 B1 + A2 B2), without alpha D where kAddD is false and without A2 B2 where terms = 1.
  template <bool kAddD>
  __device__ __forceinline__ void combine(Matrix D, T alpha, T beta, Matrix A1, Matrix B1, Matrix A2, Matrix B2,
                                          int terms) const {
    const Place own = place();
    T sum[4][4] = {};
    if (active(own)) {
#pragma unroll 1
      for (int term = 0; term < terms; ++term) multiply(sum, own, term == 0 ? A1 : A2, term == 0 ? B1 : B2);
    }
    __syncthreads();  // D may be an operand
    const bool diagonal = own.I == own.J;
    if (active(own) && !(diagonal && own.p > own.q)) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        T previous[4] = {};
        if (kAddD) load4(previous, row_of(D, own, r));
#pragma unroll
        for (int c = 0; c < 4; ++c) sum[r][c] = kAddD ? alpha * previous[c] + beta * sum[r][c] : beta * sum[r][c];
      }
      if (!diagonal || own.p < own.q) {
#pragma unroll
        for (int r = 0; r < 4; ++r) store4(row_of(D, own, r), sum[r]);
      }
      if (diagonal) mirror(D, own, sum);
    }
    __syncthreads();
  }

  /// Sub-block (q, p) of a diagonal tile from sub-block (p, q), and for p = q its lower triangle from its upper one:
  /// both sides of the diagonal are the same bits.
  static __device__ __forceinline__ void mirror(Matrix D, const Place& own, const T (&block)[4][4]) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      T row[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) row[c] = own.p == own.q && r <= c ? block[r][c] : block[c][r];
      store4(row_of_block(tile(D, own.I, own.J), own.q, own.p, r), row);
    }
  }

  int channels_, tiles_;
  int next_ = kSums + kColumns;
};

}  // namespace isqrt::cuda
