// What a cluster of blocks, or a block of warpgroups, does with a sample's matrices between loading and writing them:
// the operations of newton_schulz.h as a list, which the host records and the kernel runs in a loop, so that the code
// of each kind of operation is there once; and when all have to meet.
#pragma once
#include <algorithm>
#include <stdexcept>

#include "../newton_schulz.h"

namespace isqrt::cuda {

/// to = alpha added + beta (A0 B0 + A1 B1), without A1 B1 where terms = 1; or alpha I + beta A0. Matrices are numbers,
/// in the order in which they were asked for.
struct alignas(16) Operation {
  static constexpr uint32_t kNone = 0xff;
  static constexpr uint32_t kAcross = 0x80;  // with the number of a right factor, of which the transpose is meant
  uint32_t to : 8 = 0, added : 8 = 0, terms : 16 = 0;
  uint32_t A0 : 8 = 0, B0 : 8 = 0, A1 : 8 = 0, B1 : 8 = 0;
  float alpha = 0, beta = 0;
};

/// Products that can be computed at the same time; or one operation that each block does for itself.
struct Stage {
  enum Kind : uint32_t { kProducts, kIdentityPlus };
  static constexpr int kMostWaiting = 3;  // tiles of a warp
  uint32_t kind : 8;
  uint32_t meets : 4;  // all stages so far are done, in each block, before this one begins
  uint32_t waits : 4;  // and all is read, in each block, before results of this one replace it
  uint32_t first : 8, count : 8;
};

struct Program {
  static constexpr int kMost =
      56;  // 4 and 6 for each of at most 8 further steps, and a few: later ones would be in full
  /// A matrix; and the worker that has the first of its tiles, if the stage that it comes from was not met for.
  struct Place {
    uint8_t number = 0, dealt = 0;
  };
  int operations = 0, stages = 0;
  // Since the last meeting there were products, or what is done elementwise. Without any meeting there is one to come:
  // blocks of a cluster that have begun to meet must not return before.
  bool meets = false, maps = false;
  Place Y, Z, dY, dZ;
  Operation operation[kMost];
  Stage stage[kMost];
};

/// The Engine of newton_schulz.h that makes the list. Operations need no meeting between them as long as none reads or
/// overwrites what other warps have read or written since the last one: what a product changes is written to a spare
/// matrix, which takes its place. So a step of the iteration has two meetings, and all products between them are
/// computed at the same time. Without spare matrices the results wait in registers for one meeting more, and as many
/// products as find room there are computed at the same time.
class ProgramRecorder {
 public:
  struct Matrix {
    uint8_t number = 0;
    bool across = false;
    unsigned bit() const { return 1u << number; }
    uint32_t factor() const { return across ? number | Operation::kAcross : number; }
  };

  /// For so many workers, tiles of a matrix, matrices that will be asked for, and spare ones, or none; and an engine
  /// that computes whole matrices, or one triangle.
  ProgramRecorder(int workers, int tiles, int matrices, int spares, bool whole)
      : workers_(workers), tiles_(tiles), spares_(spares), whole_(whole) {
    for (int s = 0; s < spares; ++s) spare_[s].number = uint8_t(matrices + s);
  }

  Matrix matrix() { return {next_matrix_++}; }

  /// Each block has this matrix in all of its warps' tiles.
  void load(const Matrix& A) { mapped_ |= A.bit(); }

  void product(Matrix& D, double alpha, double beta, Matrix A, Matrix B) { products(D, alpha, beta, A, B, A, B, 1); }
  void products(Matrix& D, double alpha, double beta, Matrix A1, Matrix B1, Matrix A2, Matrix B2, unsigned terms = 2) {
    const Matrix previous = D;
    if (spares_ > 0) {
      D = spare_[0];
      for (int s = 0; s + 1 < spares_; ++s) spare_[s] = spare_[s + 1];
      spare_[spares_ - 1] = previous;
    }
    add_products(D, &previous, alpha, beta, A1, B1, A2, B2, terms);
  }
  Matrix product(Matrix& D, Matrix, Matrix A, Matrix B, bool) {
    add_products(D, nullptr, 0, 1, A, B, A, B, 1);
    return {D.number, whole_};
  }
  Matrix products(Matrix& D, Matrix, Matrix A1, Matrix B1, Matrix A2, Matrix B2, bool) {
    add_products(D, nullptr, 0, 1, A1, B1, A2, B2, 2);
    return {D.number, whole_};
  }

