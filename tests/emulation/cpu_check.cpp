// Runs the CPU engine for the sanitizers to watch, `cpu_check B C M ...`: all element types, outputs, roots and four
// layouts of x, at each SIMD level that there is, on one thread and on four. Arrays have exactly the sizes they should
// have and are not initialised: a result that is not finite is an error, and one that depends on the threads.
#include <torch/csrc/stable/ops.h>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cpu/cpu.h"

namespace {

using namespace isqrt;

#if defined(EMULATION_THREAD_SANITIZER)  // threads share what is computed, and that is never of 16 bits
constexpr bool kRaces = true;
#else
constexpr bool kRaces = false;
#endif

bool is_finite(double x) { return std::isfinite(x); }
bool is_finite(Half x) { return (x.bits & 0x7c00) != 0x7c00; }
bool is_finite(BFloat16 x) { return (x.bits & 0x7f80) != 0x7f80; }

uint32_t bits_of(double value) {
  const float number = float(value);
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof bits);
  return bits;
}
void set(double& x, double value) { x = value; }
void set(float& x, double value) { x = float(value); }
void set(BFloat16& x, double value) { x.bits = uint16_t(bits_of(value) >> 16); }
void set(Half& x, double value) {  // digits beyond its own are cut off, and so is what would be subnormal
  const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  x.bits = uint16_t(magnitude < 0x38800000 ? sign : sign | (magnitude - 0x38000000) >> 13);
}

/// Exactly `size` elements, each of them NaN.
template <class T> struct Buffer {
  explicit Buffer(int64_t size) : size(size), data(static_cast<T*>(std::malloc(size * sizeof(T)))) {
    std::memset(static_cast<void*>(data), 0xff, size * sizeof(T));
  }
  Buffer(Buffer&& other) : size(other.size), data(std::exchange(other.data, nullptr)) {}
  ~Buffer() { std::free(data); }

  int64_t size;
  T* data;
};

template <class T> Buffer<T> random_numbers(int64_t size, uint64_t seed, double factor = 1) {
  Buffer<T> buffer(size);
  for (int64_t i = 0; i < size; ++i) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    set(buffer.data[i], factor * (double(seed >> 33) / double(1u << 30) - 1));
  }
  return buffer;
}

/// The results of some calls, to compare.
struct Results {
  std::vector<char> bytes;

  template <class T> void add(const Buffer<T>& buffer, const char* what) {
    for (int64_t i = 0; i < buffer.size; ++i)
      if (!is_finite(buffer.data[i])) {
        std::printf("%s: element %lld is not finite\n", what, static_cast<long long>(i));
        std::exit(1);
      }
    const char* from = reinterpret_cast<const char*>(buffer.data);
    bytes.insert(bytes.end(), from, from + buffer.size * sizeof(T));
  }
};

