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
    T* data = nullptr;
  };

  /// A vector of C elements, and zeros.
  struct Column {
    T* data;
  };

  /// Storage for that many matrices and vectors, and the one matrix more that the engine needs.
  static int64_t storage_size(int64_t channels, int matrices, int vectors) {
    return padded<T>(channels) * (padded<T>(channels) * (matrices + 1) + vectors);
  }

  /// `storage` is all zero.
  MatrixEngine(int64_t channels, T* storage) : channels_(channels), ld_(padded<T>(channels)), next_(storage) {
    spare_ = matrix();
  }

  Matrix matrix() {
    Matrix m{next_};
    next_ += ld_ * ld_;
    return m;
  }

  Column column() {
    Column v{next_};
    next_ += ld_;
    return v;
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

  /// <factor sym(source), A>
  template <class Source> T inner(const Source& source, const Matrix& A, T factor = 1) const {
    T diagonal = 0, upper = 0;
    for (int64_t i = 0; i < channels_; ++i) {
      diagonal += factor * source.symmetric(i, i) * A.data[i * ld_ + i];
      T sum = 0;
      for (int64_t j = i + 1; j < channels_; ++j) sum += factor * source.symmetric(i, j) * A.data[i * ld_ + j];
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

  template <class Source> void load(Column& u, const Source& source) const {
    for (int64_t i = 0; i < channels_; ++i) u.data[i] = source.data[i];
  }
  T dot(const Column& u, const Column& v) const {
    T sum = 0;
    for (int64_t i = 0; i < channels_; ++i) sum += u.data[i] * v.data[i];
    return sum;
  }
  void add(Column& u, T alpha, T beta, const Column& v) const {
    for (int64_t i = 0; i < ld_; ++i) u.data[i] = alpha * u.data[i] + beta * v.data[i];
  }
  void sums(Column& u, const Matrix& A) const {
    multiply_rows(u, A, [](int64_t) { return T(1); });
  }
  void multiply(Column& u, const Matrix& A, const Column& v) const {
    multiply_rows(u, A, [&](int64_t i) { return v.data[i]; });
  }
  void rank_two(Matrix& D, T alpha, T beta, const Column& u, const Column& v, const Column& w) const {
    const T *U = u.data, *V = v.data, *W = w.data;
    for_upper_triangle(channels_, [&](int64_t i, int64_t j) {
      const T value = alpha * D.data[i * ld_ + j] + beta * (U[i] * V[j] + V[i] * U[j] + W[i] + W[j]);
      D.data[i * ld_ + j] = value;
      D.data[j * ld_ + i] = value;
    });
  }

  void product(Matrix& D, T alpha, T beta, const Matrix& A, const Matrix& B) {
    combine<true>(D, alpha, beta, false,
                  [&](Tile<T>& t, int64_t i, int64_t j, bool half) { add(t, A, B, i, j, half); });
  }
  void products(Matrix& D, T alpha, T beta, const Matrix& A1, const Matrix& B1, const Matrix& A2, const Matrix& B2) {
    combine<true>(D, alpha, beta, false, [&](Tile<T>& t, int64_t i, int64_t j, bool half) {
      add(t, A1, B1, i, j, half), add(t, A2, B2, i, j, half);
    });
  }
  Matrix product(Matrix& D, Matrix& E, const Matrix& A, const Matrix& B, bool in_full) {
    combine<false>(D, T(0), T(1), in_full,
                   [&](Tile<T>& t, int64_t i, int64_t j, bool half) { add(t, A, B, i, j, half); });
    return in_full ? transpose(E, D) : D;
  }
  Matrix products(Matrix& D, Matrix& E, const Matrix& A1, const Matrix& B1, const Matrix& A2, const Matrix& B2,
                  bool in_full) {
    combine<false>(D, T(0), T(1), in_full, [&](Tile<T>& t, int64_t i, int64_t j, bool half) {
      add(t, A1, B1, i, j, half), add(t, A2, B2, i, j, half);
    });
    return in_full ? transpose(E, D) : D;
  }

 private:
  /// u = sum_i factor(i) A[i, :], A being symmetric.
  template <class Factor> void multiply_rows(Column& u, const Matrix& A, const Factor& factor) const {
    for (int64_t j = 0; j < ld_; ++j) u.data[j] = 0;
    for (int64_t i = 0; i < channels_; ++i) {
      const T f = factor(i);
      for (int64_t j = 0; j < ld_; ++j) u.data[j] += f * A.data[i * ld_ + j];
    }
  }

  /// A is symmetric: its rows stand for its columns. Half of a tile on the diagonal where the rest is not wanted.
  inline __attribute__((always_inline)) void add(Tile<T>& tile, const Matrix& A, const Matrix& B, int64_t i, int64_t j,
                                                 bool half) const {
    multiply_add(tile, A.data + i, ld_, B.data + j, ld_, channels_, half);
  }

  /// D = alpha D + beta (sum of products), tile by tile, into the spare matrix: all of it, or the upper triangle.
  template <bool kAddD, class Products>
  inline __attribute__((always_inline)) void combine(Matrix& D, T alpha, T beta, bool in_full,
                                                     const Products& products) {
    for (int64_t j = 0; j < channels_; j += S::kColumns) {
      const int64_t rows = in_full ? channels_ : minimum(channels_, j + S::kColumns);
      for (int64_t i = 0; i < rows; i += S::kRows) {
        Tile<T> tile;
        products(tile, i, j, i == j && !in_full);
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
    if (!in_full) mirror(spare_);
    const Matrix previous = D;
    D = spare_;
    spare_ = previous;
  }

  /// E = D'
  Matrix transpose(const Matrix& E, const Matrix& D) const {
    for (int64_t i = 0; i < channels_; i += S::kWidth)
      for (int64_t j = 0; j < channels_; j += S::kWidth)
        transpose_block(E.data + j * ld_ + i, ld_, D.data + i * ld_ + j, ld_);
    return E;
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
