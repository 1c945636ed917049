// How the threads of a call share its work: the items of a stage, and loops within an item where threads are left over.
#pragma once
#include <cstdint>
#include <vector>

namespace isqrt::cpu {

/// What a thread does that has waited `turns` times for the same thing.
void wait_a_turn(int turns);

/// The loops of one thread, one after the other, of which threads that wait do rounds, too. Rounds do not throw: the
/// others would go on with what the thread has left.
class alignas(64) SharedLoop {
 public:
  using Round = void (*)(const void* loop, int64_t round) noexcept;

  /// `waiting` counts the threads that wait.
  explicit SharedLoop(const int64_t* waiting) : waiting_(waiting) {}

  /// f(loop, round) for each of `rounds` rounds, on any thread and in any order. Returns when all are done. Others take
  /// the last ones: of loops over the same matrix each thread finds most of its part in its own cache.
  void run(int64_t rounds, Round f, const void* loop);

  /// One round of the loop that runs, by another thread. False where none is left.
  bool help();

 private:
  const int64_t* waiting_;
  // The first and last of the rounds that are left, [first, last), of 32 bits each. A round that is taken is of the
  // loop that runs then, whichever was seen before: its function is read afterwards, and it does not end before the
  // round.
  uint64_t left_ = 0;
  Round round_ = nullptr;
  const void* loop_ = nullptr;
  int64_t helped_ = 0;
};

/// The threads of one call. (Whether they run at the same time is not known: none waits for what nobody has begun.)
class Crew {
 public:
  /// `help` tells whether there are loops to help with.
  Crew(int64_t threads, bool help) : help_(help), loops_(threads, SharedLoop(&waiting_)) {}
  Crew(const Crew&) = delete;
  Crew& operator=(const Crew&) = delete;

  /// The loops of a thread that joins.
  SharedLoop& join() { return loops_[__atomic_fetch_add(&joined_, 1, __ATOMIC_RELAXED)]; }

  /// Returns when done(); until then `own` loop's thread helps the others.
  template <class Done> inline __attribute__((always_inline)) void wait_until(const SharedLoop& own, const Done& done) {
    if (done()) return;
    __atomic_fetch_add(&waiting_, 1, __ATOMIC_RELAXED);
    for (int turns = 0; !done(); ++turns) {
      if (help(own))
        turns = 0;
      else
        wait_a_turn(turns);
    }
    __atomic_fetch_sub(&waiting_, 1, __ATOMIC_RELAXED);
  }

  /// What a thread with nothing else to do does in the end.
  template <class Done> inline __attribute__((always_inline)) void help_until(const SharedLoop& own, const Done& done) {
    if (help_) wait_until(own, done);
  }

 private:
  bool help(const SharedLoop& own);

  const bool help_;
  int64_t waiting_ = 0, joined_ = 0;
  std::vector<SharedLoop> loops_;
};

/// The work items of a stage, so many for each sample, which threads take from what is left: fewer where their core is
/// slower, or used by others, too. First they take several that follow each other, for the next one's data are asked
/// for during the one before; in the end single ones. A sample's begin when the stage before has done its own.
class Queue {
 public:
  /// `left` [samples] counts what is not done, `before` is null for the first stage.
  Queue(int64_t samples, int64_t per_sample, int64_t threads, int64_t* left, const Queue* before)
      : count_(samples * per_sample), per_sample_(per_sample), threads_(threads), left_(left), before_(before) {}

  /// Takes items [begin, end), where any are left.
  inline __attribute__((always_inline)) bool take(int64_t& begin, int64_t& end) {
    begin = __atomic_load_n(&next_, __ATOMIC_RELAXED);
    do {
      if (begin >= count_) return false;
      const int64_t share = (count_ - begin) / (2 * threads_);
      end = begin + (share > 1 ? share : 1);
    } while (!__atomic_compare_exchange_n(&next_, &begin, end, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return true;
  }

  inline __attribute__((always_inline)) bool may_begin(int64_t item) const {
    return before_ == nullptr || before_->has_done(item / per_sample_);
  }
  inline __attribute__((always_inline)) void finish(int64_t item) {
    __atomic_fetch_sub(left_ + item / per_sample_, 1, __ATOMIC_RELEASE);
    __atomic_fetch_add(&finished_, 1, __ATOMIC_RELEASE);
  }
  /// What waits for it goes on, to no purpose, and the call ends with the exception.
  inline __attribute__((always_inline)) void fail() { __atomic_store_n(&failed_, true, __ATOMIC_RELEASE); }

  inline __attribute__((always_inline)) bool is_done() const {
    return __atomic_load_n(&finished_, __ATOMIC_ACQUIRE) == count_ || has_failed();
  }

 private:
  inline __attribute__((always_inline)) bool has_failed() const { return __atomic_load_n(&failed_, __ATOMIC_ACQUIRE); }
  inline __attribute__((always_inline)) bool has_done(int64_t sample) const {
    return __atomic_load_n(left_ + sample, __ATOMIC_ACQUIRE) == 0 || has_failed();
  }

  const int64_t count_, per_sample_, threads_;
  int64_t* const left_;
  const Queue* const before_;
  int64_t next_ = 0, finished_ = 0;
  bool failed_ = false;
};

/// A stage as one thread sees it.
class Items {
 public:
  Items(Queue& queue, Crew& crew, SharedLoop& loop) : loop(loop), queue_(queue), crew_(crew) {}

  /// f(item) for each that no other thread took.
  template <class F> inline __attribute__((always_inline)) void take(const F& f) {
    for (int64_t begin, end; queue_.take(begin, end);)
      for (; begin < end; ++begin) {
        crew_.wait_until(loop, [&] { return queue_.may_begin(begin); });
        try {
          f(begin);
        } catch (...) {
          queue_.fail();
          throw;
        }
        queue_.finish(begin);
      }
  }

  SharedLoop& loop;

 private:
  Queue& queue_;
  Crew& crew_;
};

}  // namespace isqrt::cpu
