// Every line of inline PTX, each beside its body for the CPU emulation. A wrapper is named for what it does; its
// comment says what it is in PTX and which lane holds which element of a fragment, g = lane / 4 and t = lane % 4
// throughout. tests/emulation/conformance.cu compares each wrapper with a plain loop, emulated and on a device.
//
// Warp-wide ones (matrices) need all 32 lanes at one place, block-wide and cluster-wide ones all lanes of each warp.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#if !defined(__CUDACC__)
#define ISQRT_PTX(native, emulated) emulated
#define ISQRT_PTX_SM90(native, otherwise, emulated) emulated
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define ISQRT_PTX(native, emulated) native
#define ISQRT_PTX_SM90(native, otherwise, emulated) native
#else
#define ISQRT_PTX(native, emulated) native
#define ISQRT_PTX_SM90(native, otherwise, emulated) otherwise
#endif

// Code of sm_90a has what Hopper alone has, and runs on nothing else.
#if !defined(__CUDACC__)
#define ISQRT_PTX_SM90A(native, emulated) emulated
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define ISQRT_PTX_SM90A(native, emulated) native
#else
#define ISQRT_PTX_SM90A(native, emulated) __trap()
#endif

namespace isqrt::cuda {

#if defined(__CUDACC__)
struct Caller {
  __device__ static constexpr Caller here() { return {}; }
};
__device__ __forceinline__ unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}
/// mapa: the address, in block `rank` of the cluster, of what lies at `own` in this block's shared memory. That block
/// must have started and not returned whenever it is used.
__device__ __forceinline__ unsigned map_shared(const void* own, unsigned rank) {
  unsigned mapped;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(shared_address(own)), "r"(rank));
  return mapped;
}
#else
using emulation::Caller;  // the line of the call, which the emulation's reports name
#endif

/// i, without the compiler's knowing: what follows from it is computed anew instead of being kept in registers, and
/// what it follows from is computed here.
template <class Word> __device__ __forceinline__ Word opaque(Word i) {
  static_assert(sizeof(Word) == 4 && std::is_integral_v<Word>);
  ISQRT_PTX(asm volatile("" : "+r"(i)), (void)0);
  return i;
}

// ---- kernels after kernels ------------------------------------------------------------------------------------------

/// griddepcontrol.launch_dependents: once all blocks have said so, or returned, the next kernel may come to the
/// multiprocessors, where it waits. See launch().
__device__ __forceinline__ void let_next_kernel_come() {
  ISQRT_PTX_SM90(asm volatile("griddepcontrol.launch_dependents;" :: : "memory"), (void)0, (void)0);
}

/// griddepcontrol.wait, the first thing that a kernel does: all kernels before it have finished, and what they wrote is
/// seen; the next one may come, unless that is said later.
__device__ __forceinline__ void wait_for_kernels_before(bool next_may_come = true,
                                                        [[maybe_unused]] Caller caller = Caller::here()) {
  ISQRT_PTX_SM90(asm volatile("griddepcontrol.wait;" :: : "memory"), (void)0,
                 emulation::wait_for_kernels_before(caller));
  if (next_may_come) let_next_kernel_come();
}

// ---- tensor cores ---------------------------------------------------------------------------------------------------

/// mma.m16n8k16 of f16, d += a b. Each register has this element and its neighbour in k, the first one in the low half.
/// a: (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8) of 16 x 16; b: (2t, g), (2t + 8, g) of 16 x 8;
/// d: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1) of 16 x 8.
__device__ __forceinline__ void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                        [[maybe_unused]] Caller caller = Caller::here()) {
  ISQRT_PTX(asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                "{%0,%1,%2,%3};" : "+f"(d[0]),
                "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1])),
            emulation::mma_f16(d, a, b, caller));
}

/// mma.m8n8k4 of f64, d += a b. a: (g, t) of 8 x 4; b: (t, g) of 4 x 8; d: (g, 2t), (g, 2t + 1) of 8 x 8.
__device__ __forceinline__ void mma_f64(double* d, double a, double b,
                                        [[maybe_unused]] Caller caller = Caller::here()) {
  ISQRT_PTX(asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0,%1}, {%2}, {%3}, {%0,%1};" : "+d"(d[0]),
                "+d"(d[1]) : "d"(a), "d"(b)),
            emulation::mma_f64(d, a, b, caller));
}

