// The Engines of gram.h on one CPU thread, for all positions of a sample.
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

/// to = alpha A^T B, known to be symmetric: one triangle is computed in `spare`, and mirrored.
template <class T>
void store_symmetric(T* to, int64_t n, T alpha, const Panels<T>& A, const Panels<T>& B, int64_t terms,
                     const Panels<T>& spare) {
  for_tiles<T>(n, true, [&](auto shape, int64_t i, int64_t j) {
    Tile<T, decltype(shape)> tile;
    multiply_add(tile, A.at(0, i), B.at(0, j), terms);
    tile.for_each(kPanel,
                  [&](const Vector<T>& sum, int64_t offset) { store_vector(spare.at(i, j) + offset, alpha * sum); });
  });
  mirror<T>(round_up<int64_t>(n, Simd<T>::kWidth), kPanel, [&](int64_t i, int64_t j) { return spare.at(i, j); });
  copy_panels(to, n, spare, n, n);
}

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

/// x -> K.
template <class X> class GramEngine : public SecondPass<X> {
  using T = Compute<X>;
  using Base = SecondPass<X>;
  using Base::x_, Base::sample_, Base::matrix_, Base::size_;

 public:
  static int64_t storage_size(int64_t channels, int64_t positions) {
    return Features<X>::storage_size(channels, positions) + Panels<T>::size(positions, positions);
  }

  GramEngine(const GramTask<X>& task, int64_t sample, T* storage)
      : Base(task.x, sample, task.gram, gram_side(task.x.positions()), task.scale),
        sample_number_(sample),
        features_(x_, storage),
        spare_{storage + Features<X>::storage_size(x_.channels, x_.positions()), Panels<T>::rows_for(size_)} {}

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
    store_symmetric(matrix_, size_, alpha, F.by_channel, F.by_channel, x_.channels, spare_);
  }

  int64_t sample_number_;
  Features<X> features_;
  Panels<T> spare_;
};

/// What the engines of one sample whose scale is known have in common.
template <class X> class SampleEngine {
 protected:
  using T = Compute<X>;

  /// The features come first in the storage.
  template <class Task>
  SampleEngine(const Task& task, int64_t sample, T* storage)
      : C_(task.x.channels),
        n_(gram_side(task.x.positions())),
        sample_(sample),
        scale_(task.scale[sample]),
        features_(task.x, storage),
        next_(storage + Features<X>::storage_size(C_, task.x.positions())) {}

 public:
  void load_features() const { features_.load(sample_, scale_); }

 protected:
  int64_t C_, n_, sample_;
  T scale_;
  Features<X> features_;
  T* next_;  // what follows them
};

/// R -> Yhat.
template <class X> class ExpandEngine : public SampleEngine<X> {
  using T = Compute<X>;
  using Base = SampleEngine<X>;
  using Base::C_, Base::n_, Base::scale_, Base::features_, Base::next_;

 public:
  static int64_t storage_size(int64_t channels, int64_t positions) {
    return Features<X>::storage_size(channels, positions) + Panels<T>::size(positions, positions) +
           Panels<T>::size(positions, channels) + Panels<T>::size(channels, kPanel) + 2 * round_up(positions, kPanel);
  }

  ExpandEngine(const ExpandTask<X>& task, int64_t sample, T* storage)
      : Base(task, sample, storage),
        result_(task.result.sample(sample)),
        root_{next_, Panels<T>::rows_for(n_)},
        product_{root_.data + Panels<T>::size(n_, n_), root_.rows},
        strip_{product_.data + Panels<T>::size(n_, C_), Panels<T>::rows_for(C_)},
        sums_(strip_.data + Panels<T>::size(C_, kPanel)),
        weights_(sums_ + round_up(n_, kPanel)) {
    read_panels(root_, task.root + sample * n_ * n_, n_, n_, n_);
  }

  void multiply_root() const {  // of the mean: P 1 = R (F^T 1)
    if (result_.output == Output::kMean) {
      multiply_rows(sums_, features_.by_channel, C_, n_, [](int64_t) { return T(1); });
      multiply_rows(weights_, root_, n_, n_, [&](int64_t m) { return sums_[m]; });
      return;
    }
    multiply_panels(n_, C_, root_, features_.by_column, n_, [&](auto& tile, int64_t i, int64_t j) {
      tile.for_each(kPanel,
                    [&](const Vector<T>& sum, int64_t offset) { store_vector(product_.at(i, j) + offset, sum); });
    });
  }

  void store_root(double alpha) const {
    const T share = T(alpha), inverse = 1 / scale_;  // their product may be a denormal number
    if (result_.output == Output::kMean) {
      multiply_rows(strip_.data, features_.by_column, n_, C_, [&](int64_t m) { return weights_[m]; });
      for (int64_t c = 0; c < C_; ++c) result_.data[c] = inverse * (share / T(C_) * strip_.data[c]);
      return;
    }
    for (int64_t j = 0; j < C_; j += kPanel) {
      const Panels<T> right{product_.at(0, j), product_.rows};
      const int64_t columns = minimum(kPanel, C_ - j);
      multiply_panels(j + columns, columns, features_.by_column, right, n_, [&](auto& tile, int64_t i, int64_t k) {
        tile.for_each(kPanel, [&](const Vector<T>& sum, int64_t offset) {
          store_vector(strip_.at(i, k) + offset, inverse * (share * sum));
        });
      });
      for (int64_t r = 0; r < columns; ++r)  // on the diagonal the upper triangle counts
        for (int64_t c = 0; c < r; ++c) *strip_.at(j + r, c) = *strip_.at(j + c, r);
      write_columns(j, columns);
    }
  }

 private:
  /// Columns of Yhat as far as the diagonal, from strip_, and their mirror image.
  void write_columns(int64_t j, int64_t columns) const {
    if (result_.output == Output::kTriu)
      return copy_triangle(result_.data, C_, j, columns, static_cast<const T*>(strip_.data));
    copy_strided(result_.data + j, C_, int64_t(1), strip_.data, kPanel, int64_t(1), j + columns, columns);
    copy_strided(result_.data + j * C_, C_, int64_t(1), strip_.data, int64_t(1), kPanel, columns, j);
  }

  RootView<T> result_;
  Panels<T> root_, product_, strip_;
  T *sums_, *weights_;
};

