// Symmetric matrices as tiles that tensor cores multiply, in shared memory or on their way to it.
//
// Only the 16 x 16 tiles of the upper triangle are stored, column by column: tile (I, J), I <= J, is the one numbered
// J (J + 1) / 2 + I, and six matrices of 128 channels in float32 fit into the 227 KiB of a Hopper block. Within a tile
// the elements are permuted, see Tiles, so that a warp meets no bank conflict when it reads an operand of a product,
// along rows in packets of 16 bytes or along columns, nor when it reads or writes a result, except on the diagonal.
#pragma once
#include "launch.cuh"
#include "number.cuh"
#include "tensor.cuh"

namespace isqrt::cuda {

constexpr int kTileSize = kTile * kTile;

/// Tiles in each direction, and of the whole upper triangle.
ISQRT_FN constexpr int tile_rows(int channels) { return (channels + kTile - 1) / kTile; }
ISQRT_FN constexpr int tile_count(int channels) { return tile_rows(channels) * (tile_rows(channels) + 1) / 2; }

/// The place (I, J), I <= J, of a tile and the indices in the matrix of its rows and columns.
struct TilePlace {
  int I, J;
  __device__ int number() const { return int(unsigned(J * (J + 1)) / 2) + I; }
  __device__ int i(int row) const { return kTile * I + row; }
  __device__ int j(int column) const { return kTile * J + column; }
  /// The one of that number, of at most 8 columns.
  static __device__ TilePlace numbered(int n) {
    int J = 0;
#pragma unroll
    for (int column = 1; column < 8; ++column) J += n >= column * (column + 1) / 2;
    return {n - int(unsigned(J * (J + 1)) / 2), J};
  }
  /// Column by column, from the last one on.
  __device__ TilePlace next() const { return I < J ? TilePlace{I + 1, J} : TilePlace{0, J - 1}; }
  /// The one so many times next() after the first, of so many rows.
  static __device__ TilePlace after(int times, int rows) {
    TilePlace at{times, rows - 1};
    for (; at.I > at.J; --at.J) at.I -= at.J + 1;
    return at;
  }
};

/// Element (i, j) of sym(source), 0 outside C x C; a tile of it; and what a tile of A, with its mirror image that is
/// not stored, adds to <factor sym(source), A>.
template <class T, class Source> __device__ T symmetric(const Source& source, int i, int j) {
  if (i >= source.channels || j >= source.channels) return T(0);
  return i <= j ? source.symmetric(i, j) : source.symmetric(j, i);
}
template <class T, class Source>
__device__ __forceinline__ WarpTile<T> symmetric_tile(const Source& source, const TilePlace& at) {
  WarpTile<T> tile;
  constexpr bool kIsGradient = !std::is_pointer_v<decltype(source.data)>;  // Sigma is a matrix always
  if constexpr (kIsGradient)
    if (source.output != Output::kMatrix) {
      tile.for_each([&](T& a, int r, int c) { a = symmetric<T>(source, at.i(r), at.j(c)); });
      return tile;
    }
  // All of it is asked for before anything is done with the first of it.
  WarpTile<T> mirrored;
  with_pointer(source.data, [&](const auto* data) {
    const int C = int(source.channels);
    const auto element = [&](int i, int j) { return i < C && j < C ? to_number(data[int64_t(i) * C + j]) : T(0); };
    tile.for_each([&](T& a, int r, int c) { a = element(at.i(r), at.j(c)); });
    mirrored.for_each([&](T& a, int r, int c) { a = element(at.j(c), at.i(r)); });
  });
  tile.combine(mirrored, [](T& a, T b) { a = symmetric_part(a, b); });
  return tile;
}
template <class T>
__device__ __forceinline__ void add_inner(T& sum, const WarpTile<T>& source, WarpTile<T> tile, const TilePlace& at,
                                          T factor) {
  const T times = at.I < at.J ? 2 : 1;
  tile.combine(source, [&](T a, T b) { sum += times * (factor * (factor * b) * a); });
}
template <class T, class Source>
__device__ __forceinline__ void add_inner(T& sum, const Source& source, WarpTile<T> tile, const TilePlace& at,
                                          T factor) {
  const WarpTile<T> of_source = symmetric_tile<T>(source, at);
  add_inner(sum, of_source, tile, at, factor);
}

/// Copies a tile of a symmetric matrix out, with its mirror image unless the triangle is wanted. An Index has room for
/// C^2.
template <class Index = int, class T, class Result>
__device__ __forceinline__ void store_tile(const Result& result, WarpTile<T>& tile, const TilePlace& at) {
  const Index C = Index(result.channels);
  const bool upper = result.output == Output::kTriu;
  with_pointer(result.data, [&](auto* data) {
    tile.for_each([&](T a, int r, int c) {
      const Index i = at.i(r), j = at.j(c);
      if (j >= C || i > j) return;
      if (upper) return store_number(data + triu_index(i, j, C), a);
      store_number(data + (i * C + j), a);
      if (i < j) store_number(data + (j * C + i), a);
    });
  });
}

/// Bytes of a tile: with its scale where numbers are pairs, see Tiles.
ISQRT_FN constexpr int tile_bytes(int64_t element_size) {
  return int(element_size) * kTileSize + (element_size == 4 ? 16 : 0);
}

/// Where a tile lies: in this block's shared memory, or anywhere else.
struct OwnTile {
  int begin;
  template <class U> __device__ U& at(int offset) const { return at_shared<U>(begin + offset); }
  __device__ OwnTile operator+(int offset) const { return {begin + offset}; }
};
struct OtherTile {
  char* begin;
  template <class U> __device__ U& at(int offset) const { return *reinterpret_cast<U*>(begin + offset); }
  __device__ OtherTile operator+(int offset) const { return {begin + offset}; }
};

/// How a tile of numbers of T lies in memory: one element(); all of them as a warp has the results of products, read(),
/// and pack() for write(), of a symmetric one the upper triangle, so that both sides are the same bits; from shared
/// memory its 16 terms as tensor cores want those of a product's left() or right() factor, or of its transpose; and a
/// Sum of such products.
template <class T> struct Tiles;

/// Two neighbours in a row, which a lane has of a tile: read and written in one piece.
template <class T> struct alignas(2 * sizeof(T)) Pair {
  T value[2];
};

/// In float64 a row takes all banks. A lane of group g and quad q, see tensor.cuh, reads terms 4 q to 4 q + 3 of
/// vectors g and g + 8, and writes columns 2 q and 2 q + 1, 2 q + 8 and 2 q + 9, of rows g and g + 8: columns are
/// exchanged by 4 along columns, by 2 and 8 along rows.
template <> struct Tiles<double> {
  using T = double;
  static constexpr int kBytes = kTileSize * sizeof(T);

  static __device__ int place(int row, int column) {
    return int(sizeof(T)) * (kTile * row + (column ^ (row & 12) ^ (row & 1 ? 10 : 0)));
  }
  template <class Tile> static __device__ T element(const Tile& tile, int row, int column) {
    return tile.template at<T>(place(row, column));
  }

  using Packed = WarpTile<T>;
  template <class Tile> static __device__ __forceinline__ Packed read_packed(const Tile& tile) {
    Packed result;
    result.for_each_pair([&](T* a, int r, int c) {
      const auto pair = tile.template at<Pair<T>>(place(r, c));
      a[0] = pair.value[0], a[1] = pair.value[1];
    });
    return result;
  }
  static __device__ __forceinline__ const WarpTile<T>& unpack(const Packed& packed) { return packed; }
  template <class Tile> static __device__ __forceinline__ WarpTile<T> read(const Tile& tile) {
    return read_packed(tile);
  }
  static __device__ __forceinline__ const Packed& pack(const WarpTile<T>& result) { return result; }
  static __device__ __forceinline__ Packed pack_divided(WarpTile<T>& result, T divisor) {
    result.for_each([&](T& a, int, int) { a /= divisor; });
    return result;
  }
  template <class Tile> static __device__ __forceinline__ void write(const Tile& to, Packed packed, bool symmetric) {
    if (!symmetric)
      packed.for_each_pair(
          [&](const T* a, int r, int c) { to.template at<Pair<T>>(place(r, c)) = Pair<T>{a[0], a[1]}; });
    else
      packed.for_each([&](T a, int r, int c) {
        if (r <= c) to.template at<T>(place(r, c)) = to.template at<T>(place(c, r)) = a;
      });
  }

  /// Lane (g, q) takes the terms 4 q to 4 q + 3 of its vectors as q and q + 4 of one half and of the other: any order
  /// of the terms does, the same for both factors.
  struct Terms {
    Operand<T> half[2];
    __device__ __forceinline__ T& operator()(int h, int i) { return half[i / 2].value[h][i % 2]; }

    /// f(h, term, value) for those of vectors g and g + 8.
    template <class F> __device__ __forceinline__ void for_each(const F& f) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h) f(h, 4 * Lane().quad + i, (*this)(h, i));
    }
  };
  static __device__ __forceinline__ Terms rows(int tile) {
    Terms terms;
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const Lane lane;  // the lowest bits of a column's place in its row follow from the row
        const int first = (place(lane.group, 4 * lane.quad) ^ int(sizeof(T)) * 8 * h) + int(sizeof(T)) * kTile * 8 * h;
        const auto packet = at_shared<Pair<T>>(tile + (first ^ i * int(sizeof(T))));
        terms(h, i) = packet.value[0], terms(h, i + 1) = packet.value[1];
      }
    return terms;
  }
  static __device__ __forceinline__ Terms columns(int tile) {
    Terms terms;
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Lane lane;
        const int first = place(4 * lane.quad + i % 2, lane.group) ^ int(sizeof(T)) * 8 * h;
        terms(h, i) = at_shared<T>(tile + first + int(sizeof(T)) * kTile * (i & 2));
      }
    return terms;
  }
  struct Reader {
    __device__ __forceinline__ Terms left(int tile, bool transposed) const {
      return transposed ? columns(tile) : rows(tile);
    }
    __device__ __forceinline__ Terms right(int tile, bool transposed) const {
      return transposed ? rows(tile) : columns(tile);
    }
    /// Of tiles that follow each other, all of them transposed or none.
    template <int kCount>
    __device__ __forceinline__ void left(Terms (&terms)[kCount], int tile, bool transposed) const {
#pragma unroll
      for (int n = 0; n < kCount; ++n) terms[n] = left(tile + n * kBytes, transposed);
    }
    template <int kCount>
    __device__ __forceinline__ void right(Terms (&terms)[kCount], int tile, bool transposed) const {
#pragma unroll
      for (int n = 0; n < kCount; ++n) terms[n] = right(tile + n * kBytes, transposed);
    }
  };

  struct Sum {
    WarpTile<T> sum;
    __device__ __forceinline__ void multiply_add(const Terms& a, const Terms& b) {
#pragma unroll
      for (int k = 0; k < 2; ++k)
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int s = 0; s < 2; ++s) mma_f64(sum.sum[n] + 2 * h, a.half[k].value[h][s], b.half[k].value[n][s]);
    }
    __device__ __forceinline__ WarpTile<T> total() const { return sum; }
  };
};

