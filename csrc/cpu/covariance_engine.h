// The Engines of covariance.h on one CPU thread, and those that help it.
#pragma once
#include "positions.h"

namespace isqrt::cpu::ISQRT_LEVEL {

/// Pools one chunk: M2's upper triangle and the mean stay in cache until the chunk is done.
template <class X> class PoolEngine : public PositionTile<X> {
  using T = Compute<X>;
  using Base = PositionTile<X>;
  using Base::x_, Base::sample_, Base::padded_, Base::tile_, Base::mean_, Base::delta_;

 public:
  using Weight = double;

  static int64_t storage_size(int64_t channels) {
    const int64_t positions = tile_positions_for<T>(channels);
    return Base::storage_size(channels, positions) + Panels<T>::size(channels, channels) +
           round_up(channels, kPanel) * (1 + positions);
  }

  PoolEngine(const FeatureMaps<const X>& x, int64_t sample, T* storage, SharedLoop& loop)
      : Base(x, sample, tile_positions_for<T>(x.channels),
             storage + round_up(x.channels, kPanel) * tile_positions_for<T>(x.channels), storage),
        loop_(loop),
        moment_{delta_ + padded_, Panels<T>::rows_for(x.channels)},
        minus_delta_(moment_.data + moment_.rows * padded_) {
    for (T* moment = moment_.data; moment < minus_delta_; ++moment) *moment = 0;
  }

  int64_t tile_positions() const { return tile_positions_for<T>(x_.channels); }

  void load_tile(int64_t m, int64_t n) {
    ahead_ = Ahead<X>(x_, sample_, m + n, tile_positions());
    Base::load_tile(m, n);
  }

  void accumulate(int64_t n, double weight) {
    for (int64_t c = 0; c < padded_; ++c) minus_delta_[c] = -T(weight) * delta_[c];
    const int64_t panels = padded_ / kPanel;
    in_rounds(loop_, panels, [&](int64_t round) {
      const int64_t panel = panels - 1 - round;  // the longest columns first
      Ahead<X> ahead = ahead_.share(panel * panel, (panel + 1) * (panel + 1), panels * panels);
      for_tiles_of_panel<T>(x_.channels, panel * kPanel, true, [&](auto shape, int64_t i, int64_t j) {
        Tile<T, decltype(shape)> product;
        constexpr int64_t kPositions = 48;
        for (int64_t r = 0; r < n; r += kPositions) {
          ahead.ask_for_during(kPositions * product.kElements);
          multiply_add(product, tile_.at(r, i), tile_.at(r, j), minimum(kPositions, n - r));
        }
        multiply_add(product, minus_delta_ + i, delta_ + j, 1);
        T* moment = moment_.at(i, j);
        product.for_each(kPanel, [&](const Vector<T>& sum, int64_t offset) {
          store_vector(moment + offset, load_vector(moment + offset) + sum);
        });
      });
    });
  }

  void move_mean(double share) const {
    for (int64_t c = 0; c < x_.channels; ++c) mean_[c] += T(share) * delta_[c];
  }

  void write(T* mean, T* moment) const {
    const int64_t C = x_.channels;
    copy_strided(mean, C, int64_t(1), mean_, C, int64_t(1), int64_t(1), C);
    for (int64_t j = 0; j < C; j += kPanel) {
      const int64_t columns = minimum(kPanel, C - j);
      copy_strided(moment + j, C, int64_t(1), moment_.at(0, j), kPanel, int64_t(1), j + columns, columns);
    }
  }

 private:
  SharedLoop& loop_;
  Ahead<X> ahead_;
  Panels<T> moment_;
  T* minus_delta_;
};

/// Merges the chunks of one sample in place: chunk 0's moment is the running one. Then the second pass of a sample that
/// needs one.
template <class X> class MergeEngine : public SecondPass<X> {
  using T = Compute<X>;
  using Base = SecondPass<X>;
  using Base::x_, Base::sample_, Base::matrix_, Base::scale_;

 public:
  MergeEngine(const PoolTask<X>& task, int64_t sample, SharedLoop& loop)
      : Base(task.x, sample, task.sigma, task.x.channels, task.scale),
        C_(task.x.channels),
        loop_(loop),
        mean_(task.mean + sample * C_),
        chunks_(task.chunks),
        partial_mean_(task.partial_mean + sample * chunks_.count * C_),
        partial_moment_(task.partial_moment + sample * chunks_.count * C_ * C_) {}

  void average() const {
    const double positions = double(chunks_.positions);
    for (int64_t i = 0; i < C_; ++i) {
      const T first = partial_mean_[i];
      T sum = 0;
      for (int64_t c = 1; c < chunks_.count; ++c)
        sum += T(double(chunks_.size(c)) / positions) * (partial_mean_[c * C_ + i] - first);
      mean_[i] = first + sum;
    }
  }

  void add_moments() const {
    for (int64_t c = 0; c < chunks_.count; ++c) {
      const T size = T(chunks_.size(c));
      const T *mean = partial_mean_ + c * C_, *moment = partial_moment_ + c * C_ * C_;
      for (int64_t i = 0; i < C_; ++i) {
        const T scaled = size * (mean[i] - mean_[i]);
        for (int64_t j = i; j < C_; ++j) {
          const T own = scaled * (mean[j] - mean_[j]);
          partial_moment_[i * C_ + j] += c == 0 ? own : own + moment[i * C_ + j];
        }
      }
    }
  }

  void finish(double alpha) const { write_sigma(T(alpha), partial_moment_); }

  void rescale(T s) const {
    const Scratch<T> storage(PoolEngine<T>::storage_size(C_));
    const Distances<X> halves(x_, sample_, s);
    PoolEngine<T> engine(halves.maps(), 0, storage.get(), loop_);
    accumulate_covariance(engine, 0, x_.positions());
    engine.write(mean_, matrix_);
    for (int64_t c = 0; c < C_; ++c) mean_[c] *= 2;
    write_sigma(4 / T(x_.positions()), matrix_);
  }

  void keep(T s) const {
    if (!scale_)
      for (int64_t c = 0; c < C_; ++c) mean_[c] /= s;
    Base::keep(s);
  }

 private:
  /// Sigma = alpha times a moment, of which the upper triangle is there.
  void write_sigma(T alpha, const T* moment) const {
    for (int64_t i = 0; i < C_; ++i)
      for (int64_t j = i; j < C_; ++j) matrix_[i * C_ + j] = alpha * moment[i * C_ + j];
    mirror<T>(C_, C_, [&](int64_t i, int64_t j) { return matrix_ + i * C_ + j; });
  }

  int64_t C_;
  SharedLoop& loop_;
  T* mean_;
  Chunks chunks_;
  T *partial_mean_, *partial_moment_;
};

/// dX = W (X - mu 1^T), W = 2 dSigma / M, for one chunk.
template <class X> class PoolBackwardEngine {
  using T = Compute<X>;
  using S = Simd<T>;

 public:
  static int64_t storage_size(int64_t channels) {
    const int64_t positions = tile_positions_for<T>(channels);
    return Panels<T>::size(channels, channels) + Panels<T>::size(channels, positions) +
           round_up(channels, kPanel) * (positions + 1);
  }

  PoolBackwardEngine(const PoolBackwardTask<X>& task, int64_t sample, T* storage)
      : x_(task.x),
        dx_(task.grad_x),
        sample_(x_.sample(sample)),
        gradient_(dx_.sample(sample)),
        mean_(task.mean + sample * x_.channels),
        scale_(task.scale ? task.scale[sample] : T(1)),
        tile_positions_(tile_positions_for<T>(x_.channels)),
        weight_{storage, Panels<T>::rows_for(x_.channels)},
        tile_{storage + Panels<T>::size(x_.channels, x_.channels), weight_.rows},
        result_(tile_.data + tile_.rows * tile_positions_),
        origin_(result_ + round_up(x_.channels, kPanel) * tile_positions_) {
    const int64_t C = x_.channels;
    for (int64_t c = 0; c < C; ++c) origin_[c] = scale_ * to_number(sample_[c * x_.stride_c]);
    const T* g = task.grad_sigma + sample * C * C;
    const T share = T(2) / T(x_.positions());
    for (int64_t j = 0; j < C; j += kPanel) {
      const int64_t columns = minimum(kPanel, C - j);
      T* row = weight_.at(0, j);
      for (int64_t i = 0; i < C; ++i, row += kPanel)
        for (int64_t k = 0; k < columns; ++k) row[k] = share * g[i * C + j + k];
    }
  }

  int64_t tile_positions() const { return tile_positions_; }

  void load_centered(int64_t m, int64_t n) {  // tile: [channel, position]
    ahead_ = Ahead<X>(x_, sample_, m + n, tile_positions_);
    X* const joined = reinterpret_cast<X*>(result_);  // which is not made yet
    for_each_run(x_, sample_, m, n, joined, [&](auto... run) { load_run(run...); });
  }

  void store_gradient(int64_t m, int64_t n) {
    const int64_t C = x_.channels;
    X* target = gradient_ + dx_.offset(m);
    // Whole tiles go straight to dX: to its rows of positions W tile, to those of channels tile' W, W being symmetric.
    // Others, and other layouts, go by way of a buffer.
    if (dx_.height == 1 && dx_.stride_w == 1 && C % S::kRows == 0 && n % S::kColumns == 0)
      return multiply_out(weight_, C, tile_, n, target, dx_.stride_c);
    if (dx_.height == 1 && dx_.stride_c == 1 && n % S::kRows == 0 && C % S::kColumns == 0)
      return multiply_out(tile_, n, weight_, C, target, dx_.stride_w);
    multiply<false>(weight_, C, tile_, n, result_, tile_positions_);
    for_each_run(dx_, m, n, [&](int64_t offset, int64_t r, int64_t run) {
      copy_strided(gradient_ + offset, dx_.stride_c, dx_.stride_w, static_cast<const T*>(result_ + r), tile_positions_,
                   int64_t(1), C, run);
    });
  }

 private:
  /// One run of positions, less the first one, times the scale, as one multiplication with addition; less the mean.
  void load_run(const X* x, int64_t stride_c, int64_t stride_w, int64_t first, int64_t run) const {
    constexpr int W = S::kWidth;
    const int64_t C = x_.channels;
    const int64_t vector_run = run / W * W, transposed = stride_c == 1 && stride_w != 1 ? C / W * W : 0;
    const auto store = [&](int64_t c, int64_t r, const Vector<T>& values) {
      if (first % W == 0) return store_vector(tile_.at(c, first + r), values);
      for (int i = 0; i < W; ++i) *tile_.at(c, first + r + i) = values[i];  // may lie in two panels
    };
    const int64_t whole_panels = stride_w == 1 && first % kPanel == 0 ? run / kPanel * kPanel : 0;
    for (int64_t r = 0; transposed && r < vector_run; r += W)
      for (int64_t c = 0; c < transposed; c += W) {
        Vector<T> channels[W];
        load_transposed(channels, x + r * stride_w + c, stride_w);
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) store(c + i, r, scale_ * channels[i] - origin_[c + i] - mean_[c + i]);
      }
    for (int64_t c = 0; c < C; ++c) {
      const T origin = origin_[c], mean = mean_[c];
      int64_t r = c < transposed ? vector_run : 0;
      T* to = tile_.at(c, first);
      for (; r < whole_panels; r += kPanel, to += tile_.rows * kPanel)
#pragma GCC unroll 8
        for (int v = 0; v < kPanel; v += W)
          store_vector(to + v, scale_ * load_vector(x + c * stride_c + r + v) - origin - mean);
      if (stride_w == 1)
        for (; r < vector_run; r += W) store(c, r, scale_ * load_vector(x + c * stride_c + r) - origin - mean);
      for (; r < run; ++r) *tile_.at(c, first + r) = scale_ * to_number(x[c * stride_c + r * stride_w]) - origin - mean;
    }
  }

