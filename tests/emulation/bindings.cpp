// The launchers of csrc/cuda on the emulated device, for numpy arrays: feature maps (B, C, H, W) or (B, C, M) with any
// strides, matrices (B, C, C) contiguous. Elements of feature maps are of the type that `dtype` names, whatever type of
// that size the array has. `chunk` is the number of positions in a chunk; `output` and `root` are the enumerations of
// views.h and newton_schulz.h, and steps are tuned for `floor` where that is not 0.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cmath>
#include <vector>

#include "cuda/cuda.h"
#include "emulation.h"

namespace py = pybind11;
using namespace isqrt;

namespace {

template <class T> using Array = py::array_t<T>;
template <class T> using Contiguous = py::array_t<T, py::array::c_style>;

/// f(X()) for the element type X of that name.
template <class F> auto dispatch(const std::string& dtype, const F& f) {
  if (dtype == "float32") return f(float());
  if (dtype == "float64") return f(double());
  if (dtype == "float16") return f(Half());
  if (dtype == "bfloat16") return f(BFloat16());
  throw std::invalid_argument("dtype: " + dtype);
}

template <class X> FeatureMaps<X> feature_maps(const py::array& x, const void* data) {
  if (x.itemsize() != sizeof(X)) throw std::invalid_argument("x: elements of another size");
  const auto stride = [&](int d) { return int64_t(x.strides(d)) / int64_t(sizeof(X)); };
  X* elements = static_cast<X*>(const_cast<void*>(data));
  if (x.ndim() == 4)
    return {elements, x.shape(0), x.shape(1), x.shape(2), x.shape(3), stride(0), stride(1), stride(2), stride(3)};
  return {elements, x.shape(0), x.shape(1), 1, x.shape(2), stride(0), stride(1), 0, stride(2)};
}

Chunks chunks(const py::array& x, int64_t chunk) {
  const int64_t positions = x.ndim() == 4 ? x.shape(2) * x.shape(3) : x.shape(2);
  return {positions, chunk, (positions + chunk - 1) / chunk};
}

/// (sigma, mean). As in ops.cpp, the partial results of a single chunk are sigma and mean themselves.
py::tuple pool(const py::array& x, int64_t chunk, const std::string& dtype) {
  return dispatch(dtype, [&](auto zero) -> py::tuple {
    using X = decltype(zero);
    using T = Compute<X>;
    const int64_t B = x.shape(0), C = x.shape(1);
    const Chunks split = chunks(x, chunk);
    Array<T> sigma({B, C, C}), mean({B, C});
    Array<T> partial_mean = split.count == 1 ? mean : Array<T>({B, split.count, C});
    Array<T> partial_moment = split.count == 1 ? sigma : Array<T>({B, split.count, C, C});
    cuda::pool(PoolTask<X>{feature_maps<const X>(x, x.data()), split, partial_mean.mutable_data(),
                           partial_moment.mutable_data(), mean.mutable_data(), sigma.mutable_data()},
               nullptr);
    return py::make_tuple(sigma, mean);
  });
}

/// Writes dL/dx into grad_x.
void pool_backward(const py::array& grad_sigma, const py::array& x, const py::array& mean, py::array& grad_x,
                   int64_t chunk, const std::string& dtype) {
  dispatch(dtype, [&](auto zero) {
    using X = decltype(zero);
    using T = Compute<X>;
    cuda::pool_backward(
        PoolBackwardTask<X>{feature_maps<const X>(x, x.data()), chunks(x, chunk), Contiguous<T>(mean).data(),
                            Contiguous<T>(grad_sigma).data(), feature_maps<X>(grad_x, grad_x.mutable_data())},
        nullptr);
  });
}

template <class T> Array<T> new_root(int64_t batch, int64_t channels, Output output) {
  if (output == Output::kMatrix) return Array<T>({batch, channels, channels});
  return Array<T>({batch, RootView<T>{nullptr, output, channels}.size()});
}

Steps steps(int iterations, double floor) { return floor == 0 ? Steps{iterations} : minimax_steps(iterations, floor); }

/// Of the grid's engine, with nothing in it.
template <class T> std::vector<T> new_workspace(int64_t batch, int64_t channels, bool backward) {
  return std::vector<T>(cuda::grid_workspace_size(batch, channels, sizeof(T), backward), T(NAN));
}

template <class T>
Array<T> root(const Contiguous<T>& sigma, int iterations, int root, int output, double floor, bool grid) {
  const int64_t B = sigma.shape(0), C = sigma.shape(1);
  const Output layout = static_cast<Output>(output);
  Array<T> result = new_root<T>(B, C, layout);
  auto workspace = new_workspace<T>(B, C, false);
  const RootTask<T> task{B,
                         {sigma.data(), Output::kMatrix, C},
                         steps(iterations, floor),
                         static_cast<Root>(root),
                         {result.mutable_data(), layout, C},
                         workspace.data()};
  grid ? cuda::grid_root(task, nullptr) : cuda::root(task, nullptr);
  return result;
}

template <class T>
Array<T> root_backward(const Contiguous<T>& grad, const Contiguous<T>& sigma, int iterations, int root, int output,
                       double floor, bool grid) {
  const int64_t B = sigma.shape(0), C = sigma.shape(1);
  Array<T> result = new_root<T>(B, C, Output::kMatrix);
  auto workspace = new_workspace<T>(B, C, true);
  const RootBackwardTask<T> task{B,
                                 {grad.data(), static_cast<Output>(output), C},
                                 {sigma.data(), Output::kMatrix, C},
                                 steps(iterations, floor),
                                 static_cast<Root>(root),
                                 {result.mutable_data(), Output::kMatrix, C},
                                 workspace.data()};
  grid ? cuda::grid_root_backward(task, nullptr) : cuda::root_backward(task, nullptr);
  return result;
}

template <class T> void define(py::module_& m) {
  m.def("root", &root<T>, py::arg("sigma").noconvert(), py::arg("iterations"), py::arg("root"), py::arg("output"),
        py::arg("floor"), py::arg("grid"));
  m.def("root_backward", &root_backward<T>, py::arg("grad").noconvert(), py::arg("sigma").noconvert(),
        py::arg("iterations"), py::arg("root"), py::arg("output"), py::arg("floor"), py::arg("grid"));
}

}  // namespace

PYBIND11_MODULE(isqrt_emulation, m) {
  m.def("pool", &pool, py::arg("x"), py::arg("chunk"), py::arg("dtype"));
  m.def("pool_backward", &pool_backward, py::arg("grad_sigma"), py::arg("x"), py::arg("mean"), py::arg("grad_x"),
        py::arg("chunk"), py::arg("dtype"));
  define<float>(m);
  define<double>(m);
  m.def("root_shared_bytes", &cuda::root_shared_bytes);
  m.def("shared_bytes_limit", &cuda::shared_bytes_limit);
  m.def("set_shared_limit", [](size_t bytes) { emulation::options.shared_limit = bytes; });
  m.def("set_order", [](const std::string& order, uint64_t seed) {
    using emulation::Order;
    emulation::options.order = order == "forward"   ? Order::kForward
                               : order == "reverse" ? Order::kReverse
                                                    : Order::kRandom;
    emulation::options.seed = seed;
  });
}
