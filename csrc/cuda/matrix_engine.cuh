// The Engine of newton_schulz.h and normalization.h on one thread block: symmetric C x C matrices in its shared memory;
// or on a cluster of blocks that compute products together, see Products.
//
// Only the 16 x 16 tiles of the upper triangle are stored, column by column: tile (I, J), I <= J, is the one numbered
// J (J + 1) / 2 + I, and six matrices of 128 channels in float32 fit into the 227 KiB of a Hopper block. Within a tile
// the elements are permuted (TileLayout), so that a warp meets no bank conflict when it reads an operand of tensor.cuh,
// along rows in packets of 16 bytes or along columns, nor when it reads or writes a result, except on the diagonal.
//
// Each warp has up to kSlots tiles of every result, one after the other in a column where it can: they share an
// operand, which is read and split once. An operation of the engine begins with all threads at one place and ends with
// a barrier, so that the next one may read what any thread has written.
#pragma once
#include "../normalization.h"
#include "block.cuh"
#include "number.cuh"
#include "tensor.cuh"

namespace isqrt::cuda {

constexpr int kTileSize = kTile * kTile;

/// Tiles in each direction, and of the whole upper triangle.
ISQRT_FN constexpr int tile_rows(int channels) { return (channels + kTile - 1) / kTile; }
ISQRT_FN constexpr int tile_count(int channels) { return tile_rows(channels) * (tile_rows(channels) + 1) / 2; }

/// The most tiles of a warp, and the warps. A product takes as long as that of a multiprocessor's four schedulers which
/// has the most to do: up to four tiles get a warp each, more of them as many warps for each scheduler as hold them
/// all, two or three in each.
constexpr int kMaxSlots = 3, kSchedulers = 4;
ISQRT_FN constexpr int matrix_slots(int channels) {
  const int tiles = tile_count(channels);
  return tiles <= kSchedulers ? 1 : tiles <= 4 * kSchedulers ? 2 : kMaxSlots;
}
ISQRT_FN constexpr int matrix_threads(int channels) {
  const int tiles = tile_count(channels), slots = matrix_slots(channels), each = kSchedulers * slots;
  return kWarp * (slots == 1 ? tiles : kSchedulers * ((tiles + each - 1) / each));
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

/// Each warp has as many tiles as there are slots, or one less, but for one.
static_assert([] {
  for (int channels = 1; channels <= max_matrix_channels(4, 1); ++channels) {
    const int tiles = tile_count(channels), warps = matrix_threads(channels) / kWarp, slots = matrix_slots(channels);
    if (tiles > warps * slots || tiles < warps * (slots > 1 ? slots - 1 : 1)) return false;
  }
  return true;
}());

/// Where in a tile, in bytes from its beginning, the elements lie. A lane of group g and quad q, see tensor.cuh, reads
/// terms 4 q to 4 q + 3 of vectors g and g + 8, and writes columns 2 q and 2 q + 1, 2 q + 8 and 2 q + 9, of rows g and
/// g + 8. What depends on the lane is one of a few numbers; the rest are constants, which instructions contain.
///
/// In float32 a row of 16 takes half of the banks: rows r and r + 4 lie in different halves, as do 2 r and 2 r + 1, and
/// columns are exchanged by 8 in such rows that those of one half do not meet. In float64, which moves half as many
/// lanes at a time, a row takes all banks, and columns are exchanged by 4 along columns, by 2 and 8 along rows.
template <class T> struct TileLayout {
  static constexpr int kSize = sizeof(T);
  static constexpr bool kHalfBanks = kSize == 4;

  static __device__ int at(int row, int column) {
    const int place = kHalfBanks ? (row & ~1) | ((row ^ row >> 2) & 1) : row;
    const int flip = kHalfBanks ? (row ^ row >> 2) << 2 & 8 : (row & 12) ^ (row & 1 ? 10 : 0);
    return kSize * (kTile * place + (column ^ flip));  // multiplied inside, the sizes would cost registers
  }
  /// at(group + 8 h, 4 quad)
  static __device__ int in_row(const Lane& lane, int h) {
    return (at(lane.group, 4 * lane.quad) ^ kSize * 8 * h) + kSize * kTile * 8 * h;
  }
  /// at(4 quad + i, group + 8 h)
  static __device__ int in_column(const Lane& lane, int h, int i) {
    return (at(4 * lane.quad + i % 2, lane.group) ^ kSize * 8 * (kHalfBanks ? h ^ i / 2 : h)) + kSize * kTile * (i & 2);
  }
};

/// What products a kernel computes: triangles; some of them in full, which takes registers that the usual few steps do
/// without; or triangles together with the other blocks of its cluster.
///
/// In a cluster each block has all matrices. The tiles of products are dealt out to the warps of all blocks, and
/// results go into the matrices of each. Products need no barrier between them as long as none reads or overwrites what
/// others have read or written since the last one: what changes is written to a spare matrix, and takes its place.
/// Everything else each block does for itself. Each tile is the same sum in any case: results do not depend on who
/// computes them.
enum class Products { kTriangles, kInFull, kInCluster };

template <class T, int kSlots, Products kProducts = Products::kTriangles, int kSpares = 0> class MatrixEngine {
  static constexpr bool kInFull = kProducts == Products::kInFull, kInCluster = kProducts == Products::kInCluster;

 public:
  /// Where a matrix begins: an address in shared memory. One that is not symmetric takes the tiles under the diagonal
  /// from the upper triangle of its transpose, which begins at `transpose`. `bit` stands for it in sets.
  struct Matrix {
    int first = 0, transpose = first;
    unsigned bit = 0;
  };

  /// Where a vector of C elements begins.
  struct Column {
    int first;
  };

  __device__ explicit MatrixEngine(int channels) : channels_(channels), tiles_(tile_rows(channels)) {
    next_column_ = columns();
    next_ = next_column_ + int(sizeof(T)) * kVectors * kTile * tiles_;
    const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp, all = tile_count(channels), rest = all % warps;
    count_ = all / warps + int(warp < rest);
    first_ = place(all / warps * warp + (warp < rest ? warp : rest));
    if constexpr (kInCluster)
      for (Matrix& spare : spare_) spare = matrix();
  }

  __device__ Matrix matrix() {
    const Matrix m{next_, next_, next_bit_};
    next_ += tile_count(channels_) * kTileBytes;
    next_bit_ *= 2;
    return m;
  }

  __device__ Column column() {
    const Column u{next_column_};
    next_column_ += kTile * tiles_ * int(sizeof(T));
    return u;
  }

  template <class Source> __device__ void load(Matrix A, const Source& source) {
    begin_alone();
    for_own_tiles([&](const Place& own) {
      WarpTile<T> tile;
      tile.for_each([&](T& a, int r, int c) { a = symmetric(source, own.i(r), own.j(c)); });
      write_tile(A, own, tile);
    });
    __syncthreads();
  }

  __device__ T trace(Matrix A) {
    begin_alone();
    T sum = 0;
    for_own_tiles([&](const Place& own) {
      if (own.I != own.J) return;
      WarpTile<T> tile = read_tile(A, own);
      tile.for_each([&](T a, int r, int c) { sum += r == c ? a : T(0); });
    });
    return block_sum(sum, shared_memory<T>());
  }

  /// <factor sym(source), A>
  template <class Source> __device__ T inner(const Source& source, Matrix A, T factor = 1) {
    begin_alone();
    T sum = 0;
    for_own_tiles([&](const Place& own) {
      const T times = own.I < own.J ? 2 : 1;  // tile (J, I) is not stored
      WarpTile<T> tile = read_tile(A, own);
      tile.for_each([&](T a, int r, int c) { sum += times * (factor * symmetric(source, own.i(r), own.j(c)) * a); });
    });
    return block_sum(sum, shared_memory<T>());
  }

  __device__ void divide(Matrix A, T s) {
    map(A, A, [&](T a, int, int) { return a / s; });
  }
  __device__ void scale(Matrix D, T alpha, Matrix A) {
    map(D, A, [&](T a, int, int) { return alpha * a; });
  }
  __device__ void identity_plus(Matrix D, T alpha, T beta, Matrix A) {
    map(D, A, [&](T a, int i, int j) { return beta * a + (i == j && i < channels_ ? alpha : T(0)); });
  }

  __device__ void product(Matrix& D, T alpha, T beta, Matrix A, Matrix B) {
    combine<true>(D, alpha, beta, A, B, A, B, 1);
  }
  __device__ void products(Matrix& D, T alpha, T beta, Matrix A1, Matrix B1, Matrix A2, Matrix B2) {
    combine<true>(D, alpha, beta, A1, B1, A2, B2, 2);
  }
  __device__ Matrix product(Matrix& D, Matrix& E, Matrix A, Matrix B, bool in_full) {
    return combine_pair(D, E, A, B, A, B, 1, in_full);
  }
  __device__ Matrix products(Matrix& D, Matrix& E, Matrix A1, Matrix B1, Matrix A2, Matrix B2, bool in_full) {
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
  __device__ void sums(Column u, Matrix A) {
    sum_rows(u, A, [](int) { return T(1); });
  }
  __device__ void multiply(Column u, Matrix A, Column v) {
    sum_rows(u, A, [&](int j) { return element(v, j); });
  }
  __device__ void rank_two(Matrix D, T alpha, T beta, Column u, Column v, Column w) {
    map(D, D, [&](T d, int i, int j) {
      if (i >= channels_ || j >= channels_) return T(0);
      return alpha * d +
             beta * (element(u, i) * element(v, j) + element(v, i) * element(u, j) + element(w, i) + element(w, j));
    });
  }

  /// Copies factor u out.
  template <class Result> __device__ void write(Column u, const Result& result, T factor = 1) {
    if (kInCluster && cluster_rank() > 0) return;
    for (int i = threadIdx.x; i < channels_; i += blockDim.x) store_number(result.data + i, factor * element(u, i));
  }

  /// The means of the columns of factor A.
  template <class Result> __device__ void write_means(Matrix A, const Result& result, T factor) {
    const Column u{columns()};
    sums(u, A);
    add(u, T(1) / T(channels_), T(0), u);
    write(u, result, factor);
  }

  /// The whole of factor A, or its upper triangle; neighbouring threads write neighbouring elements.
  template <class Result> __device__ void write(Matrix A, const Result& result, T factor = 1) {
    begin_alone();
    if (kInCluster && cluster_rank() > 0) return;
    const bool upper = result.output == Output::kTriu;
    for (int i = threadIdx.x / kWarp; i < channels_; i += blockDim.x / kWarp) {
      const auto row = result.data + (upper ? triu_index(i, i, channels_) - i : int64_t(i) * channels_);
      for (int j = threadIdx.x % kWarp; j < channels_; j += kWarp)
        if (!upper || j >= i) store_number(row + j, factor * element(A, i, j));
    }
  }

 private:
  /// A tile (I, J) and the indices in the matrix of its rows and columns. Column by column, from the last one on.
  struct Place {
    int I, J;
    __device__ int i(int row) const { return kTile * I + row; }
    __device__ int j(int column) const { return kTile * J + column; }
    __device__ Place next() const { return I < J ? Place{I + 1, J} : Place{0, J - 1}; }
  };

  __device__ Place place(int tile) const {
    Place at{tile, tiles_ - 1};
    for (; at.I > at.J; --at.J) at.I -= at.J + 1;
    return at;
  }

  using Layout = TileLayout<T>;
  using Factor = typename Accumulator<T>::Factor;

  static constexpr int kTileBytes = kTileSize * sizeof(T);

  /// Where the vectors begin, and where tile (I, J) does.
  static __device__ int columns() { return shared_begin() + kSums * int(sizeof(T)); }
  static __device__ int tile(Matrix A, int I, int J) { return A.first + (J * (J + 1) / 2 + I) * kTileBytes; }

  static __device__ T& in_tile(int tile, int row, int column) { return at_shared<T>(tile + Layout::at(row, column)); }
  static __device__ T& element(Matrix A, int i, int j) {
    const bool above = i / kTile <= j / kTile;
    return above ? in_tile(tile(A, i / kTile, j / kTile), i % kTile, j % kTile)
                 : in_tile(tile(A, j / kTile, i / kTile), j % kTile, i % kTile);
  }

  static __device__ T& element(Column u, int i) { return at_shared<T>(u.first + int(sizeof(T)) * i); }

  /// u_i = f(i)
  template <class F> __device__ __forceinline__ void map(Column u, const F& f) const {
    for (int i = threadIdx.x; i < channels_; i += blockDim.x) element(u, i) = f(i);
    __syncthreads();
  }

  /// u_i = sum_j A_ij factor(j). Each warp takes 16 rows, which its lanes read as for a product.
  template <class F> __device__ __forceinline__ void sum_rows(Column u, Matrix A, const F& factor) {
    begin_alone();
    const Lane lane;
    for (int I = threadIdx.x / kWarp; I < tiles_; I += blockDim.x / kWarp) {
      T sum[2] = {};
      for (int J = 0; J < tiles_; ++J) {
        Terms terms;
        read_A(terms, A, I, J);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int j = kTile * J + 4 * lane.quad + i;
          const T f = j < channels_ ? factor(j) : T(0);
#pragma unroll
          for (int h = 0; h < 2; ++h) sum[h] += terms(h, i) * f;
        }
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 1);
        sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 2);
        const int i = kTile * I + lane.group + 8 * h;
        if (lane.quad == 0 && i < channels_) element(u, i) = sum[h];
      }
    }
    __syncthreads();
  }

