// The CPU engine with AVX-512: 32 registers of 64 bytes, a tile of 16 x 1 accumulators.
// Before the target is changed: what level.h includes of the standard library is compiled for any processor.
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#define ISQRT_LEVEL avx512
#define ISQRT_VECTOR_BYTES 64
#define ISQRT_TILE_ROWS 16
#define ISQRT_TILE_VECTORS 1
#define ISQRT_TILE_STEPS 1
#include "level.h"
#endif
