// The Engine of newton_schulz.h and normalization.h on one thread block: symmetric C x C matrices in its shared memory.
//
// Each warp has up to kSlots tiles of every result, one after the other in a column where it can: they share an
// operand, which is read once. An operation of the engine begins with all threads at one place and ends with
// a barrier, so that the next one may read what any thread has written.
#pragma once
#include "../normalization.h"
#include "block.cuh"
#include "matrix_size.cuh"
#include "number.cuh"

namespace isqrt::cuda {

/// How a matrix lies in shared memory: its upper triangle of tiles, one after the other.
template <class T> struct UpperTiles {
  static __device__ int padded(int channels) { return channels; }
  static __device__ int bytes(int channels) { return tile_count(channels) * Tiles<T>::kBytes; }
  static __device__ OwnTile tile(int first, const TilePlace& at) { return {first + at.number() * Tiles<T>::kBytes}; }
  /// Of a symmetric matrix' tile on the diagonal the upper triangle counts, so that both sides are the same bits.
  template <class Packed>
  static __device__ __forceinline__ void write(int first, const TilePlace& at, const Packed& packed, bool symmetric) {
    Tiles<T>::write(tile(first, at), packed, at.I == at.J && symmetric);
  }
};

/// Symmetric matrices in the shared memory of a block, and what its warps do with them tile by tile: what the engines
/// of one block, of a cluster and of warpgroups have in common.
template <class T, class Storage = UpperTiles<T>> class BlockMatrices {
 public:
  /// Where a matrix begins: an address in shared memory. One that is not symmetric takes the tiles under the diagonal
  /// from the upper triangle of its transpose, which begins at `transpose`.
  struct Matrix {
    int first = 0, transpose = first;
  };

  /// alpha I + beta A, which is only written.
  template <class M> struct ResultOf {
    T alpha, beta;
    M A;
  };

  __device__ explicit BlockMatrices(int channels)
      : channels_(channels),
        tiles_(tile_rows(Storage::padded(channels))),
        warp_(__shfl_sync(0xffffffffu, int(threadIdx.x / kWarp), 0)) {
    next_ = matrices();
  }

 protected:
  using Place = TilePlace;
  using Tiles = cuda::Tiles<T>;
  using Terms = typename Tiles::Terms;
  using Reader = typename Tiles::Reader;

  __device__ Matrix new_matrix() {
    const Matrix m{next_};
    next_ += Storage::bytes(channels_);
    return m;
  }

  /// This warp's number: nvcc knows that it is the same in all lanes, and all that follows from it.
  __device__ int warp() const { return warp_; }
  static __device__ int warps() { return int(blockDim.x / kWarp); }

  /// Where the matrices begin, and tile (I, J) of one.
  static __device__ int matrices() { return shared_begin() + kSums * int(sizeof(T)); }
  static __device__ int tile(int first, int I, int J) { return UpperTiles<T>::tile(first, {I, J}).begin; }
  static __device__ auto tile(const Matrix& A, const Place& at) { return Storage::tile(A.first, at); }
  __device__ int count() const { return tile_count(Storage::padded(channels_)); }

  /// f(own) for each of this warp's tiles, one after the other: what runs once is not worth its instructions' way to
  /// the multiprocessor several times.
  template <class F> __device__ __forceinline__ void for_own_tiles(const F& f) const {
#pragma unroll 1
    for (int t = warp(); t < count(); t += warps()) f(Place::numbered(t));
  }

  static __device__ __forceinline__ void write_tile(const Matrix& D, const Place& own, WarpTile<T>& result) {
    Storage::write(D.first, own, Tiles::pack(result), D.transpose == D.first);
  }

  /// A = sym(source) / divisor
  template <class Source>
  __device__ __forceinline__ void load_tiles(const Matrix& A, const Source& source, T divisor) const {
    for_own_tiles([&](const Place& own) {
      WarpTile<T> tile = symmetric_tile<T>(source, own);
      Storage::write(A.first, own, Tiles::pack_divided(tile, divisor), true);
    });
  }

  /// A = sym(source) / t; returns t, the trace, which each warp adds up for itself while its first tile is on its way.
  template <class Source>
  __device__ __forceinline__ T load_normalized_tiles(const Matrix& A, const Source& source) const {
    constexpr int kMost = (kMostMatrixChannels + kWarp - 1) / kWarp;
    T diagonal[kMost], t = 0;
#pragma unroll
    for (int n = 0; n < kMost; ++n) {
      const int i = kWarp * n + int(threadIdx.x) % kWarp;
      diagonal[n] = i < channels_ ? source.data[int64_t(i) * channels_ + i] : T(0);
    }
    Place own = Place::numbered(warp());
    WarpTile<T> tile = symmetric_tile<T>(source, own);
#pragma unroll
    for (int n = 0; n < kMost; ++n) t += diagonal[n];
    t = warp_sum(t);
    const T divisor = nonzero(t);
#pragma unroll 1
    for (int n = warp(); n < count();) {
      Storage::write(A.first, own, Tiles::pack_divided(tile, divisor), true);
      n += warps();
      if (n >= count()) break;
      own = Place::numbered(n);
      tile = symmetric_tile<T>(source, own);
    }
    return t;
  }

  /// This thread's part of <factor (factor sym(source)), A>.
  template <class Source>
  __device__ __forceinline__ T inner_part(const Source& source, const Matrix& A, T factor) const {
    T sum = 0;
    for_own_tiles([&](const Place& own) { add_inner(sum, source, Tiles::read(tile(A, own)), own, factor); });
    return sum;
  }

  /// D = f(A, i, j) elementwise, where the same warp may have written A.
  template <class F> __device__ __forceinline__ void map_tiles(const Matrix& D, const Matrix& A, const F& f) const {
    for_own_tiles([&](const Place& own) {
      __syncwarp();
      WarpTile<T> result = Tiles::read(tile(A, own));
      result.for_each([&](T& a, int r, int c) { a = f(a, own.i(r), own.j(c)); });
      __syncwarp();  // D may be A, whose scale others read
      write_tile(D, own, result);
    });
  }
  __device__ void identity_plus_tiles(const Matrix& D, T alpha, T beta, const Matrix& A) const {
    map_tiles(D, A, [&](T a, int i, int j) { return beta * a + (i == j && i < channels_ ? alpha : T(0)); });
  }
  /// Copies a tile of factor times `result` out.
  template <class M, class View>
  __device__ __forceinline__ void write_tile(const ResultOf<M>& result, const Place& own, const View& view,
                                             T factor) const {
    WarpTile<T> values = Tiles::read(tile(result.A, own));
    values.for_each(
        [&](T& a, int r, int c) { a = factor * (result.beta * a + (own.i(r) == own.j(c) ? result.alpha : T(0))); });
    store_tile(view, values, own);
  }

  /// Writes the means of the columns of factor times the result, whose alpha is 0: of every `workers`-th 16 of them
  /// from `first` on, which the lanes read as rows for a product.
  template <class M, class View>
  __device__ __forceinline__ void write_means(const ResultOf<M>& result, const View& view, T factor, int first,
                                              int workers) const {
    const Lane lane;
    const Reader reader;
    for (int I = first; I < tiles_; I += workers) {
      T sum[2] = {};
      for (int J = 0; J < tiles_; ++J) {
        Terms terms = read_A(reader, result.A, I, J);
        terms.for_each([&](int h, int, T a) { sum[h] += a; });
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 1);
        sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 2);
        const int i = kTile * I + lane.group + 8 * h;
        if (lane.quad == 0 && i < channels_)
          store_number(view.data + i, factor * result.beta * (sum[h] / T(channels_)));
      }
    }
  }

  /// Terms [16 K, 16 K + 16) of A's rows in tile row I, A being symmetric, and of B's columns in tile column J.
  /// Branches: where a warp reads several operands, choosing without them takes registers that there are not.
  static __device__ __forceinline__ Terms read_A(const Reader& reader, const Matrix& A, int I, int K) {
    return K < I ? reader.left(tile(A.first, K, I), true) : reader.left(tile(A.first, I, K), false);
  }
  static __device__ __forceinline__ Terms read_B(const Reader& reader, const Matrix& B, int K, int J) {
    return K <= J ? reader.right(tile(B.first, K, J), false) : reader.right(tile(B.transpose, J, K), true);
  }

  int channels_, tiles_;

 private:
  int warp_, next_;
};

