// The Engine of normalization.h on one block of four warpgroups (wgmma), in float32, for up to 64 channels: tensor
// cores multiply twice as fast as by mma.sync, read the right operand by themselves, and a product takes so few of them
// that one block should be faster than several, which would have to send each other their results.
//
// Matrices are stored, and computed, in full: 64 rows are what an instruction has. Then T is not symmetric, as rounded
// Y and Z commute only nearly, and U = T' is T read across, see newton_schulz.h.
#pragma once
#include "program_engine.cuh"

namespace isqrt::cuda {

/// 64 x 64 pairs: all high halves, all low ones, and a scale for each tile. Parts of 8 x 8 lie row by row, so that
/// those of any 64 or 32 vectors are equally far from each other, be the vectors rows or columns.
struct WholeMatrix {
  using Tiles = cuda::Tiles<float>;
  static constexpr int kRows = kWarpgroupSide / kTile;  // of tiles
  static constexpr int kToNextColumns = Tiles::kPart, kToNextRows = kWarpgroupSide / 8 * Tiles::kPart,
                       kHalf = kWarpgroupSide * kWarpgroupSide * 2, kScales = 2 * kHalf,
                       kScale = Tiles::kBytes - Tiles::kScale, kBytes = kScales + kRows * kRows * kScale;
  /// Tiles that a warpgroup computes together.
  static constexpr int kColumns = 2;

  /// As if it were one of Tiles<float>.
  struct Tile {
    int begin, scale;
    template <class U> __device__ U& at(int offset) const {
      if (offset >= Tiles::kScale) return at_shared<U>(scale + offset - Tiles::kScale);
      const int row = offset % Tiles::kLow / (2 * Tiles::kPart), beside = offset % (2 * Tiles::kPart);
      return at_shared<U>(begin + offset / Tiles::kLow * kHalf + row * kToNextRows + beside);
    }
    __device__ Tile operator+(int offset) const { return {begin + offset, scale}; }  // within a part
  };

  /// Channels of whole pairs of tiles: what is beyond C is zero.
  static __device__ int padded(int channels) {
    return (channels + kColumns * kTile - 1) / (kColumns * kTile) * (kColumns * kTile);
  }
  static __device__ int bytes(int) { return kBytes; }
  static __device__ int high(int first, int I, int J) { return first + 2 * I * kToNextRows + 2 * J * kToNextColumns; }
  static __device__ int scale(int first, int I, int J) { return first + kScales + (kRows * I + J) * kScale; }
  static __device__ Tile tile(int first, const TilePlace& at) {
    return {high(first, at.I, at.J), scale(first, at.I, at.J)};
  }
  /// And its mirror image.
  static __device__ __forceinline__ void write(int first, const TilePlace& at, const Tiles::Packed& packed, bool) {
    Tiles::write(tile(first, at), packed, at.I == at.J);
    if (at.I != at.J) Tiles::write(tile(first, {at.J, at.I}), Tiles::transposed(packed), false);
  }

  /// Of a left operand, whose rows are vectors: lane l has the address of row l % 8 of part l / 8, column by column.
  class Reader {
    int own_;

   public:
    __device__ Reader()
        : own_(opaque(Lane().number / 8 % 2 * kToNextRows + Lane().number / 16 * kToNextColumns +
                      Lane().number % 8 * kPacketBytes)) {}
    __device__ __forceinline__ Tiles::Terms left(int tile, int scale) const {
      Tiles::Terms terms;
      load_matrix_x4(terms.high, &at_shared<uint16_t>(tile + own_), false);
      load_matrix_x4(terms.low, &at_shared<uint16_t>(tile + kHalf + own_), false);
      terms.scale = at_shared<float>(scale);
      return terms;
    }
  };
};

class WarpgroupEngine : public ProgramEngine<WarpgroupEngine, WholeMatrix> {
  friend class ProgramEngine<WarpgroupEngine, WholeMatrix>;
  using Base = ProgramEngine<WarpgroupEngine, WholeMatrix>;
  using Sums = WarpgroupSums<WholeMatrix::kColumns * kTile>;
  using Previous = Tiles::Packed[WholeMatrix::kColumns];
  static constexpr int kTileSums = sizeof(Sums) / sizeof(float) / WholeMatrix::kColumns;  // of a lane

 public:
  using Reader = WholeMatrix::Reader;
  static constexpr int kGroups = 4, kThreads = kGroups * kWarpgroup;

  __device__ WarpgroupEngine(int channels, const Program& program)
      : Base(channels, program), group_(warp() / WholeMatrix::kRows), row_(warp() % WholeMatrix::kRows) {}

  template <class View> __device__ void write(const Result& result, const View& view, float factor = 1) {
    if (meets_) meet();
    for_own_tiles([&](const Place& own) { write_tile(result, own, view, factor); });
  }

