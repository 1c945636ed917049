// What an operator does with its tensors after they are checked, by ops.cpp: plan.cpp chooses engines, and the call
// goes by cpu/cpu.cpp to cpu/level.h; or to cuda/pooling.cu, and roots.cu or grid.cu; or to library/. Each of these
// runs the algorithm, covariance.h, normalization.h and gram.h, on an Engine of its own.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <deque>
#include <sstream>
#include <stdexcept>
#include <utility>
#include <vector>

#include "cpu/cpu.h"
#include "library/library.h"
#include "plan.h"

#ifdef ISQRT_WITH_CUDA
#include "cuda/cuda.h"

// Weak: absent in a CPU-only torch, where the library must still load.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace isqrt {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

/// Throws what `message` is made of, text only where the condition does not hold.
template <class... Args> void check(bool condition, const Args&... message) {
  if (condition) return;
  std::ostringstream text;
  (text << ... << message);
  throw std::runtime_error(text.str());
}

inline bool is_half(ScalarType dtype) { return dtype == ScalarType::Half || dtype == ScalarType::BFloat16; }

/// What is computed and kept for a tensor of this dtype.
inline ScalarType compute_dtype(ScalarType dtype) { return is_half(dtype) ? ScalarType::Float : dtype; }

// ---- views --------------------------------------------------------------------------------------------------------

template <class X, class Bytes> FeatureMaps<X> feature_maps(const Tensor& x, Bytes* data) {
  const bool image = x.dim() == 4;
  FeatureMaps<X> maps{static_cast<X*>(data),  x.size(0),   x.size(1),   image ? x.size(2) : 1,
                      x.size(image ? 3 : 2),  x.stride(0), x.stride(1), image ? x.stride(2) : 0,
                      x.stride(image ? 3 : 2)};
  if (maps.width == 1) {  // one column: its rows are the positions
    maps.stride_w = maps.stride_h;
    std::swap(maps.width, maps.height);
  } else if (maps.stride_h == maps.width * maps.stride_w) {  // rows follow on: one long row
    maps.width *= maps.height;
    maps.height = 1;
  }
  return maps;
}

inline std::vector<int64_t> output_shape(int64_t batch, int64_t channels, Output output) {
  const int64_t size = RootView<float>{nullptr, output, channels}.size();
  if (output == Output::kMatrix) return {batch, channels, channels};
  return {batch, size};
}

template <class X> RootView<const X> source(const Tensor& t, Output output, int64_t channels) {
  return {static_cast<const X*>(t.const_data_ptr()), output, channels};
}
template <class X> RootView<X> target(const Tensor& t, Output output, int64_t channels) {
  return {static_cast<X*>(t.mutable_data_ptr()), output, channels};
}

/// Null for an empty tensor.
template <class T> const T* numbers(const Tensor& t) { return t.numel() ? t.const_data_ptr<T>() : nullptr; }

/// f(X()) for the element type X of a tensor.
template <class F> void dispatch(const Tensor& t, const F& f) {
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return f(double());
    case ScalarType::Half:
      return f(Half());
    case ScalarType::BFloat16:
      return f(BFloat16());
    default:
      return f(float());
  }
}

/// A matrix or vector per sample in another dtype; itself where it has that one. Small beside x.
inline Tensor as(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

/// Contiguous; itself where it is.
inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

/// Contiguous, and in the dtype that matrices of its kind are computed in.
inline Tensor matrices(const Tensor& t) { return dense(as(t, compute_dtype(t.scalar_type()))); }

/// A new tensor beside `like`. What torch::stable::new_empty looks up and converts for the dispatcher takes as long as
/// a small batch.
inline Tensor empty(const Tensor& like, Sizes sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= std::max<int64_t>(1, sizes[d])) strides[d] = stride;
  int32_t device = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle result = nullptr;
  const auto status = aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(),
                                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
                                               device, like.get_device_index(), &result);
  check(status == TORCH_SUCCESS, "isqrt_cov: out of memory for ", stride, " numbers");
  return Tensor(result);
}

