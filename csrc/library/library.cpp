#include "library.h"

#include <utility>
#include <vector>

#include "tensors.h"

namespace isqrt::library {
namespace {

/// One number per sample.
struct Batch {
  Batch(const Tensor& value) : value(value) {}
  Batch(double all) : value(number(all)) {}
  Tensor value;  // [B, 1, 1], or one number for all
};
Batch operator*(const Batch& a, const Batch& b) { return {multiply(a.value, b.value)}; }
Batch operator*(double a, const Batch& b) { return {multiply(b.value, number(a))}; }
Batch operator/(const Batch& a, const Batch& b) { return {divide(a.value, b.value)}; }
Batch operator-(const Batch& a, const Batch& b) { return {torch::stable::subtract(a.value, b.value)}; }
Batch sqrt(const Batch& a) { return {call("aten::sqrt", "", a.value)}; }
Batch nonzero(const Batch& a) {
  // (A choice between it and number(1.0) would copy that to the device, which a CUDA graph does not capture.)
  const Tensor is_zero = call("aten::logical_not", "", a.value);
  return {add(a.value, torch::stable::to(is_zero, a.value.scalar_type()))};
}

/// The Engine of newton_schulz.h and normalization.h on a whole batch. Nothing is symmetric to the last bit between
/// the products, as in every implementation by plain GEMM; what comes out is symmetrised once.
class LibraryEngine {
 public:
  struct Matrix {
    Tensor value;  // [B, C, C]
  };
  struct Source {
    Tensor value;  // [B, C, C], symmetric
  };

  explicit LibraryEngine(const Tensor& like)
      : spare_(torch::stable::empty_like(like)),
        identity_(call("aten::eye", "", like.size(-1), std::optional(like.scalar_type()),
                       std::optional<torch::headeronly::Layout>(), std::optional(like.device()),
                       std::optional<bool>())) {}

  Matrix matrix() const { return {}; }

  void load(Matrix& A, const Source& source, const Batch& s) const { A.value = divide(source.value, s.value); }

  Batch load_normalized(Matrix& A, const Source& source) const {
    const Batch t = per_sample(
        torch::stable::sum(call("aten::diagonal", "", source.value, int64_t(0), int64_t(1), int64_t(2)), one_));
    load(A, source, nonzero(t));
    return t;
  }
  Batch inner(const Source& source, const Matrix& A) const {
    return per_sample(torch::stable::sum(multiply(source.value, A.value), both_));
  }
  Batch inner(const Source& source, const Matrix& A, const Batch& factor) const {
    return inner({multiply(multiply(source.value, factor.value), factor.value)}, A);
  }

  void scale(Matrix& D, double alpha, const Matrix& A) const { D.value = multiply(A.value, number(alpha)); }
  void identity_plus(Matrix& D, double alpha, double beta, const Matrix& A) const {
    D.value = add(multiply(A.value, number(beta)), multiply(identity_, number(alpha)));
  }

  Matrix result(const Batch& beta, const Matrix& A) const { return {multiply(A.value, beta.value)}; }
  Matrix result(const Batch& alpha, const Batch& beta, const Matrix& A) const {
    return {add(multiply(A.value, beta.value), multiply(identity_, alpha.value))};
  }

  void product(Matrix& D, double alpha, double beta, const Matrix& A, const Matrix& B) {
    gemm(spare_, alpha == 0 ? A.value : D.value, A.value, B.value, alpha, beta);
    replace(D);
  }
  void products(Matrix& D, double alpha, double beta, const Matrix& A1, const Matrix& B1, const Matrix& A2,
                const Matrix& B2) {
    gemm(spare_, alpha == 0 ? A1.value : D.value, A1.value, B1.value, alpha, beta);
    gemm(spare_, spare_, A2.value, B2.value, 1.0, beta);
    replace(D);
  }
  /// In full always, and without a second matrix.
  Matrix product(Matrix& D, Matrix&, const Matrix& A, const Matrix& B, bool) {
    product(D, 0.0, 1.0, A, B);
    return {transpose(D.value)};
  }
  Matrix products(Matrix& D, Matrix&, const Matrix& A1, const Matrix& B1, const Matrix& A2, const Matrix& B2, bool) {
    products(D, 0.0, 1.0, A1, B1, A2, B2);
    return {transpose(D.value)};
  }

