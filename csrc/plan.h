// Which engine does what, and how the positions are split: policy, apart from the engines.
#pragma once
#include <string>

#include "covariance.h"
#include "gram.h"

namespace isqrt {

/// kAuto leaves the choice to plan(); isqrt_cov/ops.py names the others in this order.
enum class EngineKind : int { kAuto = 0, kLibrary, kPortable, kAvx2, kAvx512, kBlock, kGrid, kWarpgroup };

struct Problem {
  bool cuda;
  int device;
  int64_t batch, channels, positions, element_size;
  bool in_full = false;  // some steps of the iteration compute T in full, newton_schulz.h, and need more memory
  bool gram = false;     // the matrices are those of gram.h
  int64_t side() const { return gram ? gram_side(positions) : channels; }
};

struct Plan {
  EngineKind forward, backward;  // of the root and of its gradient
  EngineKind pooling;            // of the covariance and of its gradient; or of gram.h's products, then maybe kLibrary
  Chunks pool, pool_backward;
  int forward_blocks = 1, backward_blocks = 1;  // of a cluster of a GPU, which share a sample
};

/// The plan for `requested`, or for what suits the problem best where that is kAuto. Throws std::runtime_error naming
/// the engine where it cannot do the problem on this machine.
Plan plan(const Problem& problem, EngineKind requested);

const char* engine_name(EngineKind kind);

/// True where this machine's processor (or this build) has the SIMD level.
bool cpu_supports(EngineKind level);

}  // namespace isqrt