inline Tensor like(const Tensor& x) {
  return x.is_contiguous() ? empty(x, x.sizes(), x.scalar_type()) : torch::stable::empty_like(x);
}

/// The scale of what has none.
inline Tensor none(const Tensor& like) { return empty(like, {0}, like.scalar_type()); }

// ---- devices ------------------------------------------------------------------------------------------------------

// Each enqueues work, a CPU as a GPU does: it is done, on a GPU in the order of a stream, when finish() returns.

struct Cpu {
  static constexpr bool kCuda = false;
  explicit Cpu(const Tensor&) {}
  template <class X> void pool(const PoolTask<X>& task, EngineKind kind) { cpu::pool(task, kind, stages); }
  template <class X> void pool_backward(const PoolBackwardTask<X>& task, EngineKind kind) {
    cpu::pool_backward(task, kind, stages);
  }
  template <class X> void gram(const GramTask<X>& task, EngineKind kind) { cpu::gram(task, kind, stages); }
  template <class X> void expand(const ExpandTask<X>& task, EngineKind kind) { cpu::expand(task, kind, stages); }
  template <class X> void contract(const ContractTask<X>& task, EngineKind kind) { cpu::contract(task, kind, stages); }
  template <class X> void gram_backward(const GramBackwardTask<X>& task, EngineKind kind) {
    cpu::gram_backward(task, kind, stages);
  }
  template <class X> void root(const RootTask<X>& task, EngineKind kind) { cpu::root(task, kind, stages); }
  template <class X> void root_backward(const RootBackwardTask<X>& task, EngineKind kind) {
    cpu::root_backward(task, kind, stages);
  }
  void finish() { stages.run(); }
  static int64_t workspace_size(EngineKind, const Tensor&, const Steps&, bool) { return 0; }
  cpu::Stages stages;
};

#ifdef ISQRT_WITH_CUDA
/// Makes the tensor's device current, and its current stream the one to work on.
struct Cuda {
  static constexpr bool kCuda = true;
  explicit Cuda(const Tensor& t) : guard(t.get_device_index()) {
    check(aoti_torch_get_current_cuda_stream != nullptr, "isqrt_cov: this torch has no CUDA");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  }
  template <class X> void pool(const PoolTask<X>& task, EngineKind) { cuda::pool(task, stream); }
  template <class X> void pool_backward(const PoolBackwardTask<X>& task, EngineKind) {
    cuda::pool_backward(task, stream);
  }
  template <class X> void root(const RootTask<X>& task, EngineKind kind) {
    const bool on_grid = cuda::on_grid(kind, task.sigma.channels, sizeof(Compute<X>), false, task.steps.any_in_full());
    (on_grid ? cuda::grid_root<X> : cuda::root<X>)(task, kind == EngineKind::kWarpgroup, stream);
  }
  template <class X> void root_backward(const RootBackwardTask<X>& task, EngineKind kind) {
    using T = Compute<X>;
    const bool on_grid = cuda::on_grid(kind, task.sigma.channels, sizeof(T), true, task.steps.any_in_full());
    (on_grid ? cuda::grid_root_backward<X> : cuda::root_backward<X>)(task, kind == EngineKind::kWarpgroup, stream);
    if (task.value && !on_grid)  // one more launch, rather than more code for all
      root(
          RootTask<T>{
              task.batch, task.sigma, task.steps, task.root, {task.value, Output::kMatrix, task.sigma.channels}},
          kind);
  }
  void finish() {}
  /// Elements that the engine needs beside sigma.
  static int64_t workspace_size(EngineKind kind, const Tensor& sigma, const Steps& steps, bool backward) {
    const int64_t B = sigma.size(0), C = sigma.size(1), element_size = int64_t(sigma.element_size());
    const bool in_full = steps.any_in_full(), on_grid = cuda::on_grid(kind, C, element_size, backward, in_full);
    const bool warpgroups = kind == EngineKind::kWarpgroup;
    return on_grid ? cuda::grid_workspace_size(B, C, element_size, backward, in_full, warpgroups) : 0;
  }
  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;
};
#endif

