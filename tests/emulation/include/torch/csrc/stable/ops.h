// What csrc/cpu/cpu.cpp takes from torch, with threads that a sanitizer sees through: OpenMP's it does not.
#pragma once
#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace torch::stable {

inline uint32_t threads = 1;
inline uint32_t get_num_threads() { return threads; }

template <class F> void parallel_for(int64_t begin, int64_t end, int64_t, const F& f) {
  const int64_t length = (end - begin + threads - 1) / threads;
  std::vector<std::thread> others;
  for (int64_t i = begin + length; i < end; i += length)
    others.emplace_back([&f, i, last = std::min(end, i + length)] { f(i, last); });
  if (begin < end) f(begin, std::min(end, begin + length));
  for (std::thread& other : others) other.join();
}

}  // namespace torch::stable
