// The operators of torch.ops.isqrt_cov: their schemas, the checks of their arguments, and the hand-over to an engine.
// `output`, `root` and `engine` are the enumerations of views.h, newton_schulz.h and plan.h; isqrt_cov/ops.py names
// them. `wide` leaves a result in the dtype that it was computed in, float32 for 16-bit feature maps.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <deque>
#include <optional>
#include <sstream>
#include <tuple>

#include "cpu/cpu.h"
#include "library/library.h"
#include "plan.h"

#ifdef ISQRT_WITH_CUDA
#include "cuda/cuda.h"

// Weak: absent in a CPU-only torch, where the library must still load.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace isqrt {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---- checks -------------------------------------------------------------------------------------------------------

template <class... Args> void check(bool condition, const Args&... message) {
  if (condition) return;
  std::ostringstream text;
  (text << ... << message);
  throw std::runtime_error(text.str());
}

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// What messages say of a tensor, made into text only where there is one.
struct Shape {
  Sizes sizes;
};
std::ostream& operator<<(std::ostream& out, const Shape& shape) {
  out << '(';
  for (size_t d = 0; d < shape.sizes.size(); ++d) out << (d ? ", " : "") << shape.sizes[d];
  return out << ')';
}
Shape shape(const Tensor& t) { return {t.sizes()}; }

struct Place {
  bool cpu;
  int index;
  bool operator==(const Place&) const = default;
};
std::ostream& operator<<(std::ostream& out, const Place& place) {
  return place.cpu ? out << "cpu" : out << "device " << place.index;
}
Place place(const Tensor& t) { return {t.is_cpu(), t.get_device_index()}; }

bool is_half(ScalarType dtype) { return dtype == ScalarType::Half || dtype == ScalarType::BFloat16; }

/// What is computed and kept for a tensor of this dtype.
ScalarType compute_dtype(ScalarType dtype) { return is_half(dtype) ? ScalarType::Float : dtype; }

void check_dtype(const Tensor& t, const char* name) {
  const ScalarType dtype = t.scalar_type();
  check(dtype == ScalarType::Float || dtype == ScalarType::Double || is_half(dtype), name,
        ": expected a float32, float64, float16 or bfloat16 tensor, got ", torch::headeronly::toString(dtype));
}

void check_feature_maps(const Tensor& x) {
  check(x.dim() == 3 || x.dim() == 4, "x: expected shape (B, C, H, W) or (B, C, M), got ", shape(x));
  check_dtype(x, "x");
  check(x.size(1) > 0, "x: expected at least one channel, got shape ", shape(x));
  for (int64_t d = 2; d < x.dim(); ++d) check(x.size(d) > 0, "x: expected at least one position, got shape ", shape(x));
}

void check_matrices(const Tensor& sigma) {
  check(sigma.dim() == 3 && sigma.size(1) == sigma.size(2),
        "sigma: expected a batch of square matrices (B, C, C), got ", shape(sigma));
  check_dtype(sigma, "sigma");
  check(sigma.size(1) > 0, "sigma: expected at least one channel, got shape ", shape(sigma));
}

/// `t` has the sizes and the dtype given, and lies where x or sigma, the first argument, does.
void check_beside(const Tensor& t, const char* name, Sizes sizes, ScalarType dtype, const Tensor& first) {
  check(t.sizes() == sizes, name, ": expected shape ", Shape{sizes}, ", got ", shape(t));
  check(t.scalar_type() == dtype, name, ": expected dtype ", torch::headeronly::toString(dtype), ", got ",
        torch::headeronly::toString(t.scalar_type()));
  check(place(t) == place(first), name, ": expected ", place(first), ", got ", place(t));
}

/// The upstream gradient of a result that was put out in x's dtype, or in the one it is computed in.
void check_gradient(const Tensor& grad, Sizes sizes, const Tensor& x) {
  const ScalarType kept = compute_dtype(x.scalar_type());
  check_beside(grad, "grad", sizes, grad.scalar_type() == kept ? kept : x.scalar_type(), x);
}

Steps check_steps(int64_t iterations, double spectrum_floor) {
  check(iterations >= 1 && iterations <= 1000, "iterations: expected 1 to 1000, got ", iterations);
  check(spectrum_floor == 0 || (spectrum_floor >= 1e-12 && spectrum_floor < 1),
        "spectrum_floor: expected 1e-12 or more and less than 1, got ", spectrum_floor);
  return choose_steps(int(iterations), spectrum_floor);
}

