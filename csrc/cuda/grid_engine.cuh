// The Engine of newton_schulz.h and normalization.h on the whole device, for more channels than a block can hold:
// a batch of matrices in global memory, and kernels that are enqueued by the host.
//
// A matrix has both triangles, in rows padded to whole panels. A product computes the 64 x 64 tiles of the upper
// triangle and stores each of them twice. It never writes into an operand; products that do not need each other's
// results wait for a common launch: two launches a step of the iteration, and a grid large enough to fill the device.
#pragma once
#include <utility>
#include <vector>

#include "number.cuh"
#include "panel.cuh"

namespace isqrt::cuda {

ISQRT_FN constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

/// C x C matrices of a batch, rows of `pitch` elements, zero outside C x C.
struct GridShape {
  int64_t batch, channels, pitch;
  explicit GridShape(int64_t batch, int64_t channels)
      : batch(batch), channels(channels), pitch(round_up(channels, kPanelTerms<double>)) {}
  ISQRT_FN int64_t size() const { return pitch * pitch; }  // of one matrix
  ISQRT_FN int64_t tiles() const { return (channels + kPanelVectors - 1) / kPanelVectors; }
};

/// The upper triangle of result = alpha added + beta (A1 B1 + A2 B2), only the first of them where terms = 1 and
/// nothing added where null, and its mirror image, of the result itself or of the transpose of one that is not
/// symmetric. Each B is given by its transpose, whose rows are contiguous terms.
template <class T> struct GridProduct {
  T *result, *mirrored;
  const T *added, *A[2], *B[2];
  T alpha, beta;
  int terms;
  bool diagonal = true;  // is written too
};

/// Products of one launch: no operand is the result of another.
template <class T> struct GridProducts {
  static constexpr int kMost = 4;
  int count = 0;
  GridProduct<T> product[kMost];
};

/// Tile (I, J) of one product of one sample.
template <class T> class GridProductBlock {
  using Operands = Panel<T, true>;
  using Factor = typename Accumulator<T>::Factor;
  static constexpr int kTermsOfPanel = kPanelTerms<double>, kWarpTiles = 2;

 public:
  static constexpr int64_t kSharedBytes = 4 * Operands::kBytes;

  __device__ GridProductBlock(const GridShape& shape, const GridProduct<T>& product, int64_t sample, int64_t I,
                              int64_t J)
      : shape_(shape), product_(product), sample_(sample), row_(I * kPanelVectors), column_(J * kPanelVectors) {}

  __device__ void run() {
    Accumulator<T> sum[kWarpTiles];
    const int panels = int((shape_.channels + Operands::kColumns - 1) / Operands::kColumns);
    start_loading(0, panels);
    for (int p = 0; p < product_.terms * panels; ++p) {
      copy_async_wait<0>();
      __syncthreads();  // these panels are there, and nobody reads the ones before them any more
      stage_ ^= 1;
      if (p + 1 < product_.terms * panels) start_loading(p + 1, panels);
#pragma unroll 1
      for (int term = 0; term < Operands::kColumns; term += kTerms) multiply(sum, term);
    }
#pragma unroll
    for (int v = 0; v < kWarpTiles; ++v) {
      WarpTile<T> total = sum[v].total();
      store(total, v);
    }
  }

 private:
  __device__ void start_loading(int number, int panels) const {
    const int term = number / panels, first = number % panels * Operands::kColumns;
    const int columns = int(shape_.pitch) - first;
    load(panel(0, stage_ ^ 1), product_.A[term], row_, first, columns);
    load(panel(1, stage_ ^ 1), product_.B[term], column_, first, columns);
    copy_async_commit();
  }
  __device__ __forceinline__ void load(const Operands& panel, const T* matrix, int64_t row, int first,
                                       int columns) const {
    const T* from = matrix + sample_ * shape_.size() + row * shape_.pitch + first;
    const int64_t rows = shape_.pitch - row;
    panel.load_packets([&](int r) { return from + r * shape_.pitch; }, int(rows < kPanelVectors ? rows : kPanelVectors),
                       columns < Operands::kColumns ? columns : Operands::kColumns);
  }

  __device__ __forceinline__ void multiply(Accumulator<T> (&sum)[kWarpTiles], int term) const {
    const auto factor = [&](int side, int vector) {
      const Operands from = panel(side, stage_);
      return Factor(operand<T>(vector, term, [&](int v, int t, int, int) { return from.at(v, t); }));
    };
    const Factor rows = factor(0, own_.row);
#pragma unroll
    for (int v = 0; v < kWarpTiles; ++v) sum[v].multiply_add(rows, factor(1, own_.column + kTile * v));
  }

  /// Both (i, j) and (j, i) from the upper triangle, so that they are the same bits.
  __device__ __forceinline__ void store(WarpTile<T>& total, int v) const {
    const T* added = product_.added ? product_.added + sample_ * shape_.size() : nullptr;
    T* result = product_.result + sample_ * shape_.size();
    T* mirrored = product_.mirrored + sample_ * shape_.size();
    total.for_each([&](T a, int r, int c) {
      const int64_t i = row_ + own_.row + r, j = column_ + own_.column + kTile * v + c;
      if (i > j || j >= shape_.pitch || (i == j && !product_.diagonal)) return;
      const int64_t above = i * shape_.pitch + j;
      const T value = added ? product_.alpha * added[above] + product_.beta * a : product_.beta * a;
      result[above] = value;
      mirrored[j * shape_.pitch + i] = value;
    });
  }

  __device__ static Operands panel(int side, int stage) {
    return {reinterpret_cast<T*>(shared_memory<char>() + (2 * stage + side) * Operands::kBytes)};
  }

  GridShape shape_;
  const GridProduct<T>& product_;
  int64_t sample_, row_, column_;
  int stage_ = 1;  // of the panels before the first ones
  WarpPlace own_;
};

// ---- elementwise kernels --------------------------------------------------------------------------------------------

/// One number for all samples, times one for each where `each` is not null.
template <class T> struct GridFactor {
  T number;
  const T* each;
  ISQRT_FN T operator()(int64_t sample) const { return each ? number * each[sample] : number; }
};

/// A = sym(source), padded with zeros.
template <class T, class Pointer> struct GridLoad {
  T* A;
  RootView<const T, Pointer> source;
  __device__ void operator()(const GridShape& shape, int64_t sample, int64_t i, int64_t j) const {
    const bool inside = i < shape.channels && j < shape.channels;
    const auto from = source.sample(sample);
    A[sample * shape.size() + i * shape.pitch + j] = !inside  ? T(0)
                                                     : i <= j ? from.symmetric(i, j)
                                                              : from.symmetric(j, i);
  }
};

/// D = alpha I + beta A, or A / beta.
template <class T> struct GridAffine {
  T* D;
  const T* A;
  GridFactor<T> alpha, beta;
  bool divide;
  __device__ void operator()(const GridShape& shape, int64_t sample, int64_t i, int64_t j) const {
    const int64_t at = sample * shape.size() + i * shape.pitch + j;
    const T scaled = divide ? A[at] / beta(sample) : beta(sample) * A[at];
    D[at] = i == j && i < shape.channels ? scaled + alpha(sample) : scaled;
  }
};

/// A / divisor copied out, or its upper triangle, or the means of its columns.
template <class T, class Pointer> struct GridWrite {
  RootView<T, Pointer> result;
  const T* A;
  GridFactor<T> divisor;
  __device__ void operator()(const GridShape& shape, int64_t sample, int64_t i, int64_t j) const {
    const int64_t C = shape.channels;
    const bool upper = result.output == Output::kTriu, mean = result.output == Output::kMean;
    if (i >= C || j >= C || (upper && i > j) || (mean && i > 0)) return;
    const T* column = A + sample * shape.size() + j;
    T value = column[i * shape.pitch];
    if (mean) {
      for (int64_t k = 1; k < C; ++k) value += column[k * shape.pitch];
      value /= T(C);
    }
    const int64_t at = upper ? triu_index(i, j, C) : i * C + j;
    store_number(result.sample(sample).data + at, value / divisor(sample));
  }
};

template <class F> __global__ void __launch_bounds__(kPanelThreads) elements_kernel(const F f, const GridShape shape) {
  wait_for_kernels_before();
  const int64_t element = int64_t(blockIdx.x) * kPanelThreads + threadIdx.x, row = element / shape.pitch;
  if (row < shape.batch * shape.pitch) f(shape, row / shape.pitch, row % shape.pitch, element % shape.pitch);
}

/// What one sample adds up: the diagonal of A, or <factor sym(source), A>.
template <class T> struct GridTrace {
  const T* A;
  __device__ T operator()(const GridShape& shape, int64_t sample) const {
    T sum = 0;
    for (int64_t i = threadIdx.x; i < shape.channels; i += blockDim.x)
      sum += A[sample * shape.size() + i * (shape.pitch + 1)];
    return sum;
  }
};
template <class T, class Pointer> struct GridInner {
  RootView<const T, Pointer> source;
  const T* A;
  GridFactor<T> factor;
  __device__ T operator()(const GridShape& shape, int64_t sample) const {
    const auto from = source.sample(sample);
    const T f = factor(sample);
    T sum = 0;
    for (int64_t i = threadIdx.x / kWarp; i < shape.channels; i += blockDim.x / kWarp)
      for (int64_t j = i + threadIdx.x % kWarp; j < shape.channels; j += kWarp)
        sum += T(i < j ? 2 : 1) * (f * from.symmetric(i, j) * A[sample * shape.size() + i * shape.pitch + j]);
    return sum;
  }
};

template <class F, class T>
__global__ void __launch_bounds__(kPanelThreads) sum_kernel(const F f, const GridShape shape, T* sums) {
  wait_for_kernels_before();
  const T sum = block_sum(f(shape, blockIdx.x), shared_memory<T>());
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

enum class ScalarOp { kMultiply, kDivide, kSubtract, kSquareRoot, kNonzero };

template <class T>
__global__ void __launch_bounds__(kPanelThreads)
    scalar_kernel(ScalarOp op, int64_t batch, T* to, GridFactor<T> a, GridFactor<T> b) {
  wait_for_kernels_before();
  const int64_t sample = int64_t(blockIdx.x) * kPanelThreads + threadIdx.x;
  if (sample >= batch) return;
  const T x = a(sample), y = b(sample);
  to[sample] = op == ScalarOp::kMultiply     ? x * y
               : op == ScalarOp::kDivide     ? x / y
               : op == ScalarOp::kSubtract   ? x - y
               : op == ScalarOp::kSquareRoot ? sqrt(x)
                                             : nonzero(x);
}

template <class T>
__global__ void __launch_bounds__(kPanelThreads, sizeof(T) == 8 ? 1 : 2)
    product_kernel(const GridProducts<T> products, const GridShape shape, int64_t pairs) {
  wait_for_kernels_before();
  const int64_t pair = blockIdx.x % pairs, number = blockIdx.x / pairs % products.count,
                sample = blockIdx.x / pairs / products.count;
  int64_t J = 0;
  while ((J + 1) * (J + 2) / 2 <= pair) ++J;
  GridProductBlock<T>(shape, products.product[number], sample, pair - J * (J + 1) / 2, J).run();
}

// ---- the engine -----------------------------------------------------------------------------------------------------

/// Hands out matrices of a batch, and numbers for each of its samples, from a workspace; enqueues on a stream.
template <class T> class GridEngine {
 public:
  /// None yet where null. That of a symmetric matrix is its own transpose.
  struct Matrix {
    T *data = nullptr, *transpose = nullptr;
  };

  /// One number for each sample.
  struct Scalar {
    GridEngine* engine;
    GridFactor<T> factor;

    friend Scalar operator*(const Scalar& a, const Scalar& b) { return a.engine->scalar(ScalarOp::kMultiply, a, b); }
    friend Scalar operator/(const Scalar& a, const Scalar& b) { return a.engine->scalar(ScalarOp::kDivide, a, b); }
    friend Scalar operator-(const Scalar& a, const Scalar& b) { return a.engine->scalar(ScalarOp::kSubtract, a, b); }
    friend Scalar operator*(double a, const Scalar& b) { return {b.engine, {T(a) * b.factor.number, b.factor.each}}; }
    friend Scalar sqrt(const Scalar& a) { return a.engine->scalar(ScalarOp::kSquareRoot, a, a); }
    friend Scalar nonzero(const Scalar& a) { return a.engine->scalar(ScalarOp::kNonzero, a, a); }
  };

  static constexpr int kMostScalars = 16;
  static int64_t workspace_size(const GridShape& shape, int matrices) {
    return shape.batch * (shape.size() * matrices + kMostScalars);
  }

  GridEngine(const GridShape& shape, int matrices, T* workspace, void* stream)
      : shape_(shape), stream_(stream), scalars_(workspace + shape.batch * shape.size() * matrices) {
    for (int m = 0; m < matrices; ++m) free_.push_back(workspace + m * shape.batch * shape.size());
  }

  Matrix matrix() const { return {}; }

  template <class Pointer> void load(Matrix& A, const RootView<const T, Pointer>& source) {
    if (!A.data) A.data = A.transpose = take();
    elements("load", GridLoad<T, Pointer>{A.data, source});
  }
  Scalar trace(const Matrix& A) { return sum("trace", GridTrace<T>{A.data}); }
  template <class Pointer> Scalar inner(const RootView<const T, Pointer>& source, const Matrix& A) {
    return inner(source, A, number(nullptr));
  }
  template <class Pointer>
  Scalar inner(const RootView<const T, Pointer>& source, const Matrix& A, const Scalar& factor) {
    flush();
    return sum("inner", GridInner<T, Pointer>{source, A.data, factor.factor});
  }

  /// The numbers of a batch, 1 where null.
  Scalar number(const T* each) { return {this, {T(1), each}}; }

  void divide(Matrix& A, const Scalar& s) { affine(A, {T(0), nullptr}, s.factor, A, true); }
  void scale(Matrix& D, double alpha, const Matrix& A) { affine(D, {T(0), nullptr}, {T(alpha), nullptr}, A, false); }
  void scale(Matrix& D, const Scalar& alpha, const Matrix& A) { affine(D, {T(0), nullptr}, alpha.factor, A, false); }
  void identity_plus(Matrix& D, double alpha, double beta, const Matrix& A) {
    affine(D, {T(alpha), nullptr}, {T(beta), nullptr}, A, false);
  }
  void identity_plus(Matrix& D, const Scalar& alpha, const Scalar& beta, const Matrix& A) {
    affine(D, alpha.factor, beta.factor, A, false);
  }

  void product(Matrix& D, double alpha, double beta, const Matrix& A, const Matrix& B) {
    enqueue(D, {0, 0, D.data, {A.data}, {B.transpose}, T(alpha), T(beta), 1});
  }
  void products(Matrix& D, double alpha, double beta, const Matrix& A1, const Matrix& B1, const Matrix& A2,
                const Matrix& B2) {
    enqueue(D, {0, 0, D.data, {A1.data, A2.data}, {B1.transpose, B2.transpose}, T(alpha), T(beta), 2});
  }
  Matrix product(Matrix& D, Matrix& E, const Matrix& A, const Matrix& B, bool in_full) {
    return enqueue(D, E, {0, 0, nullptr, {A.data}, {B.data}, T(0), T(1), 1}, in_full);
  }
  Matrix products(Matrix& D, Matrix& E, const Matrix& A1, const Matrix& B1, const Matrix& A2, const Matrix& B2,
                  bool in_full) {
    return enqueue(D, E, {0, 0, nullptr, {A1.data, A2.data}, {B1.data, B2.data}, T(0), T(1), 2}, in_full);
  }

  template <class Pointer> void write(const Matrix& A, const RootView<T, Pointer>& result, const Scalar& divisor) {
    flush();
    elements("write", GridWrite<T, Pointer>{result, A.data, divisor.factor});
  }

  /// What the operators of Scalar do.
  Scalar scalar(ScalarOp op, const Scalar& a, const Scalar& b) {
    T* result = take_scalar();
    launch("scalar", scalar_kernel<T>, blocks(shape_.batch), kPanelThreads, 0, stream_, op, shape_.batch, result,
           a.factor, b.factor);
    return {this, {T(1), result}};
  }

 private:
  T* take() {
    T* matrix = free_.back();
    free_.pop_back();
    return matrix;
  }

  bool waits(const T* result) const {
    for (int p = 0; p < waiting_.count; ++p)
      if (waiting_.product[p].result == result) return true;
    return false;
  }
  bool needs_waiting(const GridProduct<T>& product) const {
    return waits(product.added) || waits(product.A[0]) || waits(product.B[0]) || waits(product.A[1]) ||
           waits(product.B[1]);
  }

  /// D's own matrix stays as it is for products that wait, until they are launched.
  void renew(Matrix& D) {
    if (D.data) retired_.push_back(D.data);
    D.data = D.transpose = take();
  }

  Matrix enqueue(Matrix& D, GridProduct<T> product) {
    if (needs_waiting(product)) flush();
    renew(D);
    product.result = product.mirrored = D.data;
    waiting_.product[waiting_.count++] = product;
    if (waiting_.count == GridProducts<T>::kMost) flush();
    return D;
  }

  /// The same; in full D and E = D' from the upper triangle of each, E's from the factors exchanged.
  Matrix enqueue(Matrix& D, Matrix& E, GridProduct<T> product, bool in_full) {
    if (!in_full) return enqueue(D, product);
    if (needs_waiting(product) || waiting_.count + 2 > GridProducts<T>::kMost) flush();
    renew(D);
    renew(E);
    D.transpose = product.mirrored = E.data;
    E.transpose = product.result = D.data;
    waiting_.product[waiting_.count++] = product;
    std::swap(product.A, product.B);
    std::swap(product.result, product.mirrored);
    product.diagonal = false;
    waiting_.product[waiting_.count++] = product;
    if (waiting_.count == GridProducts<T>::kMost) flush();
    return E;
  }

  void flush() {
    if (waiting_.count == 0) return;
    const int64_t pairs = shape_.tiles() * (shape_.tiles() + 1) / 2;
    launch("product", product_kernel<T>, pairs * waiting_.count * shape_.batch, kPanelThreads,
           GridProductBlock<T>::kSharedBytes, stream_, waiting_, shape_, pairs);
    waiting_.count = 0;
    free_.insert(free_.end(), retired_.begin(), retired_.end());
    retired_.clear();
  }

  void affine(Matrix& D, const GridFactor<T>& alpha, const GridFactor<T>& beta, const Matrix& A, bool divide) {
    flush();
    const T* from = A.data;
    if (!D.data) D.data = D.transpose = take();
    elements("affine", GridAffine<T>{D.data, from, alpha, beta, divide});
  }

  template <class F> void elements(const char* name, const F& f) {
    launch(name, elements_kernel<F>, blocks(shape_.batch * shape_.size()), kPanelThreads, 0, stream_, f, shape_);
  }
  template <class F> Scalar sum(const char* name, const F& f) {
    T* sums = take_scalar();
    launch(name, sum_kernel<F, T>, shape_.batch, kPanelThreads, kPanelThreads / kWarp * sizeof(T), stream_, f, shape_,
           sums);
    return {this, {T(1), sums}};
  }
  T* take_scalar() { return std::exchange(scalars_, scalars_ + shape_.batch); }

  static int64_t blocks(int64_t threads) { return (threads + kPanelThreads - 1) / kPanelThreads; }

  GridShape shape_;
  void* stream_;
  T* scalars_;
  std::vector<T*> free_, retired_;
  GridProducts<T> waiting_;
};

}  // namespace isqrt::cuda
