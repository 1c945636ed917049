// Runs CUDA kernels on the CPU: what the runtime (runtime.cpp) offers to the headers that stand in for CUDA's, and to
// tests. Every CUDA thread is a fiber, and one runs at a time, until it waits. The blocks of a cluster run together,
// clusters one after the other.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

/// Of the thread that runs now; the runtime sets them whenever it switches.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace emulation {

// ---- for tests ------------------------------------------------------------------------------------------------------

/// In which order threads that could all run are run, and blocks.
enum class Order { kForward, kReverse, kRandom };

struct Options {
  Order order = Order::kForward;
  uint64_t seed = 1;
  /// A thread that returns while others of its block wait at a barrier is an error.
  bool strict_exit = true;
  /// ThreadSanitizer also sees races between blocks. Costs memory: nothing is reused from block to block.
  bool blocks_race = false;
  /// What the device says of itself: the shared memory that a block can have at most, and its compute capability, with
  /// clusters from 9.0 on.
  size_t shared_limit = 227 * 1024;
  int capability_major = 9, capability_minor = 0;
  /// One that says other things of itself is another device.
  int device() const { return int(shared_limit) * 100 + capability_major * 10 + capability_minor; }
};
extern Options options;

/// What a kernel did wrong: a deadlock, a divergent barrier, a shuffle with missing lanes, ...
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// Runs body() once for each thread of the grid. A kernel that comes early has to wait for those before it.
struct LaunchShape {
  dim3 grid, block;
  size_t shared_bytes;
  unsigned cluster_size = 1;
  bool early = false;
};
void run(const LaunchShape& shape, const std::function<void()>& body);

// ---- for the headers that stand in for CUDA's -----------------------------------------------------------------------

/// The line of a call, as the default argument of what is called.
struct Caller {
  const char* file;
  int line;
  static constexpr Caller here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

/// A barrier, a warp function or a wrapper of ptx.cuh in the source.
struct Site {
  const char* what = nullptr;
  const char* file = nullptr;
  int line = 0;
};

/// Ends the launch with an Error that names the running thread and the site.
[[noreturn]] void fail(const std::string& message, const Site& site);

/// Dynamic shared memory of the running block, or of another one of its cluster for an address in the former.
void* dynamic_shared();
void* shared_of_block(void* address, unsigned rank, const Caller& caller);
unsigned block_rank();
unsigned blocks_in_cluster();

/// Of the running thread in its warp.
unsigned lane();

/// Wait for all threads of the block: it is an error if they wait at different sites. A named barrier is waited for by
/// `threads` threads, wherever they are.
void block_barrier(const Site& site);
void named_barrier(int id, int threads, const Caller& caller);

// The two halves of the cluster's barrier.
void cluster_arrive(const Caller& caller);
void cluster_wait(const Caller& caller);

/// What each lane of a warp put in, once all lanes of `mask` have; orders memory between them only where asked. The
/// last lane to come calls `complete`, so that a result that takes all of them is made once and not by each lane.
constexpr unsigned kSlotBytes = 128;
using Slots = unsigned char[32][kSlotBytes];
const Slots& gather(uint32_t mask, const void* value, unsigned bytes, bool orders_memory, const Site& site,
                    void (*complete)(Slots&) = nullptr);

// The bodies of csrc/cuda/ptx.cuh, which says what they are: kernels after kernels,
void wait_for_kernels_before(const Caller& caller);

// tensor cores,
void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const Caller& caller);
void mma_f64(double* d, double a, double b, const Caller& caller);
void load_matrices(uint32_t (&r)[4], const void* row, bool transposed, const Caller& caller);
uint32_t transpose_matrix(uint32_t r, const Caller& caller);
void fence_for_warpgroups();
void warpgroup_begin(const Caller& caller);
void multiply_warpgroup(float* d, int vectors, const uint32_t (&a)[4], uint64_t b, bool adds, bool by_terms,
                        const Caller& caller);
void warpgroup_commit(const Caller& caller);
void warpgroup_wait(float* d, const Caller& caller);

// mbarriers, and stores to other blocks, done when a thread there waits for them,
void mbarrier_init(uint64_t* barrier, unsigned count, const Caller& caller);
void mbarrier_expect(uint64_t* barrier, unsigned bytes, const Caller& caller);
void mbarrier_arrive(uint64_t* own, unsigned rank, const Caller& caller);
void mbarrier_wait(uint64_t* barrier, unsigned parity, const Caller& caller);
void store_async(void* own, unsigned rank, const uint32_t (&words)[4], uint64_t* barrier, const Caller& caller);

// and cp.async, done when its thread waits for it.
void copy_async(void* to, const void* from, unsigned bytes, int source_bytes, const Caller& caller);
void copy_async_commit();
void copy_async_wait(unsigned pending);

}  // namespace emulation