template <class Enum> Enum check_enum(int64_t value, Enum last, const char* name) {
  check(value >= 0 && value <= int64_t(last), name, ": expected 0 to ", int64_t(last), ", got ", value);
  return static_cast<Enum>(value);
}
Output check_output(int64_t value) { return check_enum(value, Output::kMean, "output"); }
Root check_root(int64_t value) { return check_enum(value, Root::kInverse, "root"); }
EngineKind check_engine(int64_t value) { return check_enum(value, EngineKind::kWarpgroup, "engine"); }

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

std::vector<int64_t> output_shape(int64_t batch, int64_t channels, Output output) {
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
Tensor as(const Tensor& t, ScalarType dtype) { return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype); }

/// Contiguous; itself where it is.
Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

/// Contiguous, and in the dtype that matrices of its kind are computed in.
Tensor matrices(const Tensor& t) { return dense(as(t, compute_dtype(t.scalar_type()))); }

/// A new tensor beside `like`. What torch::stable::new_empty looks up and converts for the dispatcher takes as long as
/// a small batch.
Tensor empty(const Tensor& like, Sizes sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= std::max<int64_t>(1, sizes[d])) strides[d] = stride;
  int32_t device = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle result = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(),
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device,
                               like.get_device_index(), &result));
  return Tensor(result);
}

/// The scale of what has none.
Tensor none(const Tensor& like) { return empty(like, {0}, like.scalar_type()); }

// ---- devices ------------------------------------------------------------------------------------------------------

// Each enqueues work, a CPU as a GPU does: it is done, on a GPU in the order of a stream, when finish() returns.

