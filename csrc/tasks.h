// The four pieces of work that a device's engine does, as ops.cpp hands them over. All pointers lie on that device.
#pragma once
#include "covariance.h"
#include "normalization.h"

namespace isqrt {

/// x -> mu and Sigma. Partial results are per chunk; with one chunk they may be mean and sigma themselves.
template <class T> struct PoolTask {
  FeatureMaps<const T> x;
  Chunks chunks;
  T* partial_mean;    // [B, chunks, C]
  T* partial_moment;  // [B, chunks, C, C], upper triangle
  T* mean;            // [B, C]
  T* sigma;           // [B, C, C]
};

/// dL/dSigma -> dL/dx.
template <class T> struct PoolBackwardTask {
  FeatureMaps<const T> x;
  Chunks chunks;
  const T* mean;        // [B, C]
  const T* grad_sigma;  // [B, C, C], not necessarily symmetric
  FeatureMaps<T> grad_x;
};

/// Sigma -> Yhat, or the inverse root.
template <class T> struct RootTask {
  int64_t batch;
  RootView<const T> sigma;
  Steps steps;
  Root root;
  RootView<T> result;
};

/// dL/dYhat -> dL/dSigma, symmetric.
template <class T> struct RootBackwardTask {
  int64_t batch;
  RootView<const T> grad;
  RootView<const T> sigma;
  Steps steps;
  Root root;
  RootView<T> grad_sigma;
};

}  // namespace isqrt
