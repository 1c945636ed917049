// Copies that happen later. The hardware may do them at any time from the instruction to the wait: the sanitizers see
// the access at both ends, and in between the destination is full of NaN.
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
  const Quiet quiet;
  copies.erase(copies.begin(), copies.begin() + done);
  ends.erase(ends.begin(), ends.begin() + groups);
  for (size_t& end : ends) end -= done;
}

}  // namespace emulation
