// Vectors, transposes and the register-tiled product of one SIMD level, ISQRT_LEVEL, of ISQRT_VECTOR_BYTES.
// Included once per level with that level's instructions enabled. Only functions defined here may be emitted with
// them: a shared inline function (one of the standard library's, say) could be picked by the linker for every caller.
#pragma once
#include <cstdlib>
#include <new>
#include <utility>

#include "half.h"

#if defined(__clang__) || __GNUC__ < 11
#error "isqrt_cov is compiled with g++ 11 or later (the environment variable CXX names the compiler)"
#endif

namespace isqrt::cpu::ISQRT_LEVEL {

template <class T> struct Simd {
  static constexpr int kWidth = ISQRT_VECTOR_BYTES / sizeof(T);
  typedef T Vector __attribute__((vector_size(ISQRT_VECTOR_BYTES)));
  typedef T Unaligned __attribute__((vector_size(ISQRT_VECTOR_BYTES), aligned(sizeof(T)), may_alias));
  typedef T Half __attribute__((vector_size(ISQRT_VECTOR_BYTES / 2)));
  typedef T UnalignedHalf __attribute__((vector_size(ISQRT_VECTOR_BYTES / 2), aligned(sizeof(T)), may_alias));

  // Registers hold kRows x kVectors accumulators, enough independent chains to hide the latency of an FMA.
  static constexpr int kRows = ISQRT_TILE_ROWS, kVectors = ISQRT_TILE_VECTORS, kColumns = kVectors * kWidth;
  // A loop of so many steps, where it has to be short of instructions: of a core whose other thread is busy, too, ours
  // gets half of them, and half as many multiplications as two at a time are then out of reach.
  static constexpr int kSteps = ISQRT_TILE_STEPS;
};

template <class T> using Vector = typename Simd<T>::Vector;
template <class T> using Lanes = decltype(Vector<T>() == Vector<T>());  // integers of T's size

template <class T> inline Vector<T> load_vector(const T* p) {
  return *reinterpret_cast<const typename Simd<T>::Unaligned*>(p);
}

template <class T> inline void store_vector(T* p, Vector<T> v) {
  *reinterpret_cast<typename Simd<T>::Unaligned*>(p) = v;
}

/// Writes a vector, aligned as its size, to memory past the caches: a cache line written so is not read first. Other
/// threads see it after finish_streams().
template <class T> inline void stream_vector(T* to, Vector<T> v) {
#if ISQRT_VECTOR_BYTES == 64
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), reinterpret_cast<const __m512i&>(v));
#elif ISQRT_VECTOR_BYTES == 32
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<const __m256i&>(v));
#else
  store_vector(to, v);
#endif
}
/// The same of a cache line of any type.
constexpr int64_t kLineBytes = 64;
template <class X> inline void stream_line(X* to, const X* from) {
  float* const target = reinterpret_cast<float*>(to);
  for (int64_t i = 0; i < kLineBytes / int64_t(sizeof(float)); i += Simd<float>::kWidth)
    stream_vector(target + i, load_vector(reinterpret_cast<const float*>(from) + i));
}
inline void finish_streams() {
#if ISQRT_VECTOR_BYTES >= 32
  _mm_sfence();
#endif
}

// Feature maps of a 16-bit type are read as vectors of float, and written from them.
using Words = uint16_t __attribute__((vector_size(ISQRT_VECTOR_BYTES / 2)));
using UnalignedWords = uint16_t __attribute__((vector_size(ISQRT_VECTOR_BYTES / 2), aligned(2), may_alias));
using DoubleWords = uint32_t __attribute__((vector_size(ISQRT_VECTOR_BYTES)));

template <class X> inline Vector<float> load_words(const X* p) {
  const Words words = *reinterpret_cast<const UnalignedWords*>(p);
  return widen<Vector<float>>(__builtin_convertvector(words, DoubleWords), X{});
}
template <class X> inline void store_words(X* p, Vector<float> v) {
  const auto words = __builtin_convertvector(narrow<Vector<float>, DoubleWords>(v, X{}), Words);
  *reinterpret_cast<UnalignedWords*>(p) = words;
}
inline Vector<float> load_vector(const BFloat16* p) { return load_words(p); }
inline void store_vector(BFloat16* p, Vector<float> v) { store_words(p, v); }