  /// multiply() into dX, past the caches where it consists of whole lines.
  void multiply_out(const Panels<T>& A, int64_t rows, const Panels<T>& B, int64_t columns, X* target, int64_t ld) {
    constexpr int64_t kLine = kLineBytes / sizeof(X);
    if (reinterpret_cast<uintptr_t>(target) % kLineBytes == 0 && ld % kLine == 0 && columns % kLine == 0)
      multiply<true>(A, rows, B, columns, target, ld);
    else
      multiply<false>(A, rows, B, columns, target, ld);
  }

  /// target = A' B in whole register tiles; both factors have a row for each channel.
  template <bool kLines, class To>
  void multiply(const Panels<T>& A, int64_t rows, const Panels<T>& B, int64_t columns, To* target, int64_t ld) {
    constexpr int64_t kGroup = kLines ? kLineBytes / sizeof(To) : S::kColumns;
    for (int64_t j = 0; j < columns; j += kGroup)
      for (int64_t i = 0; i < rows; i += S::kRows) {
        alignas(kLineBytes) To group[S::kRows][kGroup];
        To* to = target + i * ld + j;
        for (int64_t k = 0; k < kGroup; k += S::kColumns) {
          Tile<T, Shape<S::kRows, S::kVectors>> product;
          ahead_.ask_for_during(x_.channels * product.kElements);
          multiply_add(product, A.at(0, i), B.at(0, j + k), x_.channels);
          if constexpr (kLines && kGroup == S::kColumns)
            product.for_each(ld, [&](const Vector<T>& sum, int64_t offset) { stream_vector(to + offset, sum); });
          else if constexpr (kLines)
            product.for_each(kGroup, [&](auto& sum, int64_t offset) { store_vector(group[0] + k + offset, sum); });
          else
            product.for_each(ld, [&](auto& sum, int64_t offset) { store_vector(to + offset, sum); });
        }
        if constexpr (kLines && kGroup != S::kColumns)
          for (int r = 0; r < S::kRows; ++r) stream_line(to + r * ld, group[r]);
      }
  }

  FeatureMaps<const X> x_;
  FeatureMaps<X> dx_;
  const X* sample_;
  X* gradient_;
  const T* mean_;
  T scale_;
  int64_t tile_positions_;
  Ahead<X> ahead_;
  Panels<T> weight_, tile_;
  T *result_, *origin_;
};

}  // namespace isqrt::cpu::ISQRT_LEVEL