/// ldmatrix.x4: four 8 x 8 matrices of 16-bit elements. Lane 8 i + r has the address of row r of matrix i, 16 bytes in
/// shared memory, aligned to 16. r[i]: elements (g, 2t), (g, 2t + 1) of matrix i; with .trans, where `transposed`,
/// (2t, g) and (2t + 1, g). It is the same in all lanes, and no branch.
__device__ __forceinline__ void load_matrix_x4(uint32_t (&r)[4], const void* row, bool transposed,
                                               [[maybe_unused]] Caller caller = Caller::here()) {
  ISQRT_PTX(
      asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, %5, 0;\n"
                   "@p ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                   "@!p ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n}" : "=&r"(r[0]),
                   "=&r"(r[1]), "=&r"(r[2]), "=&r"(r[3]) : "r"(shared_address(row)), "r"(int(transposed)) : "memory"),
      emulation::load_matrices(r, row, transposed, caller));
}

/// movmatrix.trans: the transpose of an 8 x 8 matrix of 16-bit elements. Each lane has (g, 2t) and (g, 2t + 1) of both.
__device__ __forceinline__ uint32_t transpose_matrix(uint32_t r, [[maybe_unused]] Caller caller = Caller::here()) {
  uint32_t transposed;
  ISQRT_PTX(asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(r)),
            transposed = emulation::transpose_matrix(r, caller));
  return transposed;
}

// ---- asynchronous copies of a thread --------------------------------------------------------------------------------

/// The most that is copied in one piece.
constexpr int kPacketBytes = 16;

/// cp.async, .cg (past the L1 cache) for 16 bytes and .ca for 4 and 8: the first source_bytes come from global memory,
/// the rest becomes 0. Both addresses are aligned to kBytes, also where source_bytes = 0.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* to_shared, const void* from_global, int source_bytes = kBytes,
                                           [[maybe_unused]] Caller caller = Caller::here()) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  if constexpr (kBytes == 16)
    ISQRT_PTX(asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to_shared)),
                           "l"(from_global), "r"(source_bytes) : "memory"),
              emulation::copy_async(to_shared, from_global, kBytes, source_bytes, caller));
  else
    ISQRT_PTX(asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to_shared)),
                           "l"(from_global), "n"(kBytes), "r"(source_bytes) : "memory"),
              emulation::copy_async(to_shared, from_global, kBytes, source_bytes, caller));
}

/// cp.async.commit_group: this thread's copies since the last one are a group.
__device__ __forceinline__ void copy_async_commit() {
  ISQRT_PTX(asm volatile("cp.async.commit_group;" :: : "memory"), emulation::copy_async_commit());
}

/// cp.async.wait_group: all but this thread's last kPending groups are there. Others see them after a barrier.
template <int kPending> __device__ __forceinline__ void copy_async_wait() {
  ISQRT_PTX(asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory"), emulation::copy_async_wait(kPending));
}

// ---- clusters: before sm_90 each block is one of its own ------------------------------------------------------------

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kHasClusters = false;
#else
constexpr bool kHasClusters = true;
#endif

/// %cluster_ctarank: which block of its cluster this is.
__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank;
  ISQRT_PTX_SM90(asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank)), rank = 0, rank = emulation::block_rank());
  return rank;
}

/// %cluster_nctarank: how many blocks this cluster has.
__device__ __forceinline__ unsigned cluster_size() {
  unsigned size;
  ISQRT_PTX_SM90(asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size)), size = 1, size = emulation::blocks_in_cluster());
  return size;
}

/// fence.mbarrier_init and barrier.cluster.arrive.relaxed: of what this thread has written, those that wait see the
/// mbarriers that it has initialised, and no more than that: .release would wait for the whole device's memory.
__device__ __forceinline__ void cluster_arrive([[maybe_unused]] Caller caller = Caller::here()) {
  ISQRT_PTX_SM90(
      asm volatile("fence.mbarrier_init.release.cluster;\nbarrier.cluster.arrive.relaxed.aligned;" :: : "memory"),
      (void)0, emulation::cluster_arrive(caller));
}

