// The launchers of csrc/cuda over the shapes and layouts that the lint reports on.
#include <cmath>
#include <string>

#include "cuda/cuda.h"
#include "launchers.h"
#include "lint_recorder.h"

using namespace isqrt;

namespace {

enum class Layout { kNCHW, kChannelsLast };

template <class T> T* allocate(int64_t elements) {
  T* memory = static_cast<T*>(lint::allocate(size_t(elements) * sizeof(T)));
  for (int64_t i = 0; i < elements; ++i) memory[i] = T();
  return memory;
}

template <class X>
FeatureMaps<X> feature_maps(std::remove_const_t<X>* data, int64_t C, int64_t H, int64_t W, Layout layout) {
  if (layout == Layout::kChannelsLast) return {data, 1, C, H, W, C * H * W, 1, C * W, C};
  return {data, 1, C, H, W, C * H * W, H * W, W, 1};
}

/// In chunks, so that there is something to merge.
template <class X>
void pooling(const std::string& label, int64_t C, int64_t H, int64_t W, Layout layout, int64_t count = 2) {
  using T = Compute<X>;
  const int64_t M = H * W;
  const Chunks chunks{M, (M + count - 1) / count, count};
  lint::record(label, [&] {
    X *x = allocate<X>(C * M), *grad_x = allocate<X>(C * M);
    T *mean = allocate<T>(C), *sigma = allocate<T>(C * C);
    T *partial_mean = allocate<T>(count * C), *partial_moment = allocate<T>(count * C * C);
    const auto maps = feature_maps<const X>(x, C, H, W, layout);
    cuda::pool(PoolTask<X>{maps, chunks, partial_mean, partial_moment, mean, sigma, nullptr}, nullptr);
    cuda::pool_backward(
        PoolBackwardTask<X>{maps, chunks, mean, sigma, nullptr, feature_maps<X>(grad_x, C, H, W, layout)}, nullptr);
  });
}

/// Three steps, with T in full or not.
Steps three_steps(bool in_full) {
  Steps steps = choose_steps(3, 0);
  if (in_full) steps.mirrored = 0;
  return steps;
}

/// `blocks` as in launchers.h.
template <class T> void root(const std::string& label, int64_t C, bool in_full, int blocks = 1) {
  const bool warpgroups = launchers::is_by_warpgroups(blocks), grid = launchers::is_on_grid(blocks);
  const Steps steps = three_steps(in_full);
  lint::record(label, [&] {
    T *sigma = allocate<T>(C * C), *result = allocate<T>(C * C), *grad_sigma = allocate<T>(C * C);
    T* workspace = grid ? allocate<T>(cuda::grid_workspace_size(1, C, sizeof(T), true, in_full, warpgroups)) : nullptr;
    for (int64_t i = 0; i < C; ++i) sigma[i * C + i] = T(1);
    const RootView<const T> source{sigma, Output::kMatrix, C};
    const auto fits = [&](bool backward) {
      return grid || cuda::root_shared_bytes(C, sizeof(T), backward, in_full) > 0;
    };
    const RootTask<T> forward{1,       source,    steps, Root::kSquare, {result, Output::kMatrix, C},
                              nullptr, workspace, blocks};
    const RootBackwardTask<T> backward{
        1,     {result, Output::kMatrix, C}, source, steps, Root::kSquare, {grad_sigma, Output::kMatrix, C}, workspace,
        blocks};
    if (fits(false)) grid ? cuda::grid_root(forward, warpgroups, nullptr) : cuda::root(forward, warpgroups, nullptr);
    if (fits(true))
      grid ? cuda::grid_root_backward(backward, warpgroups, nullptr)
           : cuda::root_backward(backward, warpgroups, nullptr);
  });
}

}  // namespace

int main() {
  pooling<float>("64 x 8 x 48", 64, 8, 48, Layout::kNCHW);
  pooling<float>("64 x 8 x 48 in six chunks", 64, 8, 48, Layout::kNCHW, 6);
  pooling<float>("64 x 8 x 48 channels_last", 64, 8, 48, Layout::kChannelsLast);
  pooling<float>("256 x 14 x 14", 256, 14, 14, Layout::kNCHW);
  pooling<BFloat16>("64 x 8 x 48", 64, 8, 48, Layout::kNCHW);
  root<float>("64 x 64", 64, false);
  root<float>("64 x 64 in full", 64, true);
  root<float>("64 x 64 in a cluster", 64, false, 2);
  root<float>("64 x 64 by warpgroups", 64, false, -2);
  root<float>("128 x 128", 128, false);
  root<double>("64 x 64", 64, false);
  root<float>("160 x 160", 160, true, 0);
  root<float>("160 x 160 by warpgroups", 160, true, -1);
}
