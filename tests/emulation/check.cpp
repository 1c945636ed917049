// Runs every launcher of csrc/cuda once for each number of channels on the command line, for the sanitizers to watch:
// both element types, three layouts of x, all outputs and both roots. Arrays have exactly the sizes they should have,
// and a result that is not finite (what shared memory holds before it is written is NaN) is an error.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>

#include "cuda/cuda.h"
#include "emulation.h"

using namespace isqrt;

namespace {

/// Uninitialised, unlike a std::vector: the kernels have to write all of it.
template <class T> struct Buffer {
  explicit Buffer(int64_t size) : size(size), data(new T[size]) {}
  int64_t size;
  std::unique_ptr<T[]> data;
  T* get() const { return data.get(); }
};

template <class T> Buffer<T> random_numbers(int64_t size, uint64_t seed) {
  Buffer<T> buffer(size);
  for (int64_t i = 0; i < size; ++i) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    buffer.data[i] = T(double(seed >> 33) / double(1u << 31) + 0.5);
  }
  return buffer;
}

template <class T> void require_finite(const Buffer<T>& buffer, const char* what) {
  for (int64_t i = 0; i < buffer.size; ++i)
    if (!std::isfinite(buffer.data[i])) {
      std::printf("%s: element %lld is not finite\n", what, static_cast<long long>(i));
      std::exit(1);
    }
}

template <class T> struct Check {
  int64_t B, C, height = 7, width = 11, M = height * width;  // more positions than any tile has

  /// x and its gradient lie in memory in the order B, H, W, C or B, C, H, W, the latter inside rows that are longer.
  FeatureMaps<T> view(const Buffer<T>& buffer, bool channels_last, int64_t margin) const {
    const int64_t row = width + margin;
    if (channels_last) return {buffer.get(), B, C, height, width, C * M, 1, C * width, C};
    return {buffer.get(), B, C, height, width, C * height * row, height * row, row, 1};
  }

  Buffer<T> pool_and_back(bool channels_last, int64_t margin, int64_t chunk) const {
    const Chunks chunks{M, chunk, (M + chunk - 1) / chunk};
    // The last row ends with the image and not with the margin.
    const int64_t size = B * C * height * (width + margin) - margin;
    const Buffer<T> x = random_numbers<T>(size, 1), grad_sigma = random_numbers<T>(B * C * C, 2);
    const Buffer<T> partial_mean(B * chunks.count * C), partial_moment(B * chunks.count * C * C);
    const Buffer<T> mean(B * C), grad_x = random_numbers<T>(size, 3);
    Buffer<T> sigma(B * C * C);
    const FeatureMaps<T> maps = view(x, channels_last, margin);
    const FeatureMaps<const T> constant{maps.data,    B, C, height, width, maps.stride_b, maps.stride_c, maps.stride_h,
                                        maps.stride_w};
    const bool whole = chunks.count == 1;
    cuda::pool(PoolTask<T>{constant, chunks, (whole ? mean : partial_mean).get(),
                           (whole ? sigma : partial_moment).get(), mean.get(), sigma.get()},
               nullptr);
    require_finite(mean, "mean");
    require_finite(sigma, "sigma");
    cuda::pool_backward(
        PoolBackwardTask<T>{constant, chunks, mean.get(), grad_sigma.get(), view(grad_x, channels_last, margin)},
        nullptr);
    require_finite(grad_x, "grad_x");
    return sigma;
  }

  void root_and_back(const Buffer<T>& sigma, int iterations, Root root, Output output) const {
    const RootView<const T> source{sigma.get(), Output::kMatrix, C};
    const int64_t size = RootView<T>{nullptr, output, C}.size();
    const Buffer<T> result(B * size), grad = random_numbers<T>(B * size, 4), grad_sigma(B * C * C);
    if (cuda::root_shared_bytes(C, sizeof(T), false) == 0) return;
    cuda::root(RootTask<T>{B, source, {iterations}, root, {result.get(), output, C}}, nullptr);
    require_finite(result, "root");
    if (cuda::root_shared_bytes(C, sizeof(T), true) == 0) return;
    cuda::root_backward(
        RootBackwardTask<T>{
            B, {grad.get(), output, C}, source, {iterations}, root, {grad_sigma.get(), Output::kMatrix, C}},
        nullptr);
    require_finite(grad_sigma, "grad_sigma");
  }

  void run() const {
    const Buffer<T> sigma = pool_and_back(false, 0, M);
    pool_and_back(true, 0, 40);
    pool_and_back(false, 3, 40);
    root_and_back(sigma, 1, Root::kSquare, Output::kMean);
    root_and_back(sigma, 3, Root::kSquare, Output::kMatrix);
    root_and_back(sigma, 2, Root::kInverse, Output::kTriu);
  }
};

}  // namespace

int main(int argc, char** argv) {
  emulation::options.order = emulation::Order::kRandom;
  for (int a = 1; a < argc; ++a) {
    const int64_t channels = std::stoll(argv[a]);
    std::printf("%lld channels\n", static_cast<long long>(channels));
    Check<float>{2, channels}.run();
    Check<double>{1, channels}.run();
  }
}
