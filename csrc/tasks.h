// The pieces of work that a device's engine does, as call.h hands them over. All pointers lie on that device.
#pragma once
#include "covariance.h"
#include "gram.h"
#include "normalization.h"

namespace isqrt {

/// x -> mu and Sigma. Partial results are per chunk; with one chunk they may be mean and sigma themselves. Where
/// `scale` is given, Sigma is that of scale x, and mu the mean of scale (x - x_0); otherwise of x and of x - x_0.
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
  const Compute<X>* mean;        // [B, C], that of PoolTask
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
  T* value = nullptr;  // [B, C, C], the root itself, where that is wanted
};

// Those of gram.h, of samples with fewer positions than channels. `scale` is that of PoolTask.

/// x -> K, that of scale x.
template <class X> struct GramTask {
  FeatureMaps<const X> x;
  Compute<X>* gram;   // [B, M - 1, M - 1]
  Compute<X>* scale;  // [B]
};

/// x and R -> Yhat.
template <class X> struct ExpandTask {
  FeatureMaps<const X> x;
  const Compute<X>* scale;
  const Compute<X>* root;  // [B, M - 1, M - 1]
  RootView<Compute<X>> result;
};

/// x and dL/dYhat -> V and H.
template <class X> struct ContractTask {
  FeatureMaps<const X> x;
  const Compute<X>* scale;
  RootView<const Compute<X>> grad;
  Compute<X>* product;    // [B, C, M - 1]
  Compute<X>* grad_root;  // [B, M - 1, M - 1]
};

/// x, V, R and dK -> dL/dx.
template <class X> struct GramBackwardTask {
  FeatureMaps<const X> x;
  const Compute<X>* scale;
  const Compute<X>* product;    // [B, C, M - 1]
  const Compute<X>* root;       // [B, M - 1, M - 1]
  const Compute<X>* grad_gram;  // [B, M - 1, M - 1]
  FeatureMaps<X> grad_x;
};

}  // namespace isqrt