/// barrier.cluster.wait.acquire: all threads of the cluster have arrived; each cluster_arrive() needs one.
__device__ __forceinline__ void cluster_wait([[maybe_unused]] Caller caller = Caller::here()) {
  ISQRT_PTX_SM90(asm volatile("barrier.cluster.wait.acquire.aligned;" :: : "memory"), __syncthreads(),
                 emulation::cluster_wait(caller));
}

__device__ __forceinline__ void cluster_sync(Caller caller = Caller::here()) {
  cuda::cluster_arrive(caller);  // qualified: the emulation has functions of these names
  cuda::cluster_wait(caller);
}

// ---- mbarriers: of 8 bytes, in shared memory ------------------------------------------------------------------------

/// mbarrier.init: a phase takes `count` arrivals. One thread; other blocks may use it after cluster_arrive() in that
/// thread and cluster_wait() in theirs.
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, unsigned count,
                                              [[maybe_unused]] Caller caller = Caller::here()) {
  ISQRT_PTX_SM90(
      asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory"),
      __trap(), emulation::mbarrier_init(barrier, count, caller));
}

/// mbarrier.expect_tx: the present phase also takes that many bytes of store_async().
__device__ __forceinline__ void mbarrier_expect(uint64_t* barrier, unsigned bytes,
                                                [[maybe_unused]] Caller caller = Caller::here()) {
  ISQRT_PTX_SM90(asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
                              "r"(bytes) : "memory"),
                 __trap(), emulation::mbarrier_expect(barrier, bytes, caller));
}

/// mbarrier.arrive at the barrier that lies, in block `rank` of the cluster, where `own` does in this one. What this
/// thread has written is seen by those of its own block that wait there; to those of others it says that this thread
/// has read what it has read.
__device__ __forceinline__ void mbarrier_arrive(uint64_t* own, unsigned rank,
                                                [[maybe_unused]] Caller caller = Caller::here()) {
  ISQRT_PTX_SM90(asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(map_shared(own, rank)) : "memory"),
                 __trap(), emulation::mbarrier_arrive(own, rank, caller));
}

/// mbarrier.try_wait.parity, again and again: the phase of that parity, 0 for the first one, is complete.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, unsigned parity,
                                              [[maybe_unused]] Caller caller = Caller::here()) {
  ISQRT_PTX_SM90(
      uint32_t complete; do {
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                     : "=r"(complete)
                     : "r"(shared_address(barrier)), "r"(parity)
                     : "memory");
      } while (!complete),
                         __trap(), emulation::mbarrier_wait(barrier, parity, caller));
}

/// st.async: 16 bytes to the place that is, in block `rank`, where `own` is in this one, aligned to 16; they count at
/// the barrier there that is where `barrier` is here, and are seen by those that wait for its phase.
__device__ __forceinline__ void store_async(void* own, unsigned rank, const uint32_t (&words)[4], uint64_t* barrier,
                                            [[maybe_unused]] Caller caller = Caller::here()) {
  ISQRT_PTX_SM90(
      asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1,%2,%3,%4}, [%5];" ::"r"(
                       map_shared(own, rank)),
                   "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]),
                   "r"(map_shared(barrier, rank)) : "memory"),
      __trap(), emulation::store_async(own, rank, words, barrier, caller));
}

// ---- warpgroups: four warps, the first one's number a multiple of four ----------------------------------------------

#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kHasWarpgroups = false;
#else
constexpr bool kHasWarpgroups = true;
#endif

/// Ends a kernel that is made of them and was compiled without: with an error, not without results.
__device__ __forceinline__ void require_warpgroups() { ISQRT_PTX_SM90A((void)0, (void)0); }

/// A warpgroup has 64 x 64 sums, or 64 x 32, each warp 16 rows of them: of columns 8 c to 8 c + 7 sum[4 c] to
/// sum[4 c + 3], as in mma_f16's d.
constexpr int kWarpgroup = 128, kWarpgroupSide = 64;
template <int kVectors> using WarpgroupSums = float[kWarpgroupSide * kVectors / kWarpgroup];

#define ISQRT_SUMS_16(constraint)                                                                                   \
  constraint(d[0]), constraint(d[1]), constraint(d[2]), constraint(d[3]), constraint(d[4]), constraint(d[5]),       \
      constraint(d[6]), constraint(d[7]), constraint(d[8]), constraint(d[9]), constraint(d[10]), constraint(d[11]), \
      constraint(d[12]), constraint(d[13]), constraint(d[14]), constraint(d[15])
