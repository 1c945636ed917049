// Runs the launchers for the sanitizers to watch, `check pooling C ...` or `check newton_schulz C ...`, for each number
// C of channels: all element types, three layouts of x, one chunk and several, all outputs and both roots. Arrays have
// exactly the sizes they should have and are not initialised, and a result that is not finite (what shared memory holds
// before it is written is NaN) is an error.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <utility>

#include "emulation.h"
#include "launchers.h"

namespace {

using launchers::Array;

struct Type {
  std::string name;
  int64_t size;

  double read(const char* from) const {
    const auto as = [&](auto number) {
      std::memcpy(&number, from, sizeof number);
      return number;
    };
    if (name == "float64") return as(double());
    if (name == "float32") return as(float());
    if (name == "float16") return double(as(_Float16()));
    const uint32_t bits = uint32_t(as(uint16_t())) << 16;
    float number;
    std::memcpy(&number, &bits, sizeof number);
    return number;
  }
  void write(char* to, double value) const {
    const auto as = [&](auto number) { std::memcpy(to, &number, sizeof number); };
    if (name == "float64") return as(value);
    if (name == "float32") return as(float(value));
    if (name == "float16") return as(_Float16(value));
    const float number = float(value);
    uint32_t bits;
    std::memcpy(&bits, &number, sizeof bits);
    as(uint16_t(bits >> 16));
  }
};

const Type kFloat16{"float16", 2}, kBFloat16{"bfloat16", 2}, kFloat32{"float32", 4}, kFloat64{"float64", 8};

const Array kNone{nullptr, 0, 1, {0}, {1}};

/// A contiguous array of exactly `size` elements, uninitialised: the kernels have to write all of it.
struct Buffer {
  Buffer(const Type& type, int64_t size) : type(type), size(size), data(new char[size * type.size]) {}

  Array array(int64_t a, int64_t b, int64_t c = 1) const {
    return {data.get(), type.size, 3, {a, b, c}, {b * c, c, 1}};
  }

  const Type& type;
  int64_t size;
  std::unique_ptr<char[]> data;
};

Buffer random_numbers(const Type& type, int64_t size, uint64_t seed, double factor = 1) {
  Buffer buffer(type, size);
  for (int64_t i = 0; i < size; ++i) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    type.write(buffer.data.get() + i * type.size, factor * (double(seed >> 33) / double(1u << 31) + 0.5));
  }
  return buffer;
}

void require_finite(const Buffer& buffer, const char* what) {
  for (int64_t i = 0; i < buffer.size; ++i)
    if (!std::isfinite(buffer.type.read(buffer.data.get() + i * buffer.type.size))) {
      std::printf("%s: element %lld is not finite\n", what, static_cast<long long>(i));
      std::exit(1);
    }
}

struct Pooling {
  const Type &type, &compute;
  int64_t B, C, height = 7, width = 43;  // more positions than two tiles have

  /// x and its gradient lie in memory in the order B, H, W, C or B, C, H, W, the latter inside rows that are longer.
  void run(bool channels_last, int64_t margin, int64_t chunk, double factor = 1) const {
    const int64_t row = width + margin, M = height * width;
    // The last row ends with the image and not with the margin.
    const int64_t size = B * C * height * row - margin;
    const Buffer x = random_numbers(type, size, 1, factor), grad_x = random_numbers(type, size, 2);
    const auto maps = [&](const Buffer& b) -> Array {
      if (channels_last) return {b.data.get(), type.size, 4, {B, C, height, width}, {C * M, 1, C * width, C}};
      return {b.data.get(), type.size, 4, {B, C, height, width}, {C * height * row, height * row, row, 1}};
    };
    const Buffer sigma(compute, B * C * C), mean(compute, B * C), scale(compute, B);
    launchers::pool(type.name, maps(x), chunk, sigma.array(B, C, C), mean.array(B, C), scale.array(B, 1));
    require_finite(mean, "mean");
    require_finite(sigma, "sigma");
    launchers::pool_backward(type.name, sigma.array(B, C, C), maps(x), mean.array(B, C), scale.array(B, 1), chunk,
                             maps(grad_x));
    require_finite(grad_x, "grad_x");
  }
};

