// The CPU engine with AVX2 and FMA: 16 registers of 32 bytes, a tile of 4 x 2 accumulators.
// Before the target is changed: what level.h includes of the standard library is compiled for any processor.
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC target("avx2,fma,f16c")
#define ISQRT_LEVEL avx2
#define ISQRT_VECTOR_BYTES 32
#define ISQRT_TILE_ROWS 4
#define ISQRT_TILE_VECTORS 2
#define ISQRT_TILE_STEPS 4
#include "level.h"
#endif