  /// Element (i, j) of sym(source), 0 outside C x C.
  template <class Source> __device__ T symmetric(const Source& source, int i, int j) const {
    if (i >= channels_ || j >= channels_) return T(0);
    return i <= j ? source.symmetric(i, j) : source.symmetric(j, i);
  }

  /// f(own, s) for this warp's tiles, the s-th one in slot s: for results in registers. The compiler shall not remember
  /// where they are: kept in registers, all the addresses that follow would stay there throughout the kernel, at the
  /// expense of the products.
  template <class F> __device__ __forceinline__ void for_slots(const F& f) const {
    Place own{opaque(first_.I), opaque(first_.J)};
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      if (s < count_) f(own, s);
      own = own.next();
    }
  }
  /// f(own) for each of them, one after the other: what runs once is not worth its instructions' way to the
  /// multiprocessor several times.
  template <class F> __device__ __forceinline__ void for_own_tiles(const F& f) const {
    Place own{opaque(first_.I), opaque(first_.J)};
#pragma unroll 1
    for (int s = 0; s < count_; ++s) {
      f(own);
      own = own.next();
    }
  }

  /// Two neighbours in a row, which a lane has of a tile: read and written in one piece.
  struct alignas(2 * sizeof(T)) Pair {
    T value[2];
  };

  static __device__ __forceinline__ WarpTile<T> read_tile(Matrix A, const Place& own) {
    WarpTile<T> result;
    const int from = tile(A, own.I, own.J);
    result.for_each_pair([&](T* a, int r, int c) {
      const Pair pair = at_shared<Pair>(from + Layout::at(r, c));
      a[0] = pair.value[0], a[1] = pair.value[1];
    });
    return result;
  }

  /// A tile in this block's shared memory, and in that of a block of the cluster.
  struct OwnTile {
    int begin;
    template <class U> __device__ U& at(int offset) const { return at_shared<U>(begin + offset); }
  };
  struct MappedTile {
    char* begin;
    template <class U> __device__ U& at(int offset) const { return *reinterpret_cast<U*>(begin + offset); }
  };

  /// Of a symmetric matrix' tile on the diagonal the upper triangle counts, so that both sides are the same bits.
  template <class Tile>
  static __device__ __forceinline__ void write_tile(const Tile& to, Matrix D, const Place& own, WarpTile<T>& result) {
    if (own.I < own.J || D.transpose != D.first) {
      result.for_each_pair([&](const T* a, int r, int c) {
        const Pair pair{a[0], a[1]};
        to.template at<Pair>(Layout::at(r, c)) = pair;
      });
    } else {
      result.for_each([&](T a, int r, int c) {
        if (r <= c) to.template at<T>(Layout::at(r, c)) = to.template at<T>(Layout::at(c, r)) = a;
      });
    }
  }
  static __device__ __forceinline__ void write_tile(Matrix D, const Place& own, WarpTile<T>& result) {
    write_tile(OwnTile{tile(D, own.I, own.J)}, D, own, result);
  }

  /// D = f(A, i, j) elementwise.
  template <class F> __device__ __forceinline__ void map(Matrix D, Matrix A, const F& f) {
    begin_alone();
    for_own_tiles([&](const Place& own) {
      WarpTile<T> result = read_tile(A, own);
      result.for_each([&](T& a, int r, int c) { a = f(a, own.i(r), own.j(c)); });
      __syncwarp();  // D may be A, and on the diagonal other lanes' elements are written
      write_tile(D, own, result);
    });
    __syncthreads();
  }

  /// Both halves of a tile's 16 terms. Lane (g, q) takes the terms 4 q to 4 q + 3 of its vectors as q and q + 4 of one
  /// half and of the other: any order of the terms does, the same for both factors.
  struct Terms {
    Operand<T> half[2];
    __device__ __forceinline__ T& operator()(int h, int i) { return half[i / 2].value[h][i % 2]; }
  };

  /// The terms of a tile whose rows are the vectors, or whose columns are.
  static __device__ __forceinline__ void read_rows(Terms& terms, int tile) {
    constexpr int kPacket = 16 / sizeof(T);
    struct alignas(16) Packet {
      T value[kPacket];
    };
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int i = 0; i < 4; i += kPacket) {
        // The lowest bits of a column's place in its row follow from the row, see TileLayout::at.
        const Packet packet = at_shared<Packet>(tile + (Layout::in_row(Lane(), h) ^ i * int(sizeof(T))));
#pragma unroll
        for (int p = 0; p < kPacket; ++p) terms(h, i + p) = packet.value[p];
      }
  }
  static __device__ __forceinline__ void read_columns(Terms& terms, int tile) {
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int i = 0; i < 4; ++i) terms(h, i) = at_shared<T>(tile + Layout::in_column(Lane(), h, i));
  }

  /// Terms [16 K, 16 K + 16) of A's rows in tile row I, A being symmetric, and of B's columns in tile column J.
  static __device__ __forceinline__ void read_A(Terms& terms, Matrix A, int I, int K) {
    if (K < I)
      read_columns(terms, tile(A, K, I));
    else
      read_rows(terms, tile(A, I, K));
  }
  static __device__ __forceinline__ void read_B(Terms& terms, Matrix B, int K, int J) {
    if (K <= J)
      read_columns(terms, tile(B, K, J));
    else
      read_rows(terms, tile({B.transpose}, J, K));
  }

  /// sum[s] += A B in kCount tiles from `start` on. In float32 the terms of the next tile are on their way while
  /// those of one are multiplied; in float64 there are no registers for that.
  template <int kCount>
  __device__ __forceinline__ void multiply_tiles(Accumulator<T>* sum, Matrix A, Matrix B, const Place& start) const {
    constexpr bool kAhead = sizeof(T) == 4;
    Place own[kCount];
#pragma unroll
    for (int s = 0; s < kCount; ++s) {
      own[s] = s == 0 ? start : own[s - 1].next();
      own[s] = {opaque(own[s].I), opaque(own[s].J)};
    }
    Terms a, b;
    if (kAhead) {
      read_A(a, A, own[0].I, 0);
      read_B(b, B, 0, own[0].J);
    }
#pragma unroll 1
    for (int K = 0; K < tiles_; ++K) {
      Factor b_factor[2];
#pragma unroll
      for (int s = 0; s < kCount; ++s) {
        const bool shares = s > 0 && own[s].I > 0;
        if (!kAhead) read_A(a, A, own[s].I, K);
        if (!kAhead && !shares) read_B(b, B, K, own[s].J);
        const Factor a_factor[2] = {Factor(a.half[0]), Factor(a.half[1])};
        if (!shares)
          for (int k = 0; k < 2; ++k) b_factor[k] = Factor(b.half[k]);
        if (kAhead) {
          const bool last = s + 1 == kCount;
          const Place next = own[(s + 1) % kCount];
          const int next_K = last && K + 1 < tiles_ ? K + 1 : K;  // beyond the last terms those before, once more
          read_A(a, A, next.I, next_K);
          if (last || next.I == 0) read_B(b, B, next_K, next.J);
        }
#pragma unroll
        for (int k = 0; k < 2; ++k) sum[s].multiply_add(a_factor[k], b_factor[k]);
      }
    }
  }

  /// The same in all of this warp's tiles: kSlots, or one less. In the kernels that need the most registers one by one.
  __device__ __forceinline__ void multiply(Accumulator<T> (&sum)[kSlots], Matrix A, Matrix B) const {
    if constexpr (kInFull)
      for_slots([&](const Place& own, int s) { multiply_tiles<1>(sum + s, A, B, own); });
    else if (count_ == kSlots)
      multiply_tiles<kSlots>(sum, A, B, first_);
    else
      multiply_tiles<kSlots - 1>(sum, A, B, first_);
  }

  /// D = alpha D + beta (A1 B1 + A2 B2), without alpha D where kAddD is false and without A2 B2 where terms = 1.
  template <bool kAddD>
  __device__ __forceinline__ void combine(Matrix& D, T alpha, T beta, Matrix A1, Matrix B1, Matrix A2, Matrix B2,
                                          int terms) {
    if constexpr (kInCluster)
      combine_in_cluster<kAddD>(D, alpha, beta, A1, B1, A2, B2, terms);
    else
      combine_in_block<kAddD>(D, alpha, beta, A1, B1, A2, B2, terms);
  }

  template <bool kAddD>
  __device__ __forceinline__ void combine_in_block(Matrix D, T alpha, T beta, Matrix A1, Matrix B1, Matrix A2,
                                                   Matrix B2, int terms) const {
    Accumulator<T> sum[kSlots];
#pragma unroll 1
    for (int term = 0; term < terms; ++term) multiply(sum, term == 0 ? A1 : A2, term == 0 ? B1 : B2);
    WarpTile<T> result[kSlots];
    for_slots([&](const Place& own, int s) {
      result[s] = sum[s].total();
      if constexpr (kAddD) {
        const WarpTile<T> previous = read_tile(D, own);
        result[s].combine(previous, [&](T& a, T d) { a = alpha * d + beta * a; });
      } else {
        result[s].for_each([&](T& a, int, int) { a *= beta; });
      }
    });
    __syncthreads();  // D may be an operand
    for_slots([&](const Place& own, int s) { write_tile(D, own, result[s]); });
    __syncthreads();
  }

  /// D = A1 B1 + A2 B2; in full also the upper triangle of its transpose E, from the factors exchanged.
  __device__ __forceinline__ Matrix combine_pair(Matrix& D, Matrix& E, Matrix A1, Matrix B1, Matrix A2, Matrix B2,
                                                 int terms, bool in_full) {
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

  /// The same in a cluster. Consecutive tiles, those of consecutive products too, go to different blocks.
  template <bool kAddD>
  __device__ __forceinline__ void combine_in_cluster(Matrix& D, T alpha, T beta, Matrix A1, Matrix B1, Matrix A2,
                                                     Matrix B2, int terms) {
    const Matrix target = kAddD ? spare_[0] : D;
    const unsigned operands = A1.bit | B1.bit | A2.bit | B2.bit | (kAddD ? D.bit : 0);
    if (alone_ || (operands & written_) || (target.bit & (read_ | written_))) meet();
    read_ |= operands;
    written_ |= target.bit;

    const int blocks = cluster_size(), workers = blocks * int(blockDim.x / kWarp), tiles = tile_count(channels_);
    const int worker = int(threadIdx.x / kWarp) * blocks + int(cluster_rank()) - dealt_;
#pragma unroll 1
    for (int t = worker < 0 ? worker + workers : worker; t < tiles; t += workers) {
      const Place own = place(t);
      Accumulator<T> sum;
#pragma unroll 1
      for (int term = 0; term < terms; ++term) multiply_tiles<1>(&sum, term == 0 ? A1 : A2, term == 0 ? B1 : B2, own);
      WarpTile<T> result = sum.total();
      if constexpr (kAddD) {
        const WarpTile<T> previous = read_tile(D, own);
        result.combine(previous, [&](T& a, T d) { a = alpha * d + beta * a; });
      } else {
        result.for_each([&](T& a, int, int) { a *= beta; });
      }
      char* to = shared_memory<char>() + (tile(target, own.I, own.J) - shared_begin());
#pragma unroll 1
      for (int rank = 0; rank < blocks; ++rank) write_tile(MappedTile{map_shared(to, rank)}, target, own, result);
    }
    dealt_ = (dealt_ + tiles) % workers;
    if constexpr (kAddD) {
#pragma unroll
      for (int s = 0; s + 1 < kSpares; ++s) spare_[s] = spare_[s + 1];
      spare_[kSpares - 1] = D;
      D = target;
    }
  }

  /// All products so far are there, in each block.
  __device__ void meet() {
    cluster_sync();
    alone_ = false;
    read_ = written_ = 0;
  }
  /// Before what each block does for itself, with its own matrices.
  __device__ void begin_alone() {
    if constexpr (kInCluster) {
      if (written_) meet();
      alone_ = true;
    }
  }

  int channels_, tiles_, count_;
  Place first_;
  int next_, next_column_;
  unsigned next_bit_ = 1;

  // In a cluster: whether anything was done alone since the last meeting, or not even the first has been; what products
  // have read and written since; the worker that has the next tile; and spare matrices.
  bool alone_ = true;
  unsigned read_ = 0, written_ = 0;
  int dealt_ = 0;
  Matrix spare_[kSpares > 0 ? kSpares : 1];
};

}  // namespace isqrt::cuda