struct NewtonSchulz {
  const Type &type, &compute;
  int64_t B, C;

  void run(int iterations, int root, int output, int blocks, double floor = 0) const {
    const int64_t size = output == 0 ? C * C : output == 1 ? C * (C + 1) / 2 : C;
    Buffer sigma = random_numbers(compute, B * C * C, 1);  // and more on the diagonal
    for (int64_t i = 0; i < B * C; ++i) compute.write(sigma.data.get() + (i * C + i % C) * compute.size, double(C));
    const Buffer result(type, B * size), grad = random_numbers(type, B * size, 2), grad_sigma(compute, B * C * C);
    const auto fits = [&](bool backward) {
      const auto shared_bytes = blocks > 1 ? launchers::cluster_shared_bytes : launchers::root_shared_bytes;
      return blocks <= 0 || shared_bytes(C, compute.size, backward, iterations, floor) > 0;
    };
    if (!fits(false)) return;
    launchers::root(type.name, sigma.array(B, C, C), iterations, root, output, floor, blocks, kNone,
                    result.array(B, size));
    require_finite(result, "root");
    if (!fits(true)) return;
    launchers::root_backward(type.name, grad.array(B, size), sigma.array(B, C, C), iterations, root, output, floor,
                             blocks, grad_sigma.array(B, C, C), kNone);
    require_finite(grad_sigma, "grad_sigma");
  }
};

void check_pooling(int64_t channels) {
  for (const Type* type : {&kFloat32, &kFloat64, &kFloat16, &kBFloat16}) {
    const Pooling pooling{*type, type->size == 2 ? kFloat32 : *type, 2, channels};
    pooling.run(false, 0, 301);
    pooling.run(true, 0, 200);
    pooling.run(false, 3, 40);
    if (type != &kFloat16) pooling.run(false, 0, 200, type->size == 8 ? 1e-200 : 1e-30);  // with a second pass
  }
}

void check_newton_schulz(int64_t channels) {
  for (const Type* type : {&kFloat32, &kFloat64, &kBFloat16}) {
    const NewtonSchulz newton_schulz{*type, type->size == 2 ? kFloat32 : *type, 2, channels};
    newton_schulz.run(1, 0, 2, 1);
    newton_schulz.run(2, 1, 1, 1);
    newton_schulz.run(3, 0, 0, 2);
    newton_schulz.run(2, 0, 0, 0);
    if (type->size == 2) continue;  // between reading and writing as float32
    newton_schulz.run(3, 0, 0, 1);
    newton_schulz.run(2, 0, 2, 4);
    newton_schulz.run(2, 0, 0, 8);
    for (const int blocks : {0, 1}) newton_schulz.run(6, 0, 0, blocks, 1e-3);  // the last steps in full
    if (type == &kFloat32) newton_schulz.run(2, 0, 0, -1);
    if (type == &kFloat32 && channels <= 64) newton_schulz.run(3, 0, 0, -2);
    // A device that has no room for spare matrices in the gradient.
    const size_t usual =
        std::exchange(emulation::options.shared_limit,
                      size_t(launchers::root_shared_bytes(channels, newton_schulz.compute.size, true, 3, 0)));
    newton_schulz.run(3, 0, 0, 4);
    emulation::options.shared_limit = usual;
  }
}

}  // namespace

int main(int argc, char** argv) try {
  emulation::options.order = emulation::Order::kRandom;
  const bool pooling = argc > 1 && std::string(argv[1]) == "pooling";
  for (int a = 2; a < argc; ++a) {
    std::printf("%s channels\n", argv[a]);
    (pooling ? check_pooling : check_newton_schulz)(std::stoll(argv[a]));
  }
} catch (const std::exception& error) {
  std::printf("%s\n", error.what());
  return 1;
}
