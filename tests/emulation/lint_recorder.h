// How kernels use memory: what a driver needs to record the accesses of a launch.
#pragma once
#include <cstddef>
#include <functional>
#include <string>

namespace lint {

/// Global memory, aligned as torch's is. Only accesses to this and to shared memory are recorded.
void* allocate(size_t bytes);

/// Runs the kernels that `launch` launches and prints for each of their instructions that access memory a line of
/// label, shared or global, load or store, bytes a lane, executions by a warp, bank cycles or sectors, the fewest that
/// would do, and the return addresses that lead to it. All memory is free again.
void record(const std::string& label, const std::function<void()>& launch);

}  // namespace lint