  void scale(Matrix D, double alpha, Matrix A) { identity_plus(D, 0, alpha, A); }
  /// Each block for itself, a warp its own tiles of both.
  void identity_plus(Matrix D, double alpha, double beta, Matrix A) {
    append(Stage::kIdentityPlus, {.to = D.number, .A0 = A.number, .alpha = float(alpha), .beta = float(beta)},
           (A.bit() & written_) || (D.bit() & (read_ | written_)));
    read_ |= A.bit();
    mapped_ |= D.bit();
  }

  Program finish(const Iterates<Matrix>& m, const Iterates<Matrix>& d) {
    const auto first = program_.stage, last = first + program_.stages;
    const bool met = std::any_of(first, last, [](const Stage& stage) { return stage.meets; });
    program_.meets = written_ != 0 || !met, program_.maps = mapped_ != 0;
    program_.Y = place(m.Y), program_.Z = place(m.Z), program_.dY = place(d.Y), program_.dZ = place(d.Z);
    return program_;
  }

 private:
  Stage& last() { return program_.stage[program_.stages - 1]; }

  void append(Stage::Kind kind, const Operation& operation, bool meets, bool waits = false) {
    if (program_.operations == Program::kMost) throw std::logic_error("ProgramRecorder: too many operations");
    if (meets) read_ = written_ = mapped_ = 0;
    if (meets || kind != Stage::kProducts || !joins(waits))
      program_.stage[program_.stages++] = {kind, meets, waits, uint32_t(program_.operations), 0};
    // The longest ones first: they are dealt out to the workers one by one.
    Stage& stage = last();
    stage.waits |= waits;
    Operation* at = program_.operation + program_.operations++;
    for (; at > program_.operation + stage.first && at[-1].terms < operation.terms; --at) at[0] = at[-1];
    *at = operation;
    ++stage.count;
  }
  /// Whether products belong to the last stage, whose results all wait if those of one do.
  bool joins(bool waits) {
    if (program_.stages == 0 || last().kind != Stage::kProducts) return false;
    return !(waits || last().waits) || int(last().count + 1) * tiles_ <= Stage::kMostWaiting * workers_;
  }
  void add_products(Matrix D, const Matrix* added, double alpha, double beta, Matrix A1, Matrix B1, Matrix A2,
                    Matrix B2, unsigned terms) {
    const unsigned operands = A1.bit() | B1.bit() | A2.bit() | B2.bit() | (added ? added->bit() : 0);
    const bool meets = (operands | D.bit()) & (written_ | mapped_) || (spares_ > 0 && (D.bit() & read_));
    append(Stage::kProducts,
           {D.number, added ? added->number : Operation::kNone, terms, A1.number, B1.factor(), A2.number, B2.factor(),
            float(alpha), float(beta)},
           meets, D.bit() & (operands | (meets ? 0 : read_)));
    read_ |= operands;
    written_ |= D.bit();
  }
  Program::Place place(const Matrix& A) const {
    for (int s = program_.stages - 1; s >= 0; --s) {
      const Stage& stage = program_.stage[s];
      for (unsigned n = 0; stage.kind == Stage::kProducts && n < stage.count; ++n)
        if (program_.operation[stage.first + n].to == A.number) return {A.number, uint8_t(int(n) * tiles_ % workers_)};
    }
    return {A.number};
  }

  static constexpr int kMostSpares = 4;
  int workers_, tiles_, spares_;
  bool whole_;
  uint8_t next_matrix_ = 0;
  Matrix spare_[kMostSpares];
  unsigned read_ = 0, written_ = 0, mapped_ = 0;  // since the last meeting: mapped is written elementwise
  Program program_;
};

/// What a kernel runs for this task.
inline Program record_root(ProgramRecorder e, const Steps& steps, Root root) {
  auto m = make_iterates(e, steps);
  e.load(m.Y);
  newton_schulz(e, m, steps, root);
  return e.finish(m, m);
}
inline Program record_root_backward(ProgramRecorder e, const Steps& steps, Root root) {
  auto m = make_iterates(e, steps), d = make_iterates(e, steps);
  e.load(m.Y), e.load(d.Y);
  newton_schulz_tangent(e, m, d, steps, root);
  return e.finish(m, d);
}

}  // namespace isqrt::cuda