/// A float is a pair of numbers of float16, (high + low) scale: each has 11 bits, as many as tf32 has, and tensor cores
/// multiply them at twice the rate of that. The scale is a power of two for each tile, by which its largest element is
/// near 2^15, or what is left of it where all was divided by a number: elements down to 2^-16 of that keep all 22 bits,
/// and smaller ones lose no more than 2^-39 of it. A tile of NaN, or with an infinite element, has the scale 1. The
/// scale stands there four times: tiles begin at multiples of 16 bytes, and are copied whole.
///
/// A tile's four parts of 8 x 8 follow each other, row by row: 128 bytes each, all banks once. ldmatrix reads a part,
/// and so does a warp that reads or writes its pairs of neighbours.
template <> struct Tiles<float> {
  static constexpr int kLow = 2 * kTileSize, kScale = 4 * kTileSize, kBytes = tile_bytes(sizeof(float));
  static constexpr int kPart = 2 * 8 * 8;  // bytes

  static __device__ int place(unsigned row, unsigned column) {
    return int(kPart * (row / 8 * 2 + column / 8) + 16 * (row % 8) + 2 * (column % 8));
  }

  /// Of the pairs (high, low) of two neighbours the one that `which` names.
  static __device__ __forceinline__ float join(uint32_t high, uint32_t low, int which, float scale) {
    return (half_of(high, which) + half_of(low, which)) * scale;
  }

  template <class Tile> static __device__ float element(const Tile& tile, int row, int column) {
    const int at = place(row, column);
    return join(tile.template at<uint16_t>(at), tile.template at<uint16_t>(at + kLow), 0,
                tile.template at<float>(kScale));
  }

  /// Where a lane's four pairs of neighbours are, in the order of WarpTile's: at constant offsets from the first one.
  template <class Tile> class Pairs {
    Tile first_;

   public:
    __device__ explicit Pairs(const Tile& tile) : first_(tile + place(Lane().group, 2 * Lane().quad)) {}
    template <class U> __device__ U& at(int pair, int offset) const {
      return first_.template at<U>(offset + kPart * (pair % 2 * 2 + pair / 2));
    }
  };

  /// The pairs of a lane's four pairs of neighbours.
  struct Packed {
    uint32_t high[4], low[4];
    float scale;
  };
  template <class Tile> static __device__ __forceinline__ Packed read_packed(const Tile& tile) {
    Packed packed;
    packed.scale = tile.template at<float>(kScale);
    const Pairs<Tile> pairs(tile);
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      packed.high[pair] = pairs.template at<uint32_t>(pair, 0);
      packed.low[pair] = pairs.template at<uint32_t>(pair, kLow);
    }
    return packed;
  }
  static __device__ __forceinline__ WarpTile<float> unpack(const Packed& packed) {
    WarpTile<float> result;
    int pair = 0;
    result.for_each_pair([&](float* a, int, int) {
      a[0] = join(packed.high[pair], packed.low[pair], 0, packed.scale);
      a[1] = join(packed.high[pair], packed.low[pair], 1, packed.scale);
      ++pair;
    });
    return result;
  }
  template <class Tile> static __device__ __forceinline__ WarpTile<float> read(const Tile& tile) {
    return unpack(read_packed(tile));
  }
  static __device__ __forceinline__ Packed pack(WarpTile<float>& result) {
    uint32_t largest = 0;
    result.for_each([&](float a, int, int) {
      const uint32_t size = __float_as_uint(a) & 0x7fffffffu;  // numbers are ordered as their bits, NaN being largest
      largest = size > largest ? size : largest;
    });
    largest = __reduce_max_sync(0xffffffffu, largest);
    const Scale<float> scale(__uint_as_float(largest));
    Packed packed;
    packed.scale = scale.down;
    int pair = 0;
    result.for_each_pair([&](const float* a, int, int) {
      const SplitPair split(a[0] * scale.up, a[1] * scale.up);
      packed.high[pair] = split.high;
      packed.low[pair++] = split.low;
    });
    return packed;
  }
  static __device__ __forceinline__ Packed pack_divided(WarpTile<float>& result, float divisor) {
    Packed packed = pack(result);
    packed.scale /= divisor;
    return packed;
  }
  template <class Tile> static __device__ __forceinline__ void write(const Tile& to, Packed packed, bool symmetric) {
    if (symmetric) mirror(packed.high), mirror(packed.low);
    const Lane lane;
    if (lane.group == 0) to.template at<float>(kScale + int(sizeof(float)) * lane.quad) = packed.scale;
    const Pairs<Tile> pairs(to);
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      pairs.template at<uint32_t>(pair, 0) = packed.high[pair];
      pairs.template at<uint32_t>(pair, kLow) = packed.low[pair];
    }
  }

  static __device__ __forceinline__ Packed transposed(const Packed& packed) {
    Packed result;
    result.scale = packed.scale;
#pragma unroll
    for (int part = 0; part < 4; ++part) {  // column by column
      result.high[part] = transpose_matrix(packed.high[part % 2 * 2 + part / 2]);
      result.low[part] = transpose_matrix(packed.low[part % 2 * 2 + part / 2]);
    }
    return result;
  }

  /// What is under the diagonal becomes what is above it, in parts of 8 x 8, column by column.
  static __device__ __forceinline__ void mirror(uint32_t (&parts)[4]) {
    const Lane lane;
    parts[1] = transpose_matrix(parts[2]);
#pragma unroll
    for (int part = 0; part < 4; part += 3) {
      const uint32_t below = transpose_matrix(parts[part]);
      if (lane.group > 2 * lane.quad) parts[part] = (parts[part] & 0xffff0000u) | (below & 0xffffu);
      if (lane.group > 2 * lane.quad + 1) parts[part] = (parts[part] & 0xffffu) | (below & 0xffff0000u);
    }
  }

  /// Of each of a tile's four parts of 8 x 8 a pair of neighbours in the direction of the terms: (g, 2 q) and
  /// (g, 2 q + 1). Parts are in the order of mma's operands.
  struct Terms {
    uint32_t high[4], low[4];
    float scale;

    /// f(h, term, value) for those of vectors g and g + 8, of the left factor.
    template <class F> __device__ __forceinline__ void for_each(const F& f) {
#pragma unroll
      for (int v = 0; v < 4; ++v)
#pragma unroll
        for (int which = 0; which < 2; ++which)
          f(v % 2, 8 * (v / 2) + 2 * Lane().quad + which, join(high[v], low[v], which, scale));
    }
  };
  /// Lane l has the address of row l % 8 of part l / 8, whose rows of memory are the tile's own: parts that follow each
  /// other lie below each other, or beside each other.
  class Reader {
    int below_, beside_;

   public:
    __device__ Reader() {
      const int lane = Lane().number, odd = 8 * (lane / 8 % 2), second = 8 * (lane / 16);
      below_ = opaque(place(lane % 8 + odd, second)), beside_ = opaque(place(lane % 8 + second, odd));
    }
    __device__ __forceinline__ Terms left(int tile, bool transposed) const {
      return load(tile, transposed ? beside_ : below_, transposed);
    }
    __device__ __forceinline__ Terms right(int tile, bool transposed) const {
      return load(tile, transposed ? beside_ : below_, !transposed);
    }
    /// Of tiles that follow each other, all of them transposed or none: branches, for several operands are chosen
    /// without them at the expense of registers.
    template <int kCount>
    __device__ __forceinline__ void left(Terms (&terms)[kCount], int tile, bool transposed) const {
      transposed ? load(terms, tile, beside_, true) : load(terms, tile, below_, false);
    }
    template <int kCount>
    __device__ __forceinline__ void right(Terms (&terms)[kCount], int tile, bool transposed) const {
      transposed ? load(terms, tile, beside_, false) : load(terms, tile, below_, true);
    }

   private:
    static __device__ __forceinline__ Terms load(int tile, int place, bool by_columns) {
      Terms terms;
      load_matrix_x4(terms.high, &at_shared<uint16_t>(tile + place), by_columns);
      load_matrix_x4(terms.low, &at_shared<uint16_t>(tile + place + kLow), by_columns);
      terms.scale = at_shared<float>(tile + kScale);
      return terms;
    }
    template <int kCount>
    static __device__ __forceinline__ void load(Terms (&terms)[kCount], int tile, int place, bool by_columns) {
#pragma unroll
      for (int n = 0; n < kCount; ++n) terms[n] = load(tile + n * kBytes, place, by_columns);
    }
  };

  struct Sum {
    WarpTile<float> sum;
    __device__ __forceinline__ void multiply_add(const Terms& a, const Terms& b) {
      const float scale = a.scale * b.scale;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const uint32_t b_high[2] = {b.high[2 * n], b.high[2 * n + 1]}, b_low[2] = {b.low[2 * n], b.low[2 * n + 1]};
        float terms[4] = {};  // rounded towards zero: the large products come last, and those of 16 terms are few
        mma_f16(terms, a.high, b_low);
        mma_f16(terms, a.low, b_high);
        mma_f16(terms, a.high, b_high);
#pragma unroll
        for (int v = 0; v < 4; ++v) sum.sum[n][v] += scale * terms[v];
      }
    }
    __device__ __forceinline__ WarpTile<float> total() const { return sum; }
  };

  /// The same three products by a warpgroup, for which warpgroup_wait() waits. The right operand's low halves are
  /// kToLow bytes after what is described.
  template <bool kByTerms, int kToLow, class Sums>
  static __device__ __forceinline__ void begin_products(Sums& terms, const Terms& a, uint64_t high) {
    warpgroup_begin();
    multiply_warpgroup<false, kByTerms>(terms, a.high, high + in_description(kToLow));
    multiply_warpgroup<true, kByTerms>(terms, a.low, high);
    multiply_warpgroup<true, kByTerms>(terms, a.high, high);
    warpgroup_commit();
  }
};

/// Element (i, j) of a symmetric matrix whose tiles are where(place).
template <class T, class Where> __device__ T element_of(const Where& where, int i, int j) {
  const TilePlace at{i / kTile, j / kTile};
  return at.I <= at.J ? Tiles<T>::element(where(at), i % kTile, j % kTile)
                      : Tiles<T>::element(where(TilePlace{at.J, at.I}), j % kTile, i % kTile);
}

}  // namespace isqrt::cuda