  /// Means of the columns of factor times the result, whose alpha is 0: a warp has 16 of them.
  template <class View> __device__ void write_means(const Result& result, const View& view, float factor) {
    if (meets_) meet();
    const Lane lane;
    for (int J = warp(); J < tiles_; J += warps()) {
      float sum[2][2] = {};
#pragma unroll 1
      for (int I = 0; I < tiles_; ++I) {
        const WarpTile<float> tile = Tiles::read(Base::tile(result.A, {I, J}));
#pragma unroll
        for (int v = 0; v < 8; ++v) sum[v / 4][v % 2] += tile.sum[v / 4][v % 4];
      }
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
#pragma unroll
          for (int other = 4; other < kWarp; other *= 2) sum[n][e] += __shfl_xor_sync(0xffffffffu, sum[n][e], other);
          const int j = kTile * J + 8 * n + 2 * lane.quad + e;
          if (lane.group == 0 && j < channels_)
            store_number(view.data + j, factor * result.beta * (sum[n][e] / float(channels_)));
        }
    }
  }

 private:
  /// The products of a stage. A warpgroup has two columns of tiles of one, each of its warps a row of them.
  __device__ __forceinline__ void compute(const Stage& stage, const Reader& reader) {
    const int halves = tiles_ / WholeMatrix::kColumns, all = int(stage.count) * halves;  // 1 or 2 halves
    if (stage.meets) meet();
#pragma unroll 1
    for (int n = group_; n < all; n += kGroups) {
      const Operation o = program_.operation[stage.first + (n >> (halves - 1))];
      const int J = n & (halves - 1) ? WholeMatrix::kColumns : 0;
      const bool stores = row_ < tiles_;
      Previous previous = {};  // asked for before products are waited for
      if (stores && o.added != Operation::kNone)
#pragma unroll
        for (int t = 0; t < WholeMatrix::kColumns; ++t)
          previous[t] = Tiles::read_packed(tile(at(int(o.added)), {row_, J + t}));
      Sums sum = {};
#pragma unroll 1
      for (unsigned term = 0; term < o.terms; ++term) {
        const uint32_t factor = term ? o.B1 : o.B0;
        const int A = at(int(term ? o.A1 : o.A0)).first, B = at(int(factor % Operation::kAcross)).first;
        factor < Operation::kAcross ? multiply<true>(sum, A, B, J, reader) : multiply<false>(sum, A, B, J, reader);
      }
      if (stores) store(o, sum, previous, J);
    }
  }

  /// sum += A B, or A B' where not kByTerms, in the columns of tiles from J on.
  template <bool kByTerms>
  __device__ __forceinline__ void multiply(Sums& sum, int A, int B, int J, const Reader& reader) const {
    constexpr int kTerms = kByTerms ? WholeMatrix::kToNextRows : WholeMatrix::kToNextColumns,
                  kVectors = kByTerms ? WholeMatrix::kToNextColumns : WholeMatrix::kToNextRows,
                  kNextScales = (kByTerms ? WholeMatrix::kRows : 1) * WholeMatrix::kScale,
                  kNextScale = (kByTerms ? 1 : WholeMatrix::kRows) * WholeMatrix::kScale;
    const int rows = tile_rows(channels_), row = row_ < tiles_ ? row_ : 0;
    int left = WholeMatrix::high(A, row, 0), left_scale = WholeMatrix::scale(A, row, 0),
        scales = kByTerms ? WholeMatrix::scale(B, 0, J) : WholeMatrix::scale(B, J, 0);
    uint64_t right =
        describe_parts(kByTerms ? WholeMatrix::high(B, 0, J) : WholeMatrix::high(B, J, 0), kTerms, kVectors);
    Tiles::Terms next = reader.left(left, left_scale);
#pragma unroll 2
    for (int K = 0; K < rows; ++K) {
      const Tiles::Terms a = next;
      Sums terms;
      Tiles::begin_products<kByTerms, WholeMatrix::kHalf>(terms, a, right);
      // On their way meanwhile; the last ones once more, for a branch would make products wait for each other.
      if (K + 1 < rows) left += 2 * WholeMatrix::kToNextColumns, left_scale += WholeMatrix::kScale;
      next = reader.left(left, left_scale);
      float scale[WholeMatrix::kColumns];
#pragma unroll
      for (int t = 0; t < WholeMatrix::kColumns; ++t) scale[t] = a.scale * at_shared<float>(scales + kNextScale * t);
      right += in_description(2 * kTerms), scales += kNextScales;
      warpgroup_wait(terms, a.high, a.low);
#pragma unroll
      for (int i = 0; i < WholeMatrix::kColumns * kTileSums; ++i) sum[i] += scale[i / kTileSums] * terms[i];
    }
  }

  __device__ __forceinline__ void store(const Operation& o, const Sums& sum, const Previous& previous, int J) const {
#pragma unroll
    for (int t = 0; t < WholeMatrix::kColumns; ++t) {
      WarpTile<float> result;
#pragma unroll
      for (int i = 0; i < kTileSums; ++i) result.sum[i / 4][i % 4] = sum[kTileSums * t + i];
      const WarpTile<float> added = Tiles::unpack(previous[t]);
      result.combine(added, [&](float& a, float d) { a = o.alpha * d + o.beta * a; });
      Tiles::write(tile(at(int(o.to)), {row_, J + t}), Tiles::pack(result), false);
    }
  }

  __device__ __forceinline__ void meet() {
    meets_ = false;
    fence_for_warpgroups();
    __syncthreads();
  }

  int group_, row_;  // this warp's row of tiles
};

}  // namespace isqrt::cuda