// Processors with these vectors have instructions for float16. (Unmasked ones of 64 bytes make gcc 12 warn of itself.)
#if ISQRT_VECTOR_BYTES == 64
constexpr __mmask16 kAllLanes = 0xffff;
inline Vector<float> load_vector(const Half* p) {
  return _mm512_maskz_cvtph_ps(kAllLanes, _mm256_loadu_si256(reinterpret_cast<const __m256i_u*>(p)));
}
inline void store_vector(Half* p, Vector<float> v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i_u*>(p), _mm512_maskz_cvtps_ph(kAllLanes, v, _MM_FROUND_TO_NEAREST_INT));
}
#elif ISQRT_VECTOR_BYTES == 32
inline Vector<float> load_vector(const Half* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i_u*>(p)));
}
inline void store_vector(Half* p, Vector<float> v) {
  _mm_storeu_si128(reinterpret_cast<__m128i_u*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
#else
inline Vector<float> load_vector(const Half* p) { return load_words(p); }
inline void store_vector(Half* p, Vector<float> v) { store_words(p, v); }
#endif

template <class Int> inline Int minimum(Int a, Int b) { return a < b ? a : b; }
template <class Int> inline Int round_up(Int a, Int b) { return (a + b - 1) / b * b; }

/// Zeroed scratch of one thread, on cache-line boundaries.
template <class T> class Scratch {
 public:
  explicit Scratch(int64_t size) : bytes_(round_up<int64_t>(size * sizeof(T), 64)) {}
  ~Scratch() { ::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  /// Taken at the first call: a thread that finds no work needs none.
  T* get() const {
    if (data_ == nullptr) {
      data_ = static_cast<T*>(::aligned_alloc(64, bytes_));
      if (data_ == nullptr) throw std::bad_alloc();
      __builtin_memset(data_, 0, bytes_);
    }
    return data_;
  }

 private:
  int64_t bytes_;
  mutable T* data_ = nullptr;
};

/// A matrix that products read, in panels of 16 columns, each with all of its rows: what a register tile reads of it
/// lies one after the other in memory, whatever the number of columns.
constexpr int64_t kPanel = 16;
template <class T> struct Panels {
  static_assert(kPanel % Simd<T>::kRows == 0 && kPanel % Simd<T>::kColumns == 0);
  T* data = nullptr;
  int64_t rows = 0;

  /// Rows for n and what register tiles have beyond them. They are odd: neighbours in a row of two panels that lie a
  /// power of two apart would take each other's place in the cache.
  static int64_t rows_for(int64_t n) { return round_up(n, kPanel) + 1; }
  static int64_t size(int64_t rows, int64_t columns) { return rows_for(rows) * round_up(columns, kPanel); }

  int64_t index(int64_t row, int64_t column) const { return (column / kPanel * rows + row) * kPanel + column % kPanel; }
  T* at(int64_t row, int64_t column) const { return data + index(row, column); }
  /// The same from a column on, at which a panel begins.
  Panels from(int64_t column) const { return {at(0, column), rows}; }
};

/// Lanes of the two vectors of one butterfly of a transposition: blocks of `Stride` lanes change places.
template <int Stride, bool High, class T, int... kLanes>
inline Vector<T> interleave(Vector<T> a, Vector<T> b, std::integer_sequence<int, kLanes...>) {
  constexpr auto lane = [](int i) constexpr {
    const bool from_b = i / Stride % 2;
    return (High ? (from_b ? i + int(sizeof...(kLanes)) : i + Stride)
                 : (from_b ? i - Stride + int(sizeof...(kLanes)) : i));
  };
  return __builtin_shuffle(a, b, Lanes<T>{lane(kLanes)...});
}

template <int Stride, class T> inline void butterflies(Vector<T> (&rows)[Simd<T>::kWidth]) {
  constexpr int W = Simd<T>::kWidth;
  if constexpr (Stride < W) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      if (i / Stride % 2 == 0) {
        const Vector<T> a = rows[i], b = rows[i + Stride];
        rows[i] = interleave<Stride, false, T>(a, b, std::make_integer_sequence<int, W>());
        rows[i + Stride] = interleave<Stride, true, T>(a, b, std::make_integer_sequence<int, W>());
      }
    }
    butterflies<2 * Stride, T>(rows);
  }
}

/// rows <- rows^T, a square block of one vector's width held in registers.
template <class T> inline void transpose(Vector<T> (&rows)[Simd<T>::kWidth]) { butterflies<1, T>(rows); }

/// The columns of such a block in memory.
template <class From, class T = Compute<From>>
inline __attribute__((always_inline)) void load_transposed(Vector<T> (&columns)[Simd<T>::kWidth], const From* src,
                                                           int64_t ld) {
#pragma GCC unroll 16
  for (int i = 0; i < Simd<T>::kWidth; ++i) columns[i] = load_vector(src + i * ld);
  transpose<T>(columns);
}

template <class To, class From>
inline __attribute__((always_inline)) void transpose_block(To* dst, int64_t ld_dst, const From* src, int64_t ld_src) {
  constexpr int W = Simd<Compute<From>>::kWidth;
  Vector<Compute<From>> columns[W];
  load_transposed(columns, src, ld_src);
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) store_vector(dst + i * ld_dst, columns[i]);
}

