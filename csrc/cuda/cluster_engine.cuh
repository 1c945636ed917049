// The Engine of normalization.h on a cluster of thread blocks, or on one block, in float32: each block has all matrices
// of the sample. The iteration is a Program. The tiles of its products are dealt out to the warps of all blocks, and
// results go into the matrices of each; what is done elementwise each block does for itself. Each tile is the same sum
// in any case: results do not depend on who computes them.
#pragma once
#include "program_engine.cuh"

namespace isqrt::cuda {

/// As many as have a tile each, and more than one tile each where there are many.
constexpr int kMostClusterWarps = 12, kMostClusterBlocks = 8;
ISQRT_FN constexpr int cluster_threads(int channels) {
  const int tiles = tile_count(channels);
  return kWarp * (tiles < kMostClusterWarps ? tiles : kMostClusterWarps);
}

/// kInPlace: without spare matrices, see ProgramRecorder.
template <bool kInPlace> class ClusterEngine : public ProgramEngine<ClusterEngine<kInPlace>, UpperTiles<float>> {
  friend class ProgramEngine<ClusterEngine, UpperTiles<float>>;
  using T = float;
  using Base = ProgramEngine<ClusterEngine, UpperTiles<T>>;
  using Base::channels_, Base::tiles_, Base::program_, Base::meets_, Base::tile, Base::warp, Base::warps;
  using Place = TilePlace;
  using Tiles = cuda::Tiles<T>;

 public:
  using typename Base::Result;
  using Reader = Tiles::Reader;
  using Base::at;

  __device__ ClusterEngine(int channels, const Program& program)
      : Base(channels, program),
        blocks_(int(cluster_size())),
        rank_(int(cluster_rank())),
        block_share_(opaque((1 << 16) / blocks_)),
        worker_(warp() * blocks_ + rank_),
        share_(opaque((1 << 16) / tile_count(channels) + 1)) {
    if constexpr (kHasClusters)
      if (blocks_ > 1) {
        if (threadIdx.x == 0)
          for (int phase = 0; phase < 2; ++phase) mbarrier_init(barrier(phase), unsigned(blocks_ * warps()));
        cluster_arrive();
      }
  }

  /// Each warp writes tiles that it has computed, which it need not wait for.
  template <class View> __device__ void write(const Result& result, const View& view, T factor = 1) {
    __syncwarp();
#pragma unroll 1
    for (int t = (worker_ < result.A.dealt ? workers() : 0) + worker_ - result.A.dealt; t < tile_count(channels_);
         t += workers())
      Base::write_tile(result, Place::numbered(t), view, factor);
    if (meets_ && blocks_ > 1) meet();  // other blocks still write to this one's memory
  }
  template <class View> __device__ void write_means(const Result& result, const View& view, T factor) {
    if (meets_) meet();
    Base::write_means(result, view, factor, worker_, workers());
  }

 private:
  __device__ int workers() const { return blocks_ * warps(); }

  /// A tile of a product.
  struct Work {
    Operation o;
    Place own;
  };
  __device__ __forceinline__ Work work(const Stage& stage, int n) const {
    const int product = n * share_ >> 16;  // n / count
    return {program_.operation[stage.first + product], Place::numbered(n - product * tile_count(channels_))};
  }

  /// Results in registers, the last one first: at constant places, or they would lie in local memory.
  class Waiting {
    Tiles::Packed result_[Stage::kMostWaiting] = {};

   public:
    __device__ __forceinline__ void push(const Tiles::Packed& result) {
#pragma unroll
      for (int n = Stage::kMostWaiting - 1; n > 0; --n) result_[n] = result_[n - 1];
      result_[0] = result;
    }
    __device__ __forceinline__ Tiles::Packed pop() {
      const Tiles::Packed first = result_[0];
#pragma unroll
      for (int n = 1; n < Stage::kMostWaiting; ++n) result_[n - 1] = result_[n];
      return first;
    }
  };

  /// The products of a stage, in each block of the cluster. Consecutive tiles go to different blocks.
  __device__ __forceinline__ void compute(const Stage& stage, const Reader& reader) {
    const int all = int(stage.count) * tile_count(channels_);
    Work next = work(stage, worker_ < all ? worker_ : 0);  // found out before it is waited for the other warps
    if (stage.meets) meet();
    Waiting waiting;
    const bool waits = kInPlace && stage.waits;
    const auto put = [&](const Work& work, const Tiles::Packed& result) {
      const OwnTile to = tile(at(work.o.to), work.own);
      Tiles::write(to, result, work.own.I == work.own.J);
      if (blocks_ > 1) send(to);
    };
    int n = worker_;
#pragma unroll 1
    while (n < all) {
      const Work here = next;
      const Operation& o = here.o;
      const Place& own = here.own;
      WarpTile<T> previous;
      if (o.added != Operation::kNone) previous = Tiles::read(tile(at(o.added), own));
      Tiles::Sum sum;
#pragma unroll 1
      for (unsigned term = 0; term < o.terms; ++term)
        multiply(sum, at(term ? o.A1 : o.A0).first, at(term ? o.B1 : o.B0).first, own, reader);
      WarpTile<T> result = sum.total();
      result.combine(previous, [&](T& a, T d) { a = o.alpha * d + o.beta * a; });
      const Tiles::Packed packed = Tiles::pack(result);
      waits ? waiting.push(packed) : put(here, packed);
      n += workers();
      if (n < all) next = work(stage, n);
    }
    if (waits) {
      meet();
#pragma unroll 1
      for (n -= workers(); n >= 0; n -= workers()) put(work(stage, n), waiting.pop());
    }
    expected_ += (all - ((all + blocks_ - 1 - rank_) * block_share_ >> 16)) * Tiles::kBytes;  // from other blocks
  }

  /// sum += A B in one tile.
  __device__ __forceinline__ void multiply(Tiles::Sum& sum, int A, int B, const Place& own,
                                           const Reader& reader) const {
    int left = tile(A, 0, own.I), right = tile(B, 0, own.J);
#pragma unroll 2  // while two products are computed, the operands of the next ones are on their way
    for (int K = 0; K < tiles_; ++K) {
      sum.multiply_add(reader.left(left, K < own.I), reader.right(right, K > own.J));
      left += (K < own.I ? 1 : K + 1) * Tiles::kBytes;  // along a column as far as the diagonal, then along its row
      right += (K < own.J ? 1 : K + 1) * Tiles::kBytes;
    }
  }

  /// Copies a tile to all other blocks, in packets.
  __device__ __forceinline__ void send(const OwnTile& tile) const {
    if constexpr (kHasClusters) {
      constexpr int kRound = kWarp * kPacketBytes, kRounds = (Tiles::kBytes + kRound - 1) / kRound;
      struct alignas(kPacketBytes) Packet {
        uint32_t words[kPacketBytes / 4];
      } packets[kRounds];
      const auto for_each_packet = [&](const auto& f) {
#pragma unroll
        for (int round = 0; round < kRounds; ++round) {
          const int offset = round * kRound + Lane().number * kPacketBytes;
          if (offset < Tiles::kBytes) f(packets[round], tile.at<Packet>(offset));
        }
      };
      __syncwarp();
      for_each_packet([](Packet& packet, const Packet& here) { packet = here; });
#pragma unroll
      for (int other = 1; other < kMostClusterBlocks; ++other)
        if (other < blocks_)
          for_each_packet([&](const Packet& packet, Packet& here) {
            store_async(&here, unsigned(rank_ ^ other), packet.words, barrier(phase_));
          });
    }
  }

  /// Two mbarriers, after what block_sums takes of so few warps: one block may have arrived at the next meeting before
  /// all that belongs to this one has come to another.
  static __device__ uint64_t* barrier(int phase) {
    constexpr int kBegin = 2 * kMostClusterWarps * int(sizeof(T));
    static_assert(kBegin + 2 * sizeof(uint64_t) <= kSums * sizeof(T));
    return &at_shared<uint64_t>(shared_begin() + kBegin + phase % 2 * int(sizeof(uint64_t)));
  }

  /// All operations so far are done, in each block. No block uses another one's memory before the first meeting.
  __device__ __forceinline__ void meet() {
    meets_ = false;
    if (blocks_ == 1) {
      __syncthreads();
    } else if constexpr (kHasClusters) {
      if (phase_ == 0) cluster_wait();
      uint64_t* const here = barrier(phase_);
      if (threadIdx.x == 0) mbarrier_expect(here, unsigned(expected_));
      __syncwarp();
      const unsigned lane = threadIdx.x % kWarp;
      if (lane < unsigned(blocks_)) mbarrier_arrive(here, lane);
      mbarrier_wait(here, unsigned(phase_ / 2 % 2));
      ++phase_;
      expected_ = 0;
    }
  }

  int blocks_, rank_, block_share_, worker_, share_;  // shares: 2^16 / blocks, and 2^16 / tiles of a matrix
  int phase_ = 0, expected_ = 0;                      // meetings so far, and bytes that others send before the next one
};

}  // namespace isqrt::cuda
