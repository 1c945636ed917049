// The Engine of newton_schulz.h and normalization.h on one thread block: symmetric C x C matrices in its shared memory;
// or on a cluster of blocks that compute products together, see Products.
//
// Each warp has up to kSlots tiles of every result, one after the other in a column where it can: they share an
// operand, which is read once. An operation of the engine begins with all threads at one place and ends with
// a barrier, so that the next one may read what any thread has written.
#pragma once
#include "../normalization.h"
#include "block.cuh"
#include "number.cuh"
#include "tiles.cuh"

namespace isqrt::cuda {

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
    first_ = Place::after(all / warps * warp + (warp < rest ? warp : rest), tiles_);
    if constexpr (kInCluster)
      for (Matrix& spare : spare_) spare = matrix();
  }

  __device__ Matrix matrix() {
    const Matrix m{next_, next_, next_bit_};
    next_ += tile_count(channels_) * Tiles::kBytes;
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
      WarpTile<T> tile = symmetric_tile<T>(source, own);
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
    for_own_tiles([&](const Place& own) { add_inner(sum, source, read_tile(A, own), own, factor); });
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
  using Place = TilePlace;
  using Tiles = cuda::Tiles<T>;
  using Terms = typename Tiles::Terms;
  using Sum = typename Tiles::Sum;

  /// Where the vectors begin, and where tile (I, J) does.
  static __device__ int columns() { return shared_begin() + kSums * int(sizeof(T)); }
  static __device__ int tile(Matrix A, int I, int J) { return A.first + Place{I, J}.number() * Tiles::kBytes; }

  static __device__ T element(Matrix A, int i, int j) {
    return element_of<T>([&](const Place& at) { return OwnTile{tile(A, at.I, at.J)}; }, i, j);
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
        Terms terms = read_A(A, I, J);
        terms.for_each([&](int h, int term, T a) {
          const int j = kTile * J + term;
          if (j < channels_) sum[h] += a * factor(j);
        });
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

  static __device__ __forceinline__ WarpTile<T> read_tile(Matrix A, const Place& own) {
    return Tiles::read(OwnTile{tile(A, own.I, own.J)});
  }

  /// Of a symmetric matrix' tile on the diagonal the upper triangle counts, so that both sides are the same bits.
  static __device__ bool is_symmetric(Matrix D, const Place& own) { return own.I == own.J && D.transpose == D.first; }

  static __device__ __forceinline__ void write_tile(Matrix D, const Place& own, WarpTile<T>& result) {
    Tiles::write(OwnTile{tile(D, own.I, own.J)}, Tiles::pack(result), is_symmetric(D, own));
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

  /// Terms [16 K, 16 K + 16) of A's rows in tile row I, A being symmetric, and of B's columns in tile column J.
  static __device__ __forceinline__ Terms read_A(Matrix A, int I, int K) {
    return K < I ? Tiles::left(tile(A, K, I), true) : Tiles::left(tile(A, I, K), false);
  }
  static __device__ __forceinline__ Terms read_B(Matrix B, int K, int J) {
    return K <= J ? Tiles::right(tile(B, K, J), false) : Tiles::right(tile({B.transpose}, J, K), true);
  }

  /// sum[s] += A B in kCount tiles from `start` on.
  template <int kCount>
  __device__ __forceinline__ void multiply_tiles(Sum* sum, Matrix A, Matrix B, const Place& start) const {
    Place own[kCount];
#pragma unroll
    for (int s = 0; s < kCount; ++s) {
      own[s] = s == 0 ? start : own[s - 1].next();
      own[s] = {opaque(own[s].I), opaque(own[s].J)};
    }
#pragma unroll(kInCluster ? 2 : 1)  // a warp that is alone on its scheduler asks for the next operands meanwhile
    for (int K = 0; K < tiles_; ++K) {
      Terms a[kCount], b;
#pragma unroll
      for (int s = 0; s < kCount; ++s) a[s] = read_A(A, own[s].I, K);
#pragma unroll
      for (int s = 0; s < kCount; ++s) {
        if (s == 0 || own[s].I == 0) b = read_B(B, K, own[s].J);  // tiles of a column share it
        sum[s].multiply_add(a[s], b);
      }
    }
  }

  /// The same in all of this warp's tiles: kSlots, or one less. In the kernels that need the most registers one by one.
  __device__ __forceinline__ void multiply(Sum (&sum)[kSlots], Matrix A, Matrix B) const {
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

  /// alpha D + beta sum in one tile, or beta sum.
  template <bool kAddD>
  static __device__ __forceinline__ WarpTile<T> finish(const Sum& sum, Matrix D, T alpha, T beta, const Place& own) {
    WarpTile<T> result = sum.total();
    if constexpr (kAddD) {
      const WarpTile<T> previous = read_tile(D, own);
      result.combine(previous, [&](T& a, T d) { a = alpha * d + beta * a; });
    } else {
      result.for_each([&](T& a, int, int) { a *= beta; });
    }
    return result;
  }

  template <bool kAddD>
  __device__ __forceinline__ void combine_in_block(Matrix D, T alpha, T beta, Matrix A1, Matrix B1, Matrix A2,
                                                   Matrix B2, int terms) const {
    Sum sum[kSlots];
#pragma unroll 1
    for (int term = 0; term < terms; ++term) multiply(sum, term == 0 ? A1 : A2, term == 0 ? B1 : B2);
    WarpTile<T> result[kSlots];
    for_slots([&](const Place& own, int s) { result[s] = finish<kAddD>(sum[s], D, alpha, beta, own); });
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
      const Place own = Place::after(t, tiles_);
      Sum sum;
#pragma unroll 1
      for (int term = 0; term < terms; ++term) multiply_tiles<1>(&sum, term == 0 ? A1 : A2, term == 0 ? B1 : B2, own);
      WarpTile<T> result = finish<kAddD>(sum, D, alpha, beta, own);
      write_tile(target, own, result);
      __syncwarp();
      const OwnTile mine{tile(target, own.I, own.J)};
      char* const begin = shared_memory<char>() + (mine.begin - shared_begin());
      TileCopy<T> copy(mine);
#pragma unroll 1
      for (int rank = 0; rank < blocks; ++rank)
        if (rank != int(cluster_rank())) copy.write(OtherTile{map_shared(begin, rank)});
    }
    for (dealt_ += tiles; dealt_ >= workers;) dealt_ -= workers;
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
