// Operands of products on tensor cores: 64 vectors, some terms of each, on their way from global memory.
//
// A warp has eight of the vectors. It copies their numbers to shared memory, all of them at once, looks at them, and
// puts in their place what tensor cores take: in float32 pairs of float16, see Tiles, which are made once for each
// number and not whenever it is read. What others of the block do is waited for only when the panel is multiplied.
#pragma once
#include <cmath>
#include <cstring>

#include "launch.cuh"
#include "number.cuh"
#include "tensor.cuh"

namespace isqrt::cuda {

constexpr int kPanelVectors = 64, kPanelThreads = 256, kWarpVectors = kPanelVectors * kWarp / kPanelThreads;

/// Threads, neighbours, that look at a vector together.
constexpr int kVectorThreads = kPanelThreads / kPanelVectors;

/// Neighbouring terms that are read and written together: 16 bytes of T. And as many as a warp's lanes have.
template <class T> constexpr int kPacketTerms = kPacketBytes / int(sizeof(T));
template <class T> constexpr int kPanelTerms = kWarp * kPacketTerms<T>;

template <class X, int kCount>
struct alignas(kCount * sizeof(X) < kPacketBytes ? kCount * sizeof(X) : kPacketBytes) Packet {
  X element[kCount];
};

template <class X, class T, int kCount>
__device__ __forceinline__ void store_packet(X* to, const T (&numbers)[kCount]) {
  Packet<X, kCount> packet;
#pragma unroll
  for (int e = 0; e < kCount; ++e) store_number(&packet.element[e], numbers[e]);
  // nvcc may take a packet apart again, but not these.
  using Word = std::conditional_t<sizeof(packet) == 8, unsigned long long, float4>;
#pragma unroll
  for (int w = 0; w < int(sizeof(packet) / sizeof(Word)); ++w) {
    Word word;
    memcpy(&word, reinterpret_cast<const char*>(&packet) + w * sizeof(Word), sizeof(Word));
    __stwb(reinterpret_cast<Word*>(to) + w, word);
  }
}

/// 16 vectors with 16 terms, as they are multiplied. The order of the vectors is that of of_half().
template <class T> struct Factor {
  T value[2][4];  // of each half one vector, terms quad, quad + 4, ...
};
template <> struct Factor<float> {
  uint32_t high[4], low[4];  // parts of 8 x 8 in the order of mma's operands
};
constexpr int kStepTerms = 16;

/// The vector that is number v of half of 16: a lane then has four neighbours in a row of the product.
__device__ inline int of_half(int half, int v) { return v / 2 * 4 + 2 * half + v % 2; }

/// sum += a b, tiles side by side. In float32 three products of the parts, each with the accuracy of float32: tensor
/// cores round their sums towards zero, so the large ones come last.
template <int kCount>
__device__ __forceinline__ void multiply_add(WarpTile<double> (&sum)[kCount], const Factor<double>& a,
                                             const Factor<double> (&b)[kCount], int first = 0) {
#pragma unroll
  for (int s = 0; s < 4; ++s)
#pragma unroll
    for (int v = 0; v < kCount; ++v)
      if (v >= first)
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int h = 0; h < 2; ++h) mma_f64(sum[v].sum[n] + 2 * h, a.value[h][s], b[v].value[n][s]);
}
template <int kCount>
__device__ __forceinline__ void multiply_add(WarpTile<float> (&sum)[kCount], const Factor<float>& a,
                                             const Factor<float> (&b)[kCount], int first = 0) {
  const auto add = [&](const uint32_t (&left)[4], uint32_t (Factor<float>::*right)[4]) {
#pragma unroll
    for (int v = 0; v < kCount; ++v)
      if (v >= first)
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const uint32_t part[2] = {(b[v].*right)[2 * n], (b[v].*right)[2 * n + 1]};
          mma_f16(sum[v].sum[n], left, part);
        }
  };
  add(a.high, &Factor<float>::low);
  add(a.low, &Factor<float>::high);
  add(a.high, &Factor<float>::high);
}

/// f(four neighbours, row, column of the first) of a product.
template <class T, class F> __device__ __forceinline__ void for_each_four(const WarpTile<T>& tile, const F& f) {
  const Lane lane;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const T four[4] = {tile.sum[0][2 * h], tile.sum[0][2 * h + 1], tile.sum[1][2 * h], tile.sum[1][2 * h + 1]};
    f(four, of_half(h, lane.group), 4 * lane.quad);
  }
}

