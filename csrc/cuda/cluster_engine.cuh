// The Engine of normalization.h on a cluster of thread blocks, or on one block, in float32: each block has all matrices
// of the sample. The iteration is a Program. The tiles of its products are dealt out to the warps of all blocks, and
// results go into the matrices of each; what is done elementwise each block does for itself. Each tile is the same sum
// in any case: results do not depend on who computes them.
//
// What takes time is the chain of instructions from one meeting to the next, see compute(), and what the first run
// through any code waits for instructions.
#pragma once
#include "cluster_program.h"
#include "matrix_engine.cuh"

namespace isqrt::cuda {

/// As many as have a tile each, and more than one tile each where there are many.
constexpr int kMostClusterWarps = 12, kMostClusterBlocks = 8;
ISQRT_FN constexpr int cluster_threads(int channels) {
  const int tiles = tile_count(channels);
  return kWarp * (tiles < kMostClusterWarps ? tiles : kMostClusterWarps);
}

/// kInPlace: without spare matrices, see ProgramRecorder.
template <bool kInPlace> class ClusterEngine : public BlockMatrices<float> {
  using T = float;
  using Base = BlockMatrices<T>;

 public:
  struct Matrix : Base::Matrix {
    int dealt = 0;
  };
  using Result = ResultOf<Matrix>;

  /// Before it waits for the kernels before it.
  __device__ ClusterEngine(int channels, const Program& program)
      : Base(channels),
        program_(program),
        blocks_(int(cluster_size())),
        rank_(int(cluster_rank())),
        block_share_(opaque((1 << 16) / blocks_)),
        worker_(warp() * blocks_ + rank_),
        share_(opaque((1 << 16) / tile_count(channels) + 1)) {
    // Constant memory takes its time: all of the program is asked for once.
    constexpr int kLine = 64 / sizeof(uint32_t), kWords = sizeof(Program) / sizeof(uint32_t);
    if (warp() == warps() - 1)
      for (int word = kLine * Lane().number; word < kWords; word += kLine * kWarp)
        opaque(reinterpret_cast<const uint32_t*>(&program)[word]);
    if constexpr (kHasClusters)
      if (blocks_ > 1) {
        if (threadIdx.x == 0)
          for (int phase = 0; phase < 2; ++phase) mbarrier_init(barrier(phase), unsigned(blocks_ * warps()));
        cluster_arrive();
      }
  }

  __device__ Matrix matrix() { return {new_matrix(), 0}; }

  template <class Source> __device__ void load(const Matrix& A, const Source& source) const { load_tiles(A, source); }
  template <class Source> __device__ T load_normalized(const Matrix& A, const Source& source) const {
    return load_normalized_tiles(A, source);
  }

  /// Runs the program, after its matrices were loaded.
  __device__ __forceinline__ void run() {
    const Reader reader;
#pragma unroll 1
    for (int n = 0; n < program_.stages; ++n) {
      const Stage stage = program_.stage[n];
      if (stage.kind == Stage::kProducts) {
        compute(stage, reader);
        continue;
      }
      if (stage.meets) meet();
      const Operation& o = program_.operation[stage.first];
      identity_plus_tiles(at(o.to), o.alpha, o.beta, at(o.A0));
    }
    if (program_.maps) __syncthreads();
    meets_ = program_.meets;
  }
  __device__ Matrix at(const Program::Place& place) const { return {at(place.number), place.dealt}; }
  __device__ const Program& program() const { return program_; }

  /// <factor sym(source), A>
  template <class Source> __device__ T inner(const Source& source, const Matrix& A, T factor = 1) {
    if (meets_) meet();
    return block_sum(inner_part(source, A, factor), shared_memory<T>());
  }

  /// <grad, P> and <factor sigma, D>: sources are on their way while products are waited for.
  template <class GradSource, class SigmaSource>
  __device__ InnerProducts<T> inner_products(const GradSource& grad, const Matrix& P, const SigmaSource& sigma,
                                             const Matrix& D, T factor) {
    T sums[2] = {};
    const Place first = Place::numbered(warp());
    WarpTile<T> of_grad = symmetric_tile<T>(grad, first), of_sigma = symmetric_tile<T>(sigma, first);
    if (meets_) meet();
    for_own_tiles([&](const Place& own) {
      if (own.number() != first.number())
        of_grad = symmetric_tile<T>(grad, own), of_sigma = symmetric_tile<T>(sigma, own);
      add_inner(sums[0], of_grad, Tiles::read(tile(P, own)), own, T(1));
      add_inner(sums[1], of_sigma, Tiles::read(tile(D, own)), own, factor);
    });
    block_sums(sums, shared_memory<T>());
    return {sums[0], sums[1]};
  }

  __device__ Result result(T beta, const Matrix& A) const { return {0, beta, A}; }
  __device__ Result result(T alpha, T beta, const Matrix& A) const { return {alpha, beta, A}; }

  /// Each warp writes tiles that it has computed, which it need not wait for.
  template <class View> __device__ void write(const Result& result, const View& view, T factor = 1) {
    __syncwarp();
#pragma unroll 1
    for (int t = (worker_ < result.A.dealt ? workers() : 0) + worker_ - result.A.dealt; t < tile_count(channels_);
         t += workers())
      write_tile(result, Place::numbered(t), view, factor);
    if (meets_ && blocks_ > 1) meet();  // other blocks still write to this one's memory
  }
  template <class View> __device__ void write_means(const Result& result, const View& view, T factor) {
    if (meets_) meet();
    Base::write_means(result, view, factor, worker_, workers());
  }

 private:
  __device__ int workers() const { return blocks_ * warps(); }

  __device__ Base::Matrix at(int number) const {
    const int first = matrices() + number * tile_count(channels_) * Tiles::kBytes;
    return {first, first};
  }

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

  const Program& program_;
  int blocks_, rank_, block_share_, worker_, share_;  // shares: 2^16 / blocks, and 2^16 / tiles of a matrix
  int phase_ = 0, expected_ = 0;                      // meetings so far, and bytes that others send before the next one
  bool meets_ = false;                                // whether there are products that were not met for
};

/// Of newton_schulz.h and normalization.h, in the way of this engine.
template <bool kInPlace, class Matrix>
__device__ void newton_schulz(ClusterEngine<kInPlace>& e, Iterates<Matrix>& m, const Steps&, Root) {
  e.run();
  m.Y = e.at(e.program().Y), m.Z = e.at(e.program().Z);
}
template <bool kInPlace, class Matrix>
__device__ void newton_schulz_tangent(ClusterEngine<kInPlace>& e, Iterates<Matrix>& m, Iterates<Matrix>& d,
                                      const Steps& steps, Root root) {
  newton_schulz(e, m, steps, root);
  d.Y = e.at(e.program().dY), d.Z = e.at(e.program().dZ);
}
template <bool kInPlace, class Matrix, class SigmaSource, class GradSource>
__device__ InnerProducts<float> inner_products(ClusterEngine<kInPlace>& e, const GradSource& grad, const Matrix& P,
                                               const SigmaSource& sigma, const Matrix& D, const float& factor) {
  return e.inner_products(grad, P, sigma, D, factor);
}

/// What such a kernel runs for this task.
inline Program record_root(const Steps& steps, Root root, int workers, int tiles, int matrices, int spares) {
  ProgramRecorder e(workers, tiles, matrices, spares);
  auto m = make_iterates(e, steps);
  e.load(m.Y);
  newton_schulz(e, m, steps, root);
  return e.finish(m, m);
}
inline Program record_root_backward(const Steps& steps, Root root, int workers, int tiles, int matrices, int spares) {
  ProgramRecorder e(workers, tiles, matrices, spares);
  auto m = make_iterates(e, steps), d = make_iterates(e, steps);
  e.load(m.Y), e.load(d.Y);
  newton_schulz_tangent(e, m, d, steps, root);
  return e.finish(m, d);
}

}  // namespace isqrt::cuda