template <class X> struct Check {
  using T = Compute<X>;
  EngineKind level;
  int64_t B, C, M;

  Results roots() const {
    Results results;
    for (const Output output : {Output::kMatrix, Output::kTriu, Output::kMean}) root(output, Root::kSquare, results);
    root(Output::kMatrix, Root::kInverse, results);
    return results;
  }

  Results maps(int layout, double factor) const {
    // Positions or channels follow each other; or rows of them, of an image with something beside it; or neither.
    const int64_t width = layout == 2 ? (M + 2) / 3 : M, height = layout == 2 ? 3 : 1, row = width + (layout == 2) * 5;
    const int64_t size = layout == 2 ? B * C * height * row - 5 : layout == 3 ? 2 * B * C * M - 1 : B * C * M;
    const Buffer<X> x = random_numbers<X>(size, 1, factor);
    const auto maps = [&](auto* data) -> FeatureMaps<std::remove_pointer_t<decltype(data)>> {
      if (layout == 1) return {data, B, C, 1, M, C * M, 1, 0, C};
      if (layout == 3) return {data, B, C, 1, M, 2 * C * M, 2 * M, 0, 2};
      return {data, B, C, height, width, C * height * row, height * row, row, 1};
    };
    const auto read = maps(static_cast<const X*>(x.data));
    Results results;
    const int64_t positions = read.positions();
    pool(read, maps, size, results);
    for (const Output output : {Output::kMatrix, Output::kTriu, Output::kMean})
      if (positions > 1 && positions < C) gram(read, maps, size, output, results);
    return results;
  }

  template <class Maps>
  void pool(const FeatureMaps<const X>& x, const Maps& maps, int64_t size, Results& results) const {
    const int64_t positions = x.positions();
    for (const int64_t length : {positions, std::max<int64_t>(1, positions / 3)}) {
      const Chunks chunks{positions, length, divide_up(positions, length)};
      const Buffer<T> mean(B * C), sigma(B * C * C), scale(B), partial_mean(B * chunks.count * C),
          partial_moment(B * chunks.count * C * C);
      const bool one = chunks.count == 1;
      cpu::Stages stages;
      const PoolTask<X> task{
          x,          chunks,    one ? mean.data : partial_mean.data, one ? sigma.data : partial_moment.data, mean.data,
          sigma.data, scale.data};
      cpu::pool(task, level, stages);
      const Buffer<X> grad_x(size);
      for (int64_t i = 0; i < size; ++i) set(grad_x.data[i], 0);  // what lies between positions is not written
      const Buffer<T> grad_sigma = random_numbers<T>(B * C * C, 2);
      cpu::pool_backward(PoolBackwardTask<X>{x, chunks, mean.data, grad_sigma.data, scale.data, maps(grad_x.data)},
                         level, stages);
      // A sample's gradient begins when its mean is there: the stages are of the same samples.
      stages.run();
      results.add(mean, "mean"), results.add(sigma, "sigma"), results.add(scale, "scale"),
          results.add(grad_x, "grad_x");
    }
  }

  /// Symmetric, and positive definite.
  static Buffer<T> matrices(int64_t B, int64_t n) {
    Buffer<T> sigma = random_numbers<T>(B * n * n, 3, 0.5);
    for (int64_t b = 0; b < B; ++b)
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < i; ++j) sigma.data[(b * n + i) * n + j] = sigma.data[(b * n + j) * n + i];
        sigma.data[(b * n + i) * n + i] = T(n);
      }
    return sigma;
  }

  void root(Output output, Root root, Results& results) const {
    const int64_t size = B * RootView<X>{nullptr, output, C}.size();
    const Buffer<T> sigma = matrices(B, C);
    // A step of each kind: the first, those between, the last; and one that computes T in full.
    const bool in_full = output == Output::kMatrix && sizeof(X) == sizeof(T);
    const Steps steps = in_full ? choose_steps(6, 1e-3) : choose_steps(3, 0);
    const Buffer<X> result(size), grad = random_numbers<X>(size, 4);
    const Buffer<T> grad_sigma(B * C * C), value(B * C * C);
    const bool with_value = output == Output::kMatrix;
    const RootView<const T> source{sigma.data, Output::kMatrix, C};
    cpu::Stages stages;
    cpu::root(RootTask<X>{B, source, steps, root, {result.data, output, C}}, level, stages);
    RootBackwardTask<X> task{B, {grad.data, output, C}, source, steps, root, {grad_sigma.data, Output::kMatrix, C}};
    if (with_value) task.value = value.data;
    cpu::root_backward(task, level, stages);
    stages.run();
    results.add(result, "root"), results.add(grad_sigma, "grad_sigma");
    if (with_value) results.add(value, "value");
  }

  template <class Maps>
  void gram(const FeatureMaps<const X>& x, const Maps& maps, int64_t size, Output output, Results& results) const {
    const int64_t n = gram_side(x.positions()), elements = B * RootView<T>{nullptr, output, C}.size();
    const Buffer<T> matrix(B * n * n), scale(B), result(elements), product(B * C * n), grad_root(B * n * n);
    const Buffer<T> root = matrices(B, n), grad = random_numbers<T>(elements, 5);
    const Buffer<X> grad_x(size);
    for (int64_t i = 0; i < size; ++i) set(grad_x.data[i], 0);
    cpu::Stages stages;
    cpu::gram(GramTask<X>{x, matrix.data, scale.data}, level, stages);
    cpu::expand(ExpandTask<X>{x, scale.data, root.data, {result.data, output, C}}, level, stages);
    cpu::contract(ContractTask<X>{x, scale.data, {grad.data, output, C}, product.data, grad_root.data}, level, stages);
    cpu::gram_backward(GramBackwardTask<X>{x, scale.data, product.data, root.data, grad_root.data, maps(grad_x.data)},
                       level, stages);
    stages.run();
    results.add(matrix, "gram"), results.add(result, "expanded"), results.add(grad_root, "grad_root");
    results.add(grad_x, "grad_x");
  }
};

/// The same on one thread and on four.
template <class Run> void compare(const Run& run) {
  torch::stable::threads = 1;
  const Results one = run();
  torch::stable::threads = 4;
  if (run().bytes == one.bytes) return;
  std::printf("results of four threads are not those of one\n");
  std::exit(1);
}

template <class X> void check(EngineKind level, int64_t B, int64_t C, int64_t M) {
  const Check<X> check{level, B, C, M};
  compare([&] { return check.roots(); });
  // Squares that leave the range of what they are computed in, where X has numbers so small.
  const double small = sizeof(X) == 8 ? 1e-200 : std::is_same_v<X, Half> ? 1e-4 : 1e-30;
  for (const int layout : {0, 1, 2, 3}) compare([&] { return check.maps(layout, layout == 0 ? small : 1); });
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<EngineKind> levels{EngineKind::kPortable};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    levels.push_back(EngineKind::kAvx2);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    levels.push_back(EngineKind::kAvx512);
#endif
  for (int a = 1; a + 2 < argc; a += 3)
    for (const EngineKind level : levels) {
      const int64_t B = std::stoll(argv[a]), C = std::stoll(argv[a + 1]), M = std::stoll(argv[a + 2]);
      std::printf("level %d: %s samples of %s channels and %s positions\n", int(level), argv[a], argv[a + 1],
                  argv[a + 2]);
      check<float>(level, B, C, M), check<double>(level, B, C, M);
      if (!kRaces) check<Half>(level, B, C, M), check<BFloat16>(level, B, C, M);
    }
}
