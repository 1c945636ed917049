// The library engine: the iteration as batched GEMM calls of torch, where that is asked for; and gram.h on a GPU.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include "../gram.h"
#include "../normalization.h"

namespace isqrt::library {

using torch::stable::Tensor;

/// sigma: [B, C, C] -> its root over scale, [B], in the layout `output`.
Tensor root(const Tensor& sigma, const Tensor& scale, const Steps& steps, Root root, Output output);

/// grad: upstream gradient in the layout `output`, sigma: [B, C, C] -> dL/dSigma, [B, C, C], symmetric; and the root
/// itself into `value`, if that is wanted.
Tensor root_backward(const Tensor& grad, const Tensor& sigma, const Steps& steps, Root root, Output output,
                     Tensor* value = nullptr);

/// The Engine of gram.h: what is asked of it, and for what.
class GramEngine {
 public:
  /// For x, in the dtype that it is computed in, and the scale of its samples, where that is known.
  GramEngine(const Tensor& x, torch::headeronly::ScalarType dtype, const Tensor* scale = nullptr);

  /// R for Yhat; or the upstream gradient for H, and then R and dK for dX.
  void set_root(const Tensor& root, Output output) { root_ = root, output_ = output; }
  void set_upstream(const Tensor& grad, Output output) { grad_ = grad, output_ = output; }
  void set_gradients(const Tensor& root, const Tensor& grad_gram) { root_ = root, grad_gram_ = grad_gram; }

  void load_features();
  void store_gram(double alpha);
  void multiply_root();
  void store_root(double alpha);
  void multiply_gradient();
  void store_contracted(double alpha);
  void store_gradient(double alpha);

  int64_t positions() const;
  Tensor scale() const;                             // [B]
  const Tensor& result() const { return result_; }  // of the last function that stores

 private:
  Tensor x_, scale_, features_, root_, grad_, grad_gram_, product_, result_;
  torch::headeronly::ScalarType dtype_;
  Output output_ = Output::kMatrix;
};

/// (A + A^T) / 2 of each matrix.
Tensor symmetric_part(const Tensor& A);

}  // namespace isqrt::library
