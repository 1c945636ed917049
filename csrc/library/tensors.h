// What the library engines have of torch's operators.
#pragma once
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>

#include "library.h"

// Weak: absent in a CPU-only torch, where the library must still load.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_cuda_baddbmm_out(AtenTensorHandle out, AtenTensorHandle self,
                                                                            AtenTensorHandle batch1,
                                                                            AtenTensorHandle batch2, double beta,
                                                                            double alpha);

namespace isqrt::library {

using torch::headeronly::ScalarType;

template <class... Args> Tensor call(const char* op, const char* overload, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

/// A number as a 0-dim CPU tensor: it mixes with tensors of any device and does not change their dtype.
inline Tensor number(double value) { return torch::stable::full({}, value, ScalarType::Double); }

inline Tensor multiply(const Tensor& a, const Tensor& b) { return call("aten::mul", "Tensor", a, b); }
inline Tensor divide(const Tensor& a, const Tensor& b) { return call("aten::div", "Tensor", a, b); }
inline Tensor add(const Tensor& a, const Tensor& b) { return torch::stable::subtract(a, b, -1.0); }
inline Tensor transpose(const Tensor& a) { return torch::stable::transpose(a, -2, -1); }

/// out = alpha added + beta A B; `added` is not read where alpha = 0.
inline void gemm(const Tensor& out, const Tensor& added, const Tensor& A, const Tensor& B, double alpha, double beta) {
  const auto baddbmm = out.is_cpu() ? &aoti_torch_cpu_baddbmm_out : &aoti_torch_cuda_baddbmm_out;
  TORCH_ERROR_CODE_CHECK(baddbmm(out.get(), added.get(), A.get(), B.get(), alpha, beta));
}

/// A root as it is put out, and sym(G) as RootView::symmetric has it.
Tensor to_output(const Tensor& A, Output output);
Tensor from_output(const Tensor& grad, int64_t channels, Output output);

}  // namespace isqrt::library
