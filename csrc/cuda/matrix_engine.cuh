// The Engine of newton_schulz.h and normalization.h on one thread block: symmetric C x C matrices in its shared memory.
//
// Only the 16 x 16 tiles of the upper triangle are stored, column by column: tile (I, J), I <= J, is the one numbered
// J (J + 1) / 2 + I, and six matrices of 128 channels in float32 fit into the 227 KiB of a Hopper block. Within a tile,
// element (r, c) lies at 16 r + (c ^ s(r)) with s(r) = 8 (bit 1 of r) + 4 (bit 2 of r): a warp that reads an operand of
// tensor.cuh, along rows or along columns, meets no bank conflict in float32.
//
// Each warp has up to kSlots tiles of every result. An operation of the engine begins with all threads at one place and
// ends with a barrier, so that the next one may read what any thread has written.
#pragma once
#include "../normalization.h"
#include "block.cuh"
#include "tensor.cuh"

namespace isqrt::cuda {

constexpr int kTileSize = kTile * kTile;

/// Tiles in each direction, and of the whole upper triangle.
ISQRT_FN constexpr int tile_rows(int channels) { return (channels + kTile - 1) / kTile; }
ISQRT_FN constexpr int tile_count(int channels) { return tile_rows(channels) * (tile_rows(channels) + 1) / 2; }

/// Tiles of one warp: three warps for each of a multiprocessor's schedulers are enough, and leave each thread the
/// registers to hold three tiles.
constexpr int kMaxSlots = 3, kMaxWarps = 12;
ISQRT_FN constexpr int matrix_slots(int channels) { return (tile_count(channels) + kMaxWarps - 1) / kMaxWarps; }
ISQRT_FN constexpr int matrix_threads(int channels) {
  return (tile_count(channels) + matrix_slots(channels) - 1) / matrix_slots(channels) * kWarp;
}

/// Elements of shared memory before the matrices: for block_sum, and for vectors.
constexpr int kSums = 32, kVectors = 4;

ISQRT_FN constexpr int64_t matrix_shared_bytes(int channels, int64_t element_size, int matrices) {
  return element_size *
         (kSums + kVectors * kTile * tile_rows(channels) + int64_t(matrices) * tile_count(channels) * kTileSize);
}

/// The most channels for which that many matrices fit into the shared memory of any device, and their tiles into the
/// warps of a block.
constexpr int max_matrix_channels(int64_t element_size, int matrices) {
  constexpr int64_t kLargestSharedBytes = 227 * 1024;
  int channels = 128;
  while (matrix_shared_bytes(channels, element_size, matrices) > kLargestSharedBytes) channels -= kTile;
  return channels;
}
static_assert(matrix_slots(max_matrix_channels(4, 1)) <= kMaxSlots);

/// kInFull: products may be in full. The kernels of the usual few steps do without the registers that it takes.
template <class T, int kSlots, bool kInFull> class MatrixEngine {
 public:
  /// Where a matrix begins in shared memory, in bytes. One that is not symmetric takes the tiles under the diagonal
  /// from the upper triangle of its transpose, which begins at `transpose`.
  struct Matrix {
    int first = 0, transpose = first;
  };

  /// Where a vector of C elements begins, in bytes.
  struct Column {
    int first;
  };

  __device__ explicit MatrixEngine(int channels) : channels_(channels), tiles_(tile_rows(channels)) {
    next_ = int(sizeof(T)) * (kSums + kVectors * kTile * tiles_);
    const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      const int number = warp + s * warps;
      int J = 0;
      while ((J + 1) * (J + 2) / 2 <= number) ++J;
      own_[s] = {number - J * (J + 1) / 2, J};
    }
  }

  __device__ Matrix matrix() {
    const Matrix m{next_, next_};
    next_ += tile_count(channels_) * kTileBytes;
    return m;
  }

  __device__ Column column() {
    const Column u{next_column_};
    next_column_ += kTile * tiles_ * int(sizeof(T));
    return u;
  }

  template <class Source> __device__ void load(Matrix A, const Source& source) const {
    for_own_tiles([&](const Place& own, int) {
      WarpTile<T> tile;
      tile.for_each([&](T& a, int r, int c) { a = symmetric(source, own.i(r), own.j(c)); });
      write_tile(A, own, tile);
    });
    __syncthreads();
  }

