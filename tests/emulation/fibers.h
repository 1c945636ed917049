// Fibers: several stacks that one thread of the operating system runs in turn.
#pragma once
#include <cstddef>
#include <functional>
#include <string>

namespace emulation {

struct Fiber {
  void* stack_pointer = nullptr;  // while it does not run
  char* stack = nullptr;
  size_t stack_size = 0;
  void* address_sanitizer = nullptr;
  void* thread_sanitizer = nullptr;
};

/// A fiber that starts with entry(), which never returns, at the first switch to it. It is one that has ended, if there
/// is one, and a new one where `fresh`. ThreadSanitizer's reports call it name().
Fiber start_fiber(void (*entry)(), bool fresh, const std::function<std::string()>& name);

/// `reusable` says that it got to its last switch.
void end_fiber(const Fiber& fiber, bool reusable);

/// Describes the thread that calls it, so that it can be switched back to.
void describe_main_fiber(Fiber& fiber);

/// Runs `to` in place of `from`, which does not come back if it is `last`. Where `orders_memory`, all that happened in
/// `from` happens before what `to` does next, for ThreadSanitizer.
void switch_fiber(Fiber& from, Fiber& to, bool orders_memory, bool last);

/// To be called first by the entry of a fiber.
void fiber_entered();

}  // namespace emulation
