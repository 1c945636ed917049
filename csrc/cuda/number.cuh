// Reading and writing elements of feature maps. To 16 bits they are rounded to nearest, ties to even.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../views.h"

namespace isqrt::cuda {

__device__ inline float to_number(float x) { return x; }
__device__ inline double to_number(double x) { return x; }
__device__ inline float to_number(Half x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ inline float to_number(BFloat16 x) { return __bfloat162float(__ushort_as_bfloat16(x.bits)); }

__device__ inline void store_number(float* to, float x) { *to = x; }
__device__ inline void store_number(double* to, double x) { *to = x; }
__device__ inline void store_number(Half* to, float x) { to->bits = __half_as_ushort(__float2half_rn(x)); }
__device__ inline void store_number(BFloat16* to, float x) { to->bits = __bfloat16_as_ushort(__float2bfloat16_rn(x)); }

}  // namespace isqrt::cuda