/// Numbers of X in shared memory, and in their place the operands of T that are made of them, a row for each vector.
///
/// In float32 half of a row is the high numbers of its pairs, half the low ones, each with the first eight of all 16
/// terms before the second eight, in the order of of_half(). Packets of 16 bytes exchange their places within
/// 128 bytes, so that any eight rows that ldmatrix reads together have theirs in different banks, and so has all else
/// that a warp reads and writes at a time.
template <class X, class T, int kTerms> class Panel {
  static constexpr bool kPairs = sizeof(T) == 4;
  static constexpr int kEach = kPacketTerms<T>, kLanes = kTerms / kEach, kPitch = kTerms * int(sizeof(T));
  static constexpr int kPassVectors = kWarp / kLanes, kPasses = kWarpVectors / kPassVectors;
  using Numbers = Packet<X, kEach>;

 public:
  static constexpr int kBytes = kPanelVectors * kPitch;

  int begin;

  /// Copies so many vectors, `stride` apart, and terms of what begins at `from`, whole packets, with zeros in the rest.
  /// The copy goes on until wait().
  __device__ __forceinline__ void load_packets(const X* from, int64_t stride, int vectors, int terms) const {
    const int first = kWarpVectors * warp() + lane() / kLanes, wanted = term() < terms ? vectors - first : 0;
    const X* own = from + first * stride + term();
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass, own += kPassVectors * stride)
      copy_async<sizeof(Numbers)>(&at_shared<Numbers>(own_place(pass)), own,
                                  pass * kPassVectors < wanted ? int(sizeof(Numbers)) : 0);
    copy_async_commit();
  }
  /// The same of packets of vectors; term t begins at address(t).
  template <class Address>
  __device__ __forceinline__ void load_columns(const Address& address, int vectors, int terms) const {
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const int t = lane() + kWarp * e;
      const X* own = address(t) + kWarpVectors * warp();
#pragma unroll
      for (int v = 0; v < kWarpVectors; v += kEach) {
        Numbers column = {};
        if (kWarpVectors * warp() + v < vectors && t < terms) column = *reinterpret_cast<const Numbers*>(own + v);
#pragma unroll
        for (int i = 0; i < kEach; ++i) number(kWarpVectors * warp() + v + i, t) = column.element[i];
      }
    }
  }
  /// The same of numbers wherever they lie, vectors `stride` apart.
  template <class Address>
  __device__ __forceinline__ void load_each(const Address& address, int64_t stride, int vectors, int terms) const {
#pragma unroll 1
    for (int t = lane(); t < kTerms; t += kWarp) {
      const X* own = address(t) + kWarpVectors * warp() * stride;
#pragma unroll
      for (int v = 0; v < kWarpVectors; ++v, own += stride)
        number(kWarpVectors * warp() + v, t) = kWarpVectors * warp() + v < vectors && t < terms ? *own : X{};
    }
  }
  __device__ static void wait() {
    copy_async_wait<0>();
    __syncwarp();
  }

  /// The vector that this thread looks at with kVectorThreads - 1 others, and its first number.
  __device__ static int own_vector() { return threadIdx.x / kVectorThreads; }
  __device__ T first() const { return to_number(number(own_vector(), 0)); }
  /// f(number, term, e) of each of this thread's share of so many terms, e being the number's place in its packet. See
  /// fill() for what is after them in the last packet.
  template <class F> __device__ __forceinline__ void look(int terms, const F& f) const {
    constexpr int kRounds = kLanes / kVectorThreads, kStep = kVectorThreads * int(sizeof(Numbers)), kExchanged = 128;
    const int part = threadIdx.x % kVectorThreads, row = begin + kPitch * own_vector();
    const int own = int(sizeof(Numbers)) * part ^ exchange(own_vector());
    const auto round = [&](int i) {
      const int offset = kStep * i;
      const Numbers a = at_shared<Numbers>(row + (own ^ offset % kExchanged) + offset / kExchanged * kExchanged);
#pragma unroll
      for (int e = 0; e < kEach; ++e) f(T(to_number(a.element[e])), kEach * (kVectorThreads * i + part) + e, e);
    };
    if (terms == kTerms) {
#pragma unroll 4
      for (int i = 0; i < kRounds; ++i) round(i);
    } else {
#pragma unroll 1
      for (int i = 0; i < kRounds && kEach * (kVectorThreads * i + part) < terms; ++i) round(i);
    }
  }
  /// What of the last packet of so many terms is after them becomes the vector's first number.
  __device__ void fill(int terms) const {
    if (terms % kEach == 0) return;
    const int t = terms + int(threadIdx.x) % kVectorThreads;
    if (t / kEach == terms / kEach) number(own_vector(), t) = number(own_vector(), 0);
    __syncwarp();
  }

  /// Makes the operand of of_vector(vector)(number, term).
  template <class F> __device__ __forceinline__ void convert(const F& of_vector) const {
    __syncwarp();  // all have been looked at
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const Numbers a = at_shared<Numbers>(own_place(pass));
      const auto f = of_vector(kWarpVectors * warp() + pass * kPassVectors + lane() / kLanes);
      T result[kEach];
#pragma unroll
      for (int e = 0; e < kEach; ++e) result[e] = f(T(to_number(a.element[e])), term() + e);
      __syncwarp();  // a row's numbers have been read
      write(pass, result);
    }
  }
  /// Zero instead of what is after so many terms of the last step.
  __device__ void clear(int terms) const {
    const int t = terms + lane();
    if (terms % kStepTerms == 0) return;
    __syncwarp();
    if (lane() < kStepTerms - terms % kStepTerms)
#pragma unroll 1
      for (int v = kWarpVectors * warp(); v < kWarpVectors * (warp() + 1); ++v) {
        if constexpr (kPairs) {
          const int to = begin + place(v, t / kEach, t / 2 % 2) + 2 * (t % 2);
          at_shared<uint16_t>(to) = at_shared<uint16_t>(to + kLow) = 0;
        } else {
          at(v, t) = 0;
        }
      }
  }

  /// Where the 16 vectors from `first` on are, as a product's left or right factor; or, as the right one across, of all
  /// vectors the terms from `first` on, to which the vectors are what terms are otherwise.
  enum Side { kLeft, kRight, kAcross };
  template <Side kSide> __device__ static int place_of(int first) {
    if constexpr (!kPairs) return first;
    const int second = lane() / 16, odd = lane() / 8 % 2;
    if constexpr (kSide == kAcross) return place(of_half(odd, lane() % 8), 0, second) ^ kPacketBytes * (first / 16);
    return kSide == kLeft ? place(first + of_half(odd, lane() % 8), 0, second)
                          : place(first + of_half(second, lane() % 8), 0, odd);
  }
  /// The terms of a step, of the 16 vectors that are `tile` times 16 after those at `place`.
  template <Side kSide> __device__ __forceinline__ Factor<T> factor(int place, int step, int tile = 0) const {
    constexpr bool kAcross = kSide == Side::kAcross;
    Factor<T> result;
    if constexpr (kPairs) {
      const int along = kAcross ? tile : step, over = kAcross ? step : tile;
      const int from = begin + (place ^ kPacketBytes * along) + kPitch * kTile * over;
      load_matrix_x4(result.high, &at_shared<uint16_t>(from), kAcross);
      load_matrix_x4(result.low, &at_shared<uint16_t>(from + kLow), kAcross);
    } else {
      const Lane lane;
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int s = 0; s < 4; ++s) {
          const int vector = place + kTile * tile + of_half(h, lane.group),
                    term = kStepTerms * step + 4 * s + lane.quad;
          result.value[h][s] = kAcross ? at(term, vector) : at(vector, term);
        }
    }
    return result;
  }

 private:
  static constexpr int kLow = kPitch / 2;

  __device__ static int warp() { return threadIdx.x / kWarp; }
  __device__ static int lane() { return threadIdx.x % kWarp; }
  /// Of the vectors that a lane has packets of, one in each pass.
  __device__ static int packet() { return threadIdx.x % kLanes; }
  __device__ static int term() { return kEach * packet(); }

  /// By how much the places of a row are exchanged: that of the sum of two is the exchange of both where the two have
  /// no bit in common.
  __device__ static constexpr int exchange(int row) {
    return kPacketBytes * ((row & 1) << 2 | (row >> 1 & 2) | ((row >> 1 ^ row >> 3) & 1));
  }
  __device__ int own_row(int pass) const {
    return begin + kPitch * (kWarpVectors * warp() + lane() / kLanes) + kPitch * kPassVectors * pass;
  }
  __device__ static int own_exchange(int pass) {
    return exchange(kWarpVectors * (warp() & 1)) ^ exchange(lane() / kLanes) ^ exchange(kPassVectors * pass);
  }
  __device__ int own_place(int pass) const {
    return own_row(pass) + (int(sizeof(Numbers)) * packet() ^ own_exchange(pass));
  }
  __device__ X& number(int row, int term) const {
    return at_shared<X>(begin + kPitch * row + (int(sizeof(X)) * term ^ exchange(row)));
  }
  __device__ T& at(int row, int term) const {
    return at_shared<T>(begin + kPitch * row + (int(sizeof(T)) * term ^ exchange(row)));
  }
  /// Of pairs those of a half of a packet's terms.
  __device__ static int place(int row, int packet, int half) {
    return kPitch * row + (kPacketBytes * (packet / 4) ^ exchange(row) ^ kPitch / 4 * half) + 4 * (packet % 4);
  }

  __device__ __forceinline__ void write(int pass, const T (&a)[kEach]) const {
    if constexpr (kPairs) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const SplitPair pair(a[2 * half], a[2 * half + 1]);
        const int place = kPacketBytes * (packet() / 4) + 4 * (packet() % 4);
        const int to = own_row(pass) + (place ^ own_exchange(pass) ^ kPitch / 4 * half);
        at_shared<uint32_t>(to) = pair.high;
        at_shared<uint32_t>(to + kLow) = pair.low;
      }
    } else {
      Numbers packet;
#pragma unroll
      for (int e = 0; e < kEach; ++e) packet.element[e] = a[e];
      at_shared<Numbers>(own_place(pass)) = packet;
    }
  }
};

}  // namespace isqrt::cuda
