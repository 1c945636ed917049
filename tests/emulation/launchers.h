// The launchers of csrc/cuda, and plan(), for arrays. bindings.cpp takes long to compile and need not be again where a
// kernel or the algorithm has changed: nothing of csrc is seen here.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

namespace launchers {

/// Strides are in elements.
struct Array {
  void* data;
  int64_t element_size;
  int rank;
  int64_t shape[4], strides[4];
};

// `dtype` names the type of the elements of x, of a result or of its upstream gradient. Feature maps are (B, C, H, W)
// or (B, C, M) with any strides; everything else is contiguous, matrices (B, C, C). `chunk` is the number of positions
// in a chunk; `output` and `root` are the enumerations of views.h and newton_schulz.h, and steps are tuned for `floor`
// where that is not 0. `blocks` share a sample; 0 stands for the engine of the whole device, -1 for that with products
// of warpgroups, -2 for one block of warpgroups. An empty `scale` is not wanted, or 1.
inline bool is_on_grid(int blocks) { return blocks == 0 || blocks == -1; }
inline bool is_by_warpgroups(int blocks) { return blocks < 0; }
void pool(const std::string& dtype, const Array& x, int64_t chunk, const Array& sigma, const Array& mean,
          const Array& scale);
void pool_backward(const std::string& dtype, const Array& grad_sigma, const Array& x, const Array& mean,
                   const Array& scale, int64_t chunk, const Array& grad_x);
void root(const std::string& dtype, const Array& sigma, int iterations, int root, int output, double floor, int blocks,
          const Array& scale, const Array& result);
void root_backward(const std::string& dtype, const Array& grad, const Array& sigma, int iterations, int root,
                   int output, double floor, int blocks, const Array& grad_sigma, const Array& value);

/// What plan() chooses on this device where this EngineKind is asked for: the engines by their names, and the positions
/// in a chunk.
struct Choice {
  std::string forward, backward;
  int64_t pool_chunk, pool_backward_chunk;
  int forward_blocks, backward_blocks;
};
Choice plan(int64_t batch, int64_t channels, int64_t positions, int64_t element_size, int iterations, int engine);

int64_t root_shared_bytes(int64_t channels, int64_t element_size, bool backward, int iterations, double floor);
int64_t cluster_shared_bytes(int64_t channels, int64_t element_size, bool backward, int iterations, double floor);
int64_t shared_bytes_limit();

}  // namespace launchers