 private:
  void replace(Matrix& D) {
    // A matrix not yet computed has nothing to leave behind.
    Tensor previous = D.value.defined() ? D.value : torch::stable::empty_like(spare_);
    D.value = std::exchange(spare_, previous);
  }

  static Batch per_sample(const Tensor& sums) { return {torch::stable::view(sums, {sums.size(0), 1, 1})}; }

  static constexpr std::array<int64_t, 1> one_{1};
  static constexpr std::array<int64_t, 2> both_{1, 2};
  Tensor spare_, identity_;
};

/// Row-major positions of the upper triangle in a flattened C x C matrix: [C (C + 1) / 2], on the device of `like`.
Tensor triangle(const Tensor& like, int64_t channels) {
  const Tensor rows_and_columns =
      call("aten::triu_indices", "", channels, channels, int64_t(0), std::optional(ScalarType::Long),
           std::optional<torch::headeronly::Layout>(), std::optional(like.device()), std::optional<bool>());
  const Tensor strides = torch::stable::full({2, 1}, double(channels), ScalarType::Long, std::nullopt, like.device());
  torch::stable::fill_(torch::stable::select(strides, 0, 1), 1.0);
  const std::array<int64_t, 1> dim{0};
  return torch::stable::sum(multiply(rows_and_columns, strides), dim);
}

}  // namespace

Tensor to_output(const Tensor& A, Output output) {
  const int64_t B = A.size(0), C = A.size(1);
  if (output == Output::kMatrix) return A;
  if (output == Output::kMean) {
    const std::array<int64_t, 1> dim{1};
    return divide(torch::stable::sum(A, dim), number(double(C)));
  }
  return call("aten::index_select", "", torch::stable::view(A, {B, C * C}), int64_t(1), triangle(A, C));
}

/// sym(G) of normalization.h, as RootView::symmetric has it.
Tensor from_output(const Tensor& grad, int64_t channels, Output output) {
  const int64_t B = grad.size(0);
  if (output == Output::kMatrix) return symmetric_part(grad);
  if (output == Output::kMean) {
    const Tensor share = multiply(grad, number(0.5 / double(channels)));
    return add(torch::stable::unsqueeze(share, 1), torch::stable::unsqueeze(share, 2));
  }
  const Tensor zeros = torch::stable::new_zeros(grad, {B, channels * channels});
  const Tensor upper = call("aten::index_copy", "", zeros, int64_t(1), triangle(grad, channels), grad);
  return symmetric_part(torch::stable::view(upper, {B, channels, channels}));
}

Tensor symmetric_part(const Tensor& A) {
  const Tensor half = multiply(A, number(0.5));
  return add(half, transpose(half));
}

Tensor root(const Tensor& sigma, const Tensor& scale, const Steps& steps, Root root, Output output) {
  LibraryEngine engine(sigma);
  const auto A = matrix_root(engine, LibraryEngine::Source{symmetric_part(sigma)}, steps, root);
  const Tensor result = to_output(symmetric_part(A.value), output);
  if (scale.numel() == 0) return result;
  std::vector<int64_t> sizes(result.dim(), 1);
  sizes[0] = -1;
  return divide(result, torch::stable::view(scale, sizes));
}

Tensor root_backward(const Tensor& grad, const Tensor& sigma, const Steps& steps, Root root, Output output,
                     Tensor* value) {
  LibraryEngine engine(sigma);
  const LibraryEngine::Source sigma_source{symmetric_part(sigma)},
      grad_source{from_output(grad, sigma.size(1), output)};
  const auto with_root = [&](const Batch& factor, const LibraryEngine::Matrix& P) {
    if (value) *value = symmetric_part(engine.result(factor, P).value);
  };
  return symmetric_part(matrix_root_backward(engine, sigma_source, grad_source, steps, root, with_root).value);
}

}  // namespace isqrt::library