// ---- both ---------------------------------------------------------------------------------------------------------

/// Enqueues what an operator does. Its results are there after finish(), and what it reads must be until then.
template <class Device> struct Call {
  Device device;
  EngineKind requested;
  Plan choice;
  std::deque<Tensor> held;  // the operators' arguments aside

  Call(const Tensor& t, int64_t positions, EngineKind requested, const Steps& steps = choose_steps(1, 0),
       bool gram = false)
      : device(t),
        requested(requested),
        choice(plan({Device::kCuda, Device::kCuda ? t.get_device_index() : 0, t.size(0), t.size(1), positions,
                     t.scalar_type() == ScalarType::Double ? 8 : 4, steps.any_in_full(), gram},
                    requested)) {}

  const Tensor& hold(Tensor t) { return held.emplace_back(std::move(t)); }

  template <class Result> Result finish(Result result) {
    device.finish();
    return result;
  }

  struct Pooled {
    Tensor sigma, mean, scale;
  };

  /// Sigma and mu of PoolTask and scale, in the dtype that x is computed in; scale is empty, and stands for 1, if not
  /// wanted.
  Pooled pool(const Tensor& x, bool want_scale) {
    const int64_t B = x.size(0), C = x.size(1), count = choice.pool.count;
    const ScalarType dtype = compute_dtype(x.scalar_type());
    const Tensor sigma = empty(x, {B, C, C}, dtype), mean = empty(x, {B, C}, dtype),
                 scale = empty(x, {want_scale ? B : 0}, dtype);
    if (B == 0) return {sigma, mean, scale};
    const Tensor& partial_mean = hold(count == 1 ? mean : empty(x, {B, count, C}, dtype));
    const Tensor& partial_moment = hold(count == 1 ? sigma : empty(x, {B, count, C, C}, dtype));
    dispatch(x, [&](auto zero) {
      using X = decltype(zero);
      using T = Compute<X>;
      device.pool(
          PoolTask<X>{feature_maps<const X>(x, x.const_data_ptr()), choice.pool, partial_mean.mutable_data_ptr<T>(),
                      partial_moment.mutable_data_ptr<T>(), mean.mutable_data_ptr<T>(), sigma.mutable_data_ptr<T>(),
                      want_scale ? scale.mutable_data_ptr<T>() : nullptr},
          choice.pooling);
    });
    return {sigma, mean, scale};
  }

  /// `scale` is [B] or empty, as for all below.
  Tensor pool_backward(const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& scale) {
    hold(grad), hold(mean), hold(scale);
    const Tensor dx = like(x);
    if (x.size(0) == 0) return dx;
    dispatch(x, [&](auto zero) {
      using X = decltype(zero);
      using T = Compute<X>;
      device.pool_backward(PoolBackwardTask<X>{feature_maps<const X>(x, x.const_data_ptr()), choice.pool_backward,
                                               mean.const_data_ptr<T>(), grad.const_data_ptr<T>(), numbers<T>(scale),
                                               feature_maps<X>(dx, dx.mutable_data_ptr())},
                           choice.pooling);
    });
    return dx;
  }

  /// The result in `dtype`, of which sigma's is the compute_dtype().
  Tensor root(const Tensor& sigma, const Tensor& scale, const Steps& steps, Root root, Output output,
              ScalarType dtype) {
    const int64_t B = sigma.size(0), C = sigma.size(1);
    if (choice.forward == EngineKind::kLibrary && B > 0)
      return as(library::root(finish(sigma), scale, steps, root, output), dtype);
    hold(sigma), hold(scale);
    const Tensor result = empty(sigma, output_shape(B, C, output), dtype);
    if (B == 0) return result;
    const Tensor& workspace =
        hold(empty(sigma, {device.workspace_size(choice.forward, sigma, steps, false)}, sigma.scalar_type()));
    dispatch(result, [&](auto zero) {
      using X = decltype(zero);
      using T = Compute<X>;
      device.root(RootTask<X>{B, source<T>(sigma, Output::kMatrix, C), steps, root, target<X>(result, output, C),
                              numbers<T>(scale), workspace.mutable_data_ptr<T>(), choice.forward_blocks},
                  choice.forward);
    });
    return result;
  }

  /// `grad` is contiguous; sigma's dtype is the compute_dtype() of its own. The root itself into `value`, if wanted.
  Tensor root_backward(const Tensor& grad, const Tensor& sigma, const Steps& steps, Root root, Output output,
                       Tensor* value = nullptr) {
    const int64_t B = sigma.size(0), C = sigma.size(1);
    if (steps.any_in_full() && sigma.scalar_type() == ScalarType::Float && B > 0)
      return wide_root_backward(grad, sigma, steps, root, output, value);
    if (choice.backward == EngineKind::kLibrary && B > 0)
      return library::root_backward(as(grad, sigma.scalar_type()), sigma, steps, root, output, value);
    hold(grad), hold(sigma);
    const Tensor result = empty(sigma, {B, C, C}, sigma.scalar_type());
    if (value) *value = hold(empty(sigma, {B, C, C}, sigma.scalar_type()));
    if (B == 0) return result;
    const Tensor& workspace =
        hold(empty(sigma, {device.workspace_size(choice.backward, sigma, steps, true)}, sigma.scalar_type()));
    dispatch(grad, [&](auto zero) {
      using X = decltype(zero);
      using T = Compute<X>;
      device.root_backward(
          RootBackwardTask<X>{B, source<X>(grad, output, C), source<T>(sigma, Output::kMatrix, C), steps, root,
                              target<T>(result, Output::kMatrix, C), workspace.mutable_data_ptr<T>(),
                              choice.backward_blocks, value ? value->mutable_data_ptr<T>() : nullptr},
          choice.backward);
    });
    return result;
  }

  /// The same in float64. In the directions of small eigenvalues the derivative grows by the cube of what the iterates
  /// grow by, and after many steps float32's rounding with it, beyond all digits: up to 10 or 15 steps come out right.
  Tensor wide_root_backward(const Tensor& grad, const Tensor& sigma, const Steps& steps, Root root, Output output,
                            Tensor* value) {
    device.finish();  // what it reads may be yet to come
    const Tensor wide_grad = as(grad, ScalarType::Double), wide_sigma = as(sigma, ScalarType::Double);
    const bool by_block = requested == EngineKind::kBlock || requested == EngineKind::kWarpgroup;
    Call wide(wide_sigma, sigma.size(1), by_block ? EngineKind::kAuto : requested, steps);  // a block has no room
    Tensor wide_value;
    const Tensor result =
        wide.finish(wide.root_backward(wide_grad, wide_sigma, steps, root, output, value ? &wide_value : nullptr));
    if (value) *value = hold(as(wide_value, sigma.scalar_type()));
    return as(result, sigma.scalar_type());
  }

  // ---- the same root from the side of the positions, gram.h

  /// On a GPU, and where the products of the root are the library's, too.
  bool gram_by_library() const { return choice.pooling == EngineKind::kLibrary; }

  /// K of scale x, no mean, and scale.
  Pooled pool_gram(const Tensor& x) {
    const int64_t B = x.size(0), M = choice.pool.positions, n = gram_side(M);
    const ScalarType dtype = compute_dtype(x.scalar_type());
    const Tensor mean = empty(x, {B, 0}, dtype);
    if (gram_by_library() && B > 0) {
      library::GramEngine engine(x, dtype);
      isqrt::pool_gram(engine, M);
      return {engine.result(), mean, engine.scale()};
    }
    const Tensor gram = empty(x, {B, n, n}, dtype), scale = empty(x, {B}, dtype);
    if constexpr (!Device::kCuda)
      if (B > 0)
        dispatch(x, [&](auto zero) {
          using X = decltype(zero);
          using T = Compute<X>;
          device.gram(GramTask<X>{feature_maps<const X>(x, x.const_data_ptr()), gram.mutable_data_ptr<T>(),
                                  scale.mutable_data_ptr<T>()},
                      choice.pooling);
        });
    return {gram, mean, scale};
  }

  /// Yhat in the dtype that x is computed in, from R.
  Tensor expand(const Tensor& x, const Tensor& scale, const Tensor& root, Output output) {
    const int64_t B = x.size(0), C = x.size(1);
    const ScalarType dtype = compute_dtype(x.scalar_type());
    if (gram_by_library() && B > 0) {
      library::GramEngine engine(x, dtype, &scale);
      engine.set_root(root, output);
      expand_root(engine, choice.pool.positions);
      return engine.result();
    }
    hold(scale), hold(root);
    const Tensor result = empty(x, output_shape(B, C, output), dtype);
    if constexpr (!Device::kCuda)
      if (B > 0)
        dispatch(x, [&](auto zero) {
          using X = decltype(zero);
          using T = Compute<X>;
          device.expand(ExpandTask<X>{feature_maps<const X>(x, x.const_data_ptr()), scale.const_data_ptr<T>(),
                                      root.const_data_ptr<T>(), target<T>(result, output, C)},
                        choice.pooling);
        });
    return result;
  }

  /// dX for the upstream gradient `grad`, contiguous and in the dtype that x is computed in.
  Tensor gram_backward(const Tensor& grad, const Tensor& x, const Tensor& gram, const Tensor& scale, const Steps& steps,
                       Output output) {
    const int64_t B = x.size(0), C = x.size(1), M = choice.pool.positions, n = gram_side(M);
    Tensor dx = like(x);
    if (B == 0) return dx;
    const auto root_of = [&](const Tensor& grad_root, Tensor* root) {
      return root_backward(grad_root, gram, steps, Root::kInverse, Output::kMatrix, root);
    };
    if (gram_by_library()) {
      library::GramEngine engine(x, gram.scalar_type(), &scale);
      engine.set_upstream(grad, output);
      contract_gradient(engine, M);
      Tensor root;
      const Tensor grad_gram = root_of(engine.result(), &root);
      engine.set_gradients(root, grad_gram);
      isqrt::gram_backward(engine, M);
      torch::stable::copy_(dx, torch::stable::view(engine.result(), x.sizes()));
      return dx;
    }
    hold(grad), hold(gram), hold(scale);
    if constexpr (!Device::kCuda) {
      const ScalarType dtype = gram.scalar_type();
      const Tensor &product = hold(empty(x, {B, C, n}, dtype)), &grad_root = hold(empty(x, {B, n, n}, dtype));
      dispatch(x, [&](auto zero) {
        using X = decltype(zero);
        using T = Compute<X>;
        const auto maps = feature_maps<const X>(x, x.const_data_ptr());
        device.contract(ContractTask<X>{maps, scale.const_data_ptr<T>(), source<T>(grad, output, C),
                                        product.mutable_data_ptr<T>(), grad_root.mutable_data_ptr<T>()},
                        choice.pooling);
        Tensor root;
        const Tensor& grad_gram = hold(root_of(grad_root, &root));
        device.gram_backward(
            GramBackwardTask<X>{maps, scale.const_data_ptr<T>(), product.const_data_ptr<T>(), root.const_data_ptr<T>(),
                                grad_gram.const_data_ptr<T>(), feature_maps<X>(dx, dx.mutable_data_ptr())},
            choice.pooling);
      });
    }
    return dx;
  }
};

}  // namespace isqrt
