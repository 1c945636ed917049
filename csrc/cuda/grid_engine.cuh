// The Engine of newton_schulz.h and normalization.h on the whole device, for more channels than a block can hold:
// a batch of matrices in global memory, and kernels that are enqueued by the host.
//
// A product never writes into an operand; products that do not need each other's results wait for a common launch: two
// launches a step of the iteration, and a grid large enough to fill the device. A product whose derivative waits joins
// it, and shares its operands, see GridProduct.
#pragma once
#include <stdexcept>
#include <utility>
#include <vector>

#include "block.cuh"
#include "grid_product.cuh"
#include "number.cuh"

namespace isqrt::cuda {

constexpr int kGridThreads = 256;

// ---- elementwise kernels --------------------------------------------------------------------------------------------

/// A number for each sample, in postfix notation: what uses it computes it, once in each warp, which takes less time
/// than a launch for each operation.
template <class T> class GridScalar {
 public:
  GridScalar(T number, const T* each = nullptr) : steps_{kOperand}, operands_{{number, each}} {}

  friend GridScalar operator*(const GridScalar& a, const GridScalar& b) { return a.then(b, kMultiply); }
  friend GridScalar operator/(const GridScalar& a, const GridScalar& b) { return a.then(b, kDivide); }
  friend GridScalar operator-(const GridScalar& a, const GridScalar& b) { return a.then(b, kSubtract); }
  friend GridScalar operator*(double a, const GridScalar& b) { return GridScalar(T(a)) * b; }
  friend GridScalar sqrt(const GridScalar& a) { return a.then(kSquareRoot); }
  friend GridScalar nonzero(const GridScalar& a) { return a.then(kNonzero); }

  __device__ T operator()(int64_t sample) const {
    T stack[kDepth] = {};  // the last one first
    int operand = 0;
#pragma unroll 1
    for (int n = 0; n < steps_count_; ++n) {
      const Step step = steps_[n];
      if (step == kOperand) {
#pragma unroll
        for (int d = kDepth - 1; d > 0; --d) stack[d] = stack[d - 1];
        const Operand& o = operands_[operand++];
        stack[0] = o.each ? o.number * o.each[sample] : o.number;
      } else if (step == kSquareRoot) {
        stack[0] = sqrt(stack[0]);
      } else if (step == kNonzero) {
        stack[0] = nonzero(stack[0]);
      } else {
        const T a = stack[1], b = stack[0];
        stack[0] = step == kMultiply ? a * b : step == kDivide ? a / b : a - b;
#pragma unroll
        for (int d = 1; d + 1 < kDepth; ++d) stack[d] = stack[d + 1];
      }
    }
    return stack[0];
  }

 private:
  enum Step : uint8_t { kOperand, kMultiply, kDivide, kSubtract, kSquareRoot, kNonzero };
  /// One number for all samples, times one for each where `each` is not null.
  struct Operand {
    T number;
    const T* each;
  };
  static constexpr int kDepth = 4, kMostSteps = 20, kMostOperands = 10;  // normalization.h has 17 and 8

  GridScalar then(Step step) const {
    GridScalar result = *this;
    result.append(step);
    return result;
  }
  GridScalar then(const GridScalar& b, Step step) const {
    GridScalar result = *this;
    for (int n = 0, operand = 0; n < b.steps_count_; ++n) {
      if (b.steps_[n] == kOperand) {
        if (result.operands_count_ == kMostOperands) throw std::logic_error("GridScalar: too many operands");
        result.operands_[result.operands_count_++] = b.operands_[operand++];
      }
      result.append(b.steps_[n]);
    }
    result.append(step);
    return result;
  }
  void append(Step step) {
    if (steps_count_ == kMostSteps) throw std::logic_error("GridScalar: too many steps");
    steps_[steps_count_++] = step;
  }

  int steps_count_ = 1, operands_count_ = 1;
  Step steps_[kMostSteps];
  Operand operands_[kMostOperands];
};

/// f(shape, sample, item) in a warp for each item of each sample.
template <class F>
__global__ void __launch_bounds__(kGridThreads) elements_kernel(const F f, const GridShape shape, int items) {
  wait_for_kernels_before();
  // 32 bits: of a tile for each of 2^32 warps no device has the memory
  const unsigned warp = blockIdx.x * (kGridThreads / kWarp) + threadIdx.x / kWarp, each = unsigned(items);
  if (warp < shape.batch * items) f(shape, int64_t(warp / each), int(warp % each));
}

/// A = sym(source), an item for each tile.
template <class T, class Pointer> struct GridLoad {
  char* A;
  RootView<const T, Pointer> source;
  __device__ void operator()(const GridShape& shape, int64_t sample, int tile) const {
    const TilePlace at = TilePlace::after(tile, shape.rows());
    WarpTile<T> result = symmetric_tile<T>(source.sample(sample), at);
    write_tile(shape, A, sample, at, result, at.I == at.J);
  }
};

/// D = alpha I + beta A, or A / beta.
template <class T> struct GridAffine {
  char *D, *A;
  GridScalar<T> alpha, beta;
  bool divide;
  __device__ void operator()(const GridShape& shape, int64_t sample, int tile) const {
    const TilePlace at = TilePlace::after(tile, shape.rows());
    const T a = alpha(sample), b = beta(sample);
    WarpTile<T> result = Tiles<T>::read(shape.tile<T>(A, sample, at));
    result.for_each([&](T& d, int r, int c) {
      const T scaled = divide ? d / b : b * d;
      d = at.i(r) == at.j(c) && at.i(r) < shape.channels ? scaled + a : scaled;
    });
    __syncwarp();  // D may be A, and on the diagonal other lanes' elements are written
    write_tile(shape, D, sample, at, result, at.I == at.J);
  }
};

/// A / divisor copied out, or its upper triangle.
template <class T, class Pointer> struct GridWrite {
  RootView<T, Pointer> result;
  char* A;
  GridScalar<T> divisor;
  __device__ void operator()(const GridShape& shape, int64_t sample, int tile) const {
    const TilePlace at = TilePlace::after(tile, shape.rows());
    const int64_t C = shape.channels;
    const auto to = result.sample(sample).data;
    const T d = divisor(sample);
    Tiles<T>::read(shape.tile<T>(A, sample, at)).for_each([&](T a, int r, int c) {
      const int64_t i = at.i(r), j = at.j(c);
      if (j >= C || i > j) return;
      const T value = a / d;
      if (result.output == Output::kTriu) return store_number(to + triu_index(i, j, C), value);
      store_number(to + (i * C + j), value);
      if (i < j) store_number(to + (j * C + i), value);
    });
  }
};

/// The means of the columns of A / divisor, an item for each 16 of them: two lanes share a column.
template <class T, class Pointer> struct GridWriteMeans {
  RootView<T, Pointer> result;
  char* A;
  GridScalar<T> divisor;
  __device__ void operator()(const GridShape& shape, int64_t sample, int J) const {
    const int j = kTile * J + threadIdx.x % kTile;
    T sum = 0;
    for (int i = threadIdx.x % kWarp / kTile; i < shape.channels; i += kWarp / kTile)
      sum += shape.element<T>(A, sample, i, j);
    sum += __shfl_xor_sync(0xffffffffu, sum, kTile);
    if (threadIdx.x % kWarp < kTile && j < shape.channels)
      store_number(result.sample(sample).data + j, sum / T(shape.channels) / divisor(sample));
  }
};

/// What one sample adds up: the diagonal of A, or <factor sym(source), A>.
template <class T> struct GridTrace {
  char* A;
  __device__ T operator()(const GridShape& shape, int64_t sample) const {
    T sum = 0;
    for (int i = threadIdx.x; i < shape.channels; i += blockDim.x) sum += shape.element<T>(A, sample, i, i);
    return sum;
  }
};
template <class T, class Pointer> struct GridInner {
  RootView<const T, Pointer> source;
  char* A;
  GridScalar<T> factor;
  __device__ T operator()(const GridShape& shape, int64_t sample) const {
    const auto from = source.sample(sample);
    const T f = factor(sample);
    T sum = 0;
    for (int tile = threadIdx.x / kWarp; tile < shape.tiles(); tile += blockDim.x / kWarp) {
      const TilePlace at = TilePlace::after(tile, shape.rows());
      add_inner(sum, from, Tiles<T>::read(shape.tile<T>(A, sample, at)), at, f);
    }
    return sum;
  }
};

template <class F, class T>
__global__ void __launch_bounds__(kGridThreads) sum_kernel(const F f, const GridShape shape, T* sums) {
  wait_for_kernels_before();
  const T sum = block_sum(f(shape, blockIdx.x), shared_memory<T>());
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// ---- the engine -----------------------------------------------------------------------------------------------------

/// Hands out matrices of a batch, and numbers for each of its samples, from a workspace; enqueues on a stream.
template <class T> class GridEngine {
 public:
  /// None yet where null. That of a symmetric matrix is its own transpose.
  struct Matrix {
    char *data = nullptr, *transpose = nullptr;
  };

  using Scalar = GridScalar<T>;

  static constexpr int kMostScalars = 4;  // sums: a trace and two inner products
  /// Elements of T, at multiples of 16 bytes.
  static int64_t workspace_size(const GridShape& shape, int matrices) {
    return shape.bytes<T>() / int64_t(sizeof(T)) * matrices + shape.batch * kMostScalars;
  }

  /// With clusters where `in_clusters`.
  GridEngine(const GridShape& shape, bool in_clusters, int matrices, T* workspace, void* stream)
      : shape_(shape), in_clusters_(in_clusters), stream_(stream) {
    char* next = reinterpret_cast<char*>(workspace);
    for (int m = 0; m < matrices; ++m, next += shape.bytes<T>()) free_.push_back(next);
    scalars_ = reinterpret_cast<T*>(next);
  }

  Matrix matrix() const { return {}; }

  template <class Pointer> void load(Matrix& A, const RootView<const T, Pointer>& source) {
    if (!A.data) A.data = A.transpose = take();
    elements("load", GridLoad<T, Pointer>{A.data, source}, shape_.tiles());
  }
  Scalar trace(const Matrix& A) { return sum("trace", GridTrace<T>{A.data}); }
  template <class Pointer> Scalar inner(const RootView<const T, Pointer>& source, const Matrix& A) {
    return inner(source, A, Scalar(1));
  }
  template <class Pointer>
  Scalar inner(const RootView<const T, Pointer>& source, const Matrix& A, const Scalar& factor) {
    flush();
    return sum("inner", GridInner<T, Pointer>{source, A.data, factor});
  }

  /// The numbers of a batch, 1 where null.
  Scalar number(const T* each) { return {T(1), each}; }

  void divide(Matrix& A, const Scalar& s) { affine(A, Scalar(0), s, A, true); }
  void scale(Matrix& D, double alpha, const Matrix& A) { affine(D, Scalar(0), Scalar(T(alpha)), A, false); }
  void scale(Matrix& D, const Scalar& alpha, const Matrix& A) { affine(D, Scalar(0), alpha, A, false); }
  void identity_plus(Matrix& D, double alpha, double beta, const Matrix& A) {
    affine(D, Scalar(T(alpha)), Scalar(T(beta)), A, false);
  }
  void identity_plus(Matrix& D, const Scalar& alpha, const Scalar& beta, const Matrix& A) {
    affine(D, alpha, beta, A, false);
  }

  void product(Matrix& D, double alpha, double beta, const Matrix& A, const Matrix& B) {
    enqueue(D, alpha, beta, A, B, nullptr, nullptr);
  }
  void products(Matrix& D, double alpha, double beta, const Matrix& A1, const Matrix& B1, const Matrix& A2,
                const Matrix& B2) {
    enqueue(D, alpha, beta, A1, B1, &A2, &B2);
  }
  Matrix product(Matrix& D, Matrix& E, const Matrix& A, const Matrix& B, bool in_full) {
    return enqueue(D, E, A, B, nullptr, nullptr, in_full);
  }
  Matrix products(Matrix& D, Matrix& E, const Matrix& A1, const Matrix& B1, const Matrix& A2, const Matrix& B2,
                  bool in_full) {
    return enqueue(D, E, A1, B1, &A2, &B2, in_full);
  }

  template <class Pointer> void write(const Matrix& A, const RootView<T, Pointer>& result, const Scalar& divisor) {
    flush();
    elements("write", GridWrite<T, Pointer>{result, A.data, divisor}, shape_.tiles());
  }
  template <class Pointer>
  void write_means(const Matrix& A, const RootView<T, Pointer>& result, const Scalar& divisor) {
    flush();
    elements("write_means", GridWriteMeans<T, Pointer>{result, A.data, divisor}, shape_.rows());
  }

 private:
  static GridProduct::Operand operand(const Matrix& A) { return {A.data, A.transpose}; }

  /// D = alpha D + beta (A1 B1 + A2 B2), A1 B1 alone where A2 is null.
  void enqueue(Matrix& D, double alpha, double beta, const Matrix& A1, const Matrix& B1, const Matrix* A2,
               const Matrix* B2, bool symmetric = true) {
    GridProduct product = {};
    product.left[0] = operand(A1), product.right[0] = operand(B1);
    product.dual = A2 != nullptr;
    if (product.dual) product.left[1] = operand(*A2), product.right[1] = operand(*B2);
    product.added[0] = alpha == 0 ? nullptr : D.data;
    product.alpha = alpha, product.beta = beta;
    product.symmetric = symmetric;
    const bool waits = needs(product.added[0]) || needs(product.left[0]) || needs(product.right[0]) ||
                       needs(product.left[1]) || needs(product.right[1]);
    GridProduct* derivative = waits ? nullptr : find_derivative(product);
    if (!derivative && (waits || waiting_.count == GridProducts::kMost || of_other_kind(product))) flush();

    if (D.data) retired_.push_back(D.data);  // it stays as it is for products that wait, until they are launched
    D.data = D.transpose = take();
    product.result[0] = D.data;
    if (derivative) {
      derivative->result[1] = product.result[0];
      derivative->added[1] = product.added[0];
    } else {
      waiting_.product[waiting_.count++] = product;
    }
  }

  /// D = A1 B1 + A2 B2; in full also its transpose E, from the factors exchanged.
  Matrix enqueue(Matrix& D, Matrix& E, const Matrix& A1, const Matrix& B1, const Matrix* A2, const Matrix* B2,
                 bool in_full) {
    enqueue(D, 0, 1, A1, B1, A2, B2, !in_full);
    if (!in_full) return D;
    if (A2)
      enqueue(E, 0, 1, *B2, *A2, &B1, &A1, false);
    else
      enqueue(E, 0, 1, B1, A1, nullptr, nullptr, false);
    D.transpose = E.data;
    E.transpose = D.data;
    return E;
  }

  /// Whether a product that waits has this result.
  bool needs(const char* matrix) const {
    for (int p = 0; p < waiting_.count; ++p)
      if (matrix && (waiting_.product[p].result[0] == matrix || waiting_.product[p].result[1] == matrix)) return true;
    return false;
  }
  bool needs(const GridProduct::Operand& operand) const { return needs(operand.upper) || needs(operand.transpose); }

  bool of_other_kind(const GridProduct& product) const {
    return waiting_.count > 0 && waiting_.product[0].dual != product.dual;
  }

  /// The one that waits of which this is the product whose derivative it is, see GridProduct.
  GridProduct* find_derivative(const GridProduct& product) {
    for (int p = 0; p < waiting_.count; ++p) {
      GridProduct& other = waiting_.product[p];
      if (!product.dual && other.dual && !other.result[1] && other.left[1].upper == product.left[0].upper &&
          other.right[0].upper == product.right[0].upper && other.alpha == product.alpha &&
          other.beta == product.beta && other.symmetric == product.symmetric)
        return &other;
    }
    return nullptr;
  }

  void flush() {
    if (waiting_.count == 0) return;
    waiting_.product[0].dual ? launch_products<true>() : launch_products<false>();
    waiting_.count = 0;
    free_.insert(free_.end(), retired_.begin(), retired_.end());
    retired_.clear();
  }
  template <bool kDual> void launch_products() {
    if constexpr (std::is_same_v<T, float>)
      if (in_clusters_) return launch_products<GridProductBlock<float, kDual, true>>(product_cluster_kernel<kDual>);
    launch_products<GridProductBlock<T, kDual>>(product_kernel<T, kDual>);
  }
  template <class Block> void launch_products(void (*kernel)(GridProducts, GridShape)) {
    const int64_t sides = Block::sides(shape_), places = sides * (sides + 1) / 2;
    launch_clusters("product", kernel, places * waiting_.count * shape_.batch, Block::kBlocksOfCluster, kProductThreads,
                    Block::kSharedBytes, stream_, waiting_, shape_);
  }

  void affine(Matrix& D, const GridScalar<T>& alpha, const GridScalar<T>& beta, const Matrix& A, bool divide) {
    flush();
    char* from = A.data;
    if (!D.data) D.data = D.transpose = take();
    elements("affine", GridAffine<T>{D.data, from, alpha, beta, divide}, shape_.tiles());
  }

  template <class F> void elements(const char* name, const F& f, int items) {
    launch(name, elements_kernel<F>, blocks(shape_.batch * items * kWarp), kGridThreads, 0, stream_, f, shape_, items);
  }
  template <class F> Scalar sum(const char* name, const F& f) {
    T* sums = std::exchange(scalars_, scalars_ + shape_.batch);
    launch(name, sum_kernel<F, T>, shape_.batch, kGridThreads, kGridThreads / kWarp * sizeof(T), stream_, f, shape_,
           sums);
    return {T(1), sums};
  }

  char* take() {
    char* matrix = free_.back();
    free_.pop_back();
    return matrix;
  }
  static int64_t blocks(int64_t threads) { return (threads + kGridThreads - 1) / kGridThreads; }

  GridShape shape_;
  bool in_clusters_;
  void* stream_;
  T* scalars_;
  std::vector<char*> free_, retired_;
  GridProducts waiting_;
};

}  // namespace isqrt::cuda