#define ISQRT_SUMS_32(constraint)                                                                        \
  ISQRT_SUMS_16(constraint), constraint(d[16]), constraint(d[17]), constraint(d[18]), constraint(d[19]), \
      constraint(d[20]), constraint(d[21]), constraint(d[22]), constraint(d[23]), constraint(d[24]),     \
      constraint(d[25]), constraint(d[26]), constraint(d[27]), constraint(d[28]), constraint(d[29]),     \
      constraint(d[30]), constraint(d[31])
/// Operands of the instruction: the sums, four of a, b, and whether b is by terms.
#define ISQRT_WARPGROUP_PRODUCT(vectors, adds, sums, a, b, by_terms)                                                  \
  "{\n.reg .pred p;\nsetp.ne.s32 p, " adds ", 0;\nwgmma.mma_async.sync.aligned.m64n" vectors "k16.f32.f16.f16 {" sums \
  "}, {" a "}, " b ", p, 1, 1, " by_terms ";\n}"
#define ISQRT_PLACES_16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define ISQRT_PLACES_32 ISQRT_PLACES_16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define ISQRT_PRODUCT_16(adds) ISQRT_WARPGROUP_PRODUCT("32", adds, ISQRT_PLACES_16, "%16,%17,%18,%19", "%20", "%21")
#define ISQRT_PRODUCT_32(adds) ISQRT_WARPGROUP_PRODUCT("64", adds, ISQRT_PLACES_32, "%32,%33,%34,%35", "%36", "%37")
#define ISQRT_FACTORS "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(int(kByTerms))

/// Without the compiler's knowing: they are computed here, not later.
__device__ __forceinline__ void opaque([[maybe_unused]] WarpgroupSums<32>& d) {
  ISQRT_PTX(asm volatile("" : ISQRT_SUMS_16("+f")), (void)0);
}
__device__ __forceinline__ void opaque([[maybe_unused]] WarpgroupSums<64>& d) {
  ISQRT_PTX(asm volatile("" : ISQRT_SUMS_32("+f")), (void)0);
}

/// fence.proxy.async: products of warpgroups see, after a barrier, what this thread has written to shared memory, or
/// copied there and waited for.
__device__ __forceinline__ void fence_for_warpgroups() {
  ISQRT_PTX_SM90A(asm volatile("fence.proxy.async.shared::cta;" :: : "memory"), emulation::fence_for_warpgroups());
}

/// wgmma.fence: what this thread does with registers comes before the products that follow, which use the same ones.
__device__ __forceinline__ void warpgroup_begin([[maybe_unused]] Caller caller = Caller::here()) {
  ISQRT_PTX_SM90A(asm volatile("wgmma.fence.sync.aligned;" :: : "memory"), emulation::warpgroup_begin(caller));
}

/// The right operand of such a product, 16 terms of 64 or 32 vectors: parts of 8 x 8 elements of 16 bits, 128 bytes
/// each and aligned to 16, the first one at `address` in shared memory; so many bytes from part to part. With
/// in_description(n) more it is what lies n bytes further on.
__device__ __forceinline__ constexpr uint64_t in_description(int bytes) { return uint64_t(bytes) / kPacketBytes; }
__device__ __forceinline__ uint64_t describe_parts(int address, int to_next_terms, int to_next_vectors) {
  constexpr unsigned kAddresses = 1 << 18;
  return in_description(int(unsigned(address) % kAddresses)) | in_description(to_next_terms) << 16 |
         in_description(to_next_vectors) << 32;
}