/// The mirror image, under the diagonal, of columns [first, last) above it, whole vectors. at(i, j) is the address of
/// an element, `ld` beyond which is that of the next row. In whole vectors: one that is loaded would wait for parts of
/// it that were stored just before.
template <class T, class At>
inline __attribute__((always_inline)) void mirror_columns(int64_t first, int64_t last, int64_t ld, const At& at) {
  constexpr int W = Simd<T>::kWidth;
  Lanes<T> column;
  for (int c = 0; c < W; ++c) column[c] = c;
  for (int64_t j = first; j < last; j += W) {
    for (int64_t i = 0; i < j; i += W) transpose_block(at(j, i), ld, at(i, j), ld);
    Vector<T> rows[W], columns[W];
#pragma GCC unroll 16
    for (int r = 0; r < W; ++r) columns[r] = rows[r] = load_vector(at(j + r, j));
    transpose<T>(columns);
#pragma GCC unroll 16
    for (int r = 1; r < W; ++r) store_vector(at(j + r, j), column < r ? columns[r] : rows[r]);
  }
}

/// The lower triangle of an n x n matrix from its upper one.
template <class T, class At> inline __attribute__((always_inline)) void mirror(int64_t n, int64_t ld, const At& at) {
  const int64_t whole = n / Simd<T>::kWidth * Simd<T>::kWidth;
  mirror_columns<T>(0, whole, ld, at);
  for (int64_t j = whole; j < n; ++j)
    for (int64_t i = 0; i < j; ++i) *at(j, i) = *at(i, j);
}

/// dst[r, c] = src[r, c] for any two pairs of strides; fast where both have contiguous rows or columns.
template <class To, class From>
void copy_strided(To* dst, int64_t dst_row, int64_t dst_col, const From* src, int64_t src_row, int64_t src_col,
                  int64_t rows, int64_t cols) {
  constexpr int W = Simd<Compute<From>>::kWidth;
  const auto copy = [](To* to, const From* from) { store_number(to, to_number(*from)); };
  if ((dst_row == 1 && src_row == 1 && !(dst_col == 1 && src_col == 1)) ||
      (dst_row == 1 && dst_col != 1 && src_col == 1))
    return copy_strided(dst, dst_col, dst_row, src, src_col, src_row, cols, rows);
  if (dst_col == 1 && src_col == 1) {
    for (int64_t r = 0; r < rows; ++r) {
      To* d = dst + r * dst_row;
      const From* s = src + r * src_row;
      int64_t c = 0;
      for (; c + W <= cols; c += W) store_vector(d + c, load_vector(s + c));
      for (; c < cols; ++c) copy(d + c, s + c);
    }
    return;
  }
  int64_t r = 0;
  if (dst_col == 1 && src_row == 1) {
    for (; r + W <= rows; r += W) {
      int64_t c = 0;
      for (; c + W <= cols; c += W) transpose_block(dst + r * dst_row + c, dst_row, src + c * src_col + r, src_col);
      for (; c < cols; ++c)
        for (int64_t i = r; i < r + W; ++i) copy(dst + i * dst_row + c, src + i + c * src_col);
    }
  }
  for (; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c) copy(dst + r * dst_row + c * dst_col, src + r * src_row + c * src_col);
}

