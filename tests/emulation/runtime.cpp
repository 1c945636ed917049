// Threads, blocks and clusters: scheduling, launching, and waiting for each other.
#include "runtime.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <utility>

extern char __start_emulated_shared[] __attribute__((weak)), __stop_emulated_shared[] __attribute__((weak));

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulation {

Options options;
Launch launch;

namespace {

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

/// The names of one place are mostly the same literals; they need not be where it was compiled into several objects.
bool same(const Site& a, const Site& b) {
  const auto equal = [](const char* x, const char* y) { return x == y || !strcmp(x, y); };
  return a.line == b.line && equal(a.file, b.file) && equal(a.what, b.what);
}

// ---- scheduling -----------------------------------------------------------------------------------------------------

void forget_those_that_ran() {
  if (launch.next < launch.ready.size()) return;
  launch.ready.clear();
  launch.next = 0;
}

Thread* next_thread() {
  forget_those_that_ran();
  if (launch.ready.empty()) return nullptr;
  if (options.order == Order::kRandom)
    std::swap(launch.ready[launch.next],
              launch.ready[launch.next + random_number() % (launch.ready.size() - launch.next)]);
  return launch.ready[launch.next++];
}

/// Ends the launch with the text that message() returns: no thread runs any more. Not to be called while a Quiet lives.
template <class Message> [[noreturn]] void stop(const Message& message) {
  {
    const Quiet quiet;
    launch.error = message();
  }
  switch_to(nullptr);
  abort();
}

/// Mostly they have come in that order. A random one is made as they go on.
void sort_by_order(std::vector<Thread*>& threads) {
  const auto sort = [&](const auto& before) {
    const auto by_place = [&](const Thread* a, const Thread* b) { return before(a->place, b->place); };
    if (!std::is_sorted(threads.begin(), threads.end(), by_place)) std::sort(threads.begin(), threads.end(), by_place);
  };
  if (options.order == Order::kForward) sort(std::less());
  if (options.order == Order::kReverse) sort(std::greater());
}

/// The barrier of the cluster, once all threads that have not returned have arrived.
void open_cluster_barrier() {
  Cluster& cluster = *launch.cluster;
  if (cluster.running == 0 || cluster.arrived < cluster.running) return;
  cluster.arrived = 0;
  open(cluster.barrier);
}

// Other blocks of a cluster may use a block's shared memory from its begin to its end. For the sanitizers both are
// writes to all of it: a use without a barrier of the cluster in between is a race.

void begin_in_block(Block& block) {
  const bool first = !std::exchange(block.started, true);
  if (launch.cluster->blocks.size() == 1) return;
  if (first) {
    begin_block_memory(block.shared, launch.shared_bytes);
    release_memory(&block.order_of_start);
  }
  acquire_memory(&block.order_of_start);
}

void end_in_block(Block& block) {
  release_memory(&block.order_of_end);
  if (block.running > 0 || launch.cluster->blocks.size() == 1) return;
  if (!block.stores.empty()) fail("returns while this is on its way to it", block.stores.front().site);
  acquire_memory(&block.order_of_end);
  end_block_memory(block.shared, launch.shared_bytes);
}

void finish_thread() {
  Thread* me = launch.running;
  Block& block = *me->block;
  Cluster& cluster = *launch.cluster;
  if (launch.early && !me->waited_for_kernels)
    stop([&] { return describe(*me) + " returned without having waited for the kernels before it"; });
  if (me->arrived_at_cluster)
    stop([&] { return describe(*me) + " returned without having waited where it arrived, in the cluster"; });
  me->done = true;
  --block.running;
  --cluster.running;
  if (options.strict_exit && !block.barrier.waiting.empty())
    stop([&] { return describe(*me) + " returned while others wait at " + describe(block.barrier.site); });
  end_in_block(block);
  const Quiet quiet;
  if (block.running > 0 && block.barrier.waiting.size() == block.running) open(block.barrier);
  if (me->arrived_at_cluster && me->cluster_generation == cluster.barrier.generation) --cluster.arrived;
  open_cluster_barrier();
}

void thread_main() {
  fiber_entered();
  acquire_memory(&launch.begin);
  begin_in_block(*launch.running->block);
  (*launch.body)();
  release_memory(&launch.end);
  finish_thread();
  leave(true);
  abort();
}

// ---- launching ------------------------------------------------------------------------------------------------------

/// AddressSanitizer guards static shared memory itself, outside of that section.
#if defined(EMULATION_ADDRESS_SANITIZER)
constexpr bool kKnowsStaticShared = false;
#else
constexpr bool kKnowsStaticShared = true;
#endif

std::pair<char*, size_t> static_shared() {
  return {__start_emulated_shared, __start_emulated_shared ? __stop_emulated_shared - __start_emulated_shared : 0};
}

void reset_static_shared() {
  const auto [begin, size] = static_shared();
  if (size > 0) memset(begin, 0xff, size);
  watch_shared_memory(begin, size);
}

bool static_shared_was_written() {
  const auto [begin, size] = static_shared();
  return std::any_of(begin, begin + size, [](char byte) { return byte != char(0xff); });
}

/// Shared memory full of NaN, so that reading what was not written shows. Exactly as long as asked for, so that
/// AddressSanitizer guards what lies behind.
char* new_shared_memory() {
  void* memory = nullptr;
  if (posix_memalign(&memory, 1024, std::max<size_t>(launch.shared_bytes, 1)) != 0) throw std::bad_alloc();
  memset(memory, 0xff, launch.shared_bytes);
  watch_shared_memory(memory, launch.shared_bytes);
  return static_cast<char*>(memory);
}

void prepare(Block& block, unsigned number, unsigned rank) {
  const unsigned count = blockDim.x * blockDim.y * blockDim.z;
  block.index = {number % gridDim.x, number / gridDim.x % gridDim.y, number / gridDim.x / gridDim.y};
  block.rank = rank;
  block.running = count;
  block.collectives.resize((count + 31) / 32);
  block.warpgroups.resize(count / 128);
  block.shared = new_shared_memory();
  block.threads.resize(count);
  for (unsigned t = 0; t < count; ++t) {
    Thread& thread = block.threads[t];
    thread.index = {t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
    thread.block_index = block.index;
    thread.number = t;
    thread.place = uint64_t(rank) << 32 | t;
    thread.block = &block;
    thread.fiber = start_fiber(thread_main, options.blocks_race, [&] { return describe(thread); });
  }
}

void run_cluster(Cluster& cluster) {
  launch.cluster = &cluster;
  launch.ready.clear();
  launch.next = 0;
  for (Block& block : cluster.blocks)
    for (Thread& thread : block.threads) launch.ready.push_back(&thread);
  cluster.running = unsigned(launch.ready.size());
  sort_by_order(launch.ready);
  release_memory(&launch.begin);
  switch_to(next_thread());
  if (!options.blocks_race) acquire_memory(&launch.end);
  for (Block& block : cluster.blocks)
    for (const Thread& thread : block.threads) {
      if (launch.error.empty() && !thread.done)
        launch.error = "deadlock: " + describe(thread) + " waits at " + describe(*thread.waits_at);
      end_fiber(thread.fiber, thread.done && !options.blocks_race);
    }
  if (launch.error.empty() && cluster.blocks.size() > 1 && static_shared_was_written())
    launch.error = "static shared memory in a cluster: its blocks have one between them here, use dynamic";
}

std::vector<unsigned> order_of_clusters(unsigned count) {
  std::vector<unsigned> order(count);
  for (unsigned c = 0; c < count; ++c) order[c] = options.order == Order::kReverse ? count - 1 - c : c;
  if (options.order == Order::kRandom)
    for (unsigned c = count; c > 1; --c) std::swap(order[c - 1], order[random_number() % c]);
  return order;
}

}  // namespace

void run(const LaunchShape& shape, const std::function<void()>& body) {
  const Quiet quiet;
  const unsigned cluster_size = shape.cluster_size;
  gridDim = shape.grid;
  blockDim = shape.block;
  launch.body = &body;
  launch.shared_bytes = shape.shared_bytes;
  launch.early = shape.early;
  launch.error.clear();
  launch.error_at = nullptr;
  launch.random = options.seed * 0x9E3779B97F4A7C15u | 1;
  launch.fruitless = 0;
  describe_main_fiber(launch.main);
  std::vector<char*> kept;
  for (const unsigned c : order_of_clusters(gridDim.x * gridDim.y * gridDim.z / cluster_size)) {
    reset_static_shared();
    Cluster cluster;
    cluster.blocks.resize(cluster_size);
    for (unsigned rank = 0; rank < cluster_size; ++rank) prepare(cluster.blocks[rank], c * cluster_size + rank, rank);
    run_cluster(cluster);
    forget_shared_memory();
    for (const Block& b : cluster.blocks) kept.push_back(b.shared);
    if (!options.blocks_race || !launch.error.empty()) {
      for (char* shared : kept) free(shared);
      kept.clear();
    }
    if (launch.error_at) launch.error += source_line(launch.error_at);
    if (!launch.error.empty()) throw Error(launch.error);
  }
  acquire_memory(&launch.end);
  for (char* shared : kept) free(shared);
}

void fail(const std::string& message, const Site& site) {
  stop([&] { return describe(*launch.running) + " " + message + ", " + describe(site); });
}

void fail_at(const std::string& message, const void* instruction) {
  launch.error_at = instruction;
  stop([&] { return describe(*launch.running) + " " + message + ", at "; });
}

// ---- waiting --------------------------------------------------------------------------------------------------------

/// They have run, but nobody should rely on that.
void wait_for_kernels_before(const Caller&) { launch.running->waited_for_kernels = true; }

void leave(bool last) {
  Thread* to = next_thread();
  if (to != launch.running) switch_to(to, last);
}

void open(Rendezvous& r) {
  forget_those_that_ran();
  sort_by_order(r.waiting);
  launch.ready.insert(launch.ready.end(), r.waiting.begin(), r.waiting.end());
  r.waiting.clear();
  ++r.generation;
  launch.fruitless = 0;
}

void meet(Rendezvous& r, unsigned expected, bool orders_memory, const Site& site, bool one_site) {
  Thread* me = launch.running;
  char* order = &r.order[r.generation % 2];
  if (orders_memory) release_memory(order);
  if (!r.waiting.empty() && one_site && !same(r.site, site))
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

void converge(const Site& site) { gather(~0u, "", 1, false, site); }

void block_barrier(const Site& site) {
  Block& block = *launch.running->block;
  meet(block.barrier, block.running, true, site);
}

void named_barrier(int id, int threads, const Caller& caller) {
  const Site site{"named_barrier", caller.file, caller.line};
  Block& block = *launch.running->block;
  if (id < 1 || id >= kNamedBarriers)
    fail("waits at barrier " + std::to_string(id) + ", which is none of 1 to 15", site);
  if (threads < 1 || threads % 32 != 0 || size_t(threads) > block.threads.size())
    fail("waits for " + std::to_string(threads) + " threads, which are no warps of this block", site);
  converge(site);
  Rendezvous& barrier = block.named_barriers[id];
  if (!barrier.waiting.empty() && barrier.expected != unsigned(threads))
    stop([&] {
      return describe(*launch.running) + " waits for " + std::to_string(threads) + " threads, " + describe(site) +
             ", while others wait for " + std::to_string(barrier.expected) + ", " + describe(barrier.site);
    });
  barrier.expected = unsigned(threads);
  meet(barrier, unsigned(threads), true, site, false);
}

void cluster_arrive(const Caller& caller) {
  const Site site{"cluster_arrive", caller.file, caller.line};
  Thread& me = *launch.running;
  Cluster& cluster = *launch.cluster;
  converge(site);
  if (me.arrived_at_cluster) fail("arrives again before it has waited", site);
  me.arrived_at_cluster = true;
  me.cluster_generation = cluster.barrier.generation;
  release_memory(&cluster.barrier.order[me.cluster_generation % 2]);
  const Quiet quiet;
  ++cluster.arrived;
  open_cluster_barrier();
}

void cluster_wait(const Caller& caller) {
  const Site site{"cluster_wait", caller.file, caller.line};
  Thread& me = *launch.running;
  Rendezvous& barrier = launch.cluster->barrier;
  converge(site);
  if (!me.arrived_at_cluster) fail("waits and has not arrived", site);
  me.arrived_at_cluster = false;
  if (me.cluster_generation == barrier.generation) {
    {
      const Quiet quiet;
      barrier.waiting.push_back(&me);
    }
    me.waits_at = &site;
    leave();
    me.waits_at = nullptr;
  }
  acquire_memory(&barrier.order[me.cluster_generation % 2]);
}

// ---- shared memory and warp functions -------------------------------------------------------------------------------

void* dynamic_shared() { return launch.running->block->shared; }
unsigned lane() { return launch.running->number % 32; }
unsigned block_rank() { return launch.running->block->rank; }
unsigned blocks_in_cluster() { return unsigned(launch.cluster->blocks.size()); }

namespace {
bool inside(const void* p, size_t bytes, const void* memory, size_t size) {
  const ptrdiff_t offset = static_cast<const char*>(p) - static_cast<const char*>(memory);
  return offset >= 0 && size_t(offset) + bytes <= size;
}
}  // namespace

void* shared_of_block(void* address, unsigned rank, const Caller& caller) {
  const Site site{"shared_of_block", caller.file, caller.line};
  const char* own = launch.running->block->shared;
  if (!inside(address, 1, own, launch.shared_bytes)) fail("maps what is not its block's dynamic shared memory", site);
  if (rank >= blocks_in_cluster())
    fail("maps to block " + std::to_string(rank) + " of a cluster of " + std::to_string(blocks_in_cluster()), site);
  return launch.cluster->blocks[rank].shared + (static_cast<char*>(address) - own);
}

void require_shared(const void* p, size_t bytes, const Site& site) {
  const auto [begin, size] = static_shared();
  if (!inside(p, bytes, launch.running->block->shared, launch.shared_bytes) && !inside(p, bytes, begin, size) &&
      kKnowsStaticShared)
    fail("names " + std::to_string(bytes) + " bytes that are not shared memory", site);
}

void require_aligned(const void* p, size_t alignment, const Site& site) {
  if (reinterpret_cast<uintptr_t>(p) % alignment != 0)
    fail("names an address that is not aligned to " + std::to_string(alignment), site);
}

namespace {
Collective& collective_of(uint32_t mask, const Thread& thread) {
  auto& of_warp = thread.block->collectives[thread.number / 32];
  for (const auto& c : of_warp)
    if (c->mask == mask) return *c;
  const size_t lanes = std::min<size_t>(32, thread.block->threads.size() - thread.number / 32 * 32);
  Collective& added = *of_warp.emplace_back(std::make_unique<Collective>());
  added.mask = mask;
  added.lanes = unsigned(__builtin_popcountll(mask & ((uint64_t(1) << lanes) - 1)));
  return added;
}
}  // namespace

const Slots& gather(uint32_t mask, const void* value, unsigned bytes, bool orders_memory, const Site& site,
                    void (*complete)(Slots&)) {
  Collective* collective;
  Slots* slots;
  if (!(mask >> lane() & 1)) fail("is not in its own mask", site);
  {
    const Quiet quiet;
    collective = &collective_of(mask, *launch.running);
    slots = &collective->slots[collective->rendezvous.generation % 2];
    memcpy((*slots)[lane()], value, bytes);
    if (complete && collective->rendezvous.waiting.size() + 1 == collective->lanes) complete(*slots);
  }
  meet(collective->rendezvous, collective->lanes, orders_memory, site);
  return *slots;
}

}  // namespace emulation
