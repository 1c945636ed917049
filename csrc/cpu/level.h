// The kernels of one SIMD level: the body of avx512.cpp, avx2.cpp and portable.cpp.
#pragma once
#include "covariance_engine.h"
#include "gram_engine.h"
#include "matrix_engine.h"

namespace isqrt::cpu::ISQRT_LEVEL {

template <class X> void pool(const PoolTask<X>& task, Items& items) {
  const int64_t C = task.x.channels, count = task.chunks.count;
  const Scratch<Compute<X>> storage(PoolEngine<X>::storage_size(C));
  items.take([&](int64_t item) {
    PoolEngine<X> engine(task.x, item / count, storage.get(), items.loop);
    accumulate_covariance(engine, task.chunks.first(item % count), task.chunks.last(item % count));
    engine.write(task.partial_mean + item * C, task.partial_moment + item * C * C);
  });
}

template <class X> void merge(const PoolTask<X>& task, Items& items) {
  items.take([&](int64_t sample) {
    MergeEngine<X> engine(task, sample, items.loop);
    merge_covariances(engine, task.chunks);
    rescue_covariance<X>(engine);
  });
}

template <class X> void pool_backward(const PoolBackwardTask<X>& task, Items& items) {
  const int64_t count = task.chunks.count;
  const Scratch<Compute<X>> storage(PoolBackwardEngine<X>::storage_size(task.x.channels));
  items.take([&](int64_t item) {
    PoolBackwardEngine<X> engine(task, item / count, storage.get());
    covariance_backward(engine, task.chunks.first(item % count), task.chunks.last(item % count));
  });
  finish_streams();
}

template <class X> void root(const RootTask<X>& task, Items& items) {
  using T = Compute<X>;
  const int64_t C = task.sigma.channels;
  const Scratch<T> storage(MatrixEngine<T>::storage_size(C, 4, 3));
  items.take([&](int64_t sample) {
    MatrixEngine<T> e(C, storage.get(), items.loop);
    const auto sigma = task.sigma.sample(sample);
    const auto result = task.result.sample(sample);
    const T scale = task.scale ? task.scale[sample] : T(1);
    if (result.output == Output::kMean) {
      auto mean = matrix_root_mean(e, sigma, task.steps, C);
      if (scale != 1) e.add(mean, 1 / scale, 0, mean);
      copy_strided(result.data, C, int64_t(1), mean.data, C, int64_t(1), int64_t(1), C);
    } else {
      auto root = matrix_root(e, sigma, task.steps, task.root);
      if (scale != 1) e.scale(root, 1 / scale, root);
      e.write(root, result);
    }
  });
}

/// A gradient as the engine reads it; of 16-bit numbers it is the copy in `buffer`.
template <class X> RootView<const Compute<X>> in_compute_type(const RootView<const X>& grad, Compute<X>* buffer) {
  if constexpr (sizeof(X) == sizeof(Compute<X>)) {
    return grad;
  } else {
    const int64_t size = grad.size();
    copy_strided(buffer, size, int64_t(1), grad.data, size, int64_t(1), int64_t(1), size);
    return {buffer, grad.output, grad.channels};
  }
}

template <class X> void root_backward(const RootBackwardTask<X>& task, Items& items) {
  using T = Compute<X>;
  const int64_t C = task.sigma.channels, copy = sizeof(X) == sizeof(T) ? 0 : task.grad.size();
  const int64_t size = MatrixEngine<T>::storage_size(C, 8, 4);
  const Scratch<T> storage(size + copy);
  items.take([&](int64_t sample) {
    MatrixEngine<T> e(C, storage.get(), items.loop);
    const auto sigma = task.sigma.sample(sample);
    const auto grad = in_compute_type(task.grad.sample(sample), storage.get() + size);
    const auto write_root = [&](const T& factor, Panels<T>& P) {
      if (task.value) e.write(e.result(factor, P), RootView<T>{task.value, Output::kMatrix, C}.sample(sample));
    };
    const auto gradient = grad.output == Output::kMean
                              ? matrix_root_mean_backward(e, sigma, grad, task.steps, C)
                              : matrix_root_backward(e, sigma, grad, task.steps, task.root, write_root);
    e.write(gradient, task.grad_sigma.sample(sample));
  });
}

/// run(engine, M) for an Engine of each item.
template <class Engine, class Task, class Run> void run_gram(const Task& task, Items& items, const Run& run) {
  const int64_t C = task.x.channels, M = task.x.positions();
  const Scratch<std::remove_const_t<std::remove_pointer_t<decltype(task.scale)>>> storage(Engine::storage_size(C, M));
  items.take([&](int64_t sample) {
    Engine engine(task, sample, storage.get(), items.loop);
    run(engine, M);
  });
}

template <class X> void gram_pool(const GramTask<X>& task, Items& items) {
  run_gram<GramEngine<X>>(task, items, [](auto& e, int64_t positions) {
    pool_gram(e, positions);
    rescue_covariance<X>(e);
  });
}
template <class X> void gram_expand(const ExpandTask<X>& task, Items& items) {
  run_gram<ExpandEngine<X>>(task, items, [](auto& e, int64_t positions) { expand_root(e, positions); });
}
template <class X> void gram_contract(const ContractTask<X>& task, Items& items) {
  run_gram<ContractEngine<X>>(task, items, [](auto& e, int64_t positions) { contract_gradient(e, positions); });
}
template <class X> void gram_backward(const GramBackwardTask<X>& task, Items& items) {
  run_gram<GramBackwardEngine<X>>(task, items, [](auto& e, int64_t positions) { isqrt::gram_backward(e, positions); });
}

template <class X> PoolKernels<X> pool_kernels() { return {pool<X>, merge<X>, pool_backward<X>}; }
template <class X> RootKernels<X> root_kernels() { return {root<X>, root_backward<X>}; }
template <class X> GramKernels<X> gram_kernels() {
  return {gram_pool<X>, gram_expand<X>, gram_contract<X>, gram_backward<X>};
}

template PoolKernels<float> pool_kernels();
template PoolKernels<double> pool_kernels();
template PoolKernels<Half> pool_kernels();
template PoolKernels<BFloat16> pool_kernels();
template RootKernels<float> root_kernels();
template RootKernels<double> root_kernels();
template RootKernels<Half> root_kernels();
template RootKernels<BFloat16> root_kernels();
template GramKernels<float> gram_kernels();
template GramKernels<double> gram_kernels();
template GramKernels<Half> gram_kernels();
template GramKernels<BFloat16> gram_kernels();

}  // namespace isqrt::cpu::ISQRT_LEVEL
