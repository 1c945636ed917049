// Records the accesses of emulated kernels to shared and global memory. Kernels compiled with -fsanitize=thread call
// __tsan_read16(address) and the like before each access; here these functions are not ThreadSanitizer's, and all they
// do is to note the address. Lane k's n-th execution of an instruction, reached by the same calls, is lined up with the
// other lanes' n-th.
#include "lint_recorder.h"

#include <malloc.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <set>
#include <unordered_map>
#include <vector>

#include "emulation.h"

extern char __start_emulated_shared[] __attribute__((weak)), __stop_emulated_shared[] __attribute__((weak));

namespace lint {
namespace {

constexpr size_t kArenaBytes = size_t(256) << 20;
constexpr unsigned kWarp = 32;
alignas(1024) char arena[kArenaBytes];
size_t arena_used = 0;

/// An instruction and how it was reached: return addresses from the outermost call on.
using Chain = std::vector<void*>;

struct Instruction {
  Chain chain;
  bool shared, store;
  unsigned bytes;
  auto operator<=>(const Instruction&) const = default;
};

/// One execution by a warp.
struct Execution {
  uint32_t lanes = 0;
  const char* address[kWarp];
};

struct Sums {
  long executions = 0, real = 0, ideal = 0;
};

struct Thread {
  Chain calls;
  std::map<Instruction, unsigned> executed;
};

std::unordered_map<uint64_t, Thread> threads;                              // by block and number in it
std::map<std::pair<Instruction, uint64_t>, std::vector<Execution>> warps;  // by instruction and warp

uint64_t block_number() { return (uint64_t(blockIdx.z) * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x; }
uint64_t thread_number() {
  const uint64_t in_block = (uint64_t(threadIdx.z) * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  return block_number() << 16 | in_block;
}

bool in_shared(const char* address) {
  if (__start_emulated_shared && address >= __start_emulated_shared && address < __stop_emulated_shared) return true;
  char* own = static_cast<char*>(emulation::dynamic_shared());
  for (unsigned rank = 0; rank < emulation::blocks_in_cluster(); ++rank) {
    char* base = rank == emulation::block_rank()
                     ? own
                     : static_cast<char*>(emulation::shared_of_block(own, rank, emulation::Caller::here()));
    if (address >= base && address < base + malloc_usable_size(base)) return true;
  }
  return false;
}

/// The frame of the launching code, while a launch is recorded. That code is instrumented too: it runs on the stack of
/// the program and not on that of a fiber.
const char* launching = nullptr;

bool in_kernel() {
  constexpr ptrdiff_t kMostStack = 1 << 20;
  const char* here = static_cast<const char*>(__builtin_frame_address(0));
  return launching != nullptr && (here > launching || launching - here > kMostStack);
}

void note(const void* memory, unsigned bytes, bool store, void* instruction) {
  if (!in_kernel()) return;
  const char* address = static_cast<const char*>(memory);
  const bool global = address >= arena && address < arena + kArenaBytes;
  if (!global && !in_shared(address)) return;  // a variable of the thread
  Thread& thread = threads[thread_number()];
  Instruction key{thread.calls, !global, store, bytes};
  key.chain.push_back(instruction);
  const unsigned time = thread.executed[key]++;
  const unsigned lane = emulation::lane();
  auto& executions = warps[{std::move(key), thread_number() / kWarp}];
  if (executions.size() <= time) executions.resize(time + 1);
  executions[time].lanes |= 1u << lane;
  executions[time].address[lane] = address;
}

/// Cycles of the 32 banks: 16-byte accesses are served by quarters of a warp, 8-byte ones by halves, and each of these
/// takes as many cycles as there are different words in one bank. Without conflicts that is one.
void add_bank_cycles(Sums& sums, const Execution& e, unsigned bytes) {
  const unsigned together = bytes <= 4 ? kWarp : std::max(1u, 4 * kWarp / bytes);
  for (unsigned first = 0; first < kWarp; first += together) {
    std::map<uint64_t, std::set<uint64_t>> banks;
    for (unsigned lane = first; lane < first + together; ++lane)
      if (e.lanes >> lane & 1)
        for (unsigned b = 0; b < bytes; b += 4) {
          const uint64_t word = (reinterpret_cast<uint64_t>(e.address[lane]) + b) / 4;
          banks[word % kWarp].insert(word);
        }
    size_t cycles = 0;
    for (const auto& [bank, words] : banks) cycles = std::max(cycles, words.size());
    sums.real += long(cycles);
    sums.ideal += cycles > 0;
  }
}

/// Sectors of 32 bytes that are touched, and into how many the same bytes would fit.
void add_sectors(Sums& sums, const Execution& e, unsigned bytes) {
  std::set<uint64_t> sectors, touched;
  for (unsigned lane = 0; lane < kWarp; ++lane)
    if (e.lanes >> lane & 1)
      for (unsigned b = 0; b < bytes; ++b) {
        const uint64_t byte = reinterpret_cast<uint64_t>(e.address[lane]) + b;
        touched.insert(byte);
        sectors.insert(byte / 32);
      }
  sums.real += long(sectors.size());
  sums.ideal += long((touched.size() + 31) / 32);
}

}  // namespace

void* allocate(size_t bytes) {
  constexpr size_t kAlignment = 512;  // torch's
  void* memory = arena + arena_used;
  arena_used += (bytes + kAlignment - 1) / kAlignment * kAlignment;
  if (arena_used > kArenaBytes) std::abort();
  return memory;
}

void record(const std::string& label, const std::function<void()>& launch) {
  launching = static_cast<const char*>(__builtin_frame_address(0));
  launch();
  launching = nullptr;
  std::map<Instruction, Sums> sums;
  for (const auto& [key, executions] : warps)
    for (const Execution& e : executions) {
      Sums& s = sums[key.first];
      ++s.executions;
      (key.first.shared ? add_bank_cycles : add_sectors)(s, e, key.first.bytes);
    }
  for (const auto& [i, s] : sums) {
    std::printf("%s\t%s\t%s\t%u\t%ld\t%ld\t%ld\t", label.c_str(), i.shared ? "shared" : "global",
                i.store ? "store" : "load", i.bytes, s.executions, s.real, s.ideal);
    for (const void* call : i.chain) std::printf(" %p", call);
    std::printf("\n");
  }
  threads.clear();
  warps.clear();
  arena_used = 0;
}

}  // namespace lint

// ---- what instrumented code calls -----------------------------------------------------------------------------------

#define HERE __builtin_return_address(0)
#define ACCESS(bytes)                                                               \
  void __tsan_read##bytes(void* p) { lint::note(p, bytes, false, HERE); }           \
  void __tsan_write##bytes(void* p) { lint::note(p, bytes, true, HERE); }           \
  void __tsan_unaligned_read##bytes(void* p) { lint::note(p, bytes, false, HERE); } \
  void __tsan_unaligned_write##bytes(void* p) { lint::note(p, bytes, true, HERE); }

extern "C" {
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
void __tsan_read_range(void* p, size_t bytes) { lint::note(p, unsigned(bytes), false, HERE); }
void __tsan_write_range(void* p, size_t bytes) { lint::note(p, unsigned(bytes), true, HERE); }
void __tsan_func_entry(void* call) {
  if (lint::in_kernel()) lint::threads[lint::thread_number()].calls.push_back(call);
}
void __tsan_func_exit() {
  if (!lint::in_kernel()) return;
  auto& calls = lint::threads[lint::thread_number()].calls;
  if (!calls.empty()) calls.pop_back();
}
void __tsan_init() {}

// cp.async and ldmatrix happen in the runtime, which is not instrumented; the linker sends their calls here (--wrap).
// Each lane gives the address of a row of 16 bytes, and eight rows are served together: as if every lane read its row.
using emulation::Caller;
void __real__ZN9emulation10copy_asyncEPvPKvjiRKNS_6CallerE(void*, const void*, unsigned, int, const Caller&);
void __wrap__ZN9emulation10copy_asyncEPvPKvjiRKNS_6CallerE(void* to, const void* from, unsigned bytes, int source_bytes,
                                                           const Caller& caller) {
  if (source_bytes > 0) lint::note(from, unsigned(source_bytes), false, HERE);
  lint::note(to, bytes, true, HERE);
  __real__ZN9emulation10copy_asyncEPvPKvjiRKNS_6CallerE(to, from, bytes, source_bytes, caller);
}
void __real__ZN9emulation13load_matricesERA4_jPKvbRKNS_6CallerE(uint32_t (&)[4], const void*, bool, const Caller&);
void __wrap__ZN9emulation13load_matricesERA4_jPKvbRKNS_6CallerE(uint32_t (&r)[4], const void* row, bool transposed,
                                                                const Caller& caller) {
  lint::note(row, 16, false, HERE);
  __real__ZN9emulation13load_matricesERA4_jPKvbRKNS_6CallerE(r, row, transposed, caller);
}
}
