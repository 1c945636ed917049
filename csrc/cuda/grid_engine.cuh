// The Engine of newton_schulz.h and normalization.h on the whole device, for more channels than a block can hold:
// a batch of matrices in global memory, and kernels that are enqueued by the host.
//
// A product never writes into an operand; products that do not need each other's results wait for a common launch: two
// launches a step of the iteration, and a grid large enough to fill the device. A product whose derivative waits joins
// it, and shares its operands, see GridProduct. What is done elementwise waits, too, for the launch of all of it that
// the next products want, or is done on the way out; and so do sums.
#pragma once
#include <algorithm>
#include <array>
#include <stdexcept>
#include <utility>
#include <vector>

#include "block.cuh"
#include "grid_product.cuh"
#include "number.cuh"
#include "warpgroup_product.cuh"

namespace isqrt::cuda {

constexpr int kGridThreads = 256;

// ---- elementwise kernels --------------------------------------------------------------------------------------------

/// A number for each sample, in postfix notation: what uses it computes it, once in each warp, which takes less time
/// than a launch for each operation. Of a sum there are parts, one for each lane of whoever adds them up.
template <class T> class GridScalar {
 public:
  GridScalar(T number, const T* each = nullptr, int parts = 1) : steps_{kOperand}, operands_{{number, each, parts}} {}

  /// Whether it is this number for all samples, as is known without them.
  bool is(T number) const { return steps_count_ == 1 && !operands_[0].each && operands_[0].number == number; }

  friend GridScalar operator*(const GridScalar& a, const GridScalar& b) { return a.then(b, kMultiply); }
  friend GridScalar operator/(const GridScalar& a, const GridScalar& b) { return a.then(b, kDivide); }
  friend GridScalar operator-(const GridScalar& a, const GridScalar& b) { return a.then(b, kSubtract); }
  friend GridScalar operator*(double a, const GridScalar& b) { return GridScalar(T(a)) * b; }
  friend GridScalar sqrt(const GridScalar& a) { return a.then(kSquareRoot); }
  friend GridScalar nonzero(const GridScalar& a) { return a.then(kNonzero); }

  __device__ T operator()(int64_t sample) const {
    if (steps_count_ == 1 && !operands_[0].each) return operands_[0].number;
    T stack[kDepth] = {};  // the last one first
    int operand = 0;
#pragma unroll 1
    for (int n = 0; n < steps_count_; ++n) {
      const Step step = steps_[n];
      if (step == kOperand) {
#pragma unroll
        for (int d = kDepth - 1; d > 0; --d) stack[d] = stack[d - 1];
        const Operand& o = operands_[operand++];
        stack[0] = o.each ? o.number * total(o.each + sample * o.parts, o.parts) : o.number;
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
  /// One number for all samples, times one for each where `each` is not null, which is the sum of so many.
  struct Operand {
    T number;
    const T* each;
    int parts;
  };
  static __device__ T total(const T* part, int parts) {
    const int lane = int(threadIdx.x) % kWarp;
    return warp_sum(lane < parts ? part[lane] : T(0));
  }
  static constexpr int kDepth = 4, kMostSteps = 20, kMostOperands = 10;  // normalization.h has 14 and 6

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

/// By 1 most often, without all those divisions.
template <class T> __device__ __forceinline__ void divide(WarpTile<T>& tile, T divisor) {
  if (divisor != T(1)) tile.for_each([&](T& m, int, int) { m /= divisor; });
}

/// alpha I + beta M / divisor of a matrix M in the workspace or, where that is null, of sym(source).
template <class T> struct GridMap {
  using Source = RootView<const T, Elements<const T>>;
  char* M = nullptr;
  Source source = {};
  GridScalar<T> alpha = T(0), beta = T(1), divisor = T(1);

  /// A tile of it, for a warp.
  __device__ WarpTile<T> tile(const GridShape& shape, int64_t sample, const TilePlace& at) const {
    WarpTile<T> result =  // is on its way while the numbers are computed
        M ? Tiles<T>::read(shape.tile<T>(M, sample, at)) : symmetric_tile<T>(source.sample(sample), at);
    const T a = alpha(sample), b = beta(sample);
    divide(result, divisor(sample));
    result.for_each([&](T& m, int r, int c) {
      m *= b;
      if (at.i(r) == at.j(c) && at.i(r) < shape.channels) m += a;
    });
    return result;
  }
};

/// The running warp's number. 32 bits: of a tile for each of 2^32 warps no device has the memory.
__device__ inline unsigned grid_warp() { return blockIdx.x * (kGridThreads / kWarp) + threadIdx.x / kWarp; }

/// The sample and the tile of the running warp, one after the other; beyond the last tile of a batch, more samples.
struct GridWork {
  int64_t sample;
  TilePlace at;
  __device__ explicit GridWork(const GridShape& shape) {
    const unsigned warp = grid_warp(), tiles = unsigned(shape.tiles());
    sample = warp / tiles;
    at = TilePlace::after(int(warp % tiles), shape.rows());
  }
};

/// Matrices that wait for a launch, none of which another one is made of.
template <class T> struct GridMaps {
  static constexpr int kMost = 4;
  int count = 0;
  GridMap<T> map[kMost];
  char* result[kMost] = {};
};

template <class T>
__global__ void __launch_bounds__(kGridThreads, 1) map_kernel(const GridMaps<T> maps, const GridShape shape) {
  wait_for_kernels_before(false);  // products follow
  const GridWork own(shape);
  const unsigned map = unsigned(own.sample) / unsigned(shape.batch),
                 sample = unsigned(own.sample) % unsigned(shape.batch);
  if (map >= unsigned(maps.count)) return;
  WarpTile<T> result = maps.map[map].tile(shape, sample, own.at);
  write_tile(shape, maps.result[map], maps.result[map], sample, own.at, result, true);
}

/// A matrix / divisor copied out, or its upper triangle.
template <class T>
__global__ void __launch_bounds__(kGridThreads, 1)
    write_kernel(const GridMap<T> map, const RootView<T, Elements<T>> result, const GridScalar<T> divisor,
                 const GridShape shape) {
  wait_for_kernels_before();
  const GridWork own(shape);
  if (own.sample >= shape.batch) return;
  WarpTile<T> tile = map.tile(shape, own.sample, own.at);
  divide(tile, divisor(own.sample));
  store_tile<int64_t>(result.sample(own.sample), tile, own.at);
}

/// The means of the columns of a matrix / divisor, 16 of them a warp: two lanes share a column. Its alpha is 0.
template <class T>
__global__ void __launch_bounds__(kGridThreads, 1)
    write_means_kernel(const GridMap<T> map, const RootView<T, Elements<T>> result, const GridScalar<T> divisor,
                       const GridShape shape) {
  wait_for_kernels_before();
  const unsigned warp = grid_warp(), rows = unsigned(shape.rows());
  const int64_t sample = warp / rows;
  if (sample >= shape.batch) return;
  const auto source = map.source.sample(sample);
  const int j = kTile * int(warp % rows) + threadIdx.x % kTile;
  T sum = 0;
  for (int i = threadIdx.x % kWarp / kTile; i < shape.channels; i += kWarp / kTile)
    sum += map.M ? shape.element<T>(map.M, sample, i, j) : symmetric<T>(source, i, j);
  sum += __shfl_xor_sync(0xffffffffu, sum, kTile);
  const T mean = map.beta(sample) * (sum / T(shape.channels)) / map.divisor(sample) / divisor(sample);
  if (threadIdx.x % kWarp < kTile && j < shape.channels) store_number(result.sample(sample).data + j, mean);
}

/// What one sample adds up: <factor (factor sym(source)), A>, or the trace of the source where A is null; in so many
/// parts.
template <class T> struct GridSum {
  typename GridMap<T>::Source source = {};
  char* A = nullptr;
  GridScalar<T> factor = T(1);
  T* result = nullptr;
  int parts = 1;
  __device__ T operator()(const GridShape& shape, int64_t sample, int part) const {
    const auto from = source.sample(sample);
    T sum = 0;
    if (!A) {
      for (int i = threadIdx.x; i < shape.channels; i += kGridThreads) sum += from.symmetric(i, i);
      return sum;
    }
    const T f = factor(sample);
    constexpr int kWarps = kGridThreads / kWarp;
    for (int tile = part * kWarps + threadIdx.x / kWarp; tile < shape.tiles(); tile += parts * kWarps) {
      const TilePlace at = TilePlace::after(tile, shape.rows());
      add_inner(sum, from, Tiles<T>::read(shape.tile<T>(A, sample, at)), at, f);
    }
    return sum;
  }
};

/// Sums that wait for a launch, none of which another one needs.
template <class T> struct GridSums {
  static constexpr int kMost = 2;
  int count = 0;
  GridSum<T> sum[kMost];

  /// Blocks of two tiles a warp, no more than there are lanes to add up what they find.
  static int parts(const GridShape& shape) {
    constexpr int kTiles = 2 * kGridThreads / kWarp;
    return std::min(kWarp, (shape.tiles() + kTiles - 1) / kTiles);
  }
};

template <class T>
__global__ void __launch_bounds__(kGridThreads, 1) sum_kernel(const GridSums<T> sums, const GridShape shape) {
  wait_for_kernels_before();
  const unsigned batch = unsigned(shape.batch), which = blockIdx.x / batch, sample = blockIdx.x % batch;
  const GridSum<T>& own = sums.sum[which % sums.count];
  const int part = int(which) / sums.count;
  if (part >= own.parts) return;
  const T sum = block_sum(own(shape, sample, part), shared_memory<T>());
  if (threadIdx.x == 0) own.result[sample * int64_t(own.parts) + part] = sum;
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

  static constexpr bool kTakesTwoSteps = true;  // see newton_schulz.h

  static constexpr int kMostScalars = 4;  // sums: a trace and two inner products
  /// Elements of T, at multiples of 16 bytes.
  static int64_t workspace_size(const GridShape& shape, int matrices) {
    return shape.bytes<T>() / int64_t(sizeof(T)) * matrices + shape.batch * kMostScalars * GridSums<T>::parts(shape);
  }

  GridEngine(const GridShape& shape, int matrices, T* workspace, void* stream) : shape_(shape), stream_(stream) {
    char* next = reinterpret_cast<char*>(workspace);
    for (int m = 0; m < matrices; ++m, next += shape.bytes<T>()) free_.push_back(next);
    scalars_ = reinterpret_cast<T*>(next);
  }

  Matrix matrix() const { return {}; }
  void release(Matrix& A) {
    retired_.push_back(A.data);
    A = {};
  }

  template <class Pointer> void load(Matrix& A, const RootView<const T, Pointer>& source, const Scalar& divisor) {
    wait(A, {.source = with_elements<const T>(source), .divisor = divisor});
  }
  template <class Pointer> Scalar load_normalized(Matrix& A, const RootView<const T, Pointer>& source) {
    const auto elements = with_elements<const T>(source);
    const Scalar t = sum(elements, nullptr, Scalar(1));
    load(A, source, nonzero(t));
    return t;
  }
  template <class Pointer> Scalar inner(const RootView<const T, Pointer>& source, const Matrix& A) {
    return inner(source, A, Scalar(1));
  }
  template <class Pointer>
  Scalar inner(const RootView<const T, Pointer>& source, const Matrix& A, const Scalar& factor) {
    if (find(A) || needs(A.data)) flush();
    return sum(with_elements<const T>(source), A.data, factor);
  }

  /// The numbers of a batch, 1 where null.
  Scalar number(const T* each) { return {T(1), each}; }

  void scale(Matrix& D, double alpha, const Matrix& A) { identity_plus(D, 0, alpha, A); }
  void identity_plus(Matrix& D, double alpha, double beta, const Matrix& A) {
    identity_plus(D, Scalar(T(alpha)), Scalar(T(beta)), A);
  }
  Matrix result(const Scalar& beta, const Matrix& A) { return result(Scalar(0), beta, A); }
  Matrix result(const Scalar& alpha, const Scalar& beta, Matrix A) {
    identity_plus(A, alpha, beta, A);
    return A;
  }
  void identity_plus(Matrix& D, const Scalar& alpha, const Scalar& beta, const Matrix& A) {
    if (maps_.count == GridMaps<T>::kMost) flush();  // not later: it would give away what this one is made of
    GridMap<T> map = map_of(A);
    map.alpha = alpha;
    map.beta = map.beta.is(1) ? beta : beta * map.beta;
    wait(D, map);
  }

  void product(Matrix& D, double alpha, double beta, const Matrix& A, const Matrix& B) {
    enqueue(D, {added(alpha, D)}, beta, A, B, nullptr, nullptr);
  }
  void products(Matrix& D, double alpha, double beta, const Matrix& A1, const Matrix& B1, const Matrix& A2,
                const Matrix& B2) {
    enqueue(D, {added(alpha, D)}, beta, A1, B1, &A2, &B2);
  }
  void product(Matrix& D, double alpha, const Matrix& F, double beta, const Matrix& G, double gamma, const Matrix& A,
               const Matrix& B) {
    enqueue(D, {added(alpha, F), added(beta, G)}, gamma, A, B, nullptr, nullptr);
  }
  void products(Matrix& D, double alpha, const Matrix& F, double beta, const Matrix& G, double gamma, const Matrix& A1,
                const Matrix& B1, const Matrix& A2, const Matrix& B2) {
    enqueue(D, {added(alpha, F), added(beta, G)}, gamma, A1, B1, &A2, &B2);
  }
  Matrix product(Matrix& D, Matrix& E, const Matrix& A, const Matrix& B, bool in_full) {
    return enqueue(D, E, A, B, nullptr, nullptr, in_full);
  }
  Matrix products(Matrix& D, Matrix& E, const Matrix& A1, const Matrix& B1, const Matrix& A2, const Matrix& B2,
                  bool in_full) {
    return enqueue(D, E, A1, B1, &A2, &B2, in_full);
  }

  template <class Pointer> void write(const Matrix& A, const RootView<T, Pointer>& result, const Scalar& divisor) {
    const GridMap<T>* waits = find(A);
    const GridMap<T> map = waits ? *waits : map_of(A);
    launch_sums();
    launch("write", write_kernel<T>, warps(shape_.tiles()), kGridThreads, 0, stream_, map, with_elements<T>(result),
           divisor, shape_);
  }
  template <class Pointer>
  void write_means(const Matrix& A, const RootView<T, Pointer>& result, const Scalar& divisor) {
    const GridMap<T> map = map_of(A);
    launch_sums();
    launch("write_means", write_means_kernel<T>, warps(shape_.rows()), kGridThreads, 0, stream_, map,
           with_elements<T>(result), divisor, shape_);
  }

 private:
  /// D = map, in the next launch of matrices that wait.
  void wait(Matrix& D, const GridMap<T>& map) {
    if (maps_.count == GridMaps<T>::kMost) flush();
    renew(D);
    maps_.result[maps_.count] = D.data;
    maps_.map[maps_.count++] = map;
  }
  GridMap<T>* find(const Matrix& A) {
    for (int m = 0; m < maps_.count; ++m)
      if (maps_.result[m] == A.data) return &maps_.map[m];
    return nullptr;
  }
  /// beta M / divisor that is A: what A waits for, or A itself once it is there.
  GridMap<T> map_of(const Matrix& A) {
    const GridMap<T>* waits = find(A);
    if (waits && waits->alpha.is(0)) return *waits;
    if (waits || needs(A.data)) flush();
    return {.M = A.data};
  }

  Scalar sum(const typename GridMap<T>::Source& source, char* A, const Scalar& factor) {
    if (sums_.count == GridSums<T>::kMost) launch_sums();
    const int parts = A ? GridSums<T>::parts(shape_) : 1;
    T* result = std::exchange(scalars_, scalars_ + shape_.batch * parts);
    sums_.sum[sums_.count++] = {source, A, factor, result, parts};
    return {T(1), result, parts};
  }

  static GridProduct::Operand operand(const Matrix& A) { return {A.data, A.transpose}; }

  using Addends = std::array<GridProduct::Addend, GridProduct::kAddends>;
  static GridProduct::Addend added(double factor, const Matrix& A) {
    return {factor, {factor == 0 ? nullptr : A.data}};
  }

  /// D = what is added + gamma (A1 B1 + A2 B2), A1 B1 alone where A2 is null. Of a D that is not symmetric this is the
  /// upper triangle, and it is new.
  void enqueue(Matrix& D, const Addends& addends, double gamma, const Matrix& A1, const Matrix& B1, const Matrix* A2,
               const Matrix* B2, bool symmetric = true) {
    GridProduct product = {};
    product.left[0] = operand(A1), product.right[0] = operand(B1);
    product.dual = A2 != nullptr;
    if (product.dual) product.left[1] = operand(*A2), product.right[1] = operand(*B2);
    std::copy(addends.begin(), addends.end(), product.added);
    product.gamma = gamma;
    const auto is_waited_for = [&](const auto& addend) { return needs(addend.matrix[0]); };
    const bool waits = std::any_of(addends.begin(), addends.end(), is_waited_for) || needs_operand(A1, B1, A2, B2);
    GridProduct* derivative = waits ? nullptr : find_derivative(product, symmetric);
    if (!derivative && (waits || waiting_.count == GridProducts::kMost || of_other_kind(product))) flush();

    if (symmetric) renew(D);
    product.result[0] = operand(D);
    if (derivative) {
      derivative->result[1] = product.result[0];
      for (int a = 0; a < GridProduct::kAddends; ++a) derivative->added[a].matrix[1] = addends[a].matrix[0];
    } else {
      waiting_.product[waiting_.count++] = product;
    }
  }

  /// D = A1 B1 + A2 B2; in full also its transpose E, from the factors exchanged.
  Matrix enqueue(Matrix& D, Matrix& E, const Matrix& A1, const Matrix& B1, const Matrix* A2, const Matrix* B2,
                 bool in_full) {
    if (!in_full) {
      enqueue(D, {}, 1, A1, B1, A2, B2);
      return D;
    }
    if (needs_operand(A1, B1, A2, B2)) flush();
    renew(D), renew(E);
    D.transpose = E.data;
    E.transpose = D.data;
    enqueue(D, {}, 1, A1, B1, A2, B2, false);
    A2 ? enqueue(E, {}, 1, *B2, *A2, &B1, &A1, false) : enqueue(E, {}, 1, B1, A1, nullptr, nullptr, false);
    return E;
  }

  /// Whether a product that waits has this result.
  bool needs(const char* matrix) const {
    for (int p = 0; p < waiting_.count; ++p)
      if (matrix && (waiting_.product[p].result[0].upper == matrix || waiting_.product[p].result[1].upper == matrix))
        return true;
    return false;
  }
  bool needs_operand(const Matrix& A1, const Matrix& B1, const Matrix* A2, const Matrix* B2) const {
    const auto waits = [&](const Matrix& A) { return needs(A.data) || needs(A.transpose); };
    return waits(A1) || waits(B1) || (A2 && (waits(*A2) || waits(*B2)));
  }

  bool of_other_kind(const GridProduct& product) const {
    return waiting_.count > 0 && waiting_.product[0].dual != product.dual;
  }

  /// The one that waits of which this is the product whose derivative it is, see GridProduct.
  GridProduct* find_derivative(const GridProduct& product, bool symmetric) {
    for (int p = 0; p < waiting_.count; ++p) {
      GridProduct& other = waiting_.product[p];
      if (!product.dual && other.dual && !other.result[1].upper && other.left[1].upper == product.left[0].upper &&
          other.right[0].upper == product.right[0].upper && other.added[0].factor == product.added[0].factor &&
          other.added[1].factor == product.added[1].factor && other.gamma == product.gamma &&
          symmetric == (other.result[0].upper == other.result[0].transpose))
        return &other;
    }
    return nullptr;
  }

  /// Launches all that waits: sums of matrices that are there, matrices of which products are, products.
  void flush() {
    launch_sums();
    launch("map", map_kernel<T>, warps(maps_.count * shape_.tiles()), kGridThreads, 0, stream_, maps_, shape_);
    maps_.count = 0;
    if (waiting_.count > 0) waiting_.product[0].dual ? launch_products<true>() : launch_products<false>();
    waiting_.count = 0;
    free_.insert(free_.end(), retired_.begin(), retired_.end());
    retired_.clear();
  }
  void launch_sums() {
    int parts = 0;
    for (int s = 0; s < sums_.count; ++s) parts = std::max(parts, sums_.sum[s].parts);
    launch("sum", sum_kernel<T>, sums_.count * shape_.batch * parts, kGridThreads, kGridThreads / kWarp * sizeof(T),
           stream_, sums_, shape_);
    sums_.count = 0;
  }
  template <bool kDual> void launch_products() {
    const auto launch_blocks = [&](auto block, const auto& kernel) {
      using Block = typename decltype(block)::type;
      launch("product", kernel, GridShare::places(shape_, Block::kSide) * waiting_.count * shape_.batch,
             Block::kThreads, Block::kSharedBytes, stream_, waiting_, shape_);
    };
    if constexpr (std::is_same_v<T, float>)
      if (shape_.for_warpgroups)
        return launch_blocks(std::type_identity<WarpgroupProductBlock<kDual>>(), warpgroup_product_kernel<kDual>);
    launch_blocks(std::type_identity<GridProductBlock<T, kDual>>(), product_kernel<T, kDual>);
  }

  /// Blocks with a warp for each of so many items of a sample.
  int64_t warps(int64_t items) const {
    constexpr int64_t kWarps = kGridThreads / kWarp;
    return (shape_.batch * items + kWarps - 1) / kWarps;
  }

  /// Other memory for D: the old one stays as it is for all that waits, until that is launched.
  void renew(Matrix& D) {
    if (free_.empty()) throw std::logic_error("GridEngine: too few matrices");
    if (D.data) retired_.push_back(D.data);
    D.data = D.transpose = free_.back();
    free_.pop_back();
  }

  GridShape shape_;
  void* stream_;
  T* scalars_;
  std::vector<char*> free_, retired_;
  GridSums<T> sums_;
  GridMaps<T> maps_;
  GridProducts waiting_;
};

}  // namespace isqrt::cuda
