#include "threads.h"

#include <sched.h>
#include <time.h>

namespace isqrt::cpu {

void wait_a_turn(int turns) {
  // Most waits end within microseconds. In a longer one the processor is left to others: one of them is waited for.
  constexpr int kShort = 1000;
  constexpr timespec kLonger{0, 50'000};
  if (turns < kShort)
    ::sched_yield();
  else
    ::nanosleep(&kLonger, nullptr);
}

namespace {

constexpr int kBits = 32;

/// Takes one round of those that are left, if any.
bool take(uint64_t& left, bool from_the_end, int64_t& round) {
  constexpr uint64_t kFirst = uint64_t(1) << kBits;
  uint64_t seen = __atomic_load_n(&left, __ATOMIC_ACQUIRE), then;
  do {
    const uint64_t first = seen >> kBits, last = seen % kFirst;
    if (first == last) return false;
    round = int64_t(from_the_end ? last - 1 : first);
    then = from_the_end ? seen - 1 : seen + kFirst;
  } while (!__atomic_compare_exchange_n(&left, &seen, then, false, __ATOMIC_ACQUIRE, __ATOMIC_ACQUIRE));
  return true;
}

}  // namespace

bool SharedLoop::help() {
  int64_t round;
  if (!take(left_, true, round)) return false;
  round_(loop_, round);
  __atomic_fetch_add(&helped_, 1, __ATOMIC_RELEASE);
  return true;
}

void SharedLoop::run(int64_t rounds, Round f, const void* loop) {
  constexpr int64_t kFewest = 8;  // fewer are done sooner than another thread has the matrices
  if (rounds < kFewest || __atomic_load_n(waiting_, __ATOMIC_RELAXED) == 0) {
    for (int64_t round = 0; round < rounds; ++round) f(loop, round);
    return;
  }
  round_ = f, loop_ = loop, helped_ = 0;
  __atomic_store_n(&left_, uint64_t(rounds), __ATOMIC_RELEASE);
  int64_t own = 0;
  for (int64_t round; take(left_, false, round); ++own) f(loop, round);
  for (int turns = 0; own + __atomic_load_n(&helped_, __ATOMIC_ACQUIRE) < rounds; ++turns) wait_a_turn(turns);
}

bool Crew::help(const SharedLoop& own) {
  if (!help_) return false;
  const size_t count = loops_.size(), first = &own - loops_.data() + 1;  // not all with the same one
  for (size_t i = 0; i < count; ++i)
    if (loops_[(first + i) % count].help()) return true;
  return false;
}

}  // namespace isqrt::cpu
