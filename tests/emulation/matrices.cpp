// Tensor core instructions. Each lane puts its fragments in, and computes its part of the result from those of the
// warp.
//
// Products are exact. Their sum with the accumulator is rounded toward zero, once: what the hardware does (Fasi,
// Higham, Mikaitis & Pranesh, Numerical behavior of NVIDIA tensor cores, 2021), apart from the few bits that it drops
// before.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

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

float toward_zero(double x) {
  const float nearest = static_cast<float>(x);
  return std::fabs(nearest) > std::fabs(x) ? std::nextafterf(nearest, 0.0f) : nearest;
}

/// d += A B with A of 16 x 8 kPack and B of 8 kPack x 8 elements, kPack neighbours in k to a register; number(r, e) is
/// the one at place e of register r. Column k belongs to lane k / kPack % 4 of four, in its first or second register.
template <int kPack, class Number>
void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const Site& site, const Number& number) {
  struct Fragments {
    float a[4][kPack], b[2][kPack];
  } own;
  static_assert(sizeof own <= kSlotBytes);
  for (int e = 0; e < kPack; ++e) {
    for (int r = 0; r < 4; ++r) own.a[r][e] = number(a[r], e);
    for (int r = 0; r < 2; ++r) own.b[r][e] = number(b[r], e);
  }
  const Slots& slots = gather(~0u, &own, sizeof own, false, site);
  const auto of = [&](unsigned lane) -> const Fragments& { return reinterpret_cast<const Fragments&>(slots[lane]); };
  const unsigned g = lane() / 4, t = lane() % 4;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned lower = i / 2, column = 2 * t + i % 2;
    double sum = d[i];
    for (unsigned half = 0; half < 2; ++half)
      for (unsigned k = 0; k < 4; ++k)
        for (unsigned e = 0; e < kPack; ++e)
          sum += double(of(4 * g + k).a[lower + 2 * half][e]) * double(of(4 * column + k).b[half][e]);
    d[i] = toward_zero(sum);
  }
}

uint16_t half_of(uint32_t bits, int e) { return uint16_t(bits >> 16 * e); }

}  // namespace

uint32_t to_tf32(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  if (std::isnan(x)) return 0x7fffffff;
  return std::isinf(x) ? bits : (bits + 0x1000) & ~0x1fffu;
}

void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const Caller& caller) {
  multiply<1>(d, a, b, {"mma_tf32", caller.file, caller.line},
              [](uint32_t bits, int) { return from_bits(bits & ~0x1fffu); });
}

/// In float64 each product is rounded to nearest as it is added.
void mma_f64(double* d, double a, double b, const Caller& caller) {
  const double own[2] = {a, b};
  const Slots& slots = gather(~0u, own, sizeof own, false, {"mma_f64", caller.file, caller.line});
  const auto of = [&](unsigned lane) { return reinterpret_cast<const double*>(slots[lane]); };
  const unsigned g = lane() / 4, t = lane() % 4;
  for (unsigned i = 0; i < 2; ++i)
    for (unsigned k = 0; k < 4; ++k) d[i] = std::fma(of(4 * g + k)[0], of(4 * (2 * t + i) + k)[1], d[i]);
}

void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const Caller& caller) {
  multiply<2>(d, a, b, {"mma_f16", caller.file, caller.line},
              [](uint32_t bits, int e) { return __half2float(__ushort_as_half(half_of(bits, e))); });
}

void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const Caller& caller) {
  multiply<2>(d, a, b, {"mma_bf16", caller.file, caller.line},
              [](uint32_t bits, int e) { return from_bits(uint32_t(half_of(bits, e)) << 16); });
}

void load_matrices(uint32_t (&r)[4], const void* row, bool transposed, const Caller& caller) {
  const CalledFrom here(__builtin_return_address(0));
  const Site site{"load_matrix", caller.file, caller.line};
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

}  // namespace emulation
