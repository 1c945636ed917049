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
  /// Asynchronous copies happen only when somebody waits for them: data used too early is then still the old one.
  bool late_copies = true;
  /// ThreadSanitizer also sees races between blocks. Costs memory: nothing is reused from block to block.
  bool blocks_race = false;
  /// Shared memory that a block can have at most, as cudaFuncSetAttribute sees it.
  size_t shared_limit = 227 * 1024;
};
extern Options options;

/// What a kernel did wrong: a deadlock, a divergent barrier, a shuffle with missing lanes, ...
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// Runs body() once for each thread of the grid.
void run(dim3 grid, dim3 block, size_t shared_bytes, unsigned cluster_size, const std::function<void()>& body);

// ---- for the headers that stand in for CUDA's -----------------------------------------------------------------------

/// A barrier or warp function in the source.
struct Site {
  const char *what, *file;
  int line;
};

/// Ends the launch with an Error that names the running thread, and the site if there is one.
void fail(const std::string& message, const Site& site = {});

/// Dynamic shared memory of the running block, or of another one of its cluster for an address in the former.
void* dynamic_shared();
void* shared_of_block(void* address, unsigned rank);
unsigned block_rank();
unsigned blocks_in_cluster();

/// Of the running thread in its warp.
unsigned lane();

/// Wait for all threads of the block or of the cluster. It is an error if they wait at different sites.
void block_barrier(const Site& site);
void cluster_barrier(const Site& site);

/// What each lane of a warp put in, once all lanes of `mask` have; orders memory between them only where asked.
constexpr unsigned kSlotBytes = 128;
using Slots = unsigned char[32][kSlotBytes];
const Slots& gather(uint32_t mask, const void* value, unsigned bytes, bool orders_memory, const Site& site);

// cp.async of `bytes`, those from `source_bytes` on becoming zero; groups; waiting for all but `pending` groups.
void copy_async(void* to, const void* from, unsigned bytes, unsigned source_bytes);
void copy_async_commit();
void copy_async_wait(unsigned pending);

// mbarrier, its state in the 64 bits of the object itself, and bulk copies that complete on one.
void mbarrier_init(uint64_t* barrier, unsigned count);
void mbarrier_arrive(uint64_t* barrier, int expected_bytes);
void mbarrier_wait(uint64_t* barrier, unsigned parity);
void copy_bulk(void* to, const void* from, unsigned bytes, uint64_t* barrier);

}  // namespace emulation
