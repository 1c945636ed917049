// The CUDA engine as call.h sees it: no CUDA header is needed to include this.
#pragma once
#include <string>

#include "../plan.h"
#include "../tasks.h"

namespace isqrt::cuda {

/// Each enqueues its kernels on `stream`, a cudaStream_t of the current device, and throws std::runtime_error with
/// CUDA's own message where a launch fails.
template <class X> void pool(const PoolTask<X>& task, void* stream);
template <class X> void pool_backward(const PoolBackwardTask<X>& task, void* stream);
template <class X> void root(const RootTask<X>& task, bool warpgroups, void* stream);
template <class X> void root_backward(const RootBackwardTask<X>& task, bool warpgroups, void* stream);

/// The same of matrices in global memory, with the workspace of the task: so many elements. In both products are those
/// of warpgroups where that is asked for, of float32 on a device that has them. This root_backward alone writes the
/// task's value.
template <class X> void grid_root(const RootTask<X>& task, bool warpgroups, void* stream);
template <class X> void grid_root_backward(const RootBackwardTask<X>& task, bool warpgroups, void* stream);
int64_t grid_workspace_size(int64_t batch, int64_t channels, int64_t element_size, bool backward, bool in_full,
                            bool warpgroups);

/// Shared memory in bytes that one block needs for root or root_backward of a C x C matrix, with or without steps in
/// full, 0 where no kernel is compiled for so many channels; and each block of a cluster, with task.blocks > 1. In
/// float32 they take more for spare matrices where the device has it.
int64_t root_shared_bytes(int64_t channels, int64_t element_size, bool backward, bool in_full);
int64_t cluster_shared_bytes(int64_t channels, int64_t element_size, bool backward, bool in_full);

/// The same of a block of warpgroups, 0 where none has so many channels, such elements or steps.
int64_t warpgroup_shared_bytes(int64_t channels, int64_t element_size, bool backward, bool in_full);

/// Whether this engine has such matrices in global memory.
inline bool on_grid(EngineKind engine, int64_t channels, int64_t element_size, bool backward, bool in_full) {
  return engine == EngineKind::kGrid ||
         (engine == EngineKind::kWarpgroup && warpgroup_shared_bytes(channels, element_size, backward, in_full) == 0);
}

/// The most shared memory of a block of this device, its multiprocessors, whether it has clusters and code for them,
/// whether it is of compute capability 9, and whether a kernel may be brought to it while those before still run:
/// wait_for_kernels_before() does wait, and the driver can record such launches in graphs. The first time, the device
/// is the current one.
struct Limits {
  int64_t shared_bytes, multiprocessors;
  bool clusters, hopper, early;
};
Limits limits(int device);

/// The architectures compiled in, as "8.0 9.0 10.0+PTX".
std::string architectures();

}  // namespace isqrt::cuda
