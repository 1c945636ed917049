// What the parts of the runtime know of each other: the launch that is going on, its blocks and threads, and waiting.
#pragma once
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "checkers.h"
#include "emulation.h"
#include "fibers.h"

namespace emulation {

struct Block;

/// Of a thread; the bytes from source_bytes on become zero.
struct AsyncCopy {
  char* to;
  const void* from;
  unsigned bytes, source_bytes;
  Site site;
};

/// To a block, at whose mbarrier it counts.
struct AsyncStore {
  char* to;
  uint32_t words[4];
  uint64_t* barrier;
  Site site;
};

/// What a thread has of a product of its warpgroup: two rows of the left operand, and the place of the right one.
struct WarpgroupProduct {
  float* d;
  unsigned vectors;        // of the right operand
  bool continues = false;  // adds to an earlier one that is not done
  float before[32] = {};   // what d was otherwise
  float a[2][16] = {};
  const char* b;
  unsigned to_next_terms, to_next_vectors;
  bool by_terms;
  Site site;
  unsigned sums() const { return vectors / 2; }
};

struct Thread {
  uint3 index, block_index;
  Fiber fiber;
  unsigned number = 0;  // in its block
  uint64_t place = 0;   // in the order of all threads of the cluster
  Block* block = nullptr;
  bool done = false;
  bool waited_for_kernels = false;
  const Site* waits_at = nullptr;
  bool arrived_at_cluster = false;  // in that generation of the cluster's barrier
  unsigned cluster_generation = 0;
  std::vector<AsyncCopy> copies;   // not waited for yet
  std::vector<size_t> group_ends;  // those of each committed group end at such a place of `copies`
  bool copied_without_fence = false;
  unsigned fences = 0;  // for warpgroups, so far
  bool warpgroup_began = false;
  std::vector<WarpgroupProduct> products;  // not waited for yet
  size_t committed_products = 0;           // of these, the first ones
};

/// Where threads wait for each other, over and over.
struct Rendezvous {
  std::vector<Thread*> waiting;
  Site site{};
  unsigned expected = 0;
  unsigned generation = 0;
  char order[2];  // addresses for release_memory and acquire_memory, by generation
};

/// The warp functions of the lanes in one mask. A lane may be in the next generation while another one still reads.
struct Collective {
  uint32_t mask;
  unsigned lanes;  // of the mask that the block has
  Rendezvous rendezvous;
  alignas(16) Slots slots[2];
};

constexpr int kNamedBarriers = 16;

struct Block {
  uint3 index;
  unsigned rank = 0, running = 0;
  bool started = false;
  char order_of_start, order_of_end;  // addresses for release_memory
  std::vector<Thread> threads;
  std::vector<std::vector<std::unique_ptr<Collective>>> collectives;  // by warp
  Rendezvous barrier, named_barriers[kNamedBarriers];
  std::vector<Rendezvous> warpgroups;
  char* shared = nullptr;
  std::vector<AsyncStore> stores;  // on their way to this block
};

struct Cluster {
  std::vector<Block> blocks;
  unsigned running = 0, arrived = 0;
  Rendezvous barrier;
};

/// The launch that is going on.
struct Launch {
  const std::function<void()>* body = nullptr;
  size_t shared_bytes = 0;
  bool early = false;
  Cluster* cluster = nullptr;
  Thread* running = nullptr;
  Fiber main;
  std::vector<Thread*> ready;  // those from `next` on
  size_t next = 0;
  std::string error;
  const void* error_at = nullptr;  // an instruction of the program
  uint64_t random = 1;
  unsigned fruitless = 0;  // polls of an mbarrier since anything happened
  char begin, end;         // addresses for release_memory: the begin and the end of the threads
};
extern Launch launch;

/// Runs some other thread that can run; the launching one where none can.
void leave(bool last = false);

/// The running thread will go on once `expected` threads have met at r; at the same site where `one_site`.
void meet(Rendezvous& r, unsigned expected, bool orders_memory, const Site& site, bool one_site = true);

/// For instructions that all lanes of a warp have to execute together.
void converge(const Site& site);

/// All of those that wait at r can go on.
void open(Rendezvous& r);

/// Fails unless the bytes are shared memory of the running block.
void require_shared(const void* p, size_t bytes, const Site& site);
void require_aligned(const void* p, size_t alignment, const Site& site);

/// Like fail(), for an access that this instruction of the program makes.
void fail_at(const std::string& message, const void* instruction);

}  // namespace emulation
