// What the engines read and write: plain structs of pointers, sizes and strides, in elements.
#pragma once
#include <cstdint>

// A call that nvcc does not inline keeps its arguments in local memory.
#if defined(__CUDACC__)
#define ISQRT_FN __host__ __device__ __forceinline__
#else
#define ISQRT_FN inline
#endif

namespace isqrt {

ISQRT_FN constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// The 16-bit floating-point numbers, as they lie in memory. Nothing is computed in them: they are read into and
/// written from float.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class X> struct ComputeType {
  using type = X;
};
template <> struct ComputeType<Half> {
  using type = float;
};
template <> struct ComputeType<BFloat16> {
  using type = float;
};

/// What feature maps of X are computed in.
template <class X> using Compute = typename ComputeType<X>::type;

/// One batch of feature maps x: [B, C, H, W], any strides (0 and negative included); M = H W positions.
template <class T> struct FeatureMaps {
  T* data;
  int64_t batch, channels, height, width;
  int64_t stride_b, stride_c, stride_h, stride_w;

  ISQRT_FN int64_t positions() const { return height * width; }
  ISQRT_FN T* sample(int64_t b) const { return data + b * stride_b; }
  /// Address of position m of channel 0, relative to its sample.
  ISQRT_FN int64_t offset(int64_t m) const {
    return height == 1 ? m * stride_w : m / width * stride_h + m % width * stride_w;  // divisions take time
  }
};

/// Yhat itself, its upper triangle row by row, or its mean over the first channel index.
enum class Output : int { kMatrix = 0, kTriu = 1, kMean = 2 };

/// Index of (i, j), i <= j, in the row-major upper triangle of a C x C matrix.
ISQRT_FN int64_t triu_index(int64_t i, int64_t j, int64_t channels) { return i * channels - i * (i - 1) / 2 + (j - i); }

/// The mean of two mirrored elements: half of a denormal number is not exact.
template <class T> ISQRT_FN T symmetric_part(T above, T below) {
  return above == below ? above : T(0.5) * above + T(0.5) * below;
}

/// The result of one batch of roots, [B, C, C], [B, C (C + 1) / 2] or [B, C], contiguous; or the upstream gradient
/// dL/dYhat in the same layout. Its elements are of X, and data[i] is one.
template <class X, class Pointer = X*> struct RootView {
  Pointer data;
  Output output;
  int64_t channels;

  ISQRT_FN int64_t size() const {
    return output == Output::kMatrix ? channels * channels
           : output == Output::kTriu ? channels * (channels + 1) / 2
                                     : channels;
  }
  ISQRT_FN RootView sample(int64_t b) const { return {data + b * size(), output, channels}; }

  /// Read as a gradient: element (i, j), i <= j, of sym(G), the symmetric C x C matrix whose inner product with
  /// a symmetric dYhat is that of this gradient with d(output).
  ISQRT_FN auto symmetric(int64_t i, int64_t j) const {
    using Scalar = decltype(data[0] * data[0]);
    const Scalar half = Scalar(0.5);
    switch (output) {
      case Output::kMatrix: {
        const Scalar above = data[i * channels + j], below = data[j * channels + i];
        return symmetric_part(above, below);
      }
      case Output::kTriu:
        return (i == j ? Scalar(1) : half) * data[triu_index(i, j, channels)];
      default:
        return (half * data[i] + half * data[j]) / Scalar(channels);
    }
  }
};

}  // namespace isqrt
