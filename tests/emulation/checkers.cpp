// The runtime is compiled without instrumentation; EMULATION_ADDRESS_SANITIZER, EMULATION_THREAD_SANITIZER or
// EMULATION_SHADOW says what watches the kernels.
#include "checkers.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <vector>

#include "runtime.h"

#if defined(EMULATION_ADDRESS_SANITIZER)
#include <sanitizer/asan_interface.h>
extern "C" {
void __asan_loadN(const void* p, size_t bytes);
void __asan_storeN(void* p, size_t bytes);
/// The stacks of a launch that failed are left as they are, with all that they own.
__attribute__((visibility("default"))) const char* __asan_default_options() { return "detect_leaks=0"; }
}
#endif
#if defined(EMULATION_THREAD_SANITIZER)
extern "C" {
void __tsan_acquire(void* p);
void __tsan_release(void* p);
void __tsan_func_entry(void* return_address);
void __tsan_func_exit();
void __tsan_read_range(const void* p, size_t bytes);
void __tsan_write_range(void* p, size_t bytes);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

namespace emulation {

#if defined(EMULATION_THREAD_SANITIZER)
void release_memory(void* p) { __tsan_release(p); }
void acquire_memory(void* p) { __tsan_acquire(p); }
Quiet::Quiet() {
  AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
}
Quiet::~Quiet() {
  AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
}
CalledFrom::CalledFrom(void* return_address) { __tsan_func_entry(return_address); }
CalledFrom::~CalledFrom() { __tsan_func_exit(); }
#endif

#if defined(EMULATION_SHADOW)

namespace {

struct Byte {
  Shadow state = Shadow::kNeverWritten;
  const Thread* writer = nullptr;
  unsigned fences = 0;  // of the writer's, until then
};
struct Watched {
  char* memory;
  std::vector<Byte> bytes;
};
std::vector<Watched> watched;
char *lowest = nullptr, *highest = nullptr;  // most accesses are of other memory

/// f(byte) for those of the bytes that are watched.
template <class F> void for_watched(const void* p, size_t bytes, const F& f) {
  char *begin = static_cast<char*>(const_cast<void*>(p)), *end = begin + bytes;
  if (end <= lowest || begin >= highest) return;
  for (Watched& w : watched)
    for (char* at = std::max(begin, w.memory); at < std::min(end, w.memory + w.bytes.size()); ++at)
      f(w.bytes[at - w.memory]);
}

const char* complaint(Shadow state, bool write) {
  switch (state) {
    case Shadow::kNeverWritten:
      return write ? nullptr : "reads shared memory that was never written";
    case Shadow::kInFlight:
      return write ? "writes where an asynchronous copy has not been waited for"
                   : "reads what an asynchronous copy brings, which has not been waited for";
    case Shadow::kGone:
      return "uses the shared memory of a block that has returned";
    default:
      return nullptr;
  }
}

/// The complaint about an access, or nullptr.
const char* check(const void* p, size_t bytes, bool write) {
  const char* found = nullptr;
  for_watched(p, bytes, [&](Byte& byte) {
    if (found == nullptr) found = complaint(byte.state, write);
    if (!write) return;
    if (byte.state == Shadow::kNeverWritten) byte.state = Shadow::kWritten;
    byte.writer = launch.running, byte.fences = launch.running->fences;
  });
  return found;
}

void check_access(const void* p, size_t bytes, bool write, void* instruction) {
  if (const char* found = check(p, bytes, write)) fail_at(found, instruction);
}

void check_note(const void* p, size_t bytes, bool write, const Site& site) {
  if (const char* found = check(p, bytes, write)) fail(found, site);
}

}  // namespace

void note_read(const void* p, size_t bytes, const Site& site) { check_note(p, bytes, false, site); }
void note_write(void* p, size_t bytes, const Site& site) { check_note(p, bytes, true, site); }
void require_fenced(const void* p, size_t bytes, const Site& site) {
  for_watched(p, bytes, [&](const Byte& byte) {
    if (byte.writer && byte.fences == byte.writer->fences) fail("reads what was written, and no fence followed", site);
  });
}

void watch_shared_memory(void* memory, size_t bytes) {
  if (bytes == 0) return;
  char* begin = static_cast<char*>(memory);
  watched.push_back({begin, std::vector<Byte>(bytes)});
  lowest = lowest ? std::min(lowest, begin) : begin;
  highest = std::max(highest, begin + bytes);
}

void forget_shared_memory() {
  watched.clear();
  lowest = highest = nullptr;
}

void set_shadow(void* p, size_t bytes, Shadow state) {
  for_watched(p, bytes, [&](Byte& byte) { byte.state = state; });
}

#else

void require_fenced(const void*, size_t, const Site&) {}
void watch_shared_memory(void*, size_t) {}
void forget_shared_memory() {}

#if defined(EMULATION_ADDRESS_SANITIZER)
void note_read(const void* p, size_t bytes, const Site&) { __asan_loadN(p, bytes); }
void note_write(void* p, size_t bytes, const Site&) { __asan_storeN(p, bytes); }
void set_shadow(void* p, size_t bytes, Shadow state) {
  if (state == Shadow::kGone) __asan_poison_memory_region(p, bytes);
}
#else
#if defined(EMULATION_THREAD_SANITIZER)
void note_read(const void* p, size_t bytes, const Site&) { __tsan_read_range(p, bytes); }
void note_write(void* p, size_t bytes, const Site&) { __tsan_write_range(p, bytes); }
#else
void note_read(const void*, size_t, const Site&) {}
void note_write(void*, size_t, const Site&) {}
#endif
void set_shadow(void*, size_t, Shadow) {}
#endif

#endif

void begin_block_memory([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) {
#if defined(EMULATION_THREAD_SANITIZER)
  __tsan_write_range(memory, bytes);
#endif
}

void end_block_memory(void* memory, size_t bytes) {
#if defined(EMULATION_THREAD_SANITIZER)
  __tsan_write_range(memory, bytes);
#endif
  const Quiet quiet;
  memset(memory, 0xff, bytes);
  set_shadow(memory, bytes, Shadow::kGone);
}

std::string source_line(const void* instruction) {
  Dl_info module;
  if (!dladdr(instruction, &module)) return "an unknown place";
  // The call before the address that it returns to.
  const size_t offset = static_cast<const char*>(instruction) - static_cast<const char*>(module.dli_fbase) - 1;
  char command[1024], text[4096];
  snprintf(command, sizeof command, "addr2line -fipCe '%s' %#zx 2>/dev/null", module.dli_fname, offset);
  FILE* pipe = popen(command, "r");
  if (pipe == nullptr) return command;
  const size_t length = fread(text, 1, sizeof text, pipe);
  pclose(pipe);
  return {text, length};
}

}  // namespace emulation

#if defined(EMULATION_SHADOW)
// What g++ -fsanitize=kernel-address calls before each access.
#define EMULATION_ACCESS(bytes)                                            \
  extern "C" void __asan_load##bytes##_noabort(const void* p) {            \
    emulation::check_access(p, bytes, false, __builtin_return_address(0)); \
  }                                                                        \
  extern "C" void __asan_store##bytes##_noabort(const void* p) {           \
    emulation::check_access(p, bytes, true, __builtin_return_address(0));  \
  }
EMULATION_ACCESS(1)
EMULATION_ACCESS(2)
EMULATION_ACCESS(4)
EMULATION_ACCESS(8)
EMULATION_ACCESS(16)
extern "C" void __asan_loadN_noabort(const void* p, size_t bytes) {
  emulation::check_access(p, bytes, false, __builtin_return_address(0));
}
extern "C" void __asan_storeN_noabort(const void* p, size_t bytes) {
  emulation::check_access(p, bytes, true, __builtin_return_address(0));
}
extern "C" void __asan_handle_no_return() {}
extern "C" void __asan_before_dynamic_init(const char*) {}
extern "C" void __asan_after_dynamic_init() {}
#endif