/// wgmma.mma_async.m64nNk16 of f16, d = a b, or += where kAdds: in the course of time until warpgroup_wait(), and of
/// several after each other. a: each warp's 16 rows, as mma_f16's. A row of b's parts has eight terms of a vector, or,
/// `by_terms`, a term of eight vectors; there are as many as d has columns.
template <bool kAdds, bool kByTerms>
__device__ __forceinline__ void multiply_warpgroup(WarpgroupSums<32>& d, const uint32_t (&a)[4], uint64_t b,
                                                   [[maybe_unused]] Caller caller = Caller::here()) {
  if constexpr (kAdds)
    ISQRT_PTX_SM90A(asm volatile(ISQRT_PRODUCT_16("1") : ISQRT_SUMS_16("+f") : ISQRT_FACTORS),
                    emulation::multiply_warpgroup(d, 32, a, b, true, kByTerms, caller));
  else
    ISQRT_PTX_SM90A(asm volatile(ISQRT_PRODUCT_16("0") : ISQRT_SUMS_16("=f") : ISQRT_FACTORS),
                    emulation::multiply_warpgroup(d, 32, a, b, false, kByTerms, caller));
}
template <bool kAdds, bool kByTerms>
__device__ __forceinline__ void multiply_warpgroup(WarpgroupSums<64>& d, const uint32_t (&a)[4], uint64_t b,
                                                   [[maybe_unused]] Caller caller = Caller::here()) {
  if constexpr (kAdds)
    ISQRT_PTX_SM90A(asm volatile(ISQRT_PRODUCT_32("1") : ISQRT_SUMS_32("+f") : ISQRT_FACTORS),
                    emulation::multiply_warpgroup(d, 64, a, b, true, kByTerms, caller));
  else
    ISQRT_PTX_SM90A(asm volatile(ISQRT_PRODUCT_32("0") : ISQRT_SUMS_32("=f") : ISQRT_FACTORS),
                    emulation::multiply_warpgroup(d, 64, a, b, false, kByTerms, caller));
}

/// wgmma.commit_group: what this warpgroup has multiplied since the last time is to be waited for. Right after the
/// products: what stands between costs an instruction of tensor cores that has nothing to do.
__device__ __forceinline__ void warpgroup_commit([[maybe_unused]] Caller caller = Caller::here()) {
  ISQRT_PTX_SM90A(asm volatile("wgmma.commit_group.sync.aligned;" :: : "memory"), emulation::warpgroup_commit(caller));
}

/// wgmma.wait_group 0: this warpgroup's products are done, d among them. a and b: the left operands that they read,
/// which the compiler shall not replace meanwhile.
#define ISQRT_WARPGROUP_WAIT "wgmma.wait_group.sync.aligned 0;"
#define ISQRT_READ "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]) : "memory"
__device__ __forceinline__ void warpgroup_wait(WarpgroupSums<32>& d, [[maybe_unused]] const uint32_t (&a)[4],
                                               [[maybe_unused]] const uint32_t (&b)[4],
                                               [[maybe_unused]] Caller caller = Caller::here()) {
  ISQRT_PTX_SM90A(asm volatile(ISQRT_WARPGROUP_WAIT : ISQRT_SUMS_16("+f") : ISQRT_READ),
                  emulation::warpgroup_wait(d, caller));
}
__device__ __forceinline__ void warpgroup_wait(WarpgroupSums<64>& d, [[maybe_unused]] const uint32_t (&a)[4],
                                               [[maybe_unused]] const uint32_t (&b)[4],
                                               [[maybe_unused]] Caller caller = Caller::here()) {
  ISQRT_PTX_SM90A(asm volatile(ISQRT_WARPGROUP_WAIT : ISQRT_SUMS_32("+f") : ISQRT_READ),
                  emulation::warpgroup_wait(d, caller));
}
#undef ISQRT_READ
#undef ISQRT_WARPGROUP_WAIT
#undef ISQRT_FACTORS
#undef ISQRT_PRODUCT_32
#undef ISQRT_PRODUCT_16
#undef ISQRT_PLACES_32
#undef ISQRT_PLACES_16
#undef ISQRT_WARPGROUP_PRODUCT
#undef ISQRT_SUMS_32
#undef ISQRT_SUMS_16

// ---- named barriers -------------------------------------------------------------------------------------------------

/// bar.sync: waits for `threads` threads, whole warps, at barrier `id`, 1 to 15 (0 is that of __syncthreads).
__device__ __forceinline__ void named_barrier(int id, int threads, [[maybe_unused]] Caller caller = Caller::here()) {
  ISQRT_PTX(asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"),
            emulation::named_barrier(id, threads, caller));
}

}  // namespace isqrt::cuda

#undef ISQRT_PTX
#undef ISQRT_PTX_SM90
#undef ISQRT_PTX_SM90A