  __device__ T trace(Matrix A) const {
    T sum = 0;
    for_own_tiles([&](const Place& own, int) {
      if (own.I != own.J) return;
      WarpTile<T> tile = read_tile(A, own);
      tile.for_each([&](T a, int r, int c) { sum += r == c ? a : T(0); });
    });
    return block_sum(sum, shared_memory<T>());
  }

  /// <factor sym(source), A>
  template <class Source> __device__ T inner(const Source& source, Matrix A, T factor = 1) const {
    T sum = 0;
    for_own_tiles([&](const Place& own, int) {
      const T times = own.I < own.J ? 2 : 1;  // tile (J, I) is not stored
      WarpTile<T> tile = read_tile(A, own);
      tile.for_each([&](T a, int r, int c) { sum += times * (factor * symmetric(source, own.i(r), own.j(c)) * a); });
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

  __device__ void product(Matrix D, T alpha, T beta, Matrix A, Matrix B) const {
    combine<true>(D, alpha, beta, A, B, A, B, 1);
  }
  __device__ void products(Matrix D, T alpha, T beta, Matrix A1, Matrix B1, Matrix A2, Matrix B2) const {
    combine<true>(D, alpha, beta, A1, B1, A2, B2, 2);
  }
  __device__ Matrix product(Matrix& D, Matrix& E, Matrix A, Matrix B, bool in_full) const {
    return combine_pair(D, E, A, B, A, B, 1, in_full);
  }
  __device__ Matrix products(Matrix& D, Matrix& E, Matrix A1, Matrix B1, Matrix A2, Matrix B2, bool in_full) const {
    return combine_pair(D, E, A1, B1, A2, B2, 2, in_full);
  }

  template <class Source> __device__ void load(Column u, const Source& source) const {
    map(u, [&](int i) { return source.data[i]; });
  }
  __device__ void add(Column u, T alpha, T beta, Column v) const {
    map(u, [&](int i) { return alpha * element(u, i) + beta * element(v, i); });
  }
  __device__ T dot(Column u, Column v) const {
    T sum = 0;
    for (int i = threadIdx.x; i < channels_; i += blockDim.x) sum += element(u, i) * element(v, i);
    return block_sum(sum, shared_memory<T>());
  }
  __device__ void sums(Column u, Matrix A) const {
    sum_rows(u, A, [](int) { return T(1); });
  }
  __device__ void multiply(Column u, Matrix A, Column v) const {
    sum_rows(u, A, [&](int j) { return element(v, j); });
  }
  __device__ void rank_two(Matrix D, T alpha, T beta, Column u, Column v, Column w) const {
    map(D, D, [&](T d, int i, int j) {
      if (i >= channels_ || j >= channels_) return T(0);
      return alpha * d +
             beta * (element(u, i) * element(v, j) + element(v, i) * element(u, j) + element(w, i) + element(w, j));
    });
  }

  /// Copies factor u out.
  __device__ void write(Column u, const RootView<T>& result, T factor = 1) const {
    for (int i = threadIdx.x; i < channels_; i += blockDim.x) result.data[i] = factor * element(u, i);
  }

  /// The means of the columns of factor A.
  __device__ void write_means(Matrix A, const RootView<T>& result, T factor) const {
    const Column u{kSums * int(sizeof(T))};
    sums(u, A);
    add(u, T(1) / T(channels_), T(0), u);
    write(u, result, factor);
  }

  /// The whole of factor A, or its upper triangle; neighbouring threads write neighbouring elements.
  __device__ void write(Matrix A, const RootView<T>& result, T factor = 1) const {
    const bool upper = result.output == Output::kTriu;
    for (int i = threadIdx.x / kWarp; i < channels_; i += blockDim.x / kWarp) {
      T* row = result.data + (upper ? triu_index(i, i, channels_) - i : int64_t(i) * channels_);
      for (int j = threadIdx.x % kWarp; j < channels_; j += kWarp)
        if (!upper || j >= i) row[j] = factor * element(A, i, j);
    }
  }

 private:
  /// A tile (I, J) and the indices in the matrix of its rows and columns.
  struct Place {
    int I, J;
    __device__ int i(int row) const { return kTile * I + row; }
    __device__ int j(int column) const { return kTile * J + column; }
  };

  static constexpr int kTileBytes = kTileSize * sizeof(T);

  /// Where tile (I, J) begins, in bytes; and what lies at such a place. Addresses are sums of bytes up to the last
  /// moment, which takes the fewest instructions.
  static __device__ int tile(Matrix A, int I, int J) { return A.first + (J * (J + 1) / 2 + I) * kTileBytes; }
  static __device__ T& at(int bytes) { return *reinterpret_cast<T*>(shared_memory<char>() + bytes); }

  static __device__ int swizzle(int row) { return (row << 2 & 8) | (row & 4); }
  static __device__ T& in_tile(int tile, int row, int column) {
    return at(tile + int(sizeof(T)) * (kTile * row + (column ^ swizzle(row))));
  }
  static __device__ T& element(Matrix A, int i, int j) {
    const bool above = i / kTile <= j / kTile;
    return above ? in_tile(tile(A, i / kTile, j / kTile), i % kTile, j % kTile)
                 : in_tile(tile(A, j / kTile, i / kTile), j % kTile, i % kTile);
  }

  static __device__ T& element(Column u, int i) { return at(u.first + int(sizeof(T)) * i); }

  /// u_i = f(i)
  template <class F> __device__ __forceinline__ void map(Column u, const F& f) const {
    for (int i = threadIdx.x; i < channels_; i += blockDim.x) element(u, i) = f(i);
    __syncthreads();
  }

  /// u_i = sum_j A_ij factor(j). Four neighbouring threads share a row, and meet no bank conflict: they and those of
  /// the next rows read as for an Operand.
  template <class Factor> __device__ __forceinline__ void sum_rows(Column u, Matrix A, const Factor& factor) const {
    for (int i = threadIdx.x / 4; i < kTile * tiles_; i += blockDim.x / 4) {
      const int I = i / kTile;
      T sum = 0;
      for (int J = 0; J < tiles_; ++J) {
        const int from = I <= J ? tile(A, I, J) : tile(A, J, I);
        for (int c = threadIdx.x % 4; c < kTile && kTile * J + c < channels_; c += 4)
          sum += (I <= J ? in_tile(from, i % kTile, c) : in_tile(from, c, i % kTile)) * factor(kTile * J + c);
      }
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      if (threadIdx.x % 4 == 0 && i < channels_) element(u, i) = sum;
    }
    __syncthreads();
  }

  /// Element (i, j) of sym(source), 0 outside C x C.
  template <class Source> __device__ T symmetric(const Source& source, int i, int j) const {
    if (i >= channels_ || j >= channels_) return T(0);
    return i <= j ? source.symmetric(i, j) : source.symmetric(j, i);
  }

  /// f(own, s) for this warp's tiles, the s-th one in slot s. The compiler shall not remember where they are: kept in
  /// registers, all the addresses that follow would stay there throughout the kernel, at the expense of the products.
  template <class F> __device__ __forceinline__ void for_own_tiles(const F& f) const {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      const Place own{opaque(own_[s].I), opaque(own_[s].J)};
      if (own.J < tiles_) f(own, s);
    }
  }

  static __device__ __forceinline__ WarpTile<T> read_tile(Matrix A, const Place& own) {
    WarpTile<T> result;
    const int from = tile(A, own.I, own.J);
    result.for_each([&](T& a, int r, int c) { a = in_tile(from, r, c); });
    return result;
  }

  /// Of a symmetric matrix' tile on the diagonal the upper triangle counts, so that both sides are the same bits.
  static __device__ __forceinline__ void write_tile(Matrix D, const Place& own, WarpTile<T>& result) {
    const int to = tile(D, own.I, own.J);
    if (own.I < own.J || D.transpose != D.first) {
      result.for_each([&](T a, int r, int c) { in_tile(to, r, c) = a; });
    } else {
      result.for_each([&](T a, int r, int c) {
        if (r <= c) in_tile(to, r, c) = in_tile(to, c, r) = a;
      });
    }
  }

  /// D = f(A, i, j) elementwise.
  template <class F> __device__ __forceinline__ void map(Matrix D, Matrix A, const F& f) const {
    for_own_tiles([&](const Place& own, int) {
      WarpTile<T> result = read_tile(A, own);
      result.for_each([&](T& a, int r, int c) { a = f(a, own.i(r), own.j(c)); });
      __syncwarp();  // D may be A, and on the diagonal other lanes' elements are written
      write_tile(D, own, result);
    });
    __syncthreads();
  }

  /// Of a tile the operands for both halves of its 16 terms, its rows being the vectors with kAlongRows, else its
  /// columns. What depends on the lane is a sum that is computed once; the rest is exclusive or with constants.
  template <bool kAlongRows> static __device__ __forceinline__ void read(Operand<T> (&terms)[2], int tile) {
    const Lane lane;
    const int first = kAlongRows ? kTile * lane.group + (lane.quad ^ swizzle(lane.group))
                                 : kTile * lane.quad + (lane.group ^ (lane.quad << 2 & 8));
#pragma unroll
    for (int k = 0; k < 2; ++k)
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          const int term = 8 * k + 4 * s, flipped = kAlongRows ? term : 8 * h + 4 * s, rows = kAlongRows ? 8 * h : term;
          terms[k].value[h][s] = at(tile + int(sizeof(T)) * (first ^ flipped) + int(sizeof(T)) * kTile * rows);
        }
  }

  /// 16 terms of A's rows in tile row I and of B's columns in tile column J.
  struct Terms {
    Operand<T> a[2], b[2];
  };

  /// A is symmetric.
  static __device__ __forceinline__ void read_terms(Terms& terms, Matrix A, Matrix B, const Place& own, int K) {
    if (K < own.I)
      read<false>(terms.a, tile(A, K, own.I));
    else
      read<true>(terms.a, tile(A, own.I, K));
    if (K <= own.J)
      read<false>(terms.b, tile(B, K, own.J));
    else
      read<true>(terms.b, tile({B.transpose}, own.J, K));
  }

  /// sum += A B in one tile. The next terms are on their way while these are multiplied, unless registers are short.
  __device__ __forceinline__ void multiply(Accumulator<T>& sum, Matrix A, Matrix B, const Place& own) const {
    using Factor = typename Accumulator<T>::Factor;
    constexpr bool kAhead = !kInFull || sizeof(T) == 4;
    Terms terms;
    read_terms(terms, A, B, own, 0);
#pragma unroll 1
    for (int K = 1; K <= tiles_; ++K) {
      Terms next = terms;
      if (kAhead && K < tiles_) read_terms(next, A, B, own, K);
#pragma unroll
      for (int k = 0; k < 2; ++k) sum.multiply_add(Factor(terms.a[k]), Factor(terms.b[k]));
      if (!kAhead && K < tiles_) read_terms(next, A, B, own, K);
      terms = next;
    }
  }

  /// D = alpha D + beta (A1 B1 + A2 B2), without alpha D where kAddD is false and without A2 B2 where terms = 1.
  template <bool kAddD>
  __device__ __forceinline__ void combine(Matrix D, T alpha, T beta, Matrix A1, Matrix B1, Matrix A2, Matrix B2,
                                          int terms) const {
    WarpTile<T> result[kSlots];
    for_own_tiles([&](const Place& own, int s) {
      Accumulator<T> sum;
#pragma unroll 1
      for (int term = 0; term < terms; ++term) multiply(sum, term == 0 ? A1 : A2, term == 0 ? B1 : B2, own);
      result[s] = sum.total();
      const int previous = tile(D, own.I, own.J);
      result[s].for_each(
          [&](T& a, int r, int c) { a = kAddD ? alpha * in_tile(previous, r, c) + beta * a : beta * a; });
    });
    __syncthreads();  // D may be an operand
    for_own_tiles([&](const Place& own, int s) { write_tile(D, own, result[s]); });
    __syncthreads();
  }

  /// D = A1 B1 + A2 B2; in full also the upper triangle of its transpose E, from the factors exchanged.
  __device__ __forceinline__ Matrix combine_pair(Matrix& D, Matrix& E, Matrix A1, Matrix B1, Matrix A2, Matrix B2,
                                                 int terms, bool in_full) const {
    if constexpr (kInFull) {
      D.transpose = in_full ? E.first : D.first;
      E.transpose = D.first;
#pragma unroll 1
      for (int side = 0; side <= int(in_full); ++side)
        combine<false>(side ? E : D, T(0), T(1), side ? B1 : A1, side ? A1 : B1, side ? B2 : A2, side ? A2 : B2, terms);
      return in_full ? E : D;
    } else {
      combine<false>(D, T(0), T(1), A1, B1, A2, B2, terms);
      return D;
    }
  }

  int channels_, tiles_;
  Place own_[kSlots];
  int next_, next_column_ = kSums * int(sizeof(T));
};

}  // namespace isqrt::cuda