/// G -> V and H.
template <class X> class ContractEngine : public SampleEngine<X> {
  using T = Compute<X>;
  using S = Simd<T>;
  using Base = SampleEngine<X>;
  using Base::C_, Base::n_, Base::features_, Base::next_;

 public:
  static int64_t storage_size(int64_t channels, int64_t positions) {
    return Features<X>::storage_size(channels, positions) + Panels<T>::size(channels, positions) +
           Panels<T>::size(channels, kPanel) + Panels<T>::size(positions, positions);
  }

  ContractEngine(const ContractTask<X>& task, int64_t sample, T* storage)
      : Base(task, sample, storage),
        grad_(task.grad.sample(sample)),
        product_to_(task.product + sample * C_ * n_),
        grad_root_(task.grad_root + sample * n_ * n_),
        product_{next_, Panels<T>::rows_for(C_)},
        strip_{product_.data + Panels<T>::size(C_, n_), product_.rows},
        spare_{strip_.data + Panels<T>::size(C_, kPanel), Panels<T>::rows_for(n_)} {}

  void multiply_gradient() const {
    if (grad_.output == Output::kMean) return multiply_mean_gradient();
    for (int64_t i = 0; i < C_; i += kPanel) {
      load_columns(i);
      multiply_panels(kPanel, n_, strip_, features_.by_channel, C_, [&](auto& tile, int64_t r, int64_t m) {
        tile.for_each(kPanel,
                      [&](const Vector<T>& sum, int64_t offset) { store_vector(product_.at(i + r, m) + offset, sum); });
      });
    }
  }

  void store_gradient(double alpha) const {
    copy_panels(product_to_, n_, product_, C_, n_);
    store_symmetric(grad_root_, n_, T(alpha), features_.by_channel, product_, C_, spare_);
  }

 private:
  /// Columns [j, j + kPanel) of sym(G).
  void load_columns(int64_t j) const {
    constexpr int W = S::kWidth;
    const int64_t columns = minimum(kPanel, C_ - j);
    const int64_t whole = grad_.output == Output::kMatrix && columns == kPanel ? C_ / W * W : 0;
    for (int64_t k = 0; k < whole; k += W)
      for (int64_t v = 0; v < kPanel; v += W) {
        Vector<T> below[W];
        load_transposed(below, grad_.data + (j + v) * C_ + k, C_);
#pragma GCC unroll 16
        for (int r = 0; r < W; ++r)
          store_vector(strip_.at(k + r, v),
                       symmetric_vector<T>(load_vector(grad_.data + (k + r) * C_ + j + v), below[r]));
      }
    for (int64_t k = whole; k < C_; ++k)
      for (int64_t v = 0; v < columns; ++v)
        *strip_.at(k, v) = k < j + v ? grad_.symmetric(k, j + v) : grad_.symmetric(j + v, k);
  }

  /// V for G = (g 1^T + 1 g^T) / (2 C): (g (1^T F) + 1 (g^T F)) / (2 C).
  void multiply_mean_gradient() const {
    T *const sums = strip_.data, *const weighted = spare_.data;
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
  Panels<T> product_, strip_, spare_;
};

/// V, R and dK -> dX.
template <class X> class GramBackwardEngine : public SampleEngine<X> {
  using T = Compute<X>;
  using Base = SampleEngine<X>;
  using Base::C_, Base::n_, Base::sample_, Base::features_, Base::next_;

 public:
  static int64_t storage_size(int64_t channels, int64_t positions) {
    return Features<X>::storage_size(channels, positions) + Panels<T>::size(positions, channels) +
           2 * Panels<T>::size(positions, positions) + round_up(channels, kPanel) * round_up(positions, kPanel) +
           kPanel;
  }

  GramBackwardEngine(const GramBackwardTask<X>& task, int64_t sample, T* storage)
      : Base(task, sample, storage),
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

  void store_features(double alpha) const {
    const int64_t ld = round_up(n_ + 1, kPanel);
    multiply_panels(C_, n_, product_, root_, n_, [&](auto& tile, int64_t c, int64_t m) {
      multiply_add(tile, features_.by_column.at(0, c), grad_gram_.at(0, m), n_);
      tile.for_each(ld, [&](const Vector<T>& sum, int64_t offset) {
        store_vector(result_ + 1 + c * ld + m + offset, T(alpha) * sum);  // after that of the first position
      });
    });
    for (int64_t c = 0; c < C_; ++c) reflect(result_ + c * ld);
    X* const to = grad_x_.sample(sample_);
    for_each_run(grad_x_, 0, n_ + 1, [&](int64_t offset, int64_t m, int64_t run) {
      copy_strided(to + offset, grad_x_.stride_c, grad_x_.stride_w, static_cast<const T*>(result_ + m), ld, int64_t(1),
                   C_, run);
    });
  }

 private:
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
