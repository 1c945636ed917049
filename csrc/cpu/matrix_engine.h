// The Engine of newton_schulz.h and normalization.h on one CPU thread: C x C matrices in its cache, products in
// register tiles over one triangle, which is then mirrored.
#pragma once
#include "simd.h"

namespace isqrt::cpu::ISQRT_LEVEL {

template <class T> class MatrixEngine {
  using S = Simd<T>;

 public:
  /// Storage of one matrix, ld_ columns and as many rows, zero outside C x C.
  struct Matrix {
    T* data;
  };

  static int64_t matrix_size(int64_t channels) { return padded<T>(channels) * padded<T>(channels); }

  /// `storage` holds one matrix more than the caller takes with matrix(), all zero.
  MatrixEngine(int64_t channels, T* storage) : channels_(channels), ld_(padded<T>(channels)), next_(storage) {
    spare_ = matrix();
  }

  Matrix matrix() {
    Matrix m{next_};
    next_ += ld_ * ld_;
    return m;
  }

  const T* row(const Matrix& A, int64_t i) const { return A.data + i * ld_; }

  template <class Source> void load(Matrix& A, const Source& source) const {
    for_upper_triangle(channels_, [&](int64_t i, int64_t j) {
      const T value = source.symmetric(i, j);
      A.data[i * ld_ + j] = value;
      A.data[j * ld_ + i] = value;
    });
  }

  T trace(const Matrix& A) const {
    T sum = 0;
    for (int64_t i = 0; i < channels_; ++i) sum += A.data[i * ld_ + i];
    return sum;
  }

  /// <sym(source), A>
  template <class Source> T inner(const Source& source, const Matrix& A) const {
    T diagonal = 0, upper = 0;
    for (int64_t i = 0; i < channels_; ++i) {
      diagonal += source.symmetric(i, i) * A.data[i * ld_ + i];
      T sum = 0;
      for (int64_t j = i + 1; j < channels_; ++j) sum += source.symmetric(i, j) * A.data[i * ld_ + j];
      upper += sum;
    }
    return diagonal + 2 * upper;
  }

  void divide(Matrix& A, T s) const {
    for (int64_t i = 0; i < channels_; ++i)
      for (int64_t j = 0; j < channels_; ++j) A.data[i * ld_ + j] /= s;
  }

  void scale(Matrix& D, T alpha, const Matrix& A) const {
    for (int64_t i = 0; i < channels_; ++i)
      for (int64_t j = 0; j < ld_; ++j) D.data[i * ld_ + j] = alpha * A.data[i * ld_ + j];
  }

  void identity_plus(Matrix& D, T alpha, T beta, const Matrix& A) const {
    scale(D, beta, A);
    for (int64_t i = 0; i < channels_; ++i) D.data[i * ld_ + i] += alpha;
  }

  void product(Matrix& D, const Matrix& A, const Matrix& B) {
    combine<false>(D, T(0), T(1), [&](Tile<T>& t, int64_t i, int64_t j) { add(t, A, B, i, j); });
  }
  void product(Matrix& D, T alpha, T beta, const Matrix& A, const Matrix& B) {
    combine<true>(D, alpha, beta, [&](Tile<T>& t, int64_t i, int64_t j) { add(t, A, B, i, j); });
  }
  void products(Matrix& D, const Matrix& A1, const Matrix& B1, const Matrix& A2, const Matrix& B2) {
    combine<false>(D, T(0), T(1),
                   [&](Tile<T>& t, int64_t i, int64_t j) { add(t, A1, B1, i, j), add(t, A2, B2, i, j); });
  }
  void products(Matrix& D, T alpha, T beta, const Matrix& A1, const Matrix& B1, const Matrix& A2, const Matrix& B2) {
    combine<true>(D, alpha, beta,
                  [&](Tile<T>& t, int64_t i, int64_t j) { add(t, A1, B1, i, j), add(t, A2, B2, i, j); });
  }

 private:
  inline __attribute__((always_inline)) void add(Tile<T>& tile, const Matrix& A, const Matrix& B, int64_t i,
                                                 int64_t j) const {
    multiply_add(tile, A.data + i, ld_, B.data + j, ld_, channels_);
  }

  /// D = alpha D + beta (sum of products), tile by tile over the upper triangle, into the spare matrix.
  template <bool kAddD, class Products>
  inline __attribute__((always_inline)) void combine(Matrix& D, T alpha, T beta, const Products& products) {
    for (int64_t j = 0; j < channels_; j += S::kColumns) {
      for (int64_t i = 0; i < minimum(channels_, j + S::kColumns); i += S::kRows) {
        Tile<T> tile;
        products(tile, i, j);
#pragma GCC unroll 16
        for (int r = 0; r < S::kRows; ++r)
#pragma GCC unroll 4
          for (int v = 0; v < S::kVectors; ++v) {
            const int64_t at = (i + r) * ld_ + j + v * S::kWidth;
            Vector<T> value = beta * tile.sum[r][v];
            if (kAddD) value += alpha * load_vector(D.data + at);
            store_vector(spare_.data + at, value);
          }
      }
    }
    mirror(spare_);
    const Matrix previous = D;
    D = spare_;
    spare_ = previous;
  }

  /// The lower triangle from the upper one.
  void mirror(Matrix& A) const {
    constexpr int W = S::kWidth;
    for (int64_t i = 0; i < channels_; i += W) {
      T* diagonal = A.data + i * ld_ + i;
      for (int r = 1; r < W; ++r)
        for (int c = 0; c < r; ++c) diagonal[r * ld_ + c] = diagonal[c * ld_ + r];
      for (int64_t j = i + W; j < channels_; j += W)
        transpose_block(A.data + j * ld_ + i, ld_, A.data + i * ld_ + j, ld_);
    }
  }

  int64_t channels_, ld_;
  T* next_;
  Matrix spare_;
};

}  // namespace isqrt::cpu::ISQRT_LEVEL
