// launchers.h and the emulation's options for Python, with numpy arrays.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "emulation.h"
#include "launchers.h"

extern "C" void __gcov_dump() __attribute__((weak));

namespace py = pybind11;

namespace {

launchers::Array view(const py::array& a) {
  if (a.ndim() > 4) throw std::invalid_argument("array: more than four dimensions");
  launchers::Array result{const_cast<void*>(a.data()), a.itemsize(), int(a.ndim()), {}, {}};
  for (int d = 0; d < result.rank; ++d) {
    result.shape[d] = a.shape(d);
    result.strides[d] = a.strides(d) / a.itemsize();
  }
  return result;
}

}  // namespace

PYBIND11_MODULE(isqrt_emulation, m) {
  using Text = const std::string&;
  using Array = const py::array&;
  m.def("pool", [](Text dtype, Array x, int64_t chunk, Array sigma, Array mean, Array scale) {
    launchers::pool(dtype, view(x), chunk, view(sigma), view(mean), view(scale));
  });
  m.def("pool_backward",
        [](Text dtype, Array grad_sigma, Array x, Array mean, Array scale, int64_t chunk, Array grad_x) {
          launchers::pool_backward(dtype, view(grad_sigma), view(x), view(mean), view(scale), chunk, view(grad_x));
        });
  m.def("root", [](Text dtype, Array sigma, int iterations, int root, int output, double floor, int blocks, Array scale,
                   Array result) {
    launchers::root(dtype, view(sigma), iterations, root, output, floor, blocks, view(scale), view(result));
  });
  m.def("root_backward", [](Text dtype, Array grad, Array sigma, int iterations, int root, int output, double floor,
                            int blocks, Array grad_sigma, Array value) {
    launchers::root_backward(dtype, view(grad), view(sigma), iterations, root, output, floor, blocks, view(grad_sigma),
                             view(value));
  });
  m.def(
      "plan",
      [](int64_t batch, int64_t channels, int64_t positions, int64_t element_size, int iterations, int engine) {
        const launchers::Choice c = launchers::plan(batch, channels, positions, element_size, iterations, engine);
        return py::make_tuple(c.forward, c.backward, c.pool_chunk, c.pool_backward_chunk, c.forward_blocks,
                              c.backward_blocks);
      },
      py::arg("batch"), py::arg("channels"), py::arg("positions"), py::arg("element_size"), py::arg("iterations") = 5,
      py::arg("engine") = 0);
  m.def("root_shared_bytes", &launchers::root_shared_bytes, py::arg("channels"), py::arg("element_size"),
        py::arg("backward"), py::arg("iterations") = 5, py::arg("floor") = 0.0);
  m.def("shared_bytes_limit", &launchers::shared_bytes_limit);
  m.def("set_device", [](size_t shared_limit, int capability_major) {
    emulation::options.shared_limit = shared_limit;
    emulation::options.capability_major = capability_major;
  });
  m.def("set_order", [](Text order, uint64_t seed) {
    using emulation::Order;
    emulation::options.order = order == "forward"   ? Order::kForward
                               : order == "reverse" ? Order::kReverse
                                                    : Order::kRandom;
    emulation::options.seed = seed;
  });
  if (__gcov_dump) m.def("write_coverage", &__gcov_dump);
}
