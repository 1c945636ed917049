// The Engine of newton_schulz.h and normalization.h on one CPU thread, and those that help it: C x C matrices in its
// cache, products in register tiles over one triangle, which is then mirrored.
#pragma once
#include "simd.h"

namespace isqrt::cpu::ISQRT_LEVEL {

template <class T> class MatrixEngine {
  using S = Simd<T>;

 public:
  static constexpr bool kTakesTwoSteps = true;  // see newton_schulz.h

  /// As many rows as columns, both padded to whole panels. What lies outside C x C does not matter.
  using Matrix = Panels<T>;

  /// A vector of C elements, padded.
  struct Column {
    T* data;
  };

  /// Storage for that many matrices and vectors, and the one matrix more that the engine needs.
  static int64_t storage_size(int64_t channels, int matrices, int vectors) {
    return Matrix::size(channels, channels) * (matrices + 1) + round_up(channels, kPanel) * vectors;
  }

  MatrixEngine(int64_t channels, T* storage, SharedLoop& loop)
      : channels_(channels), size_(Matrix::size(channels, channels)), loop_(loop), next_(storage), spare_(matrix()) {}

  Matrix matrix() {
    const Matrix m{next_, Matrix::rows_for(channels_)};
    next_ += size_;
    return m;
  }

  void release(const Matrix&) const {}

  Column column() {
    const Column u{next_};
    next_ += round_up(channels_, kPanel);
    return u;
  }

  /// A = sym(source) / divisor
  void load(Matrix& A, const RootView<const T>& source, T divisor) const {
    constexpr int W = S::kWidth;
    const int64_t C = channels_, in_blocks = source.output == Output::kMatrix ? C / W * W : 0;
    for (int64_t i = 0; i < in_blocks; i += W)
      for (int64_t j = i; j < in_blocks; j += W) {
        Vector<T> block[W], below[W];
        load_transposed(below, source.data + j * C + i, C);
#pragma GCC unroll 16
        for (int r = 0; r < W; ++r) {
          const Vector<T> above = load_vector(source.data + (i + r) * C + j);
          block[r] = symmetric_vector<T>(above, below[r]);
          store_vector(A.at(i + r, j), block[r]);
        }
        transpose<T>(block);
#pragma GCC unroll 16
        for (int r = 0; r < W; ++r) store_vector(A.at(j + r, i), block[r]);
      }
    for (int64_t i = 0; i < C; ++i)
      for (int64_t j = i < in_blocks ? in_blocks : i; j < C; ++j) *A.at(i, j) = *A.at(j, i) = source.symmetric(i, j);
    if (divisor == 1) return;
    for (int64_t i = 0; i < size_; ++i) A.data[i] /= divisor;
  }

  /// A = sym(source) / t, and t, the trace.
  T load_normalized(Matrix& A, const RootView<const T>& source) const {
    T t = 0;
    for (int64_t i = 0; i < channels_; ++i) t += source.symmetric(i, i);
    load(A, source, nonzero(t));
    return t;
  }

  /// <factor (factor sym(source)), A>
  T inner(const RootView<const T>& source, const Matrix& A, T factor = 1) const {
    constexpr int W = S::kWidth;
    const int64_t C = channels_;
    T total = 0;
    for (int64_t i = 0; i < C; ++i) {
      T sum = 0;
      if (source.output == Output::kMatrix) {  // <sym(G), A> = <G, A>
        const T* row = source.data + i * C;
        Vector<T> sums = {};
        int64_t j = 0;
        for (; j + W <= C; j += W) sums += factor * (factor * load_vector(row + j)) * load_vector(A.at(i, j));
        for (; j < C; ++j) sum += factor * (factor * row[j]) * *A.at(i, j);
        for (int lane = 0; lane < W; ++lane) sum += sums[lane];
      } else {
        for (int64_t j = i + 1; j < C; ++j) sum += factor * (factor * source.symmetric(i, j)) * *A.at(i, j);
        sum = 2 * sum + factor * (factor * source.symmetric(i, i)) * *A.at(i, i);
      }
      total += sum;
    }
    return total;
  }

  void scale(Matrix& D, T alpha, const Matrix& A) const {
    for (int64_t i = 0; i < size_; ++i) D.data[i] = alpha * A.data[i];
  }

  void identity_plus(Matrix& D, T alpha, T beta, const Matrix& A) const {
    scale(D, beta, A);
    for (int64_t i = 0; i < channels_; ++i) *D.at(i, i) += alpha;
  }

  Matrix result(T beta, Matrix A) const {
    scale(A, beta, A);
    return A;
  }
  Matrix result(T alpha, T beta, Matrix A) const {
    identity_plus(A, alpha, beta, A);
    return A;
  }

  void load(Column& u, const RootView<const T>& source) const {
    for (int64_t i = 0; i < channels_; ++i) u.data[i] = source.data[i];
  }
  T dot(const Column& u, const Column& v) const {
    T sum = 0;
    for (int64_t i = 0; i < channels_; ++i) sum += u.data[i] * v.data[i];
    return sum;
  }
  void add(Column& u, T alpha, T beta, const Column& v) const {
    for (int64_t i = 0; i < channels_; ++i) u.data[i] = alpha * u.data[i] + beta * v.data[i];
  }
  /// A is symmetric: its rows stand for its columns.
  void sums(Column& u, const Matrix& A) const {
    multiply_rows(u.data, A, channels_, channels_, [](int64_t) { return T(1); });
  }
  void multiply(Column& u, const Matrix& A, const Column& v) const {
    multiply_rows(u.data, A, channels_, channels_, [&](int64_t i) { return v.data[i]; });
  }
  void rank_two(Matrix& D, T alpha, T beta, const Column& u, const Column& v, const Column& w) const {
    const T *U = u.data, *V = v.data, *W = w.data;
    for (int64_t i = 0; i < channels_; ++i)
      for (int64_t j = i / S::kWidth * S::kWidth; j < channels_; j += S::kWidth) {
        const Vector<T> u_j = load_vector(U + j), v_j = load_vector(V + j), w_j = load_vector(W + j);
        T* at = D.at(i, j);
        store_vector(at, alpha * load_vector(at) + beta * (U[i] * v_j + V[i] * u_j + W[i] + w_j));
      }
    mirror(D);
  }

  /// Copies A out, the whole of it or its upper triangle.
  template <class X> void write(const Matrix& A, const RootView<X>& result) const {
    const int64_t C = channels_;
    if (result.output != Output::kTriu) return copy_panels(result.data, C, A, C, C);
    for (int64_t j = 0; j < C; j += kPanel)
      copy_triangle(result.data, C, 0, C, j, minimum(kPanel, C - j), static_cast<const T*>(A.at(0, j)));
  }

  void product(Matrix& D, T alpha, T beta, const Matrix& A, const Matrix& B) {
    combine(D, false, sum_of(A, B), plus(alpha, D, beta));
  }
  void products(Matrix& D, T alpha, T beta, const Matrix& A1, const Matrix& B1, const Matrix& A2, const Matrix& B2) {
    combine(D, false, sum_of(A1, B1, A2, B2), plus(alpha, D, beta));
  }
  void product(Matrix& D, T alpha, const Matrix& F, T beta, const Matrix& G, T gamma, const Matrix& A,
               const Matrix& B) {
    combine(D, false, sum_of(A, B), plus(alpha, F, beta, G, gamma));
  }
  void products(Matrix& D, T alpha, const Matrix& F, T beta, const Matrix& G, T gamma, const Matrix& A1,
                const Matrix& B1, const Matrix& A2, const Matrix& B2) {
    combine(D, false, sum_of(A1, B1, A2, B2), plus(alpha, F, beta, G, gamma));
  }
  Matrix product(Matrix& D, Matrix& E, const Matrix& A, const Matrix& B, bool in_full) {
    combine(D, in_full, sum_of(A, B), Itself());
    return in_full ? transposed(E, D) : D;
  }
  Matrix products(Matrix& D, Matrix& E, const Matrix& A1, const Matrix& B1, const Matrix& A2, const Matrix& B2,
                  bool in_full) {
    combine(D, in_full, sum_of(A1, B1, A2, B2), Itself());
    return in_full ? transposed(E, D) : D;
  }

 private:
  /// For combine(): a tile of A B or A1 B1 + A2 B2. The left factors are symmetric: their rows stand for their columns.
  auto sum_of(const Matrix& A, const Matrix& B) const {
    return [&A, &B, n = channels_](auto& tile, int64_t i, int64_t j)
               __attribute__((always_inline)) { multiply_add(tile, A.at(0, i), B.at(0, j), n); };
  }
  auto sum_of(const Matrix& A1, const Matrix& B1, const Matrix& A2, const Matrix& B2) const {
    return [first = sum_of(A1, B1), second = sum_of(A2, B2)](auto& tile, int64_t i, int64_t j)
               __attribute__((always_inline)) { first(tile, i, j), second(tile, i, j); };
  }

  /// For combine(): what becomes of a vector of such a tile.
  static auto plus(T alpha, const Matrix& F, T beta) {
    return [alpha, beta, F = F.data](const Vector<T>& sum, int64_t at) {
      return beta * sum + alpha * load_vector(F + at);
    };
  }
  static auto plus(T alpha, const Matrix& F, T beta, const Matrix& G, T gamma) {
    return [alpha, beta, gamma, F = F.data, G = G.data](const Vector<T>& sum, int64_t at) {
      return gamma * sum + alpha * load_vector(F + at) + beta * load_vector(G + at);
    };
  }
  struct Itself {
    Vector<T> operator()(const Vector<T>& sum, int64_t) const { return sum; }
  };

  /// D = result(sum of products), tile by tile, into the spare matrix: all of it, or the upper triangle and its mirror
  /// image. Panels, the longest columns first, are what threads share.
  template <class Products, class Result>
  inline __attribute__((always_inline)) void combine(Matrix& D, bool in_full, const Products& products,
                                                     const Result& result) {
    const int64_t panels = divide_up(channels_, kPanel), size = round_up<int64_t>(channels_, S::kWidth);
    in_rounds(loop_, panels, [&](int64_t round) {
      const int64_t first = (panels - 1 - round) * kPanel;
      for_tiles_of_panel<T>(channels_, first, !in_full, [&](auto shape, int64_t i, int64_t j) {
        Tile<T, decltype(shape)> tile;
        products(tile, i, j);
        const int64_t at = D.index(i, j);
        tile.for_each(kPanel, [&](const Vector<T>& sum, int64_t offset) {
          store_vector(spare_.data + at + offset, result(sum, at + offset));
        });
      });
      if (!in_full)
        mirror_columns<T>(first, minimum(size, first + kPanel), kPanel,
                          [&](int64_t i, int64_t j) { return spare_.at(i, j); });
    });
    const Matrix previous = D;
    D = spare_;
    spare_ = previous;
  }

  /// E = D'
  Matrix transposed(const Matrix& E, const Matrix& D) const {
    for (int64_t i = 0; i < channels_; i += S::kWidth)
      for (int64_t j = 0; j < channels_; j += S::kWidth) transpose_block(E.at(j, i), kPanel, D.at(i, j), kPanel);
    return E;
  }

  void mirror(Matrix& A) const {
    cpu::ISQRT_LEVEL::mirror<T>(round_up<int64_t>(channels_, S::kWidth), kPanel,
                                [&](int64_t i, int64_t j) { return A.at(i, j); });
  }

  int64_t channels_, size_;
  SharedLoop& loop_;
  T* next_;
  Matrix spare_;
};

}  // namespace isqrt::cpu::ISQRT_LEVEL
