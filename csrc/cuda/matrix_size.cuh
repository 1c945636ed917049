// What a block takes for symmetric matrices in its shared memory: warps for their tiles, and bytes.
#pragma once
#include "tiles.cuh"

namespace isqrt::cuda {

/// The most tiles of a warp, and the warps. A product takes as long as that of a multiprocessor's four schedulers which
/// has the most to do: up to four tiles get a warp each, more of them as many warps for each scheduler as hold them
/// all, two or three in each.
constexpr int kMaxSlots = 3, kSchedulers = 4;
ISQRT_FN constexpr int matrix_slots(int channels) {
  const int tiles = tile_count(channels);
  return tiles <= kSchedulers ? 1 : tiles <= 4 * kSchedulers ? 2 : kMaxSlots;
}
ISQRT_FN constexpr int matrix_threads(int channels) {
  const int tiles = tile_count(channels), slots = matrix_slots(channels), each = kSchedulers * slots;
  return kWarp * (slots == 1 ? tiles : kSchedulers * ((tiles + each - 1) / each));
}

/// Elements of shared memory before the matrices: for block_sum, and a cluster's mbarriers.
constexpr int kSums = 32;

ISQRT_FN constexpr int64_t matrix_shared_bytes(int channels, int64_t element_size, int matrices) {
  return element_size * kSums + int64_t(matrices) * tile_count(channels) * tile_bytes(element_size);
}

/// The most channels for which that many matrices fit into the shared memory of any device, and their tiles into the
/// warps of a block.
constexpr int kMostMatrixChannels = 128;
constexpr int max_matrix_channels(int64_t element_size, int matrices) {
  constexpr int64_t kLargestSharedBytes = 227 * 1024;
  int channels = kMostMatrixChannels;
  while (matrix_shared_bytes(channels, element_size, matrices) > kLargestSharedBytes) channels -= kTile;
  return channels;
}

/// Each warp has as many tiles as there are slots, or one less, but for one.
static_assert([] {
  for (int channels = 1; channels <= max_matrix_channels(4, 1); ++channels) {
    const int tiles = tile_count(channels), warps = matrix_threads(channels) / kWarp, slots = matrix_slots(channels);
    if (tiles > warps * slots || tiles < warps * (slots > 1 ? slots - 1 : 1)) return false;
  }
  return true;
}());

}  // namespace isqrt::cuda
