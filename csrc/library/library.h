// The library engine: the iteration as batched GEMM calls of torch, for a C whose matrices fit in no fast memory.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include "../normalization.h"

namespace isqrt::library {

using torch::stable::Tensor;

/// sigma: [B, C, C] -> its root over scale, [B], in the layout `output`.
Tensor root(const Tensor& sigma, const Tensor& scale, const Steps& steps, Root root, Output output);

/// grad: upstream gradient in the layout `output`, sigma: [B, C, C] -> dL/dSigma, [B, C, C], symmetric; and the root
/// itself into `value`, if that is wanted.
Tensor root_backward(const Tensor& grad, const Tensor& sigma, const Steps& steps, Root root, Output output,
                     Tensor* value = nullptr);

/// (A + A^T) / 2 of each matrix.
Tensor symmetric_part(const Tensor& A);

}  // namespace isqrt::library