/// With some products in full, which takes registers that the usual few steps do without.
template <class T, int kSlots, bool kInFull = false> class MatrixEngine : public BlockMatrices<T> {
  using Base = BlockMatrices<T>;
  using Base::tiles_, Base::tile;
  using typename Base::Place, typename Base::Tiles, typename Base::Terms, typename Base::Reader;

 public:
  using typename Base::Matrix;
  using Result = typename Base::template ResultOf<Matrix>;

  __device__ explicit MatrixEngine(int channels) : Base(channels) {
    const int warp = Base::warp(), warps = Base::warps(), all = tile_count(channels), rest = all % warps;
    count_ = all / warps + int(warp < rest);
    first_ = Place::after(all / warps * warp + (warp < rest ? warp : rest), tiles_);
  }

  __device__ Matrix matrix() { return Base::new_matrix(); }

  template <class Source> __device__ void load(Matrix A, const Source& source, T divisor) const {
    Base::load_tiles(A, source, divisor);
    __syncthreads();
  }
  template <class Source> __device__ T load_normalized(Matrix A, const Source& source) const {
    const T t = Base::load_normalized_tiles(A, source);
    __syncthreads();
    return t;
  }

  /// <factor (factor sym(source)), A>
  template <class Source> __device__ T inner(const Source& source, Matrix A, T factor = 1) const {
    return block_sum(Base::inner_part(source, A, factor), shared_memory<T>());
  }

  __device__ void scale(Matrix D, T alpha, Matrix A) const { identity_plus(D, T(0), alpha, A); }
  __device__ void identity_plus(Matrix D, T alpha, T beta, Matrix A) const {
    Base::identity_plus_tiles(D, alpha, beta, A);
    __syncthreads();
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

  __device__ Result result(T beta, Matrix A) const { return {0, beta, A}; }
  __device__ Result result(T alpha, T beta, Matrix A) const { return {alpha, beta, A}; }

  template <class View> __device__ void write(const Result& result, const View& view, T factor = 1) const {
    Base::for_own_tiles([&](const Place& own) { Base::write_tile(result, own, view, factor); });
  }

  template <class View> __device__ void write_means(const Result& result, const View& view, T factor) const {
    Base::write_means(result, view, factor, Base::warp(), Base::warps());
  }

 private:
  using Sum = typename Tiles::Sum;

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
  /// sum[s] += A B in kCount tiles from `start` on.
  template <int kCount>
  __device__ __forceinline__ void multiply_tiles(Sum* sum, Matrix A, Matrix B, const Place& start) const {
    Place own[kCount];
#pragma unroll
    for (int s = 0; s < kCount; ++s) {
      own[s] = s == 0 ? start : own[s - 1].next();
      own[s] = {opaque(own[s].I), opaque(own[s].J)};
    }
    const Reader reader;
#pragma unroll 1
    for (int K = 0; K < tiles_; ++K) {
      Terms a[kCount], b;
#pragma unroll
      for (int s = 0; s < kCount; ++s) a[s] = Base::read_A(reader, A, own[s].I, K);
#pragma unroll
      for (int s = 0; s < kCount; ++s) {
        if (s == 0 || own[s].I == 0) b = Base::read_B(reader, B, K, own[s].J);  // tiles of a column share it
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

  /// alpha D + beta sum in one tile, or beta sum.
  template <bool kAddD>
  static __device__ __forceinline__ WarpTile<T> finish(const Sum& sum, Matrix D, T alpha, T beta, const Place& own) {
    WarpTile<T> result = sum.total();
    if constexpr (kAddD) {
      const WarpTile<T> previous = Tiles::read(tile(D, own));
      result.combine(previous, [&](T& a, T d) { a = alpha * d + beta * a; });
    } else {
      result.for_each([&](T& a, int, int) { a *= beta; });
    }
    return result;
  }

  /// D = alpha D + beta (A1 B1 + A2 B2), without alpha D where kAddD is false and without A2 B2 where terms = 1.
  template <bool kAddD>
  __device__ __forceinline__ void combine(Matrix D, T alpha, T beta, Matrix A1, Matrix B1, Matrix A2, Matrix B2,
                                          int terms) const {
    Sum sum[kSlots];
#pragma unroll 1
    for (int term = 0; term < terms; ++term) multiply(sum, term == 0 ? A1 : A2, term == 0 ? B1 : B2);
    WarpTile<T> result[kSlots];
    for_slots([&](const Place& own, int s) { result[s] = finish<kAddD>(sum[s], D, alpha, beta, own); });
    __syncthreads();  // D may be an operand
    for_slots([&](const Place& own, int s) { Base::write_tile(D, own, result[s]); });
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

  int count_;
  Place first_;
};

}  // namespace isqrt::cuda
