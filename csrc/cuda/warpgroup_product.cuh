// Products of a batch of matrices in global memory by warpgroups (wgmma), which Hopper alone has: tensor cores read the
// right operand by themselves, in the course of time, and twice as fast as by mma.sync.
//
// A block computes 8 x 8 tiles of the upper triangle of a result, each of its four warpgroups 4 x 4 of them. Sums of 16
// terms are scaled and added to others as everywhere: a warpgroup does that while tensor cores work for the others.
#pragma once
#include "grid_product.cuh"

namespace isqrt::cuda {

template <bool kDual> class WarpgroupProductBlock {
  using Tiles = cuda::Tiles<float>;
  using Sums = WarpgroupSums<kWarpgroupSide>;
  static constexpr int kLaneSums = sizeof(Sums) / sizeof(float);
  static constexpr int kNumbers = kDual ? 2 : 1;             // of an operand, and of the result
  static constexpr int kGroup = GridShape::kGroup;           // tiles of a warpgroup in each direction
  static constexpr int kTileSums = kLaneSums / kGroup;       // of a lane
  static constexpr int kDepth = kDual ? 2 : 4, kStages = 3;  // in terms

  /// Of a term of one number: the left operand's tiles as they are; and of the right operand's two panels of four tiles
  /// the high halves of all, the low ones, and the scales. Each part begins where all banks do.
  static constexpr int kPanelHalf = kGroup * Tiles::kLow, kPanelScales = 2 * kPanelHalf,
                       kPanelBytes = kPanelScales + Tiles::kPart;

 public:
  static constexpr int kSide = 2 * kGroup, kThreads = kWarpgroup * kSide * kSide / (kGroup * kGroup);

 private:
  static constexpr int kRight = kSide * Tiles::kBytes, kTermBytes = kRight + 2 * kPanelBytes;
  static constexpr int kStageBytes = kDepth * kNumbers * kTermBytes;
  static_assert(kTermBytes % Tiles::kPart == 0);

 public:
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static_assert(kNumbers * kLaneSums * kThreads * int(sizeof(float)) <= kSharedBytes);

  __device__ WarpgroupProductBlock(const GridProducts& products, const GridShape& shape)
      : products_(products), shape_(shape), own_(GridShare::own(products, shape, kSide)) {
    // From one lane, so that it is known to be the same in all.
    const int warp = __shfl_sync(0xffffffffu, int(threadIdx.x) / kWarp, 0), group = warp / kGroup;
    first_ = {own_.first.I + group / 2 * kGroup, own_.first.J + group % 2 * kGroup};
    row_ = first_.I + warp % kGroup;
    wants_value_ = products.product[own_.product].result[kNumbers - 1].upper;
    left_ = shared_begin() + (row_ - own_.first.I) * Tiles::kBytes;
    right_ = shared_begin() + kRight + group % 2 * kPanelBytes;
  }

  __device__ void run() {
    Sums sum[kNumbers] = {};
    const bool idle = first_.I > first_.J || first_.J >= shape_.rows();
    constexpr int kAhead = (kStages - 1) * kDepth, kLastStage = (kStages - 1) * kStageBytes;
    int stage = kStageBytes;  // of terms from K on; the one before it is loaded
#pragma unroll 1
    for (int K = -kAhead; K < shape_.rows(); K += kDepth) {
      if (K >= 0) {
        copy_async_wait<kStages - 2>();
        fence_for_warpgroups();
        __syncthreads();  // what was asked for first is there, and nobody reads the stage before any more
      }
      start_loading(K + kAhead, stage > 0 ? stage - kStageBytes : kLastStage);
      if (!idle)
#pragma unroll 1
        for (int k = K < 0 ? kDepth : 0; k < kDepth && K + k < shape_.rows(); ++k) {
          const int at = stage + k * kNumbers * kTermBytes;
          is_by_rows(K + k, first_.J) ? multiply<false>(sum, K + k, at) : multiply<true>(sum, K + k, at);
        }
      stage = stage < kLastStage ? stage + kStageBytes : 0;
    }
    let_next_kernel_come();  // see GridProductBlock::run()
    __syncthreads();
    if (!idle) store(sum);
  }

 private:
  /// Whether the tiles of term K of a panel of the right operand, of which this vector is one, are those whose rows are
  /// vectors, below the diagonal of R: tiles of its transpose. Those on the diagonal are stored in full.
  static __device__ bool is_by_rows(int K, int vector) { return K / kGroup > vector / kGroup; }

  /// Terms from K on: 64 threads for each vector's tile, a packet each. What is read as a vector beyond the last one is
  /// that; a panel of nothing else is not read.
  __device__ __forceinline__ void start_loading(int K, int stage) const {
    constexpr int kPackets = 2 * Tiles::kLow / kPacketBytes;  // of a tile
    static_assert(kThreads == kSide * kPackets);
    const int thread = int(opaque(threadIdx.x)), packet = thread % kPackets, v = thread / kPackets;
    const GridProduct& product = products_.product[own_.product];
    const int last = shape_.rows() - 1;
    const auto clamped = [&](int vector) { return vector < last ? vector : last; };
    const auto copy = [&](char* A, int number, int to, int to_scale) {
      const OtherTile from = shape_.numbered<float>(A, own_.sample, number);
      copy_async<kPacketBytes>(&at_shared<char>(to), &from.template at<char>(kPacketBytes * packet));
      if (packet == 0)
        copy_async<int(sizeof(float))>(&at_shared<char>(to_scale), &from.template at<char>(Tiles::kScale));
    };
    // Where a packet of a panel goes: to the eight rows of a part, which are vectors or terms.
    const int low = packet / (kPackets / 2), below = packet / 16 % 2, beside = packet / 8 % 2, row = packet % 8;
    const int panel = shared_begin() + stage + kRight + v / kGroup * kPanelBytes;
    const int part = panel + low * kPanelHalf + v % kGroup * Tiles::kLow + kPacketBytes * row;
    const int by_rows = part + kToNextVectors * below + kToNextTerms * beside,
              by_terms = part + kToNextVectors * beside + kToNextTerms * below;
#pragma unroll 1
    for (int n = 0; n < kDepth * kNumbers && K + n / kNumbers <= last; ++n) {
      const int term = K + n / kNumbers, number = n % kNumbers, at = n * kTermBytes;
      if (own_.first.I + v / kGroup * kGroup <= last) {
        const int vector = clamped(own_.first.I + v), to = shared_begin() + stage + at + v * Tiles::kBytes;
        copy(product.left[number].upper, shape_.number(term < vector ? term : vector, term < vector ? vector : term),
             to + kPacketBytes * packet, to + Tiles::kScale);
      }
      if (own_.first.J + v / kGroup * kGroup <= last) {
        const int vector = clamped(own_.first.J + v);
        const auto& [upper, transpose] = product.right[number];
        const bool rows = is_by_rows(term, vector);
        copy(rows ? transpose : upper, rows ? shape_.number(vector, term) : shape_.number(term, vector),
             at + (rows ? by_rows : by_terms), panel + at + kPanelScales + v % kGroup * int(sizeof(float)));
      }
    }
    copy_async_commit();
  }

  template <bool kByTerms> __device__ __forceinline__ void multiply(Sums (&sum)[kNumbers], int K, int stage) const {
    constexpr int kValue = kNumbers - 1;  // as in GridProductBlock
    const bool above = K <= row_;
    typename Tiles::Terms a[1];
    const typename Tiles::Reader reader;  // anew each time: its registers are needed
    reader.left(a, left_ + stage + kValue * kTermBytes, above);
    if constexpr (kDual) add<kByTerms>(sum[0], a[0], right_ + stage + kTermBytes);
    if (!kDual || wants_value_) add<kByTerms>(sum[kValue], a[0], right_ + stage);
    if constexpr (kDual) {
      reader.left(a, left_ + stage, above);
      add<kByTerms>(sum[0], a[0], right_ + stage);
    }
  }

  /// As Sum::multiply_add, with four tiles.
  template <bool kByTerms>
  static __device__ __forceinline__ void add(Sums& sum, const typename Tiles::Terms& a, int panel) {
    Sums terms;
    Tiles::begin_products<kByTerms, kPanelHalf>(terms, a, describe_parts(panel, kToNextTerms, kToNextVectors));
    warpgroup_wait(terms, a.high, a.low);
    const float4 scales = at_shared<float4>(panel + kPanelScales);
    const float scale[] = {a.scale * scales.x, a.scale * scales.y, a.scale * scales.z, a.scale * scales.w};
#pragma unroll
    for (int i = 0; i < kLaneSums; ++i) sum[i] += scale[i / kTileSums] * terms[i];
    opaque(sum);  // otherwise terms of several products wait in registers
  }

  /// One tile after the other, in few instructions: what runs once waits for them. Therefore sums lie in shared memory.
  __device__ __forceinline__ void store(const Sums (&sum)[kNumbers]) const {
    float* const own = shared_memory<float>() + threadIdx.x;
#pragma unroll
    for (int number = 0; number < kNumbers; ++number)
#pragma unroll
      for (int i = 0; i < kLaneSums; ++i) own[(number * kLaneSums + i) * kThreads] = sum[number][i];

    const GridProduct& product = products_.product[own_.product];
    const int tiles = wants_value_ ? kNumbers * kGroup : kGroup;
    const auto result = [&](int tile) {
      return GridResult<float, true>{shape_, product, tile / kGroup, own_.sample, {row_, first_.J + tile % kGroup}};
    };
    constexpr int kAddends = GridProduct::kAddends;
    typename Tiles::Packed next[kAddends] = {};
    const auto ask_for = [&](int tile) {
#pragma unroll
      for (int a = 0; a < kAddends; ++a)
        if (tile < tiles && result(tile).adds(a)) next[a] = result(tile).added(a);
    };
    ask_for(0);
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      typename Tiles::Packed added[kAddends];
#pragma unroll
      for (int a = 0; a < kAddends; ++a) added[a] = next[a];
      ask_for(tile + 1);
      WarpTile<float> total;
#pragma unroll
      for (int i = 0; i < kTileSums; ++i) total.sum[i / 4][i % 4] = own[(tile * kTileSums + i) * kThreads];
      total = result(tile).scaled(total);
#pragma unroll
      for (int a = 0; a < kAddends; ++a)
        if (result(tile).adds(a)) result(tile).add(total, a, added[a]);
      result(tile).store(total);
    }
  }

  /// From part to part of a panel.
  static constexpr int kToNextTerms = Tiles::kPart, kToNextVectors = 2 * Tiles::kPart;

  const GridProducts& products_;
  const GridShape& shape_;
  const GridShare own_;
  TilePlace first_;  // of this warpgroup's tiles
  bool wants_value_;
  int row_;           // of this warp's
  int left_, right_;  // where its vector, and its panel, are in the first stage
};

template <bool kDual>
__global__ void __launch_bounds__(WarpgroupProductBlock<kDual>::kThreads, 1)
    warpgroup_product_kernel(const __grid_constant__ GridProducts products, const __grid_constant__ GridShape shape) {
  wait_for_kernels_before(false);
  if constexpr (kHasWarpgroups)
    WarpgroupProductBlock<kDual>(products, shape).run();
  else
    require_warpgroups();
}

}  // namespace isqrt::cuda
