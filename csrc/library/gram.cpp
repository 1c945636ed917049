// The Engine of gram.h on a whole batch, by torch's operators.
#include "tensors.h"

namespace isqrt::library {
namespace {

/// For each of some sizes the power of two that brings it near 1, from its bits; whichever for 0 and for what is not
/// finite. Its reciprocal is no denormal number either.
Tensor scale_for(const Tensor& size) {
  const bool wide = size.scalar_type() == ScalarType::Double;
  const int64_t ones = wide ? 2047 : 255;
  const auto bits = [wide](int64_t exponent) {
    return torch::stable::full({}, double(exponent) * (wide ? 0x1p52 : 0x1p23), ScalarType::Long);
  };
  const Tensor all = call("aten::view", "dtype", size, wide ? ScalarType::Long : ScalarType::Int);
  const Tensor exponent = call("aten::bitwise_and", "Tensor", all, bits(ones));
  const Tensor clamped = call("aten::minimum", "", call("aten::maximum", "", exponent, bits(2)), bits(ones - 2));
  return call("aten::view", "dtype", call("aten::bitwise_xor", "Tensor", clamped, bits(ones)), size.scalar_type());
}

constexpr std::array<int64_t, 1> kChannels{1}, kPositions{2};

/// So many positions from the first one on.
Tensor narrow(Tensor A, int64_t first, int64_t count) { return torch::stable::narrow(A, 2, first, count); }

Tensor sum(const Tensor& A, const std::array<int64_t, 1>& dimension) { return torch::stable::sum(A, dimension, true); }

/// beta A B
Tensor product(const Tensor& A, const Tensor& B, double beta = 1) {
  const Tensor out = torch::stable::new_empty(A, {A.size(0), A.size(1), B.size(2)});
  gemm(out, out, A, B, 0, beta);
  return out;
}

}  // namespace

GramEngine::GramEngine(const Tensor& x, ScalarType dtype, const Tensor* scale)
    : x_(torch::stable::flatten(x, 2, -1)), dtype_(dtype) {
  if (scale) scale_ = torch::stable::view(*scale, {-1, 1, 1});
}

int64_t GramEngine::positions() const { return x_.size(2); }
Tensor GramEngine::scale() const { return torch::stable::flatten(scale_, 0, -1); }

void GramEngine::load_features() {
  if (features_.defined()) return;
  const Tensor x = torch::stable::to(x_, dtype_);
  const Tensor half = multiply(x, number(0.5));  // of a difference, which does not overflow
  const Tensor distance = torch::stable::subtract(half, narrow(half, 0, 1));
  if (!scale_.defined()) {
    constexpr std::array<int64_t, 2> kAll{1, 2};
    scale_ = scale_for(torch::stable::amax(call("aten::abs", "", distance), kAll, true));
  }
  const Tensor scaled = multiply(distance, multiply(scale_, number(2)));
  const Tensor mean = divide(sum(scaled, kPositions), number(double(positions())));
  const Tensor centered = torch::stable::subtract(scaled, mean), first = narrow(centered, 0, 1);
  features_ =
      add(narrow(centered, 1, gram_side(positions())), multiply(first, number(Reflection(positions()).of_first)));
}

void GramEngine::store_gram(double alpha) { result_ = product(transpose(features_), features_, alpha); }

void GramEngine::multiply_root() {  // of the mean: P 1 = R (F^T 1)
  const Tensor& F = features_;
  product_ = output_ == Output::kMean ? product(root_, transpose(sum(F, kChannels))) : product(root_, transpose(F));
}
void GramEngine::store_root(double alpha) {
  const Tensor root = divide(product(features_, product_, alpha), scale_);
  result_ = output_ == Output::kMean ? divide(torch::stable::squeeze(root, 2), number(double(root.size(1))))
                                     : to_output(symmetric_part(root), output_);
}

void GramEngine::multiply_gradient() {
  if (output_ != Output::kMean) {
    product_ = product(from_output(grad_, x_.size(1), output_), features_);
    return;
  }
  // G = (g 1^T + 1 g^T) / (2 C)
  const Tensor g = multiply(torch::stable::unsqueeze(grad_, 2), number(0.5 / double(x_.size(1))));
  product_ = add(multiply(g, sum(features_, kChannels)), product(transpose(g), features_));
}
void GramEngine::store_contracted(double alpha) { result_ = product(transpose(features_), product_, alpha); }

void GramEngine::store_gradient(double alpha) {
  const Tensor D = product(product_, root_, alpha);
  gemm(D, D, features_, grad_gram_, 1, alpha);
  const Tensor total = sum(D, kPositions);
  const Reflection reflection(positions());
  result_ = torch::stable::new_empty(D, {D.size(0), D.size(1), positions()});
  Tensor first = narrow(result_, 0, 1), others = narrow(result_, 1, D.size(2));
  torch::stable::copy_(first, multiply(total, number(reflection.to_first)));
  torch::stable::copy_(others, add(D, multiply(total, number(reflection.to_others))));
}

}  // namespace isqrt::library
