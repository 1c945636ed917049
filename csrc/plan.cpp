#include "plan.h"

#include <algorithm>
#include <stdexcept>

#ifdef ISQRT_WITH_CUDA
#include "cuda/cuda.h"
#endif

namespace isqrt {
namespace {

/// Enough pieces to occupy the workers when the batch does not, none but the last shorter than `shortest`. The numbers
/// are fixed: a count of threads here would make results depend on it. Pieces begin where cache lines do if rows do.
Chunks split(const Problem& p, int64_t pieces, int64_t shortest) {
  const int64_t wanted = std::max<int64_t>(1, pieces / std::max<int64_t>(1, p.batch));
  const int64_t possible = std::max<int64_t>(1, p.positions / shortest);
  constexpr int64_t kLines = 64;  // positions: whole cache lines of any dtype
  const int64_t length = kLines * divide_up(divide_up(p.positions, std::min(wanted, possible)), kLines);
  return {p.positions, length, divide_up(p.positions, length)};
}

EngineKind best_cpu_level() {
  for (const EngineKind level : {EngineKind::kAvx512, EngineKind::kAvx2})
    if (cpu_supports(level)) return level;
  return EngineKind::kPortable;
}

Plan plan_cpu(const Problem& p, EngineKind requested) {
  const bool is_level = requested != EngineKind::kAuto && requested != EngineKind::kLibrary;
  if (is_level && !cpu_supports(requested))
    throw std::runtime_error(std::string("engine: '") + engine_name(requested) + "' is not available on this CPU");
  const EngineKind level = is_level ? requested : best_cpu_level();
  const EngineKind root = requested == EngineKind::kLibrary ? requested : level, pooling = p.gram ? root : level;
  // A chunk costs a C x C partial result: at 4 C positions or more these stay below a quarter of float32 feature maps.
  const int64_t pieces = p.gram ? 1 : 64;
  return {root, root, pooling, split(p, pieces, std::max<int64_t>(1024, 4 * p.channels)), split(p, pieces, 256)};
}

#ifdef ISQRT_WITH_CUDA
/// A cluster for each sample where the samples leave multiprocessors idle, as large a one as all samples can have at
/// the same time and as is of use: what blocks send each other takes time. Eight, which leave gaps, in half of the
/// device. The numbers are those of an H200, benchmarks/results/notes.md.
int blocks_of_sample(const Problem& p, const cuda::Limits& device, bool backward) {
  const int64_t fewest = backward ? 17 : 49, fewest_for_eight = 65;
  const int64_t bytes = cuda::cluster_shared_bytes(p.side(), p.element_size, backward, p.in_full);
  if (!device.clusters || bytes == 0 || bytes > device.shared_bytes || p.side() < fewest) return 1;
  if (backward && p.side() >= fewest_for_eight && 8 * p.batch <= device.multiprocessors / 2) return 8;
  // Of the groups of multiprocessors that clusters lie in some have two left over: 30 of four find room on an H200.
  if (4 * p.batch <= device.multiprocessors * 10 / 11) return 4;
  return 2 * p.batch <= device.multiprocessors ? 2 : 1;
}

Plan plan_cuda(const Problem& p, EngineKind requested) {
  const cuda::Limits device = cuda::limits(p.device);
  const auto choose = [&](bool backward) {
    const int64_t bytes = cuda::root_shared_bytes(p.side(), p.element_size, backward, p.in_full);
    const bool fits = bytes > 0 && bytes <= device.shared_bytes;
    switch (requested) {
      case EngineKind::kAuto:
        return fits ? EngineKind::kBlock : EngineKind::kGrid;  // kWarpgroup has yet to be measured
      case EngineKind::kBlock:
        if (fits) return requested;
        throw std::runtime_error("engine: 'block' needs more shared memory than this device has for " +
                                 std::to_string(p.side()) + " channels");
      case EngineKind::kWarpgroup:
        if (!device.hopper || cuda::architectures().find("9.0a") == std::string::npos)
          throw std::runtime_error(
              "engine: 'warpgroup' runs on devices of compute capability 9.0, with code of sm_90a");
        return p.element_size == sizeof(float) ? requested : EngineKind::kGrid;
      case EngineKind::kGrid:
      case EngineKind::kLibrary:
        return requested;
      default:
        throw std::runtime_error(std::string("engine: '") + engine_name(requested) + "' does not run on a CUDA device");
    }
  };
  // Some three blocks for each of the 132 multiprocessors of an H200, as many as it holds, of whole tiles of positions.
  // A block has 64 x 64 channels; or 64 for the gradient, of which several follow each other: it leaves nothing to
  // merge.
  constexpr int64_t kPoolBlocks = 384, kBlocks = 4096, kTile = 128, kChannels = 64;
  const int64_t tiles = divide_up(p.channels, kChannels);
  const auto split_tiles = [&](int64_t blocks, int64_t shortest) {
    const int64_t wanted = std::max<int64_t>(1, blocks / std::max<int64_t>(1, p.batch));
    const int64_t length = kTile * divide_up(std::max(divide_up(p.positions, wanted), shortest), kTile);
    return Chunks{p.positions, length, divide_up(p.positions, length)};
  };
  Plan plan = {choose(false), choose(true), p.gram ? EngineKind::kLibrary : EngineKind::kBlock,
               split_tiles(kPoolBlocks / (tiles * (tiles + 1) / 2), 2 * p.channels), split_tiles(kBlocks / tiles, 0)};
  if (requested != EngineKind::kAuto) return plan;  // no clusters where that is asked for: to compare with
  const auto blocks = [&](EngineKind engine, bool backward) {
    return engine == EngineKind::kBlock ? blocks_of_sample(p, device, backward) : 1;
  };
  plan.forward_blocks = blocks(plan.forward, false);
  plan.backward_blocks = blocks(plan.backward, true);
  return plan;
}
#endif

}  // namespace

const char* engine_name(EngineKind kind) {
  constexpr const char* names[] = {"auto", "library", "portable", "avx2", "avx512", "block", "grid", "warpgroup"};
  return names[static_cast<int>(kind)];
}

bool cpu_supports(EngineKind level) {
  switch (level) {
    case EngineKind::kPortable:
      return true;
#if defined(__x86_64__)
    case EngineKind::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case EngineKind::kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    default:
      return false;
  }
}

Plan plan(const Problem& problem, EngineKind requested) {
#ifdef ISQRT_WITH_CUDA
  if (problem.cuda) return plan_cuda(problem, requested);
#endif
  if (requested >= EngineKind::kBlock)
    throw std::runtime_error(std::string("engine: '") + engine_name(requested) + "' runs on CUDA devices only");
  return plan_cpu(problem, requested);
}

}  // namespace isqrt
