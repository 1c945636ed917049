// Copies that happen later. The hardware may do them at any time from the instruction to the wait: the sanitizers see
// the access at both ends, and in between the destination is full of NaN.
#include <algorithm>
#include <cstring>

#include "runtime.h"

namespace emulation {
namespace {

void begin_copy(const AsyncCopy& copy) {
  note_read(copy.from, copy.source_bytes, copy.site);
  note_write(copy.to, copy.bytes, copy.site);
  const Quiet quiet;
  memset(copy.to, 0xff, copy.bytes);
  set_shadow(copy.to, copy.bytes, Shadow::kInFlight);
}

void finish_copy(const AsyncCopy& copy) {
  set_shadow(copy.to, copy.bytes, Shadow::kNeverWritten);
  note_read(copy.from, copy.source_bytes, copy.site);
  note_write(copy.to, copy.bytes, copy.site);
  const Quiet quiet;
  memcpy(copy.to, copy.from, copy.source_bytes);
  memset(copy.to + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
}

}  // namespace

// ---- cp.async -------------------------------------------------------------------------------------------------------

void copy_async(void* to, const void* from, unsigned bytes, int source_bytes, const Caller& caller) {
  const CalledFrom here(__builtin_return_address(0));
  const Site site{"copy_async", caller.file, caller.line};
  require_aligned(to, bytes, site);
  require_aligned(from, bytes, site);
  require_shared(to, bytes, site);
  if (source_bytes < 0 || unsigned(source_bytes) > bytes)
    fail("copies " + std::to_string(source_bytes) + " of " + std::to_string(bytes) + " bytes", site);
  const AsyncCopy copy{static_cast<char*>(to), from, bytes, unsigned(source_bytes), site};
  begin_copy(copy);
  const Quiet quiet;
  launch.running->copies.push_back(copy);
}

void copy_async_commit() {
  const Quiet quiet;
  launch.running->group_ends.push_back(launch.running->copies.size());
}

void copy_async_wait(unsigned pending) {
  const CalledFrom here(__builtin_return_address(0));
  auto& copies = launch.running->copies;
  auto& ends = launch.running->group_ends;
  if (ends.size() <= pending) return;
  const size_t groups = ends.size() - pending, done = ends[groups - 1];
  for (size_t c = 0; c < done; ++c) finish_copy(copies[c]);
  if (done > 0) launch.running->copied_without_fence = true;
  const Quiet quiet;
  copies.erase(copies.begin(), copies.begin() + done);
  ends.erase(ends.begin(), ends.begin() + groups);
  for (size_t& end : ends) end -= done;
}

// ---- mbarrier -------------------------------------------------------------------------------------------------------

namespace {

constexpr int kMostBytes = (1 << 20) - 1;

struct Mbarrier {
  uint32_t phase : 1, count : 15, pending : 16;
  int32_t bytes;
};
static_assert(sizeof(Mbarrier) == sizeof(uint64_t));

/// What mbarrier_init wrote is read, for the sanitizers; all later changes are atomic.
Site checked(const char* what, uint64_t* barrier, const Caller& caller) {
  const Site site{what, caller.file, caller.line};
  require_aligned(barrier, sizeof *barrier, site);
  require_shared(barrier, sizeof *barrier, site);
  note_read(barrier, sizeof *barrier, site);
  return site;
}

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

[[noreturn]] void never_completes(uint64_t* barrier, const Site& site) {
  Mbarrier state;
  __builtin_memcpy(&state, barrier, sizeof state);
  const std::string bytes = state.bytes >= 0 ? std::to_string(state.bytes) + " bytes are missing"
                                             : std::to_string(-state.bytes) + " bytes too many came";
  fail("waits for ever: " + std::to_string(state.pending) + " arrivals and " + bytes, site);
}

}  // namespace

void mbarrier_init(uint64_t* barrier, unsigned count, const Caller& caller) {
  const CalledFrom here(__builtin_return_address(0));
  const Site site{"mbarrier_init", caller.file, caller.line};
  require_aligned(barrier, sizeof *barrier, site);
  require_shared(barrier, sizeof *barrier, site);
  note_write(barrier, sizeof *barrier, site);
  const Mbarrier state{0, count, count, 0};
  __builtin_memcpy(barrier, &state, sizeof state);
}

void mbarrier_expect(uint64_t* barrier, unsigned bytes, const Caller& caller) {
  const CalledFrom here(__builtin_return_address(0));
  const Site site = checked("mbarrier_expect", barrier, caller);
  if (bytes > unsigned(kMostBytes))
    fail("expects more bytes than the " + std::to_string(kMostBytes) + " of a phase", site);
  change(barrier, [&](Mbarrier& state) { state.bytes += int(bytes); });
  launch.fruitless = 0;
}

void mbarrier_arrive(uint64_t* own, unsigned rank, const Caller& caller) {
  const CalledFrom here(__builtin_return_address(0));
  auto* const barrier = static_cast<uint64_t*>(shared_of_block(own, rank, caller));
  const Site site{"mbarrier_arrive", caller.file, caller.line};
  note_read(barrier, sizeof *barrier, site);
  release_memory(barrier);
  bool too_many = false;
  change(barrier, [&](Mbarrier& state) {
    too_many = state.pending == 0;
    --state.pending;
  });
  if (too_many) fail("arrives more often than the mbarrier's count", site);
  launch.fruitless = 0;
}

void store_async(void* own, unsigned rank, const uint32_t (&words)[4], uint64_t* barrier, const Caller& caller) {
  const CalledFrom here(__builtin_return_address(0));
  const Site site{"store_async", caller.file, caller.line};
  if (blocks_in_cluster() == 1) fail("sends from a block that is in no cluster, not even to itself", site);
  require_aligned(own, sizeof words, site);
  require_shared(own, sizeof words, site);
  auto* const there = static_cast<uint64_t*>(shared_of_block(barrier, rank, caller));
  note_read(there, sizeof *there, site);  // what mbarrier_init wrote
  AsyncStore store{static_cast<char*>(shared_of_block(own, rank, caller)), {}, there, site};
  memcpy(store.words, words, sizeof words);
  note_write(store.to, sizeof words, site);
  set_shadow(store.to, sizeof words, Shadow::kInFlight);
  release_memory(there);
  const Quiet quiet;
  memset(store.to, 0xff, sizeof words);
  launch.cluster->blocks[rank].stores.push_back(store);
}

void mbarrier_wait(uint64_t* barrier, unsigned parity, const Caller& caller) {
  const CalledFrom here(__builtin_return_address(0));
  constexpr unsigned kMostPolls = 1 << 18;
  const Site site = checked("mbarrier_wait", barrier, caller);
  if (parity > 1) fail("waits for a parity that is neither 0 nor 1", site);
  Thread* me = launch.running;
  me->waits_at = &site;
  for (;;) {
    bool waiting = false;
    std::vector<AsyncStore> arrived;
    {
      const Quiet quiet;
      change(barrier, [&](Mbarrier& state) { waiting = state.phase == parity; });
      if (!waiting) break;
      auto& stores = me->block->stores;
      const auto others = std::stable_partition(stores.begin(), stores.end(),
                                                [&](const AsyncStore& store) { return store.barrier != barrier; });
      arrived.assign(others, stores.end());
      stores.erase(others, stores.end());
    }
    if (!arrived.empty()) {
      acquire_memory(barrier);
      for (const AsyncStore& store : arrived) {
        set_shadow(store.to, sizeof store.words, Shadow::kNeverWritten);
        note_write(store.to, sizeof store.words, store.site);
        const Quiet quiet;
        memcpy(store.to, store.words, sizeof store.words);
      }
      release_memory(barrier);
      change(barrier, [&](Mbarrier& state) { state.bytes -= int(arrived.size() * sizeof(AsyncStore::words)); });
      launch.fruitless = 0;
    } else {
      if (++launch.fruitless > kMostPolls) never_completes(barrier, site);
      {
        const Quiet quiet;
        launch.ready.push_back(me);
      }
      leave();
    }
  }
  me->waits_at = nullptr;
  acquire_memory(barrier);
}

}  // namespace emulation
