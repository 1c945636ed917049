// The operators of torch.ops.isqrt_cov: their schemas, the checks of their arguments, and the hand-over to an engine.
// `output`, `root` and `engine` are the enumerations of views.h, newton_schulz.h and plan.h; isqrt_cov/ops.py names
// them. `wide` leaves a result in the dtype that it was computed in, float32 for 16-bit feature maps. With `gram` sigma
// is the matrix K of gram.h.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "call.h"

namespace isqrt {
namespace {

// ---- checks -------------------------------------------------------------------------------------------------------

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

int64_t positions_of(const Tensor& x) { return x.dim() == 4 ? x.size(2) * x.size(3) : x.size(2); }

void check_matrices(const Tensor& sigma) {
  check(sigma.dim() == 3 && sigma.size(1) == sigma.size(2),
        "sigma: expected a batch of square matrices (B, C, C), got ", shape(sigma));
  check_dtype(sigma, "sigma");
  check(sigma.size(1) > 0, "sigma: expected at least one channel, got shape ", shape(sigma));
}

/// `t` has the sizes and the dtype given, and lies where x or sigma, the first argument, does.
void check_beside(const Tensor& t, const char* name, Sizes sizes, ScalarType dtype, const Tensor& first) {
  check(t.sizes().equals(sizes), name, ": expected shape ", Shape{sizes}, ", got ", shape(t));
  check(t.scalar_type() == dtype, name, ": expected dtype ", torch::headeronly::toString(dtype), ", got ",
        torch::headeronly::toString(t.scalar_type()));
  check(place(t) == place(first), name, ": expected ", place(first), ", got ", place(t));
}

/// Whether gram.h is for such feature maps.
bool has_gram(const Tensor& x) { return positions_of(x) > 1 && positions_of(x) < x.size(1); }

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

template <class Device> std::tuple<Tensor, Tensor> covariance_pool(const Tensor& x, int64_t engine, bool wide) {
  check_feature_maps(x);
  Call<Device> call(x, positions_of(x), check_engine(engine));
  const auto pooled = call.finish(call.pool(x, false));
  return {wide ? pooled.sigma : as(pooled.sigma, x.scalar_type()), pooled.mean};
}

template <class Device>
Tensor covariance_pool_backward(const Tensor& grad, const Tensor& x, const Tensor& mean, int64_t engine) {
  check_feature_maps(x);
  const int64_t B = x.size(0), C = x.size(1);
  check_gradient(grad, {B, C, C}, x);
  check_beside(mean, "mean", {B, C}, compute_dtype(x.scalar_type()), x);
  Call<Device> call(x, positions_of(x), check_engine(engine));
  return call.finish(call.pool_backward(library::symmetric_part(matrices(grad)), x, matrices(mean), none(mean)));
}

template <class Device>
Tensor matrix_root(const Tensor& sigma, int64_t iterations, int64_t root, double spectrum_floor, int64_t engine) {
  check_matrices(sigma);
  const Steps steps = check_steps(iterations, spectrum_floor);
  Call<Device> call(sigma, sigma.size(1), check_engine(engine), steps);
  return call.finish(
      call.root(matrices(sigma), none(sigma), steps, check_root(root), Output::kMatrix, sigma.scalar_type()));
}

template <class Device>
Tensor matrix_root_backward(const Tensor& grad, const Tensor& sigma, int64_t iterations, int64_t root,
                            double spectrum_floor, int64_t engine) {
  check_matrices(sigma);
  check_beside(grad, "grad", {sigma.size(0), sigma.size(1), sigma.size(1)}, sigma.scalar_type(), sigma);
  const Steps steps = check_steps(iterations, spectrum_floor);
  Call<Device> call(sigma, sigma.size(1), check_engine(engine), steps);
  const Tensor gradient = call.root_backward(dense(grad), matrices(sigma), steps, check_root(root), Output::kMatrix);
  return as(call.finish(gradient), sigma.scalar_type());
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> cov_sqrt(const Tensor& x, int64_t iterations, int64_t output,
                                                    double spectrum_floor, int64_t engine, bool wide, bool gram) {
  check_feature_maps(x);
  const Steps steps = check_steps(iterations, spectrum_floor);
  const Output layout = check_output(output);
  const ScalarType kept = compute_dtype(x.scalar_type()), dtype = wide ? kept : x.scalar_type();
  gram = gram && has_gram(x);  // a graph that was recorded for other sizes may ask for it
  Call<Device> call(x, positions_of(x), check_engine(engine), steps, gram);
  if (gram) {
    const auto [matrix, mean, scale] = call.pool_gram(x);
    const Tensor root = call.root(matrix, none(matrix), steps, Root::kInverse, Output::kMatrix, kept);
    return {as(call.finish(call.expand(x, scale, root, layout)), dtype), matrix, mean, scale};
  }
  const auto [sigma, mean, scale] = call.pool(x, true);
  return {call.finish(call.root(sigma, scale, steps, Root::kSquare, layout, dtype)), sigma, mean, scale};
}

/// Of gram.h where sigma is a matrix of that size.
template <class Device>
Tensor cov_sqrt_backward(const Tensor& grad, const Tensor& x, const Tensor& sigma, const Tensor& mean,
                         const Tensor& scale, int64_t iterations, int64_t output, double spectrum_floor,
                         int64_t engine) {
  check_feature_maps(x);
  const int64_t B = x.size(0), C = x.size(1), M = positions_of(x);
  const Steps steps = check_steps(iterations, spectrum_floor);
  const Output layout = check_output(output);
  const ScalarType kept = compute_dtype(x.scalar_type());
  const bool gram = has_gram(x) && sigma.dim() == 3 && sigma.size(1) == gram_side(M);
  const int64_t side = gram ? gram_side(M) : C;
  check_gradient(grad, output_shape(B, C, layout), x);
  check_beside(sigma, "sigma", {B, side, side}, kept, x);
  check_beside(mean, "mean", {B, gram ? 0 : C}, kept, x);
  check_beside(scale, "scale", {B}, kept, x);
  Call<Device> call(x, M, check_engine(engine), steps, gram);
  if (gram)
    return call.finish(call.gram_backward(dense(as(grad, kept)), x, matrices(sigma), matrices(scale), steps, layout));
  const Tensor grad_sigma = call.root_backward(dense(grad), matrices(sigma), steps, Root::kSquare, layout);
  return call.finish(call.pool_backward(grad_sigma, x, matrices(mean), matrices(scale)));
}

// ---- information ----------------------------------------------------------------------------------------------------

/// What plan.h decides, as JSON.
std::string describe_plan(bool cuda, int64_t device, int64_t batch, int64_t channels, int64_t positions,
                          int64_t element_size, int64_t iterations, double spectrum_floor, int64_t engine, bool gram) {
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
  const Plan p =
      plan({cuda, int(device), batch, channels, positions, element_size, in_full, gram}, check_engine(engine));
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
  m.def("cov_sqrt(Tensor x, int iterations, int output, float spectrum_floor=0.0, int engine=0, bool wide=False,"
        " bool gram=False) -> (Tensor y, Tensor sigma, Tensor mean, Tensor scale)");
  m.def("cov_sqrt_backward(Tensor grad, Tensor x, Tensor sigma, Tensor mean, Tensor scale, int iterations, int output,"
        " float spectrum_floor=0.0, int engine=0) -> Tensor");
  m.def("plan(bool cuda, int device, int batch, int channels, int positions, int element_size, int iterations=5,"
        " float spectrum_floor=0.0, int engine=0, bool gram=False) -> str");
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
