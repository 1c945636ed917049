// EMULATION_ADDRESS_SANITIZER and EMULATION_THREAD_SANITIZER say which sanitizer has to be told about stacks.
#include "fibers.h"

#include <pthread.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#if defined(EMULATION_ADDRESS_SANITIZER)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(EMULATION_THREAD_SANITIZER)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_set_fiber_name(void* fiber, const char* name);
}
#endif

#if !defined(__x86_64__)
#error "fibers.cpp: write switch_stacks for this processor"
#endif

// Pushes what a function has to preserve, leaves the stack pointer in *save and goes on where `load` was left.
extern "C" void emulation_switch_stacks(void** save, void* load);
asm(R"(
.text
.type emulation_switch_stacks,@function
.globl emulation_switch_stacks
.hidden emulation_switch_stacks
emulation_switch_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulation_switch_stacks, .-emulation_switch_stacks
)");

namespace emulation {
namespace {

constexpr size_t kStackSize = 256 << 10, kGuard = 4096;
constexpr int kSavedRegisters = 6;

std::vector<Fiber> ended_fibers;

Fiber new_fiber() {
  void* memory =
      mmap(nullptr, kGuard + kStackSize, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) abort();
  mprotect(memory, kGuard, PROT_NONE);  // an overflow is a fault and not another thread's error
  Fiber fiber;
  fiber.stack = static_cast<char*>(memory) + kGuard;
  fiber.stack_size = kStackSize;
#if defined(EMULATION_THREAD_SANITIZER)
  fiber.thread_sanitizer = __tsan_create_fiber(0);
#endif
  return fiber;
}

}  // namespace

Fiber start_fiber(void (*entry)(), bool fresh, [[maybe_unused]] const std::function<std::string()>& name) {
  Fiber fiber;
  if (fresh || ended_fibers.empty()) {
    fiber = new_fiber();
  } else {
    fiber = ended_fibers.back();
    ended_fibers.pop_back();
  }
#if defined(EMULATION_ADDRESS_SANITIZER)
  __asan_unpoison_memory_region(fiber.stack, kStackSize);
#endif
  // From the top: an aligned frame without a return address, the entry to "return" to, the registers.
  void** top = reinterpret_cast<void**>(fiber.stack + kStackSize) - 1;
  *top-- = nullptr;
  *top = reinterpret_cast<void*>(entry);
  top -= kSavedRegisters;
  memset(top, 0, kSavedRegisters * sizeof(void*));
  fiber.stack_pointer = top;
#if defined(EMULATION_THREAD_SANITIZER)
  __tsan_set_fiber_name(fiber.thread_sanitizer, name().c_str());
#endif
  return fiber;
}

void end_fiber(const Fiber& fiber, bool reusable) {
  if (reusable) return ended_fibers.push_back(fiber);
  munmap(fiber.stack - kGuard, kGuard + kStackSize);
#if defined(EMULATION_THREAD_SANITIZER)
  __tsan_destroy_fiber(fiber.thread_sanitizer);
#endif
}

void describe_main_fiber([[maybe_unused]] Fiber& fiber) {
#if defined(EMULATION_ADDRESS_SANITIZER)
  pthread_attr_t attributes;
  void* stack;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &stack, &fiber.stack_size);
  pthread_attr_destroy(&attributes);
  fiber.stack = static_cast<char*>(stack);
#endif
#if defined(EMULATION_THREAD_SANITIZER)
  fiber.thread_sanitizer = __tsan_get_current_fiber();
#endif
}

void switch_fiber(Fiber& from, Fiber& to, [[maybe_unused]] bool orders_memory, [[maybe_unused]] bool last) {
#if defined(EMULATION_ADDRESS_SANITIZER)
  __sanitizer_start_switch_fiber(last ? nullptr : &from.address_sanitizer, to.stack, to.stack_size);
#endif
#if defined(EMULATION_THREAD_SANITIZER)
  constexpr unsigned kNoOrder = 1;
  __tsan_switch_to_fiber(to.thread_sanitizer, orders_memory ? 0 : kNoOrder);
#endif
  emulation_switch_stacks(&from.stack_pointer, to.stack_pointer);
#if defined(EMULATION_ADDRESS_SANITIZER)
  __sanitizer_finish_switch_fiber(from.address_sanitizer, nullptr, nullptr);
#endif
}

void fiber_entered() {
#if defined(EMULATION_ADDRESS_SANITIZER)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

}  // namespace emulation
