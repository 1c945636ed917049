// Tensor core instructions. Each lane puts its fragments in, and the last one to come computes what all of them get.
//
// Products are exact. Their sum with the accumulator is rounded toward zero, once: what the hardware does (Fasi,
// Higham, Mikaitis & Pranesh, Numerical behavior of NVIDIA tensor cores, 2021), apart from the few bits that it drops
// before.
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "runtime.h"

namespace emulation {
namespace {

float from_bits(uint32_t bits) {
  float number;
  memcpy(&number, &bits, sizeof number);
  return number;
}

/// The float next to another one in the direction of zero has the bits before.
float toward_zero(double x) {
  const float nearest = static_cast<float>(x);
  uint32_t bits;
  memcpy(&bits, &nearest, sizeof bits);
  return from_bits(bits - (std::fabs(nearest) > std::fabs(x)));
}

/// What a lane puts in, its registers unpacked; d becomes its part of the result.
struct Fragments {
  float a[4][2], b[2][2], d[4];
};

/// Neighbours in a row, which any x86-64 adds and multiplies together.
using Pair = double __attribute__((vector_size(16)));

/// d += A B of a whole warp, A being 16 x 16 and B 16 x 8. Lane 4 g + t has the pairs t and t + 4 of A's rows g and
/// g + 8, and of B's column g.
void multiply_warp(Slots& slots) {
  static_assert(sizeof(Fragments) <= kSlotBytes);
  constexpr int K = 16;
  double A[16][K];
  Pair B[K][4], D[16][4];
  const auto of = [&](int lane) -> Fragments& { return reinterpret_cast<Fragments&>(slots[lane]); };
  const auto for_results = [&](const auto& f) {
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) f(of(lane).d[i], D[lane / 4 + i / 2 * 8][lane % 4], i % 2);
  };
  for (int lane = 0; lane < 32; ++lane)
    for (int e = 0; e < 2; ++e) {
      const int g = lane / 4, t = lane % 4;
      for (int r = 0; r < 4; ++r) A[g + r % 2 * 8][(t + r / 2 * 4) * 2 + e] = of(lane).a[r][e];
      for (int r = 0; r < 2; ++r) B[(t + r * 4) * 2 + e][g / 2][g % 2] = of(lane).b[r][e];
    }
  for_results([](float& d, Pair& in, int e) { in[e] = d; });
  for (int i = 0; i < 16; ++i) {
    Pair sum[4];
    memcpy(sum, D[i], sizeof sum);
    for (int k = 0; k < K; ++k)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sum[j] += A[i][k] * B[k][j];
    memcpy(D[i], sum, sizeof sum);
  }
  for_results([](float& d, Pair& in, int e) { d = toward_zero(in[e]); });
}

/// The same in float64, A being 8 x 4 and B 4 x 8: each product is rounded to nearest as it is added.
struct FragmentsF64 {
  double a, b, d[2];
};

/// Where the processor has the instruction, std::fma is no call.
__attribute__((target_clones("fma", "default"))) void multiply_warp_f64(Slots& slots) {
  const auto of = [&](int lane) -> FragmentsF64& { return reinterpret_cast<FragmentsF64&>(slots[lane]); };
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 2; ++i)
      for (int k = 0; k < 4; ++k) {
        const int g = lane / 4, column = lane % 4 * 2 + i;
        of(lane).d[i] = std::fma(of(4 * g + k).a, of(4 * column + k).b, of(lane).d[i]);
      }
}

uint16_t half_of(uint32_t bits, int e) { return uint16_t(bits >> 16 * e); }
float number_of(uint32_t bits, int e) { return __half2float(__ushort_as_half(half_of(bits, e))); }

}  // namespace

void mma_f64(double* d, double a, double b, const Caller& caller) {
  const FragmentsF64 own{a, b, {d[0], d[1]}};
  const Site site{"mma_f64", caller.file, caller.line};
  const Slots& slots = gather(~0u, &own, sizeof own, false, site, multiply_warp_f64);
  memcpy(d, reinterpret_cast<const FragmentsF64&>(slots[lane()]).d, sizeof own.d);
}

void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const Caller& caller) {
  Fragments own;
  for (int e = 0; e < 2; ++e) {
    for (int r = 0; r < 4; ++r) own.a[r][e] = number_of(a[r], e);
    for (int r = 0; r < 2; ++r) own.b[r][e] = number_of(b[r], e);
  }
  memcpy(own.d, d, sizeof d);
  const Site site{"mma_f16", caller.file, caller.line};
  const Slots& slots = gather(~0u, &own, sizeof own, false, site, multiply_warp);
  memcpy(d, reinterpret_cast<const Fragments&>(slots[lane()]).d, sizeof d);
}

void load_matrices(uint32_t (&r)[4], const void* row, bool transposed, const Caller& caller) {
  const CalledFrom here(__builtin_return_address(0));
  const Site site{"load_matrix_x4", caller.file, caller.line};
  struct alignas(16) Row {
    uint16_t element[8];
  };
  require_aligned(row, sizeof(Row), site);
  require_shared(row, sizeof(Row), site);
  note_read(row, sizeof(Row), site);
  const Slots& slots = gather(~0u, row, sizeof(Row), false, site);
  const auto element = [&](unsigned matrix, unsigned i, unsigned j) {
    return uint32_t(reinterpret_cast<const Row&>(slots[8 * matrix + i]).element[j]);
  };
  const unsigned g = lane() / 4, t = lane() % 4;
  for (unsigned m = 0; m < 4; ++m)
    r[m] = transposed ? element(m, 2 * t, g) | element(m, 2 * t + 1, g) << 16
                      : element(m, g, 2 * t) | element(m, g, 2 * t + 1) << 16;
}

