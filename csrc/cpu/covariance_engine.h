// The Engines of covariance.h on one CPU thread. A tile of positions is copied once into cache, in the orientation in
// which the product reads it, whatever the strides of x.
#pragma once
#include "simd.h"

namespace isqrt::cpu::ISQRT_LEVEL {

/// Positions of a tile, whole panels: few enough to stay near the first-level cache, enough to outweigh a pass over M2.
template <class T> inline int64_t tile_positions_for(int64_t channels) {
  if (ISQRT_VECTOR_BYTES < 64) return 96;
  const int64_t fitting = 48 * 1024 / (round_up(channels, kPanel) * int64_t(sizeof(T))) / 32 * 32;
  return minimum<int64_t>(fitting < 128 ? 128 : fitting, 256);
}

/// Calls visit(offset, r, length) for each run of positions m + r, ... of one image row among [m, m + n).
template <class T, class Visit>
inline void for_each_run(const FeatureMaps<T>& x, int64_t m, int64_t n, const Visit& visit) {
  for (int64_t r = 0; r < n;) {
    const int64_t run = minimum(n - r, x.width - (m + r) % x.width);
    visit(x.offset(m + r), r, run);
    r += run;
  }
}

/// The cache lines of the tile after this one, in rows of contiguous positions or channels. The hardware does not
/// foresee where they lie, and all at once are more than it can wait for: they are asked for a few at a time, between
/// products, and come into the second level, for the first one holds this tile.
template <class X> class Ahead {
  static constexpr int64_t kLine = 64 / sizeof(X);

 public:
  Ahead() = default;

  /// Of up to n positions of a sample from m on. None where they are no rows.
  Ahead(const FeatureMaps<const X>& x, const X* sample, int64_t m, int64_t n) : row_(sample + x.offset(m)) {
    n = minimum(n, x.positions() - m);
    if (x.height != 1 || n <= 0) return;
    if (x.stride_w == 1) stride_ = x.stride_c, length_ = n, rows_ = x.channels;
    if (x.stride_c == 1) stride_ = x.stride_w, length_ = x.channels, rows_ = n;
  }

  /// As many of the lines as come while so many numbers are multiplied.
  void ask_for_during(int64_t products) {
    constexpr int64_t kProductsOfLine = 512;
    const X* row = row_;
    int64_t at = at_, rows = rows_;
    for (int64_t line = products / kProductsOfLine; line > 0 && rows > 0; --line) {
      __builtin_prefetch(row + at, 0, 2);
      at += kLine;
      if (at >= length_) at = 0, row += stride_, --rows;
    }
    row_ = row, at_ = at, rows_ = rows;
  }

 private:
  const X* row_ = nullptr;
  int64_t stride_ = 0, length_ = 0, rows_ = 0, at_ = 0;
};

/// Pools one chunk: M2's upper triangle and the mean stay in cache until the chunk is done.
template <class X> class PoolEngine {
  using T = Compute<X>;
  using S = Simd<T>;

 public:
  using Weight = double;

  static int64_t storage_size(int64_t channels) {
    return Panels<T>::size(channels, channels) + Panels<T>::size(tile_positions_for<T>(channels), channels) +
           3 * round_up(channels, kPanel);
  }

  PoolEngine(const FeatureMaps<const X>& x, int64_t sample, T* storage)
      : x_(x),
        sample_(x.sample(sample)),
        padded_(round_up(x.channels, kPanel)),
        tile_positions_(tile_positions_for<T>(x.channels)),
        moment_{storage, Panels<T>::rows_for(x.channels)},
        tile_{moment_.data + moment_.rows * padded_, Panels<T>::rows_for(tile_positions_)},
        mean_(tile_.data + tile_.rows * padded_),
        delta_(mean_ + padded_),
        minus_delta_(delta_ + padded_) {
    for (T* moment = moment_.data; moment < tile_.data; ++moment) *moment = 0;
    for (int64_t c = 0; c < x.channels; ++c) mean_[c] = to_number(sample_[c * x.stride_c]);
  }

  int64_t tile_positions() const { return tile_positions_; }

  void load_tile(int64_t m, int64_t n) {  // tile: [position, channel]
    ahead_ = Ahead<X>(x_, sample_, m + n, tile_positions_);
    for (int64_t c = 0; c < padded_; ++c) delta_[c] = 0;
    for_each_run(x_, m, n, [&](int64_t offset, int64_t r, int64_t run) { load_run(r, sample_ + offset, run); });
    for (int64_t c = 0; c < x_.channels; ++c) delta_[c] /= T(n);
  }

  void center_tile(int64_t n) const {
    for (int64_t c = 0; c < padded_; c += S::kWidth) {
      const Vector<T> delta = load_vector(delta_ + c);
      store_vector(mean_ + c, load_vector(mean_ + c) + delta);
      store_vector(delta_ + c, Vector<T>{});
      T* column = tile_.at(0, c);
      for (int64_t r = 0; r < n; ++r, column += kPanel) store_vector(column, load_vector(column) - delta);
    }
  }

  void accumulate(int64_t n, double weight) {
    for (int64_t c = 0; c < padded_; ++c) minus_delta_[c] = -T(weight) * delta_[c];
    for_tiles<T>(x_.channels, true, [&](auto shape, int64_t i, int64_t j) {
      Tile<T, decltype(shape)> product;
      constexpr int64_t kPositions = 48;
      for (int64_t r = 0; r < n; r += kPositions) {
        ahead_.ask_for_during(kPositions * product.kElements);
        multiply_add(product, tile_.at(r, i), tile_.at(r, j), minimum(kPositions, n - r));
      }
      multiply_add(product, minus_delta_ + i, delta_ + j, 1);
      T* moment = moment_.at(i, j);
      product.for_each(kPanel, [&](const Vector<T>& sum, int64_t offset) {
        store_vector(moment + offset, load_vector(moment + offset) + sum);
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
  /// One run of positions, less the mean, into the tile's rows from `first` on; their sums into delta_. What cannot be
  /// transposed in whole blocks, or lies neither along positions nor along channels, is read element by element.
  void load_run(int64_t first, const X* x, int64_t run) const {
    constexpr int W = S::kWidth;
    const int64_t stride_c = x_.stride_c;  // the compiler does not know that a tile is written, and not this
    const bool along_positions = x_.stride_w == 1, along_channels = stride_c == 1;
    const int64_t vector_channels = along_positions || along_channels ? x_.channels / W * W : 0;
    const int64_t vector_run = along_positions ? run / W * W : along_channels ? run : 0;
    if (along_channels) {
      int64_t c = 0;
      for (; c + 4 * W <= vector_channels; c += 4 * W) load_columns<4>(first, x, c, run);
      for (; c < vector_channels; c += W) load_columns<1>(first, x, c, run);
    }
    for (int64_t c = 0; along_positions && c < vector_channels; c += W) {
      const Vector<T> mean = load_vector(mean_ + c);
      Vector<T> sum = {};
      T* tile = tile_.at(first, c);
      for (int64_t r = 0; r < vector_run; r += W) {
        Vector<T> rows[W];
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) rows[i] = load_vector(x + (c + i) * stride_c + r);
        transpose<T>(rows);
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) {
          const Vector<T> value = rows[i] - mean;
          sum += value;
          store_vector(tile + (r + i) * kPanel, value);
        }
      }
      store_vector(delta_ + c, load_vector(delta_ + c) + sum);
    }
    for (int64_t c = 0; c < x_.channels; ++c)
      for (int64_t r = c < vector_channels ? vector_run : 0; r < run; ++r) {
        const T value = to_number(x[c * x_.stride_c + r * x_.stride_w]) - mean_[c];
        delta_[c] += value;
        *tile_.at(first + r, c) = value;
      }
  }

  /// kVectors vectors of contiguous channels from c on, of each position of a run.
  template <int kVectors> void load_columns(int64_t first, const X* x, int64_t c, int64_t run) const {
    const int64_t stride = x_.stride_w;
    Vector<T> mean[kVectors], sum[kVectors] = {};
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) mean[v] = load_vector(mean_ + c + v * S::kWidth);
    T* tile[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) tile[v] = tile_.at(first, c + v * S::kWidth);
    for (int64_t r = 0; r < run; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const Vector<T> value = load_vector(x + r * stride + c + v * S::kWidth) - mean[v];
        sum[v] += value;
        store_vector(tile[v] + r * kPanel, value);
      }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      T* delta = delta_ + c + v * S::kWidth;
      store_vector(delta, load_vector(delta) + sum[v]);
    }
  }

  FeatureMaps<const X> x_;
  const X* sample_;
  int64_t padded_, tile_positions_;
  Ahead<X> ahead_;
  Panels<T> moment_, tile_;
  T *mean_, *delta_, *minus_delta_;
};

/// Merges the chunks of one sample in place: chunk 0's moment is the running one. Then the second pass of a sample that
/// needs one.
template <class X> class MergeEngine {
  using T = Compute<X>;

 public:
  MergeEngine(const PoolTask<X>& task, int64_t sample)
      : x_(task.x),
        C_(task.x.channels),
        chunks_(task.chunks),
        sample_(task.x.sample(sample)),
        partial_mean_(task.partial_mean + sample * chunks_.count * C_),
        partial_moment_(task.partial_moment + sample * chunks_.count * C_ * C_),
        mean_(task.mean + sample * C_),
        sigma_(task.sigma + sample * C_ * C_),
        scale_(task.scale ? task.scale + sample : nullptr) {}

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

  T trace() const {
    T sum = 0;
    for (int64_t i = 0; i < C_; ++i) sum += sigma_[i * (C_ + 1)];
    return sum;
  }

  T largest(T share) const {
    T most = 0;
    for_each_number(share, [&](int64_t, int64_t, T distance) {
      const T size = distance < 0 ? -distance : distance;
      if (!(size <= most)) most = size;  // NaN is taken over
    });
    return most;
  }

  /// By way of a contiguous copy of s (x - x_0).
  void rescale(T s) const {
    const int64_t M = x_.positions();
    const Scratch<T> copy(C_ * M), storage(PoolEngine<T>::storage_size(C_));
    for_each_number(T(1), [&](int64_t c, int64_t m, T distance) { copy.get()[c * M + m] = s * distance; });
    PoolEngine<T> engine({copy.get(), 1, C_, 1, M, C_ * M, M, 0, 1}, 0, storage.get());
    accumulate_covariance(engine, 0, M);
    engine.write(mean_, sigma_);
    // The copy holds half of the distances, which double here and four times in the covariance.
    for (int64_t c = 0; c < C_; ++c) mean_[c] = to_number(sample_[c * x_.stride_c]) + 2 * (mean_[c] / s);
    write_sigma(4 / T(M), sigma_);
  }

  void keep(T s) const {
    if (scale_) {
      *scale_ = s;
    } else if (s != 1) {
      for (int64_t i = 0; i < C_ * C_; ++i) sigma_[i] = sigma_[i] / s / s;
    }
  }

 private:
  /// Sigma = alpha times a moment, of which the upper triangle is there.
  void write_sigma(T alpha, const T* moment) const {
    for (int64_t i = 0; i < C_; ++i)
      for (int64_t j = i; j < C_; ++j) sigma_[i * C_ + j] = alpha * moment[i * C_ + j];
    mirror<T>(C_, C_, [&](int64_t i, int64_t j) { return sigma_ + i * C_ + j; });
  }

  /// f(channel, position, (x - share x_0) / 2): half of a difference does not overflow.
  template <class F> void for_each_number(T share, const F& f) const {
    for (int64_t c = 0; c < C_; ++c) {
      const X* row = sample_ + c * x_.stride_c;
      const T first = T(0.5) * share * to_number(row[0]);
      for (int64_t m = 0; m < x_.positions(); ++m) f(c, m, T(0.5) * to_number(row[x_.offset(m)]) - first);
    }
  }

  FeatureMaps<const X> x_;
  int64_t C_;
  Chunks chunks_;
  const X* sample_;
  T *partial_mean_, *partial_moment_, *mean_, *sigma_, *scale_;
};

/// dX = W (X - mu 1^T), W = 2 dSigma / M, for one chunk.
template <class X> class PoolBackwardEngine {
  using T = Compute<X>;
  using S = Simd<T>;

 public:
  static int64_t storage_size(int64_t channels) {
    const int64_t positions = tile_positions_for<T>(channels);
    return Panels<T>::size(channels, channels) + Panels<T>::size(channels, positions) +
           round_up(channels, kPanel) * positions;
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
        result_(tile_.data + tile_.rows * tile_positions_) {
    const int64_t C = x_.channels;
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
    for_each_run(x_, m, n, [&](int64_t offset, int64_t r, int64_t run) { load_run(r, sample_ + offset, run); });
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
  /// One run of positions, less the mean, times the scale: as one multiplication with addition.
  void load_run(int64_t first, const X* x, int64_t run) const {
    constexpr int W = S::kWidth;
    const int64_t C = x_.channels, stride_c = x_.stride_c, stride_w = x_.stride_w;
    const int64_t vector_run = run / W * W, transposed = stride_c == 1 && stride_w != 1 ? C / W * W : 0;
    const auto store = [&](int64_t c, int64_t r, const Vector<T>& values) {
      if (first % W == 0) return store_vector(tile_.at(c, first + r), values);
      for (int i = 0; i < W; ++i) *tile_.at(c, first + r + i) = values[i];  // may lie in two panels
    };
    const int64_t whole_panels = stride_w == 1 && first % kPanel == 0 ? run / kPanel * kPanel : 0;
    for (int64_t r = 0; transposed && r < vector_run; r += W)
      for (int64_t c = 0; c < transposed; c += W) {
        Vector<T> rows[W];
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) rows[i] = load_vector(x + (r + i) * stride_w + c);
        transpose<T>(rows);
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) store(c + i, r, scale_ * rows[i] - scale_ * mean_[c + i]);
      }
    for (int64_t c = 0; c < C; ++c) {
      const T mean = scale_ * mean_[c];
      int64_t r = c < transposed ? vector_run : 0;
      T* to = tile_.at(c, first);
      for (; r < whole_panels; r += kPanel, to += tile_.rows * kPanel)
#pragma GCC unroll 8
        for (int v = 0; v < kPanel; v += W) store_vector(to + v, scale_ * load_vector(x + c * stride_c + r + v) - mean);
      if (stride_w == 1)
        for (; r < vector_run; r += W) store(c, r, scale_ * load_vector(x + c * stride_c + r) - mean);
      for (; r < run; ++r) *tile_.at(c, first + r) = scale_ * to_number(x[c * stride_c + r * stride_w]) - mean;
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
  T* result_;
};

}  // namespace isqrt::cpu::ISQRT_LEVEL
