#include <cuda_runtime.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <utility>
#include <vector>

#include "fibers.h"

extern char __start_emulated_shared[] __attribute__((weak)), __stop_emulated_shared[] __attribute__((weak));

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulation {

Options options;

namespace {

struct Block;

struct AsyncCopy {
  void* to;
  const void* from;
  unsigned bytes, source_bytes;
};

struct Thread {
  uint3 index, block_index;
  Fiber fiber;
  unsigned number = 0;  // in its block
  Block* block = nullptr;
  bool done = false;
  const Site* waits_at = nullptr;
  std::vector<AsyncCopy> open_group;
  std::vector<std::vector<AsyncCopy>> groups;
};

/// Where threads wait for each other, over and over.
struct Rendezvous {
  std::vector<Thread*> waiting;
  Site site{};
  unsigned generation = 0;
  char order[2];  // addresses for release_memory and acquire_memory, by generation
};

/// The warp functions of the lanes in one mask. A lane may be in the next generation while another one still reads.
struct Collective {
  uint32_t mask;
  Rendezvous rendezvous;
  alignas(16) unsigned char slots[2][32][kSlotBytes];
};

struct BulkCopy {
  void* to;
  const void* from;
  unsigned bytes;
  uint64_t* barrier;
};

struct Block {
  uint3 index;
  unsigned rank = 0, running = 0;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<std::vector<std::unique_ptr<Collective>>> collectives;  // by warp
  Rendezvous barrier;
  char* shared = nullptr;
  std::vector<BulkCopy> bulk_copies;
};

struct Cluster {
  std::vector<Block> blocks;
  Rendezvous barrier;
  unsigned running = 0;
};

/// The launch that is going on.
struct Launch {
  const std::function<void()>* body = nullptr;
  size_t shared_bytes = 0;
  Cluster* cluster = nullptr;
  Thread* running = nullptr;
  Fiber main;
  std::vector<Thread*> ready;  // those from `next` on
  size_t next = 0;
  std::string error;
  uint64_t random = 1;
  unsigned fruitless = 0;  // polls of an mbarrier since anything happened
  char begin, end;         // addresses for release_memory: the begin and the end of the threads
};
Launch launch;

/// Goes on with `to`, or where that is nullptr with the thread that launches.
void switch_to(Thread* to, bool last = false) {
  Fiber& from = launch.running ? launch.running->fiber : launch.main;
  const bool main_takes_part = to == nullptr || launch.running == nullptr;
  launch.running = to;
  if (to != nullptr) {
    threadIdx = to->index;
    blockIdx = to->block_index;
  }
  switch_fiber(from, to ? to->fiber : launch.main, main_takes_part && !(options.blocks_race && to == nullptr), last);
}

uint64_t random_number() {
  launch.random ^= launch.random << 13;
  launch.random ^= launch.random >> 7;
  launch.random ^= launch.random << 17;
  return launch.random;
}

std::string describe(const Thread& t) {
  const auto triple = [](const uint3& v) {
    return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
  };
  return "block " + triple(t.block_index) + ", thread " + triple(t.index);
}

std::string describe(const Site& site) {
  return std::string(site.what) + " at " + site.file + ":" + std::to_string(site.line);
}

bool same(const Site& a, const Site& b) {
  return a.line == b.line && !strcmp(a.file, b.file) && !strcmp(a.what, b.what);
}

// ---- scheduling -----------------------------------------------------------------------------------------------------

Thread* next_thread() {
  if (launch.next == launch.ready.size()) {
    launch.ready.clear();
    launch.next = 0;
    return nullptr;
  }
  if (options.order == Order::kRandom)
    std::swap(launch.ready[launch.next],
              launch.ready[launch.next + random_number() % (launch.ready.size() - launch.next)]);
  return launch.ready[launch.next++];
}

/// Runs some other thread that can run; the launching one where none can.
void leave(bool last = false) {
  Thread* to = next_thread();
  if (to != launch.running) switch_to(to, last);
}

/// Ends the launch with the text that message() returns: no thread runs any more. Not to be called while a Quiet lives.
template <class Message> void stop(const Message& message) {
  {
    const Quiet quiet;
    launch.error = message();
  }
  switch_to(nullptr);
}

void sort_by_order(std::vector<Thread*>& threads) {
  std::sort(threads.begin(), threads.end(), [](const Thread* a, const Thread* b) {
    const auto key = [](const Thread* t) { return std::pair(t->block->rank, t->number); };
    return options.order == Order::kReverse ? key(a) > key(b) : key(a) < key(b);
  });
}

void open(Rendezvous& r) {
  sort_by_order(r.waiting);
  launch.ready.insert(launch.ready.end(), r.waiting.begin(), r.waiting.end());
  r.waiting.clear();
  ++r.generation;
}

void meet(Rendezvous& r, unsigned expected, bool orders_memory, const Site& site) {
  Thread* me = launch.running;
  char* order = &r.order[r.generation % 2];
  if (orders_memory) release_memory(order);
  if (!r.waiting.empty() && !same(r.site, site))
    stop([&] { return describe(*me) + " is at " + describe(site) + " while others wait at " + describe(r.site); });
  {
    const Quiet quiet;
    r.site = site;
    r.waiting.push_back(me);
    if (r.waiting.size() == expected) open(r);
  }
  me->waits_at = &site;
  leave();
  me->waits_at = nullptr;
  if (orders_memory) acquire_memory(order);
}

void finish_thread() {
  Thread* me = launch.running;
  Block& block = *me->block;
  me->done = true;
  --block.running;
  --launch.cluster->running;
  if (options.strict_exit && !block.barrier.waiting.empty())
    stop([&] { return describe(*me) + " returned while others wait at " + describe(block.barrier.site); });
  const Quiet quiet;
  if (block.running > 0 && block.barrier.waiting.size() == block.running) open(block.barrier);
  Rendezvous& of_cluster = launch.cluster->barrier;
  if (launch.cluster->running > 0 && of_cluster.waiting.size() == launch.cluster->running) open(of_cluster);
}

void thread_main() {
  fiber_entered();
  acquire_memory(&launch.begin);
  (*launch.body)();
  release_memory(&launch.end);
  finish_thread();
  leave(true);
  abort();
}

// ---- launching ------------------------------------------------------------------------------------------------------

/// Shared memory full of NaN, so that reading what was not written shows. Exactly as long as asked for, so that
/// AddressSanitizer guards what lies behind.
char* new_shared_memory() {
  void* memory = nullptr;
  if (posix_memalign(&memory, 1024, std::max<size_t>(launch.shared_bytes, 1)) != 0) throw std::bad_alloc();
  memset(memory, 0xff, launch.shared_bytes);
  return static_cast<char*>(memory);
}

void prepare(Block& block, unsigned number, unsigned rank) {
  const unsigned count = blockDim.x * blockDim.y * blockDim.z;
  block.index = {number % gridDim.x, number / gridDim.x % gridDim.y, number / gridDim.x / gridDim.y};
  block.rank = rank;
  block.running = count;
  block.collectives.resize((count + 31) / 32);
  block.shared = new_shared_memory();
  for (unsigned t = 0; t < count; ++t) {
    auto thread = std::make_unique<Thread>();
    thread->index = {t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
    thread->block_index = block.index;
    thread->number = t;
    thread->block = &block;
    thread->fiber = start_fiber(thread_main, options.blocks_race, describe(*thread).c_str());
    block.threads.push_back(std::move(thread));
  }
}

void run_cluster(Cluster& cluster) {
  launch.cluster = &cluster;
  launch.ready.clear();
  launch.next = 0;
  for (Block& block : cluster.blocks)
    for (const auto& thread : block.threads) launch.ready.push_back(thread.get());
  cluster.running = unsigned(launch.ready.size());
  sort_by_order(launch.ready);
  release_memory(&launch.begin);
  switch_to(next_thread());
  if (!options.blocks_race) acquire_memory(&launch.end);
  for (Block& block : cluster.blocks)
    for (const auto& thread : block.threads) {
      if (launch.error.empty() && !thread->done)
        launch.error = "deadlock: " + describe(*thread) + " waits at " +
                       (thread->waits_at ? describe(*thread->waits_at) : "an mbarrier");
      end_fiber(thread->fiber, thread->done && !options.blocks_race);
    }
}

std::vector<unsigned> order_of_clusters(unsigned count) {
  std::vector<unsigned> order(count);
  for (unsigned c = 0; c < count; ++c) order[c] = options.order == Order::kReverse ? count - 1 - c : c;
  if (options.order == Order::kRandom)
    for (unsigned c = count; c > 1; --c) std::swap(order[c - 1], order[random_number() % c]);
  return order;
}

}  // namespace

void run(dim3 grid, dim3 block, size_t shared_bytes, unsigned cluster_size, const std::function<void()>& body) {
  const Quiet quiet;
  gridDim = grid;
  blockDim = block;
  launch.body = &body;
  launch.shared_bytes = shared_bytes;
  launch.error.clear();
  launch.random = options.seed * 0x9E3779B97F4A7C15u | 1;
  launch.fruitless = 0;
  describe_main_fiber(launch.main);
  std::vector<char*> kept;
  for (const unsigned c : order_of_clusters(grid.x * grid.y * grid.z / cluster_size)) {
    if (__start_emulated_shared)
      memset(__start_emulated_shared, 0xff, __stop_emulated_shared - __start_emulated_shared);
    Cluster cluster;
    cluster.blocks.resize(cluster_size);
    for (unsigned rank = 0; rank < cluster_size; ++rank) prepare(cluster.blocks[rank], c * cluster_size + rank, rank);
    run_cluster(cluster);
    for (const Block& b : cluster.blocks) kept.push_back(b.shared);
    if (!options.blocks_race || !launch.error.empty()) {
      for (char* shared : kept) free(shared);
      kept.clear();
    }
    if (!launch.error.empty()) throw Error(launch.error);
  }
  acquire_memory(&launch.end);
  for (char* shared : kept) free(shared);
}

void fail(const std::string& message, const Site& site) {
  stop([&] { return describe(*launch.running) + ": " + message + (site.file ? ", " + describe(site) : ""); });
}

// ---- shared memory, barriers, warp functions ------------------------------------------------------------------------

void* dynamic_shared() { return launch.running->block->shared; }
unsigned lane() { return launch.running->number % 32; }
unsigned block_rank() { return launch.running->block->rank; }
unsigned blocks_in_cluster() { return unsigned(launch.cluster->blocks.size()); }

void* shared_of_block(void* address, unsigned rank) {
  const ptrdiff_t offset = static_cast<char*>(address) - launch.running->block->shared;
  if (offset < 0 || size_t(offset) >= launch.shared_bytes) fail("map_shared_rank of what is not dynamic shared memory");
  if (rank >= blocks_in_cluster()) fail("map_shared_rank of a block that is not in the cluster");
  return launch.cluster->blocks[rank].shared + offset;
}

void block_barrier(const Site& site) {
  Block& block = *launch.running->block;
  meet(block.barrier, block.running, true, site);
}

void cluster_barrier(const Site& site) { meet(launch.cluster->barrier, launch.cluster->running, true, site); }

const Slots& gather(uint32_t mask, const void* value, unsigned bytes, bool orders_memory, const Site& site) {
  Thread* me = launch.running;
  Block& block = *me->block;
  Collective* collective = nullptr;
  unsigned expected = 0, half = 0;
  if (!(mask >> lane() & 1)) fail("is not in its own mask", site);
  {
    const Quiet quiet;
    auto& of_warp = block.collectives[me->number / 32];
    for (const auto& c : of_warp)
      if (c->mask == mask) collective = c.get();
    if (collective == nullptr) {
      of_warp.push_back(std::make_unique<Collective>());
      collective = of_warp.back().get();
      collective->mask = mask;
    }
    half = collective->rendezvous.generation % 2;
    memcpy(collective->slots[half][lane()], value, bytes);
    const size_t lanes = std::min<size_t>(32, block.threads.size() - me->number / 32 * 32);
    expected = unsigned(__builtin_popcountll(mask & ((uint64_t(1) << lanes) - 1)));
  }
  meet(collective->rendezvous, expected, orders_memory, site);
  return collective->slots[half];
}

// ---- cp.async -------------------------------------------------------------------------------------------------------

namespace {
/// Seen by the sanitizers as an access of the running thread.
void copy_now(const AsyncCopy& copy) {
  memcpy(copy.to, copy.from, copy.source_bytes);
  memset(static_cast<char*>(copy.to) + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
}
bool misaligned(const void* p, unsigned bytes) { return reinterpret_cast<uintptr_t>(p) % bytes != 0; }
}  // namespace

void copy_async(void* to, const void* from, unsigned bytes, unsigned source_bytes) {
  if (misaligned(to, bytes) || misaligned(from, bytes)) fail("cp.async of a misaligned address");
  const AsyncCopy copy{to, from, bytes, source_bytes};
  if (!options.late_copies) return copy_now(copy);
  const Quiet quiet;
  launch.running->open_group.push_back(copy);
}

void copy_async_commit() {
  const Quiet quiet;
  launch.running->groups.push_back(std::exchange(launch.running->open_group, {}));
}

void copy_async_wait(unsigned pending) {
  auto& groups = launch.running->groups;
  while (groups.size() > pending) {
    for (const AsyncCopy& copy : groups.front()) copy_now(copy);
    const Quiet quiet;
    groups.erase(groups.begin());
  }
}

// ---- mbarrier -------------------------------------------------------------------------------------------------------

namespace {

struct Mbarrier {
  uint32_t phase : 1, count : 15, pending : 16;
  int32_t bytes;
};
static_assert(sizeof(Mbarrier) == sizeof(uint64_t));

template <class Change> void change(uint64_t* barrier, const Change& f) {
  Mbarrier state;
  __builtin_memcpy(&state, barrier, sizeof state);
  f(state);
  if (state.pending == 0 && state.bytes == 0) {
    state.phase ^= 1;
    state.pending = state.count;
  }
  __builtin_memcpy(barrier, &state, sizeof state);
}

}  // namespace

void mbarrier_init(uint64_t* barrier, unsigned count) {
  const Mbarrier state{0, count, count, 0};
  memcpy(barrier, &state, sizeof state);  // a plain write: whoever uses it without a barrier in between races
}

void mbarrier_arrive(uint64_t* barrier, int expected_bytes) {
  release_memory(barrier);
  change(barrier, [&](Mbarrier& state) {
    if (state.pending == 0) fail("more arrivals at an mbarrier than its count");
    state.bytes += expected_bytes;
    --state.pending;
  });
  launch.fruitless = 0;
}

void copy_bulk(void* to, const void* from, unsigned bytes, uint64_t* barrier) {
  if (misaligned(to, 16) || misaligned(from, 16) || bytes % 16 != 0) fail("misaligned bulk copy");
  const Quiet quiet;
  launch.running->block->bulk_copies.push_back({to, from, bytes, barrier});
}

void mbarrier_wait(uint64_t* barrier, unsigned parity) {
  constexpr unsigned kMostPolls = 1 << 18;
  uint64_t seen;
  memcpy(&seen, barrier, sizeof seen);  // a plain read, see mbarrier_init
  for (;;) {
    bool waiting = false;
    BulkCopy copy{};
    {
      const Quiet quiet;
      change(barrier, [&](Mbarrier& state) { waiting = state.phase == parity; });
      if (!waiting) break;
      auto& copies = launch.running->block->bulk_copies;
      const auto mine =
          std::find_if(copies.begin(), copies.end(), [&](const BulkCopy& c) { return c.barrier == barrier; });
      if (mine != copies.end()) {
        copy = *mine;
        copies.erase(mine);
      }
    }
    if (copy.barrier != nullptr) {
      memcpy(copy.to, copy.from, copy.bytes);  // as late as can be, and seen as an access of this thread
      release_memory(barrier);
      const Quiet quiet;
      change(barrier, [&](Mbarrier& state) { state.bytes -= int(copy.bytes); });
      launch.fruitless = 0;
    } else {
      if (++launch.fruitless > kMostPolls) fail("an mbarrier never completes");
      {
        const Quiet quiet;
        launch.ready.push_back(launch.running);
      }
      leave();
    }
  }
  acquire_memory(barrier);
}

}  // namespace emulation
