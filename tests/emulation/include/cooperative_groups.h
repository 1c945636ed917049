// Stands in for CUDA's <cooperative_groups.h>: the block and the cluster.
#pragma once
#include <cuda_runtime.h>

namespace cooperative_groups {

struct thread_block {
  void sync(const char* file = __builtin_FILE(), int line = __builtin_LINE()) const {
    emulation::block_barrier({"thread_block.sync", file, line});
  }
  unsigned thread_rank() const { return (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x; }
};
inline thread_block this_thread_block() { return {}; }

struct cluster_group {
  using Caller = emulation::Caller;

  void sync(Caller caller = Caller::here()) const {
    emulation::cluster_arrive(caller);
    emulation::cluster_wait(caller);
  }
  unsigned block_rank() const { return emulation::block_rank(); }
  unsigned num_blocks() const { return emulation::blocks_in_cluster(); }
  template <class T> T* map_shared_rank(T* address, unsigned rank, Caller caller = Caller::here()) const {
    return static_cast<T*>(emulation::shared_of_block(const_cast<std::remove_const_t<T>*>(address), rank, caller));
  }
};
inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
