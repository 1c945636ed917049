#include "launchers.h"

#include <cmath>
#include <stdexcept>
#include <vector>

#include "cuda/cuda.h"
#include "emulation.h"
#include "plan.h"

using namespace isqrt;

namespace launchers {
namespace {

template <class T> T* elements(const Array& a) {
  if (a.element_size != sizeof(T)) throw std::invalid_argument("array: elements of another size");
  return static_cast<T*>(a.data);
}

template <class T> T* contiguous(const Array& a) {
  int64_t size = 1;  // of an index of dimension d
  bool contiguous = true;
  for (int d = a.rank - 1; d >= 0; size *= a.shape[d--]) contiguous &= a.strides[d] == size || a.shape[d] == 1;
  if (!contiguous && size > 0) throw std::invalid_argument("array: not contiguous");
  return elements<T>(a);
}

/// Null for an array without elements.
template <class T> T* numbers(const Array& a) { return a.shape[0] == 0 ? nullptr : contiguous<T>(a); }

template <class X> FeatureMaps<X> feature_maps(const Array& x) {
  const auto &n = x.shape, &s = x.strides;
  X* data = elements<X>(x);
  if (x.rank == 4) return {data, n[0], n[1], n[2], n[3], s[0], s[1], s[2], s[3]};
  return {data, n[0], n[1], 1, n[2], s[0], s[1], 0, s[2]};
}

Chunks chunks(const Array& x, int64_t chunk) {
  const int64_t positions = x.rank == 4 ? x.shape[2] * x.shape[3] : x.shape[2];
  return {positions, chunk, (positions + chunk - 1) / chunk};
}

/// f(X()) for the element type X of that name.
template <class F> void dispatch(const std::string& dtype, const F& f) {
  if (dtype == "float32") return f(float());
  if (dtype == "float64") return f(double());
  if (dtype == "float16") return f(Half());
  if (dtype == "bfloat16") return f(BFloat16());
  throw std::invalid_argument("dtype: " + dtype);
}

}  // namespace

void pool(const std::string& dtype, const Array& x, int64_t chunk, const Array& sigma, const Array& mean,
          const Array& scale) {
  dispatch(dtype, [&](auto zero) {
    using X = decltype(zero);
    using T = Compute<X>;
    const int64_t B = x.shape[0], C = x.shape[1];
    const Chunks split = chunks(x, chunk);
    // As in call.h, the partial results of a single chunk are sigma and mean themselves.
    std::vector<T> partial_mean, partial_moment;
    if (split.count > 1) {
      partial_mean.resize(B * split.count * C);
      partial_moment.resize(B * split.count * C * C);
    }
    cuda::pool(PoolTask<X>{feature_maps<const X>(x), split, split.count > 1 ? partial_mean.data() : contiguous<T>(mean),
                           split.count > 1 ? partial_moment.data() : contiguous<T>(sigma), contiguous<T>(mean),
                           contiguous<T>(sigma), numbers<T>(scale)},
               nullptr);
  });
}

void pool_backward(const std::string& dtype, const Array& grad_sigma, const Array& x, const Array& mean,
                   const Array& scale, int64_t chunk, const Array& grad_x) {
  dispatch(dtype, [&](auto zero) {
    using X = decltype(zero);
    using T = Compute<X>;
    cuda::pool_backward(PoolBackwardTask<X>{feature_maps<const X>(x), chunks(x, chunk), contiguous<T>(mean),
                                            contiguous<T>(grad_sigma), numbers<T>(scale), feature_maps<X>(grad_x)},
                        nullptr);
  });
}

void root(const std::string& dtype, const Array& sigma, int iterations, int root, int output, double floor, int blocks,
          const Array& scale, const Array& result) {
  const bool warpgroups = is_by_warpgroups(blocks), grid = is_on_grid(blocks);
  dispatch(dtype, [&](auto zero) {
    using X = decltype(zero);
    using T = Compute<X>;
    const int64_t B = sigma.shape[0], C = sigma.shape[1];
    const Steps steps = choose_steps(iterations, floor);
    std::vector<T> workspace(
        grid ? cuda::grid_workspace_size(B, C, sizeof(T), false, steps.any_in_full(), warpgroups) : 0, T(NAN));
    const RootTask<X> task{B,
                           {contiguous<const T>(sigma), Output::kMatrix, C},
                           steps,
                           static_cast<Root>(root),
                           {contiguous<X>(result), static_cast<Output>(output), C},
                           numbers<const T>(scale),
                           workspace.data(),
                           blocks};
    grid ? cuda::grid_root(task, warpgroups, nullptr) : cuda::root(task, warpgroups, nullptr);
  });
}

void root_backward(const std::string& dtype, const Array& grad, const Array& sigma, int iterations, int root,
                   int output, double floor, int blocks, const Array& grad_sigma, const Array& value) {
  const bool warpgroups = is_by_warpgroups(blocks), grid = is_on_grid(blocks);
  dispatch(dtype, [&](auto zero) {
    using X = decltype(zero);
    using T = Compute<X>;
    const int64_t B = sigma.shape[0], C = sigma.shape[1];
    const Steps steps = choose_steps(iterations, floor);
    std::vector<T> workspace(
        grid ? cuda::grid_workspace_size(B, C, sizeof(T), true, steps.any_in_full(), warpgroups) : 0, T(NAN));
    const RootBackwardTask<X> task{B,
                                   {contiguous<const X>(grad), static_cast<Output>(output), C},
                                   {contiguous<const T>(sigma), Output::kMatrix, C},
                                   steps,
                                   static_cast<Root>(root),
                                   {contiguous<T>(grad_sigma), Output::kMatrix, C},
                                   workspace.data(),
                                   blocks,
                                   numbers<T>(value)};
    grid ? cuda::grid_root_backward(task, warpgroups, nullptr) : cuda::root_backward(task, warpgroups, nullptr);
  });
}

Choice plan(int64_t batch, int64_t channels, int64_t positions, int64_t element_size, int iterations, int engine) {
  const bool in_full = choose_steps(iterations, 0).any_in_full();
  const int device = emulation::options.device();
  const Plan p =
      isqrt::plan({true, device, batch, channels, positions, element_size, in_full}, static_cast<EngineKind>(engine));
  return {engine_name(p.forward), engine_name(p.backward), p.pool.length,
          p.pool_backward.length, p.forward_blocks,        p.backward_blocks};
}

int64_t root_shared_bytes(int64_t channels, int64_t element_size, bool backward, int iterations, double floor) {
  return cuda::root_shared_bytes(channels, element_size, backward, choose_steps(iterations, floor).any_in_full());
}
int64_t cluster_shared_bytes(int64_t channels, int64_t element_size, bool backward, int iterations, double floor) {
  return cuda::cluster_shared_bytes(channels, element_size, backward, choose_steps(iterations, floor).any_in_full());
}
int64_t shared_bytes_limit() { return cuda::limits(emulation::options.device()).shared_bytes; }

}  // namespace launchers