uint32_t transpose_matrix(uint32_t r, const Caller& caller) {
  const Slots& slots = gather(~0u, &r, sizeof r, false, {"transpose_matrix", caller.file, caller.line});
  const unsigned g = lane() / 4, t = lane() % 4;
  const auto element = [&](unsigned i, unsigned j) {
    uint32_t pair;
    memcpy(&pair, slots[4 * i + j / 2], sizeof pair);
    return uint32_t(half_of(pair, int(j % 2)));
  };
  return element(2 * t, g) | element(2 * t + 1, g) << 16;
}

// ---- warpgroups -----------------------------------------------------------------------------------------------------

// The hardware may read the right operand at any time from the instruction to the wait: as with copies, the sanitizers
// see it at both ends, where a warp's first lane reads for all, and in between sums are NaN.

namespace {

constexpr unsigned kWarpgroup = 128, kTerms = 16, kPartBytes = 128;

const char* part_of(const WarpgroupProduct& product, unsigned k, unsigned n) {
  return product.b + k / 8 * product.to_next_terms + n / 8 * product.to_next_vectors;
}

void read_right(const WarpgroupProduct& product) {
  if (lane() != 0) return;
  for (unsigned k = 0; k < kTerms; k += 8)
    for (unsigned n = 0; n < product.vectors; n += 8) {
      require_shared(part_of(product, k, n), kPartBytes, product.site);
      note_read(part_of(product, k, n), kPartBytes, product.site);
      require_fenced(part_of(product, k, n), kPartBytes, product.site);
    }
}

void finish(const WarpgroupProduct& product) {
  read_right(product);
  for (unsigned i = 0; i < product.sums(); ++i) {
    const unsigned n = i / 4 * 8 + lane() % 4 * 2 + i % 2;
    double sum = product.continues ? product.d[i] : product.before[i];
    for (unsigned k = 0; k < kTerms; ++k) {
      const unsigned row = product.by_terms ? k % 8 : n % 8, column = product.by_terms ? n % 8 : k % 8;
      const auto* part = reinterpret_cast<const uint16_t*>(part_of(product, k, n));
      sum += double(product.a[i / 2 % 2][k]) * __half2float(__ushort_as_half(part[8 * row + column]));
    }
    product.d[i] = toward_zero(sum);
  }
}

}  // namespace

void fence_for_warpgroups() {
  launch.running->copied_without_fence = false;
  ++launch.running->fences;
}

void warpgroup_begin(const Caller& caller) {
  converge({"warpgroup_begin", caller.file, caller.line});
  launch.running->warpgroup_began = true;
}

void multiply_warpgroup(float* d, int vectors, const uint32_t (&a)[4], uint64_t b, bool adds, bool by_terms,
                        const Caller& caller) {
  const CalledFrom here(__builtin_return_address(0));
  const Site site{"multiply_warpgroup", caller.file, caller.line};
  Thread& me = *launch.running;
  Block& block = *me.block;
  if (block.threads.size() % kWarpgroup != 0) fail("is in a block that is not made of warpgroups", site);
  if (!me.warpgroup_began) fail("multiplies without having begun", site);
  if (lane() == 0)
    for (const Thread& thread : block.threads)
      if (thread.copied_without_fence) fail("reads what was copied, and no fence followed", site);
  WarpgroupProduct product = {.d = d,
                              .vectors = unsigned(vectors),
                              .b = static_cast<char*>(dynamic_shared()) + (b & 0x3fff) * 16,
                              .to_next_terms = unsigned(b >> 16 & 0x3fff) * 16,
                              .to_next_vectors = unsigned(b >> 32 & 0x3fff) * 16,
                              .by_terms = by_terms,
                              .site = site};
  const Slots& slots = gather(~0u, a, sizeof a, false, site);
  for (unsigned t = 0; t < 4; ++t) {
    const auto& of = reinterpret_cast<const uint32_t (&)[4]>(slots[lane() / 4 * 4 + t]);
    for (unsigned r = 0; r < 4; ++r)
      for (unsigned e = 0; e < 2; ++e) product.a[r % 2][r / 2 * 8 + 2 * t + e] = number_of(of[r], int(e));
  }
  read_right(product);
  meet(block.warpgroups[me.number / kWarpgroup], kWarpgroup, false, site);
  const Quiet quiet;
  product.continues = adds && std::any_of(me.products.begin(), me.products.end(),
                                          [&](const WarpgroupProduct& earlier) { return earlier.d == d; });
  for (unsigned i = 0; i < product.sums(); ++i) product.before[i] = adds ? d[i] : 0;
  memset(d, 0xff, product.sums() * sizeof *d);
  me.products.push_back(product);
}

void warpgroup_commit(const Caller& caller) {
  converge({"warpgroup_commit", caller.file, caller.line});
  launch.running->committed_products = launch.running->products.size();
}

void warpgroup_wait(float*, const Caller& caller) {
  const CalledFrom here(__builtin_return_address(0));
  converge({"warpgroup_wait", caller.file, caller.line});
  Thread& me = *launch.running;
  const auto end = me.products.begin() + ptrdiff_t(me.committed_products);
  std::for_each(me.products.begin(), end, finish);
  const Quiet quiet;
  me.products.erase(me.products.begin(), end);
  me.committed_products = 0;
  me.warpgroup_began = false;
}

}  // namespace emulation
