// What watches the accesses of kernels: ThreadSanitizer, AddressSanitizer, or the runtime's own shadow of shared memory
// in a build of mode "shadow". Kernels are instrumented and watched by themselves; the runtime is not, and says what it
// reads, writes and orders in their name.
#pragma once
#include <cstddef>
#include <string>

#include "emulation.h"

namespace emulation {

/// ThreadSanitizer: what happened before release(p) happens before what follows acquire(p).
void release_memory(void* p);
void acquire_memory(void* p);

/// While one lives, ThreadSanitizer ignores accesses: the bookkeeping is not part of the program under test.
class Quiet {
 public:
  Quiet();
  ~Quiet();
  Quiet(const Quiet&) = delete;
};

/// An access of the running thread, made for it by the runtime. Not to be called while a Quiet lives.
void note_read(const void* p, size_t bytes, const Site& site);
void note_write(void* p, size_t bytes, const Site& site);

/// The shadow: whoever wrote these bytes has called fence_for_warpgroups() since.
void require_fenced(const void* p, size_t bytes, const Site& site);

/// While one lives, ThreadSanitizer's reports of notes show where the runtime was called from: its own functions, not
/// being instrumented, are on no list of calls.
class CalledFrom {
 public:
  explicit CalledFrom(void* return_address);
  ~CalledFrom();
  CalledFrom(const CalledFrom&) = delete;
};

#if !defined(EMULATION_THREAD_SANITIZER)  // not even a call: these are on the way whenever threads meet
inline void release_memory(void*) {}
inline void acquire_memory(void*) {}
inline Quiet::Quiet() {}
inline Quiet::~Quiet() {}
inline CalledFrom::CalledFrom(void*) {}
inline CalledFrom::~CalledFrom() {}
#endif

/// What the shadow knows of a byte of shared memory.
enum class Shadow : unsigned char { kWritten, kNeverWritten, kInFlight, kGone };

/// Shared memory that is to have a shadow, all of it never written, until forget_shared_memory().
void watch_shared_memory(void* memory, size_t bytes);
void forget_shared_memory();
void set_shadow(void* p, size_t bytes, Shadow state);

/// The begin and the end of a block of a cluster, made by the running thread.
void begin_block_memory(void* memory, size_t bytes);
void end_block_memory(void* memory, size_t bytes);

/// "FILE:LINE" of an address in the program, with the calls that were inlined there.
std::string source_line(const void* instruction);

}  // namespace emulation
