// What engines of normalization.h have in common whose iteration is a Program, in float32: it runs in a loop, with the
// code of each kind of operation there once.
//
// What takes time is the chain of instructions from one meeting to the next, see compute() of the engines, and what the
// first run through any code waits for instructions.
#pragma once
#include "matrix_engine.cuh"
#include "program.h"

namespace isqrt::cuda {

/// The Engine derives from it. It has compute(stage, reader), with a Reader of operands that each thread has once; and
/// meet(): all operations so far are done, in all threads that take part.
template <class Engine, class Storage> class ProgramEngine : public BlockMatrices<float, Storage> {
  using T = float;

 protected:
  using Base = BlockMatrices<T, Storage>;
  using Base::tile, Base::warp, Base::warps;
  using typename Base::Place, typename Base::Tiles;

 public:
  struct Matrix : Base::Matrix {
    int dealt = 0;
  };
  using Result = typename Base::template ResultOf<Matrix>;

  /// Before it waits for the kernels before it.
  __device__ ProgramEngine(int channels, const Program& program) : Base(channels), program_(program) {
    // Constant memory takes its time: all of the program is asked for once.
    constexpr int kLine = 64 / sizeof(uint32_t), kWords = sizeof(Program) / sizeof(uint32_t);
    if (warp() == warps() - 1)
      for (int word = kLine * Lane().number; word < kWords; word += kLine * kWarp)
        opaque(reinterpret_cast<const uint32_t*>(&program)[word]);
  }

  __device__ Matrix matrix() { return {Base::new_matrix(), 0}; }

  template <class Source> __device__ void load(const Matrix& A, const Source& source, T divisor) const {
    Base::load_tiles(A, source, divisor);
  }
  template <class Source> __device__ T load_normalized(const Matrix& A, const Source& source) const {
    return Base::load_normalized_tiles(A, source);
  }

  /// Runs the program, after its matrices were loaded.
  __device__ __forceinline__ void run() {
    const typename Engine::Reader reader;
#pragma unroll 1
    for (int n = 0; n < program_.stages; ++n) {
      const Stage stage = program_.stage[n];
      if (stage.kind == Stage::kProducts) {
        engine().compute(stage, reader);
        continue;
      }
      if (stage.meets) engine().meet();
      const Operation& o = program_.operation[stage.first];
      Base::identity_plus_tiles(at(o.to), o.alpha, o.beta, at(o.A0));
    }
    if (program_.maps) __syncthreads();
    meets_ = program_.meets;
  }
  __device__ Matrix at(const Program::Place& place) const { return {at(int(place.number)), place.dealt}; }
  __device__ const Program& program() const { return program_; }

  /// <grad, P> and <factor (factor sigma), D>: sources are on their way while products are waited for.
  template <class GradSource, class SigmaSource>
  __device__ InnerProducts<T> inner_products(const GradSource& grad, const Matrix& P, const SigmaSource& sigma,
                                             const Matrix& D, T factor) {
    T sums[2] = {};
    const Place first = Place::numbered(warp());
    WarpTile<T> of_grad = symmetric_tile<T>(grad, first), of_sigma = symmetric_tile<T>(sigma, first);
    if (meets_) engine().meet();
    Base::for_own_tiles([&](const Place& own) {
      if (own.number() != first.number())
        of_grad = symmetric_tile<T>(grad, own), of_sigma = symmetric_tile<T>(sigma, own);
      add_inner(sums[0], of_grad, Tiles::read(tile(P, own)), own, T(1));
      add_inner(sums[1], of_sigma, Tiles::read(tile(D, own)), own, factor);
    });
    block_sums(sums, shared_memory<T>());
    return {sums[0], sums[1]};
  }

  __device__ Result result(T beta, const Matrix& A) const { return {0, beta, A}; }
  __device__ Result result(T alpha, T beta, const Matrix& A) const { return {alpha, beta, A}; }

 protected:
  /// The one of that number, as the program has it.
  __device__ typename Base::Matrix at(int number) const {
    const int first = Base::matrices() + number * Storage::bytes(Base::channels_);
    return {first, first};
  }

  const Program& program_;
  bool meets_ = false;  // whether there are products that were not met for

 private:
  __device__ Engine& engine() { return static_cast<Engine&>(*this); }
};

/// Of newton_schulz.h and normalization.h, in the way of such an engine.
template <class Engine>
concept RunsProgram = requires(Engine& e) { e.program(); };

template <RunsProgram Engine, class Matrix>
__device__ void newton_schulz(Engine& e, Iterates<Matrix>& m, const Steps&, Root) {
  e.run();
  m.Y = e.at(e.program().Y), m.Z = e.at(e.program().Z);
}
template <RunsProgram Engine, class Matrix>
__device__ void newton_schulz_tangent(Engine& e, Iterates<Matrix>& m, Iterates<Matrix>& d, const Steps& steps,
                                      Root root) {
  newton_schulz(e, m, steps, root);
  d.Y = e.at(e.program().dY), d.Z = e.at(e.program().dZ);
}
template <RunsProgram Engine, class Matrix, class SigmaSource, class GradSource, class Scalar>
__device__ InnerProducts<Scalar> inner_products(Engine& e, const GradSource& grad, const Matrix& P,
                                                const SigmaSource& sigma, const Matrix& D, const Scalar& factor) {
  return e.inner_products(grad, P, sigma, D, factor);
}

}  // namespace isqrt::cuda