/// The mean of two mirrored vectors, as symmetric_part() of views.h.
template <class T> inline Vector<T> symmetric_vector(Vector<T> above, Vector<T> below) {
  return above == below ? above : T(0.5) * above + T(0.5) * below;
}

/// Rows of `ld` numbers from and into panels.
template <class T>
inline void read_panels(const Panels<T>& A, const T* from, int64_t ld, int64_t rows, int64_t columns) {
  for (int64_t j = 0; j < columns; j += kPanel)
    copy_strided(A.at(0, j), kPanel, int64_t(1), from + j, ld, int64_t(1), rows, minimum(kPanel, columns - j));
}
template <class X, class T>
inline void copy_panels(X* to, int64_t ld, const Panels<T>& A, int64_t rows, int64_t columns) {
  for (int64_t j = 0; j < columns; j += kPanel)
    copy_strided(to + j, ld, int64_t(1), static_cast<const T*>(A.at(0, j)), kPanel, int64_t(1), rows,
                 minimum(kPanel, columns - j));
}

/// What rows [i, i + rows) and columns [j, j + columns) have of a C x C matrix's upper triangle into its row-major
/// vector, from a panel's rows.
template <class X, class T>
inline void copy_triangle(X* to, int64_t C, int64_t i, int64_t rows, int64_t j, int64_t columns, const T* panel) {
  for (int64_t r = 0; r < rows && i + r < j + columns; ++r) {
    const int64_t first = i + r < j ? j : i + r;
    copy_strided(to + triu_index(i + r, first, C), C, int64_t(1), panel + r * kPanel + first - j, kPanel, int64_t(1),
                 int64_t(1), j + columns - first);
  }
}

/// u = sum_i factor(i) A[i, :]
template <class T, class Factor>
inline void multiply_rows(T* u, const Panels<T>& A, int64_t rows, int64_t columns, const Factor& factor) {
  constexpr int W = Simd<T>::kWidth, kVectors = kPanel / W;
  for (int64_t j = 0; j < columns; j += kPanel) {
    Vector<T> sum[kVectors] = {};
    const T* row = A.at(0, j);
    for (int64_t i = 0; i < rows; ++i, row += kPanel)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[v] += factor(i) * load_vector(row + v * W);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store_vector(u + j + v * W, sum[v]);
  }
}

/// The extent of a register tile. With kUpper what lies under its diagonal does not count.
template <int kRows_, int kVectors_, bool kUpper_ = false> struct Shape {
  static constexpr int kRows = kRows_, kVectors = kVectors_;
  static constexpr bool kUpper = kUpper_;
};

/// sum + a b.
#if ISQRT_VECTOR_BYTES == 32
// Into the register of the sum: left to choose, gcc takes the forms that overwrite a factor, too, and copies and
// spills.
inline Vector<float> fused_multiply_add(Vector<float> sum, float a, Vector<float> b) {
  asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(_mm256_set1_ps(a)), "x"(b));
  return sum;
}
inline Vector<double> fused_multiply_add(Vector<double> sum, double a, Vector<double> b) {
  asm("vfmadd231pd %2, %1, %0" : "+x"(sum) : "x"(_mm256_set1_pd(a)), "x"(b));
  return sum;
}
#else
template <class T> inline Vector<T> fused_multiply_add(Vector<T> sum, T a, Vector<T> b) { return sum + a * b; }
#endif

#if ISQRT_VECTOR_BYTES == 64
/// The second half of a vector, and a vector of two such halves.
inline Simd<float>::Half right_half(Vector<float> v) { return _mm512_maskz_extractf32x8_ps(0xff, v, 1); }
inline Vector<float> twice(Simd<float>::Half half) { return _mm512_maskz_broadcast_f32x8(kAllLanes, half); }
#endif

