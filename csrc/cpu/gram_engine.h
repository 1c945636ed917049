// The Engines of gram.h on one CPU thread, and those that help it, for all positions of a sample.
#pragma once
#include "positions.h"

namespace isqrt::cpu::ISQRT_LEVEL {

/// F of one sample, by its columns and by channels: products read the rows of both factors.
template <class X> class Features {
  using T = Compute<X>;
  using S = Simd<T>;

 public:
  static int64_t storage_size(int64_t channels, int64_t positions) {
    return PositionTile<T>::storage_size(channels, positions) + Panels<T>::size(channels, positions);
  }

  Features(const FeatureMaps<const X>& x, T* storage)
      : side(gram_side(x.positions())),
        by_column{storage + kPanel, Panels<T>::rows_for(x.positions())},  // after the row of the first position
        by_channel{storage + PositionTile<T>::storage_size(x.channels, x.positions()), Panels<T>::rows_for(x.channels)},
        x_(x) {}

  void load(int64_t sample, T s) const {
    const Panels<T> positions{by_column.data - kPanel, by_column.rows};
    T factor = s;
    if (is_in_range(s * s)) {
      load_tile(PositionTile<X>(x_, sample, x_.positions(), positions.data, by_channel.data));
    } else {
      const Distances<X> distances(x_, x_.sample(sample), s);  // halves of them
      load_tile(PositionTile<T>(distances.maps(), 0, x_.positions(), positions.data, by_channel.data));
      factor = 2;
    }
    const T of_first = factor * T(Reflection(x_.positions()).of_first);
    for (int64_t c = 0; c < x_.channels; c += S::kWidth) {
      const Vector<T> first = of_first * load_vector(positions.at(0, c));
      T* row = by_column.at(0, c);
      for (int64_t j = 0; j < side; ++j, row += kPanel) store_vector(row, factor * load_vector(row) + first);
      for (int64_t j = 0; j < side; j += S::kWidth)
        transpose_block(by_channel.at(c, j), kPanel, by_column.at(j, c), kPanel);
    }
  }

  const int64_t side;
  const Panels<T> by_column, by_channel;

 private:
  template <class PositionTile> void load_tile(PositionTile tile) const {
    tile.load_tile(0, x_.positions());
    tile.center_tile(x_.positions());
  }

  FeatureMaps<const X> x_;
};

/// f(tile, i, j) for the register tiles of A^T B, rows x columns.
template <class T, class F>
inline __attribute__((always_inline)) void multiply_panels(int64_t rows, int64_t columns, const Panels<T>& A,
                                                           const Panels<T>& B, int64_t terms, const F& f) {
  using S = Simd<T>;
  for (int64_t j = 0; j < columns; j += S::kColumns)
    for (int64_t i = 0; i < rows; i += S::kRows) {
      Tile<T, Shape<S::kRows, S::kVectors>> tile;
      multiply_add(tile, A.at(0, i), B.at(0, j), terms);
      f(tile, i, j);
    }
}

/// to = result(A^T B), element by element, where A^T B is known to be symmetric: the upper triangle is computed, and
/// written with its mirror image.
template <class T, class Result>
void store_symmetric(SharedLoop& loop, const RootView<T>& to, const Panels<T>& A, const Panels<T>& B, int64_t terms,
                     const Result& result) {
  constexpr int64_t kRows = 16 * kPanel;  // at a time, for writing takes turns with computing
  const int64_t n = to.channels, panels = divide_up(n, kPanel);
  in_rounds(loop, panels, [&](int64_t round) {
    const int64_t j = (panels - 1 - round) * kPanel, columns = minimum(kPanel, n - j);  // the longest first
    for (int64_t i = 0; i < j + columns; i += kRows) {
      const int64_t rows = minimum(kRows, j + columns - i), above = minimum(rows, j - i);  // above the diagonal's block
      alignas(kLineBytes) T strip[kRows * kPanel];
      multiply_panels(rows, columns, A.from(i), B.from(j), terms, [&](auto& tile, int64_t r, int64_t c) {
        tile.for_each(kPanel, [&](const Vector<T>& sum, int64_t offset) {
          store_vector(strip + r * kPanel + c + offset, result(sum));
        });
      });
      const T* const from = strip;
      if (to.output == Output::kTriu) {
        copy_triangle(to.data, n, i, rows, j, columns, from);
        continue;
      }
      for (int64_t r = 0; r < rows - above; ++r)  // of that block the upper triangle counts
        for (int64_t c = 0; c < r; ++c) strip[(above + r) * kPanel + c] = strip[(above + c) * kPanel + r];
      copy_strided(to.data + i * n + j, n, int64_t(1), from, kPanel, int64_t(1), rows, columns);
      copy_strided(to.data + j * n + i, n, int64_t(1), from, int64_t(1), kPanel, columns, above);
    }
  });
}

/// x -> K.
template <class X> class GramEngine : public SecondPass<X> {
  using T = Compute<X>;
  using Base = SecondPass<X>;
  using Base::x_, Base::sample_, Base::matrix_, Base::size_;

 public:
  static int64_t storage_size(int64_t channels, int64_t positions) {
    return Features<X>::storage_size(channels, positions);
  }

  GramEngine(const GramTask<X>& task, int64_t sample, T* storage, SharedLoop& loop)
      : Base(task.x, sample, task.gram, gram_side(task.x.positions()), task.scale),
        sample_number_(sample),
        features_(x_, storage),
        loop_(loop) {}

  void load_features() const { features_.load(sample_number_, 1); }
  void store_gram(double alpha) const { store_gram(features_, T(alpha)); }

  /// Of what is in range, the trace is brought near 1, to the bit: an upstream gradient meets F twice, and their
  /// product shall stay in range as long as the gradient itself does.
  void keep(T s) const {
    const T t = s == 1 ? Base::trace() : T(1);
    if (is_in_range(t)) {
      const T by = std::ldexp(T(1), -std::ilogb(t) / 2);
      for (int64_t i = 0; i < size_ * size_; ++i) matrix_[i] *= by * by;
      s *= by;
    }
    Base::keep(s);
  }

  void rescale(T s) const {
    const Distances<X> halves(x_, sample_, s);
    const Features<T> features(halves.maps(), features_.by_column.data - kPanel);
    features.load(0, 1);
    store_gram(features, 4 / T(x_.positions()));
  }

 private:
  template <class Y> void store_gram(const Features<Y>& F, T alpha) const {
    store_symmetric(loop_, RootView<T>{matrix_, Output::kMatrix, size_}, F.by_channel, F.by_channel, x_.channels,
                    [&](const Vector<T>& sum) { return alpha * sum; });
  }

  int64_t sample_number_;
  Features<X> features_;
  SharedLoop& loop_;
};

/// What the engines of one sample whose scale is known have in common.
template <class X> class SampleEngine {
 protected:
  using T = Compute<X>;

  /// The features come first in the storage.
  template <class Task>
  SampleEngine(const Task& task, int64_t sample, T* storage, SharedLoop& loop)
      : C_(task.x.channels),
        n_(gram_side(task.x.positions())),
        sample_(sample),
        scale_(task.scale[sample]),
        features_(task.x, storage),
        loop_(loop),
        next_(storage + Features<X>::storage_size(C_, task.x.positions())) {}

 public:
  void load_features() const { features_.load(sample_, scale_); }

 protected:
  int64_t C_, n_, sample_;
  T scale_;
  Features<X> features_;
  SharedLoop& loop_;
  T* next_;  // what follows the features
};

/// R -> Yhat.
template <class X> class ExpandEngine : public SampleEngine<X> {
  using T = Compute<X>;
  using Base = SampleEngine<X>;
  using Base::C_, Base::n_, Base::scale_, Base::features_, Base::loop_, Base::next_;

 public:
  static int64_t storage_size(int64_t channels, int64_t positions) {
    return Features<X>::storage_size(channels, positions) + Panels<T>::size(positions, positions) +
           Panels<T>::size(positions, channels) + round_up(channels, kPanel) + 2 * round_up(positions, kPanel);
  }

  ExpandEngine(const ExpandTask<X>& task, int64_t sample, T* storage, SharedLoop& loop)
      : Base(task, sample, storage, loop),
        result_(task.result.sample(sample)),
        root_{next_, Panels<T>::rows_for(n_)},
        product_{root_.data + Panels<T>::size(n_, n_), root_.rows},
        mean_(product_.data + Panels<T>::size(n_, C_)),
        sums_(mean_ + round_up(C_, kPanel)),
        weights_(sums_ + round_up(n_, kPanel)) {
    read_panels(root_, task.root + sample * n_ * n_, n_, n_, n_);
  }

  void multiply_root() const {  // of the mean: P 1 = R (F^T 1)
    if (result_.output == Output::kMean) {
      multiply_rows(sums_, features_.by_channel, C_, n_, [](int64_t) { return T(1); });
      multiply_rows(weights_, root_, n_, n_, [&](int64_t m) { return sums_[m]; });
      return;
    }
    in_rounds(loop_, divide_up(C_, kPanel), [&](int64_t strip) {
      const int64_t j = strip * kPanel;
      multiply_panels(n_, kPanel, root_, features_.by_column.from(j), n_, [&](auto& tile, int64_t m, int64_t c) {
        tile.for_each(kPanel,
                      [&](const Vector<T>& sum, int64_t offset) { store_vector(product_.at(m, j + c) + offset, sum); });
      });
    });
  }

  void store_root(double alpha) const {
    const T share = T(alpha), inverse = 1 / scale_;  // their product may be a denormal number
    if (result_.output == Output::kMean) {
      multiply_rows(mean_, features_.by_column, n_, C_, [&](int64_t m) { return weights_[m]; });
      for (int64_t c = 0; c < C_; ++c) result_.data[c] = inverse * (share / T(C_) * mean_[c]);
      return;
    }
    store_symmetric(loop_, result_, features_.by_column, product_, n_,
                    [&](const Vector<T>& sum) { return inverse * (share * sum); });
  }

 private:
  RootView<T> result_;
  Panels<T> root_, product_;
  T *mean_, *sums_, *weights_;
};

/// G -> V and H.
template <class X> class ContractEngine : public SampleEngine<X> {
  using T = Compute<X>;
  using S = Simd<T>;
  using Base = SampleEngine<X>;
  using Base::C_, Base::n_, Base::features_, Base::loop_, Base::next_;
  static constexpr int64_t kGroup = 4 * kPanel;  // columns of G at a time

 public:
  static int64_t storage_size(int64_t channels, int64_t positions) {
    return Features<X>::storage_size(channels, positions) + Panels<T>::size(channels, positions) +
           Panels<T>::size(channels, kGroup);
  }

  ContractEngine(const ContractTask<X>& task, int64_t sample, T* storage, SharedLoop& loop)
      : Base(task, sample, storage, loop),
        grad_(task.grad.sample(sample)),
        product_to_(task.product + sample * C_ * n_),
        grad_root_(task.grad_root + sample * n_ * n_),
        product_{next_, Panels<T>::rows_for(C_)},
        columns_{product_.data + Panels<T>::size(C_, n_), product_.rows} {}

  void multiply_gradient() const {
    if (grad_.output == Output::kMean) return multiply_mean_gradient();
    for (int64_t i = 0; i < C_; i += kGroup) {
      const int64_t rows = minimum(kGroup, C_ - i);
      for (int64_t r = 0; r < rows; r += kPanel) load_columns(i + r, columns_.from(r));
      in_rounds(loop_, divide_up(n_, kPanel), [&](int64_t strip) {
        const int64_t m = strip * kPanel;
        multiply_panels(rows, kPanel, columns_, features_.by_channel.from(m), C_,
                        [&](auto& tile, int64_t r, int64_t k) {
                          tile.for_each(kPanel, [&](const Vector<T>& sum, int64_t offset) {
                            store_vector(product_.at(i + r, m + k) + offset, sum);
                          });
                        });
      });
    }
  }

  void store_contracted(double alpha) const {
    copy_panels(product_to_, n_, product_, C_, n_);
    store_symmetric(loop_, RootView<T>{grad_root_, Output::kMatrix, n_}, features_.by_channel, product_, C_,
                    [a = T(alpha)](const Vector<T>& sum) { return a * sum; });
  }

 private:
  /// Columns [j, j + kPanel) of sym(G).
  void load_columns(int64_t j, const Panels<T>& to) const {
    constexpr int W = S::kWidth;
    const int64_t columns = minimum(kPanel, C_ - j);
    const int64_t whole = grad_.output == Output::kMatrix && columns == kPanel ? C_ / W * W : 0;
    for (int64_t k = 0; k < whole; k += W)
      for (int64_t v = 0; v < kPanel; v += W) {
        Vector<T> below[W];
        load_transposed(below, grad_.data + (j + v) * C_ + k, C_);
#pragma GCC unroll 16
        for (int r = 0; r < W; ++r)
          store_vector(to.at(k + r, v), symmetric_vector<T>(load_vector(grad_.data + (k + r) * C_ + j + v), below[r]));
      }
    for (int64_t k = whole; k < C_; ++k)
      for (int64_t v = 0; v < columns; ++v)
        *to.at(k, v) = k < j + v ? grad_.symmetric(k, j + v) : grad_.symmetric(j + v, k);
  }

  /// V for G = (g 1^T + 1 g^T) / (2 C): (g (1^T F) + 1 (g^T F)) / (2 C).
  void multiply_mean_gradient() const {
    T *const sums = columns_.data, *const weighted = sums + round_up(n_, kPanel);
    const T share = T(0.5) / T(C_);
    multiply_rows(sums, features_.by_channel, C_, n_, [&](int64_t) { return share; });
    multiply_rows(weighted, features_.by_channel, C_, n_, [&](int64_t c) { return share * grad_.data[c]; });
    for (int64_t m = 0; m < n_; m += S::kWidth) {
      const Vector<T> sum = load_vector(sums + m), weight = load_vector(weighted + m);
      for (int64_t c = 0; c < C_; ++c) store_vector(product_.at(c, m), grad_.data[c] * sum + weight);
    }
  }

  RootView<const T> grad_;
  T *product_to_, *grad_root_;
  Panels<T> product_, columns_;
};

/// V, R and dK -> dX.
template <class X> class GramBackwardEngine : public SampleEngine<X> {
  using T = Compute<X>;
  using Base = SampleEngine<X>;
  using Base::C_, Base::n_, Base::sample_, Base::features_, Base::loop_, Base::next_;

 public:
  static int64_t storage_size(int64_t channels, int64_t positions) {
    return Features<X>::storage_size(channels, positions) + Panels<T>::size(positions, channels) +
           2 * Panels<T>::size(positions, positions) + round_up(channels, kPanel) * row_for(positions);
  }

  GramBackwardEngine(const GramBackwardTask<X>& task, int64_t sample, T* storage, SharedLoop& loop)
      : Base(task, sample, storage, loop),
        grad_x_(task.grad_x),
        product_{next_, Panels<T>::rows_for(n_)},
        root_{product_.data + Panels<T>::size(n_, C_), product_.rows},
        grad_gram_{root_.data + Panels<T>::size(n_, n_), product_.rows},
        result_(grad_gram_.data + Panels<T>::size(n_, n_)) {
    read_panels(root_, task.root + sample * n_ * n_, n_, n_, n_);
    read_panels(grad_gram_, task.grad_gram + sample * n_ * n_, n_, n_, n_);
    const T* product = task.product + sample * C_ * n_;
    for (int64_t c = 0; c < C_; c += kPanel)  // transposed
      copy_strided(product_.at(0, c), kPanel, int64_t(1), product + c * n_, int64_t(1), n_, n_,
                   minimum(kPanel, C_ - c));
  }

  void store_gradient(double alpha) const {
    const int64_t ld = row_for(n_);
    in_rounds(loop_, divide_up(C_, kPanel), [&](int64_t strip) {
      const int64_t first = strip * kPanel;
      multiply_panels(kPanel, n_, product_.from(first), root_, n_, [&](auto& tile, int64_t r, int64_t m) {
        const int64_t c = first + r;
        multiply_add(tile, features_.by_column.at(0, c), grad_gram_.at(0, m), n_);
        tile.for_each(ld, [&](const Vector<T>& sum, int64_t offset) {
          store_vector(result_ + 1 + c * ld + m + offset, T(alpha) * sum);  // after that of the first position
        });
      });
      for (int64_t c = first; c < first + kPanel; ++c) reflect(result_ + c * ld);
    });
    X* const to = grad_x_.sample(sample_);
    for_each_run(grad_x_, 0, n_ + 1, [&](int64_t offset, int64_t m, int64_t run) {
      copy_strided(to + offset, grad_x_.stride_c, grad_x_.stride_w, static_cast<const T*>(result_ + m), ld, int64_t(1),
                   C_, run);
    });
  }

 private:
  /// Numbers from row to row of what is computed: the first position's, and the others' in whole tiles.
  static int64_t row_for(int64_t positions) { return kPanel + round_up(positions, kPanel); }

  /// A row of D, from its second number on, becomes one of D Q^T.
  void reflect(T* row) const {
    constexpr int W = Simd<T>::kWidth;
    const Reflection reflection(n_ + 1);
    Vector<T> sums = {};
    T sum = 0;
    int64_t m = 1;
    for (; m + W <= n_ + 1; m += W) sums += load_vector(row + m);
    for (; m <= n_; ++m) sum += row[m];
    for (int lane = 0; lane < W; ++lane) sum += sums[lane];
    const T of_others = T(reflection.to_others) * sum;
    for (m = 1; m + W <= n_ + 1; m += W) store_vector(row + m, load_vector(row + m) + of_others);
    for (; m <= n_; ++m) row[m] += of_others;
    row[0] = T(reflection.to_first) * sum;
  }

  FeatureMaps<X> grad_x_;
  Panels<T> product_, root_, grad_gram_;
  T* result_;
};

}  // namespace isqrt::cpu::ISQRT_LEVEL
