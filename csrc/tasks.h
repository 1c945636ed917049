// The four pieces of work that a device's engine does, as ops.cpp hands them over. All pointers lie on that device.
#pragma once
#include "covariance.h"
#include "normalization.h"

namespace isqrt {

/// x -> mu and Sigma. Partial results are per chunk; with one chunk they may be mean and sigma themselves. Where
/// `scale` is given, Sigma is that of scale x, and of x itself otherwise; mu is that of x always.
template <class X> struct PoolTask {
  FeatureMaps<const X> x;
  Chunks chunks;
  Compute<X>* partial_mean;    // [B, chunks, C]
  Compute<X>* partial_moment;  // [B, chunks, C, C], upper triangle
  Compute<X>* mean;            // [B, C]
  Compute<X>* sigma;           // [B, C, C]
  Compute<X>* scale;           // [B], powers of two, or null
};

/// dL/dSigma -> dL/dx, where Sigma is that of scale x and dL/dSigma is less a factor 1 / scale; null stands for 1.
template <class X> struct PoolBackwardTask {
  FeatureMaps<const X> x;
  Chunks chunks;
  const Compute<X>* mean;        // [B, C]
  const Compute<X>* grad_sigma;  // [B, C, C], symmetric
  const Compute<X>* scale;       // [B] or null
  FeatureMaps<X> grad_x;
};

/// Sigma -> Yhat, or the inverse root; the mean is that of the square root. Sigma is that of scale x, Yhat that of x;
/// null stands for 1. Yhat alone is put out as X.
template <class X, class Pointer = X*> struct RootTask {
  using T = Compute<X>;
  int64_t batch;
  RootView<const T> sigma;
  Steps steps;
  Root root;
  RootView<X, Pointer> result;
  const T* scale = nullptr;  // [B]
  T* workspace = nullptr;    // of an engine that needs one
  int blocks = 1;            // that share a sample, of an engine that has any
};

/// dL/dYhat, of X, -> dL/dSigma, symmetric.
template <class X, class Pointer = const X*> struct RootBackwardTask {
  using T = Compute<X>;
  int64_t batch;
  RootView<const X, Pointer> grad;
  RootView<const T> sigma;
  Steps steps;
  Root root;
  RootView<T> grad_sigma;
  T* workspace = nullptr;
  int blocks = 1;
};

}  // namespace isqrt