struct Cpu {
  static constexpr bool kCuda = false;
  explicit Cpu(const Tensor&) {}
  template <class X> void pool(const PoolTask<X>& task, EngineKind kind) { cpu::pool(task, kind, stages); }
  template <class X> void pool_backward(const PoolBackwardTask<X>& task, EngineKind kind) {
    cpu::pool_backward(task, kind, stages);
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
    const bool on_grid = cuda::on_grid(kind, task.sigma.channels, sizeof(Compute<X>), true, task.steps.any_in_full());
    (on_grid ? cuda::grid_root_backward<X> : cuda::root_backward<X>)(task, kind == EngineKind::kWarpgroup, stream);
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

// ---- the operators, after their arguments are checked ---------------------------------------------------------------

/// Enqueues what an operator does. Its results are there after finish(), and what it reads must be until then.
template <class Device> struct Engine {
  Device device;
  Plan choice;
  std::deque<Tensor> held;  // the operators' arguments aside

  Engine(const Tensor& t, int64_t positions, EngineKind requested, const Steps& steps = choose_steps(1, 0))
      : device(t),
        choice(plan({Device::kCuda, Device::kCuda ? t.get_device_index() : 0, t.size(0), t.size(1), positions,
                     t.scalar_type() == ScalarType::Double ? 8 : 4, steps.any_in_full()},
                    requested)) {}

  const Tensor& hold(Tensor t) { return held.emplace_back(std::move(t)); }

  template <class Result> Result finish(Result result) {
    device.finish();
    return result;
  }

  struct Pooled {
    Tensor sigma, mean, scale;
  };

  /// Sigma of scale x, mu and scale, in the dtype that x is computed in; scale is empty, and stands for 1, if not
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
    const Tensor dx = x.is_contiguous() ? empty(x, x.sizes(), x.scalar_type()) : torch::stable::empty_like(x);
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

  /// `grad` is contiguous; sigma's dtype is the compute_dtype() of its own.
  Tensor root_backward(const Tensor& grad, const Tensor& sigma, const Steps& steps, Root root, Output output) {
    const int64_t B = sigma.size(0), C = sigma.size(1);
    if (choice.backward == EngineKind::kLibrary && B > 0)
      return library::root_backward(as(grad, sigma.scalar_type()), sigma, steps, root, output);
    hold(grad), hold(sigma);
    const Tensor result = empty(sigma, {B, C, C}, sigma.scalar_type());
    if (B == 0) return result;
    const Tensor& workspace =
        hold(empty(sigma, {device.workspace_size(choice.backward, sigma, steps, true)}, sigma.scalar_type()));
    dispatch(grad, [&](auto zero) {
      using X = decltype(zero);
      using T = Compute<X>;
      device.root_backward(RootBackwardTask<X>{B, source<X>(grad, output, C), source<T>(sigma, Output::kMatrix, C),
                                               steps, root, target<T>(result, Output::kMatrix, C),
                                               workspace.mutable_data_ptr<T>(), choice.backward_blocks},
                           choice.backward);
    });
    return result;
  }
};

int64_t positions_of(const Tensor& x) { return x.dim() == 4 ? x.size(2) * x.size(3) : x.size(2); }

template <class Device> std::tuple<Tensor, Tensor> covariance_pool(const Tensor& x, int64_t engine, bool wide) {
  check_feature_maps(x);
  Engine<Device> chosen(x, positions_of(x), check_engine(engine));
  const auto pooled = chosen.finish(chosen.pool(x, false));
  return {wide ? pooled.sigma : as(pooled.sigma, x.scalar_type()), pooled.mean};
}

template <class Device>
Tensor covariance_pool_backward(const Tensor& grad, const Tensor& x, const Tensor& mean, int64_t engine) {
  check_feature_maps(x);
  const int64_t B = x.size(0), C = x.size(1);
  check_gradient(grad, {B, C, C}, x);
  check_beside(mean, "mean", {B, C}, compute_dtype(x.scalar_type()), x);
  Engine<Device> chosen(x, positions_of(x), check_engine(engine));
  return chosen.finish(chosen.pool_backward(library::symmetric_part(matrices(grad)), x, matrices(mean), none(mean)));
}

template <class Device>
Tensor matrix_root(const Tensor& sigma, int64_t iterations, int64_t root, double spectrum_floor, int64_t engine) {
  check_matrices(sigma);
  const Steps steps = check_steps(iterations, spectrum_floor);
  Engine<Device> chosen(sigma, 1, check_engine(engine), steps);
  return chosen.finish(
      chosen.root(matrices(sigma), none(sigma), steps, check_root(root), Output::kMatrix, sigma.scalar_type()));
}

template <class Device>
Tensor matrix_root_backward(const Tensor& grad, const Tensor& sigma, int64_t iterations, int64_t root,
                            double spectrum_floor, int64_t engine) {
  check_matrices(sigma);
  check_beside(grad, "grad", {sigma.size(0), sigma.size(1), sigma.size(1)}, sigma.scalar_type(), sigma);
  const Steps steps = check_steps(iterations, spectrum_floor);
  Engine<Device> chosen(sigma, 1, check_engine(engine), steps);
  const Tensor gradient = chosen.root_backward(dense(grad), matrices(sigma), steps, check_root(root), Output::kMatrix);
  return as(chosen.finish(gradient), sigma.scalar_type());
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> cov_sqrt(const Tensor& x, int64_t iterations, int64_t output,
                                                    double spectrum_floor, int64_t engine, bool wide) {
  check_feature_maps(x);
  const Steps steps = check_steps(iterations, spectrum_floor);
  const Output layout = check_output(output);
  Engine<Device> chosen(x, positions_of(x), check_engine(engine), steps);
  const auto [sigma, mean, scale] = chosen.pool(x, true);
  const ScalarType dtype = wide ? compute_dtype(x.scalar_type()) : x.scalar_type();
  return {chosen.finish(chosen.root(sigma, scale, steps, Root::kSquare, layout, dtype)), sigma, mean, scale};
}

template <class Device>
Tensor cov_sqrt_backward(const Tensor& grad, const Tensor& x, const Tensor& sigma, const Tensor& mean,
                         const Tensor& scale, int64_t iterations, int64_t output, double spectrum_floor,
                         int64_t engine) {
  check_feature_maps(x);
  const int64_t B = x.size(0), C = x.size(1);
  const Steps steps = check_steps(iterations, spectrum_floor);
  const Output layout = check_output(output);
  const ScalarType kept = compute_dtype(x.scalar_type());
  check_gradient(grad, output_shape(B, C, layout), x);
  check_beside(sigma, "sigma", {B, C, C}, kept, x);
  check_beside(mean, "mean", {B, C}, kept, x);
  check_beside(scale, "scale", {B}, kept, x);
  Engine<Device> chosen(x, positions_of(x), check_engine(engine), steps);
  const Tensor grad_sigma = chosen.root_backward(dense(grad), matrices(sigma), steps, Root::kSquare, layout);
  return chosen.finish(chosen.pool_backward(grad_sigma, x, matrices(mean), matrices(scale)));
}

// ---- information ----------------------------------------------------------------------------------------------------

/// What plan.h decides, as JSON.
std::string describe_plan(bool cuda, int64_t device, int64_t batch, int64_t channels, int64_t positions,
                          int64_t element_size, int64_t iterations, double spectrum_floor, int64_t engine) {
  check(batch >= 0, "batch: expected 0 or more, got ", batch);
  check(channels > 0, "channels: expected 1 or more, got ", channels);
  check(positions > 0, "positions: expected 1 or more, got ", positions);
#ifdef ISQRT_WITH_CUDA
  std::optional<torch::stable::accelerator::DeviceGuard>
      guard;  // what there is code for is asked of the current device
  if (cuda) guard.emplace(int(device));
#else
  check(!cuda, "device: this build of isqrt_cov has no CUDA kernels");
#endif
  const bool in_full = check_steps(iterations, spectrum_floor).any_in_full();
  const Plan p = plan({cuda, int(device), batch, channels, positions, element_size, in_full}, check_engine(engine));
  std::ostringstream text;
  text << "{\"pooling\": \"" << engine_name(p.pooling) << "\", \"forward\": \"" << engine_name(p.forward)
       << "\", \"backward\": \"" << engine_name(p.backward) << "\", \"pool_chunks\": " << p.pool.count
       << ", \"pool_backward_chunks\": " << p.pool_backward.count << ", \"forward_blocks\": " << p.forward_blocks
       << ", \"backward_blocks\": " << p.backward_blocks << '}';
  return text.str();
}

/// What was compiled, and the SIMD levels that this processor has, as JSON.
std::string build_info() {
  std::ostringstream text;
  text << "{\"compiler\": \"" << __VERSION__ << "\", \"torch_target\": \"2.10\", \"cuda_architectures\": \"";
#ifdef ISQRT_WITH_CUDA
  text << cuda::architectures();
#endif
  text << "\", \"simd_compiled\": [";
#if defined(__x86_64__)
  text << "\"avx512\", \"avx2\", ";
#endif
  text << "\"portable\"], \"simd_usable\": [";
  for (const EngineKind level : {EngineKind::kAvx512, EngineKind::kAvx2})
    if (cpu_supports(level)) text << '"' << engine_name(level) << "\", ";
  text << "\"portable\"]}";
  return text.str();
}

template <class Device, class Library> void register_ops(Library& m) {
  m.impl("covariance_pool", TORCH_BOX(&covariance_pool<Device>));
  m.impl("covariance_pool_backward", TORCH_BOX(&covariance_pool_backward<Device>));
  m.impl("matrix_root", TORCH_BOX(&matrix_root<Device>));
  m.impl("matrix_root_backward", TORCH_BOX(&matrix_root_backward<Device>));
  m.impl("cov_sqrt", TORCH_BOX(&cov_sqrt<Device>));
  m.impl("cov_sqrt_backward", TORCH_BOX(&cov_sqrt_backward<Device>));
}

}  // namespace
}  // namespace isqrt

// clang-format off
STABLE_TORCH_LIBRARY(isqrt_cov, m) {
  m.def("covariance_pool(Tensor x, int engine=0, bool wide=False) -> (Tensor sigma, Tensor mean)");
  m.def("covariance_pool_backward(Tensor grad, Tensor x, Tensor mean, int engine=0) -> Tensor");
  m.def("matrix_root(Tensor sigma, int iterations, int root, float spectrum_floor=0.0, int engine=0) -> Tensor");
  m.def("matrix_root_backward(Tensor grad, Tensor sigma, int iterations, int root, float spectrum_floor=0.0,"
        " int engine=0) -> Tensor");
  m.def("cov_sqrt(Tensor x, int iterations, int output, float spectrum_floor=0.0, int engine=0, bool wide=False)"
        " -> (Tensor y, Tensor sigma, Tensor mean, Tensor scale)");
  m.def("cov_sqrt_backward(Tensor grad, Tensor x, Tensor sigma, Tensor mean, Tensor scale, int iterations, int output,"
        " float spectrum_floor=0.0, int engine=0) -> Tensor");
  m.def("plan(bool cuda, int device, int batch, int channels, int positions, int element_size, int iterations=5,"
        " float spectrum_floor=0.0, int engine=0) -> str");
  m.def("build_info() -> str");
}
// clang-format on

STABLE_TORCH_LIBRARY_IMPL(isqrt_cov, CompositeExplicitAutograd, m) {
  m.impl("plan", TORCH_BOX(&isqrt::describe_plan));
  m.impl("build_info", TORCH_BOX(&isqrt::build_info));
}

STABLE_TORCH_LIBRARY_IMPL(isqrt_cov, CPU, m) { isqrt::register_ops<isqrt::Cpu>(m); }
#ifdef ISQRT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(isqrt_cov, CUDA, m) { isqrt::register_ops<isqrt::Cuda>(m); }
#endif