/// The accumulators of one register tile.
template <class T, class Shape> struct Tile {
  static constexpr int64_t kElements = Shape::kRows * Shape::kVectors * Simd<T>::kWidth;
  Vector<T> sum[Shape::kRows][Shape::kVectors] = {};

  /// f(vector, offset) for each of them, `offset` counted from the first one where rows are `ld` apart.
  template <class F> inline __attribute__((always_inline)) void for_each(int64_t ld, const F& f) {
#pragma GCC unroll 16
    for (int r = 0; r < Shape::kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < Shape::kVectors; ++v) f(sum[r][v], r * ld + v * Simd<T>::kWidth);
  }
};

/// f(shape, i, j) for the register tiles of an n x n result, or of its upper triangle, in the panel of columns that
/// begins at `first`. Of those on the diagonal about half is computed: their lower rows want the second of two vectors
/// alone, or half of the only one. None reaches below the panel's own rows.
template <class T, class F>
inline __attribute__((always_inline)) void for_tiles_of_panel(int64_t n, int64_t first, bool upper, const F& f) {
  using S = Simd<T>;
  constexpr bool kHalf = S::kVectors == 1 && S::kRows == 16 && S::kWidth == 16,
                 kSecond = S::kVectors == 2 && S::kWidth % S::kRows == 0;
  constexpr int64_t kWhole = kHalf ? 0 : kSecond ? S::kWidth : S::kColumns;  // rows on the diagonal of whole tiles
  for (int64_t j = first; j < minimum(n, first + kPanel); j += S::kColumns) {
    const int64_t rows = upper ? minimum(n, j + kWhole) : n;
    for (int64_t i = 0; i < rows; i += S::kRows) f(Shape<S::kRows, S::kVectors>(), i, j);
    if (!upper || j + kWhole >= n) continue;
    if constexpr (kHalf) f(Shape<S::kRows, 1, true>(), j, j);
    if constexpr (kSecond) f(Shape<S::kWidth, 1>(), j + S::kWidth, j + S::kWidth);
  }
}

/// f(round) for each of `rounds` rounds, with the help of threads that wait.
template <class F> inline void in_rounds(SharedLoop& loop, int64_t rounds, const F& f) {
  loop.run(rounds, [](const void* f, int64_t round) noexcept { (*static_cast<const F*>(f))(round); }, &f);
}

/// tile[i, j] += sum_k a[k, i] b[k, j], both in panels. The left factor is symmetric, or given transposed, so that
/// nothing has to be packed. With kUpper, of the lower half of the rows only the right half of the columns is computed.
template <class T, class Shape>
inline __attribute__((always_inline)) void multiply_add(Tile<T, Shape>& tile, const T* a, const T* b, int64_t n) {
  using S = Simd<T>;
  if constexpr (Shape::kUpper) {
    typename S::Half lower[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) lower[i] = right_half(tile.sum[8 + i][0]);
    for (int64_t k = 0; k < n; ++k, a += kPanel, b += kPanel) {
      const Vector<T> right = load_vector(b);
      const auto half = *reinterpret_cast<const typename S::UnalignedHalf*>(b + 8);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        tile.sum[i][0] += a[i] * right;
        lower[i] += a[8 + i] * half;
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) tile.sum[8 + i][0] = twice(lower[i]);
  } else {
    const auto step = [&](const T* a, const T* b) __attribute__((always_inline)) {
      Vector<T> right[Shape::kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < Shape::kVectors; ++v) right[v] = load_vector(b + v * S::kWidth);
#pragma GCC unroll 16
      for (int i = 0; i < Shape::kRows; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < Shape::kVectors; ++v) tile.sum[i][v] = fused_multiply_add(tile.sum[i][v], a[i], right[v]);
    };
    int64_t k = 0;
    for (; k + S::kSteps <= n; k += S::kSteps, a += S::kSteps * kPanel, b += S::kSteps * kPanel)
#pragma GCC unroll 4
      for (int s = 0; s < S::kSteps; ++s) step(a + s * kPanel, b + s * kPanel);
#pragma GCC unroll 1
    for (; k < n; ++k, a += kPanel, b += kPanel) step(a, b);
  }
}

}  // namespace isqrt::cpu::ISQRT_LEVEL
