"""Batch normalisation, forward, as one fused CUDA kernel in one launch.

    y = gamma · (x − mean) / √(var + eps) + beta     mean, biased var: per channel, over N, H and W

x (NCHW or channels-last) is read from memory once and y is written once, as a copy would do: a
team of blocks keeps a group of channels on the chip from the sums to the store.

    worker warps                                        exchange warps
      load the first groups
      for each group i of this team:                      for each group i:
        sum group i + lag ── partial sums, "summed" ──────► wait for the block's sums of i
                                                            the team's: nothing | messages in a
                                                            cluster | slots in memory
        wait for the result of i ◄───────── "ready" ─────── mean, inv_std, result
        store group i, and refill each of its               running buffers
        places with group i + stages                        pivots of a group to come

Each thread owns vectors of its block's share, in places of its own: the first rows in registers,
the next in shared memory. Where there are more, the last ones go through a ring of places, and are
read again for the store. Places are private, so no barrier guards them. Where one group alone is
under way, L2 is asked for part of the next before the exchange.
A group is one channel; or the few whose odd planes are whole vectors together; or, channels-last,
neighbouring channels, each element of a vector another one. make_plan() in the CUDA text chooses
the group, the team, and how many rows and groups under way a block has, from shape and device.
"""

import contextlib
import hashlib
import logging
import os
import shutil
import sys

import torch
import torch.utils.cpp_extension

FUSED_BATCH_NORM_CALL = r"""
#include <stddef.h>
#include <stdint.h>

// One call, as the C++ text hands it to the CUDA text.
struct FusedBatchNormCall {
  const void* x;                 // [N, C, HW] or [N, HW, C], dtype
  void* y;                       // the same, dtype; as far from a 16-byte boundary as x
  const void* gamma;             // [C], or null for 1
  const void* beta;              // [C], or null for 0
  void* running_mean;            // [C], or null
  void* running_var;             // [C], or null
  int64_t* num_batches_tracked;  // scalar, or null
  void* mean;                    // [C] saved for backward: float, or double for a double x
  void* inv_std;                 // [C]
  int64_t N, C, HW;
  double eps;
  double momentum;
  int cumulative;     // momentum is None: the cumulative average
  int dtype;          // 0 float, 1 half, 2 bfloat16, 3 double
  int affine_float;   // gamma and beta are float whatever x is
  int running_float;  // so are the running buffers
  int training;       // 0: normalise with the running buffers
  int channels_last;  // x and y are [N, HW, C]
};

// Each returns null, or what went wrong.
extern "C" const char* fused_batch_norm_launch(const FusedBatchNormCall* call,
                                               void* (*allocate)(size_t bytes, void* context),
                                               void* context, void* stream);
// words: of struct Plan, in its order; as many as there is room for.
extern "C" const char* fused_batch_norm_plan(const FusedBatchNormCall* call, int* words,
                                             size_t bytes);
"""

FUSED_BATCH_NORM_CUDA = r"""
#define _CG_LIMIT_INCLUDED_DEPENDENCIES  // 1.7 s less of headers
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <optional>
#include <type_traits>
#include <utility>

namespace {

// -------------------------------------------------------------------------------------------------
// Constants
// -------------------------------------------------------------------------------------------------
constexpr int kVectorBytes = 16;   // one access of one thread
constexpr int kLineBytes = 128;    // of L2
constexpr int kUnitChannels = 8;   // channels of an exchange warp; more where a group would take
constexpr int kUnits = 4;          // more such warps than these in a block
constexpr int kMaxCluster = 8;     // blocks, that any GPU with clusters takes
constexpr int kMaxThreads = 1024;  // of a block

// -------------------------------------------------------------------------------------------------
// PTX, one instruction a function, named after it
// -------------------------------------------------------------------------------------------------
using Mbarrier = uint64_t;  // in shared memory
// x is what L2 evicts last. (createpolicy.fractional would put this into a register.)
constexpr uint64_t kEvictLast = 0x14f0000000000000;

// A block's sums on their way to the team. They travel in one piece, so −s2 vouches for s1: its
// sign bit is set even if s2 is 0, so that it differs from the zeros of an empty slot.
template <typename A>
struct alignas(2 * sizeof(A)) SumSlot {
  A s1, minus_s2;
};

#ifdef __CUDACC__
#define ASM asm volatile

__device__ unsigned char* dynamic_shared_memory() {
  extern __shared__ __align__(128) unsigned char fused_batch_norm_shared[];
  return fused_batch_norm_shared;
}

__device__ unsigned shared_address(const void* p) { return unsigned(__cvta_generic_to_shared(p)); }

#if __CUDA_ARCH__ >= 800
__device__ void mbarrier_init(Mbarrier* b, unsigned arrivals) {
  const unsigned at = shared_address(b);
  ASM("mbarrier.init.shared.b64 [%0], %1;" ::"r"(at), "r"(arrivals) : "memory");
}

__device__ void mbarrier_arrive(Mbarrier* b) {
  const unsigned at = shared_address(b);
  ASM("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(at) : "memory");
}

__device__ bool mbarrier_test_wait(Mbarrier* b, unsigned parity) {
  const unsigned at = shared_address(b);
  unsigned complete;
  ASM("{ .reg .pred p;"
#if __CUDA_ARCH__ >= 900  // may sleep a while; shows what peers have sent, too
      "  mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;"
#else
      "  mbarrier.test_wait.parity.shared.b64 p, [%1], %2;"
#endif
      "  selp.u32 %0, 1, 0, p; }" : "=r"(complete) : "r"(at),
      "r"(parity) : "memory");
  return complete;
}
#else  // in software: arrivals so far in the lower half, arrivals of a phase in the upper one
__device__ void mbarrier_init(Mbarrier* b, unsigned arrivals) { *b = uint64_t(arrivals) << 32; }

__device__ void mbarrier_arrive(Mbarrier* b) {
  __threadfence_block();
  atomicAdd(reinterpret_cast<unsigned*>(b), 1);
}

__device__ bool mbarrier_test_wait(Mbarrier* b, unsigned parity) {
  const uint64_t word = *const_cast<volatile Mbarrier*>(b);
  __threadfence_block();
  return (unsigned(word) / unsigned(word >> 32) & 1) != parity;
}
#endif

// Returns when the phase of this parity is complete.
__device__ void mbarrier_wait(Mbarrier* b, unsigned parity) {
  while (!mbarrier_test_wait(b, parity)) {
  }
}

// 16 bytes by this thread, some time later. L2 fetches the whole line of 128.
__device__ void cp_async_16(void* shared, const void* global) {
#if __CUDA_ARCH__ >= 800
  ASM("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2;" ::"r"(
          shared_address(shared)),
      "l"(global), "l"(kEvictLast) : "memory");
#else
  *static_cast<uint4*>(shared) = *static_cast<const uint4*>(global);
#endif
}

// 16 bytes, and the line that they are in, into L2.
__device__ void prefetch_global_L2(const void* global) {
#if __CUDA_ARCH__ >= 800
  ASM("prefetch.global.L2::evict_last [%0];" ::"l"(global) : "memory");
#endif
}

// Makes a group of this thread's cp_async_16 since the last one.
__device__ void cp_async_commit_group() {
#if __CUDA_ARCH__ >= 800
  ASM("cp.async.commit_group;" :: : "memory");
#endif
}

// Returns when all groups but the last `kPending` have landed, for this thread to see.
template <int kPending>
__device__ void cp_async_wait_group() {
#if __CUDA_ARCH__ >= 800
  ASM("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// Into registers.
__device__ void ld_global_128(void* to, const void* global) {
  uint4 v;
#if __CUDA_ARCH__ >= 800
  ASM("ld.global.L1::no_allocate.L2::cache_hint.L2::128B.v4.b32 {%0, %1, %2, %3}, [%4], %5;" : "=r"(
          v.x),
      "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(global), "l"(kEvictLast));
#else
  v = *static_cast<const uint4*>(global);
#endif
  memcpy(to, &v, sizeof v);
}

// Relaxed accesses, each in one piece.
template <typename A>
__device__ SumSlot<A> ld_relaxed(const SumSlot<A>* from) {
  unsigned long long bits[2];
  if constexpr (sizeof(A) == 4)
    ASM("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(bits[0]) : "l"(from) : "memory");
  else
    ASM("{ .reg .b128 v; ld.relaxed.gpu.global.b128 v, [%2]; mov.b128 {%0, %1}, v; }" : "=l"(
            bits[0]),
        "=l"(bits[1]) : "l"(from) : "memory");
  SumSlot<A> slot;
  memcpy(&slot, bits, sizeof slot);
  return slot;
}

template <typename A>
__device__ void st_relaxed(SumSlot<A>* to, SumSlot<A> slot) {
  unsigned long long bits[2];
  memcpy(bits, &slot, sizeof slot);
  if constexpr (sizeof(A) == 4)
    ASM("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(to), "l"(bits[0]) : "memory");
  else
    ASM("{ .reg .b128 v; mov.b128 v, {%1, %2}; st.relaxed.gpu.global.b128 [%0], v; }" ::"l"(to),
        "l"(bits[0]), "l"(bits[1]) : "memory");
}

__device__ unsigned long long ld_relaxed(const unsigned long long* from) {
  unsigned long long v;
  ASM("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(from) : "memory");
  return v;
}

__device__ void nanosleep() { __nanosleep(40); }

// Sleeps for so many clock cycles, about.
__device__ void nanosleep_cycles(int64_t cycles) {
  const int64_t start = clock64();
  while (clock64() - start < cycles) __nanosleep(20);
}

#if __CUDA_ARCH__ >= 900
// Makes initialised mbarriers visible to the cluster, behind its barrier.
__device__ void fence_mbarrier_init() { ASM("fence.mbarrier_init.release.cluster;" :: : "memory"); }

// One arrival; the phase also waits for `bytes` from peers.
__device__ void mbarrier_arrive_expect_tx(Mbarrier* b, unsigned bytes) {
  ASM("{ .reg .b64 state; mbarrier.arrive.expect_tx.shared.b64 state, [%0], %1; }" ::"r"(
          shared_address(b)),
      "r"(bytes) : "memory");
}

// The barrier of all threads of a cluster, in two halves. Relaxed: an execution barrier only; a
// release would cost each thread a MEMBAR.GPU. Aligned: all lanes of a warp together.
__device__ void barrier_cluster_arrive() {
  ASM("barrier.cluster.arrive.relaxed.aligned;" :: : "memory");
}

__device__ void barrier_cluster_wait() {
  ASM("barrier.cluster.wait.acquire.aligned;" :: : "memory");
}

// Where another block of the cluster has what this one has at p.
__device__ unsigned mapa(const void* p, int rank) {
  unsigned there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(p)), "r"(rank));
  return there;
}

// Writes a slot to the same place in another block of the cluster, some time later, and counts its
// bytes on that block's barrier.
template <typename A>
__device__ void st_async(SumSlot<A>* shared, int rank, SumSlot<A> slot, Mbarrier* b) {
  if constexpr (sizeof(A) == 4)
    ASM("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(
            mapa(shared, rank)),
        "f"(slot.s1), "f"(slot.minus_s2), "r"(mapa(b, rank)) : "memory");
  else
    ASM("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f64 [%0], {%1, %2}, [%3];" ::"r"(
            mapa(shared, rank)),
        "d"(slot.s1), "d"(slot.minus_s2), "r"(mapa(b, rank)) : "memory");
}
#else  // no plan asks for clusters
__device__ void fence_mbarrier_init() {}
__device__ void mbarrier_arrive_expect_tx(Mbarrier*, unsigned) { __trap(); }
__device__ void barrier_cluster_arrive() { __trap(); }
__device__ void barrier_cluster_wait() { __trap(); }
template <typename A>
__device__ void st_async(SumSlot<A>*, int, SumSlot<A>, Mbarrier*) {
  __trap();
}
#endif
#undef ASM
#else
#include "emulated_device.h"
#endif

// -------------------------------------------------------------------------------------------------
// Types
// -------------------------------------------------------------------------------------------------
template <typename T>
struct alignas(kVectorBytes) Vector {  // as words: as elements, 16-bit ones take a register each
  static constexpr int kSize = kVectorBytes / sizeof(T);
  unsigned word[4] = {};

  __device__ T get(int i) const {
    unsigned bits[2] = {word[i * sizeof(T) / 4] >> (i * sizeof(T) % 4 * 8),
                        sizeof(T) == 8 ? word[i * 2 % 4 + 1] : 0};
    T element;
    memcpy(&element, bits, sizeof(T));
    return element;
  }
  __device__ void set(int i, T element) {
    memcpy(reinterpret_cast<char*>(word) + i * sizeof(T), &element, sizeof(T));
  }
};

__device__ float widen(float v) { return v; }
__device__ double widen(double v) { return v; }
__device__ float widen(__half v) { return __half2float(v); }
__device__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

// Element i of a vector, widened. (A bfloat16 is the upper half of a float.)
template <typename T>
__device__ auto widen(const Vector<T>& v, int i) {
  if constexpr (std::is_same<T, __nv_bfloat16>::value)
    return __uint_as_float(i % 2 ? v.word[i / 2] & 0xffff0000u : v.word[i / 2] << 16);
  else
    return widen(v.get(i));
}

// Rounds to T and packs.
template <typename T, typename A>
__device__ Vector<T> make_vector(const A (&v)[Vector<T>::kSize]) {
  Vector<T> vector;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same<T, __half>::value) {
      const __half2 pair = __floats2half2_rn(v[2 * i], v[2 * i + 1]);
      memcpy(&vector.word[i], &pair, 4);
    } else if constexpr (std::is_same<T, __nv_bfloat16>::value) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(v[2 * i], v[2 * i + 1]);
      memcpy(&vector.word[i], &pair, 4);
    } else {
      memcpy(&vector.word[i], reinterpret_cast<const char*>(v) + 4 * i, 4);
    }
  }
  return vector;
}

template <typename T, typename A>
__device__ T round_to(A v) {
  const A first[Vector<T>::kSize] = {v};
  return make_vector<T>(first).get(0);
}

template <typename T>
using Accumulator = std::conditional_t<sizeof(T) == 8, double, float>;

// Sums over some part of a channel, with d = x − pivot. All parts of a channel have the same pivot.
template <typename A>
struct Sums {
  A s1 = 0, s2 = 0;  // Σ d, Σ d²

  __device__ void add(const Sums& other) {
    s1 += other.s1;
    s2 += other.s2;
  }
};

template <typename A>
struct Result {  // y = (x − mean)·scale + shift
  A mean, scale, shift;
};

// A parameter or an element of a running buffer: float, or of x's own type.
template <typename T>
__device__ Accumulator<T> load_parameter(const void* p, int64_t i, bool is_float) {
  return is_float ? static_cast<const float*>(p)[i] : widen(static_cast<const T*>(p)[i]);
}

template <typename T>
__device__ void store_parameter(void* p, int64_t i, bool is_float, double v) {
  if (is_float)
    static_cast<float*>(p)[i] = float(v);
  else
    static_cast<T*>(p)[i] = round_to<T>(Accumulator<T>(v));
}

// -------------------------------------------------------------------------------------------------
// Plan, as data
// -------------------------------------------------------------------------------------------------
struct FastDivmod {  // n / divisor == umulhi(2n, magic) >> shift for all n < 2³¹
  unsigned divisor, magic, shift;
};

enum Layout {     // of a group of neighbouring channels, that a block works on
  kPlanes,        // one channel; its planes are rows of whole vectors
  kMaskedPlanes,  // one channel; a plane may start or end within a vector
  kPackedPlanes,  // several, whose planes together are whole vectors; a vector may hold two of them
  kPixels,        // several of a channels-last x; each element of a vector has a channel of its own
};

// Where a thread's vectors are all at the same place of their rows.
__host__ __device__ constexpr bool has_columns(Layout layout) { return layout >= kPackedPlanes; }
// Rows of which a warp takes a whole number: lanes that are `width` apart have the same column.
__host__ __device__ constexpr bool fits_warp(unsigned width) {
  return width <= 32 && (width & (width - 1)) == 0;
}

// There are two kernels for a layout: `many` is for one block on a multiprocessor, with many rows
// in registers; else several blocks share one. `lean`: on architectures for which the same code
// takes more registers. All numbers are such that nothing spills.
constexpr bool is_lean(int architecture) { return architecture / 10 != 9; }
#ifdef __CUDA_ARCH__
constexpr bool kLean = is_lean(__CUDA_ARCH__ / 10);
#else
constexpr bool kLean = false;
#endif

// Registers of a thread: with 56, a multiprocessor has room for five blocks of 224 threads.
__host__ __device__ constexpr int max_registers(Layout layout, int size, bool many, bool lean) {
  if (many) return 128;
  const int few = size == 2                 ? 96
                  : layout == kPixels       ? (size == 4 ? 72 : 80)
                  : layout == kPackedPlanes ? 72
                                            : 56;
  return few + (lean ? 24 : 0);
}

// Threads for which a multiprocessor has registers; those of a warp are in one of its four parts.
__host__ __device__ constexpr int resident_threads(Layout layout, int size, bool many, bool lean) {
  return 4 * 32 * (65536 / 4 / (32 * max_registers(layout, size, many, lean)));
}

// Rows of a thread in registers, where a vector has `size` elements.
__host__ __device__ constexpr int register_rows(Layout layout, int size, bool many, bool lean) {
  if (many) return lean ? 12 : 16;
  return layout == kPlanes && size == 4 ? 3 : 0;
}

// Rows that a thread adds up one after the other, about: of values with few digits, as 16-bit ones
// have, each is rounded like the one before, and the errors add up.
constexpr int kChain = 32;

// Places of a thread in which rows take turns that have no places of their own.
constexpr int kRing = 4;

enum TeamKind { kBlockTeam, kClusterTeam, kGridTeam };

struct Plan {
  // The group: rows of vectors, the same in each of them.
  Layout layout;          // 0 planes, 1 masked planes, 2 packed planes, 3 pixels
  int channels;           // of a group
  int groups;             // of x
  unsigned vectors;       // of a group, in all rows
  FastDivmod width;       // vectors of a row
  unsigned row_stride;    // vectors of x from a row to the next
  unsigned group_stride;  // vectors of x from a group to the next
  FastDivmod pixel;       // kPixels: vectors that cover a pixel's part of a row
                          // kPackedPlanes: elements of a plane
  int pixels;             // kPixels: pixels of a row
  // The team: blocks that share a group.
  TeamKind team_kind;  // 0 one block, 1 a cluster, 2 blocks of a cooperative launch
  FastDivmod team;     // blocks of a team
  int teams;           // at work at once
  int rounds;          // groups of a team, at most
  // The block.
  int threads;                     // workers
  int exchange_warps;              // of all sets
  FastDivmod stages;               // groups under way in a block: D
  int lag;                         // groups whose sums are being exchanged meanwhile: E
  FastDivmod sets;                 // of exchange warps, which take the groups in turn: E + 1
  unsigned share;                  // vectors of a group from a block's first to the next block's
  FastDivmod step;                 // the same from a thread's vector to its next
  unsigned step_row, step_in_row;  // that in rows, and vectors beyond
  int rows;                        // vectors of a thread, at most; of them
  int reg_rows, smem_rows;         // in registers and in shared memory; others share kRing of those
  int shared_bytes;                // of a block
  // Blocks that start one after the other.
  FastDivmod stagger;  // teams that start at once
  int stagger_turns;   // of such teams that are there at first; 0: all start at once
  int stagger_cycles;  // by which one starts later than the one before
};

int ceil_div(int64_t a, int64_t b) { return int((a + b - 1) / b); }

// Of a group of x.
int64_t x_bytes(const Plan& p) { return int64_t(p.vectors) * kVectorBytes; }

// Threads of a block, whole warps.
int block_threads(const Plan& p) { return 32 * (p.exchange_warps + ceil_div(p.threads, 32)); }

// What follows from a plan: how an exchange is cut, where things lie in a block's shared memory.
struct SharedLayout {
  int unit_bits, units;  // an exchange warp takes 1 << unit_bits channels; warps of a group
  // Of scratch: for each unit a line of L2 with the count of the blocks that have left their sums,
  // so that looking at it delays none that still write; then the slots.
  int64_t group_bytes;
  int partial_row, partial_rows, partials;  // partial sums of a row; rows; their product
  // Offsets; the places are at 0.
  int message_at, result_at, barrier_at, factor_at, partial_at, pivot_at, bytes;

  // accumulator_bytes: of one number; size: elements of a vector.
  SharedLayout(const Plan& p, int accumulator_bytes, int size) {
    const int slot_bytes = 2 * accumulator_bytes;
    const bool by_warp = !has_columns(p.layout) || fits_warp(p.width.divisor);
    const int team = p.team.divisor;
    const int sets = p.lag + 1;
    const int least = std::max(kUnitChannels, ceil_div(p.channels * sets, kUnits));
    unit_bits = 0;
    while (1 << unit_bits < std::min(p.channels, least)) ++unit_bits;
    units = ceil_div(p.channels, 1 << unit_bits);
    group_bytes =
        p.team_kind == kGridTeam && team > 1
            ? kLineBytes *
                  (units + ceil_div((team + 1) * int64_t(p.channels) * slot_bytes, kLineBytes))
            : 0;
    partial_row = p.layout == kPixels         ? p.width.divisor * size
                  : p.layout == kPackedPlanes ? p.width.divisor * 2
                                              : 1;
    partial_rows = ceil_div(p.threads, by_warp ? 32 : p.width.divisor);
    partials = partial_row * partial_rows;
    message_at = int(p.stages.divisor) * p.smem_rows * p.threads * kVectorBytes;
    result_at =
        message_at +
        (p.team_kind == kClusterTeam ? ceil_div(p.channels * team * slot_bytes, 16) * 16 : 0);
    barrier_at = result_at + ceil_div(3 * sets * p.channels * accumulator_bytes, 16) * 16;
    factor_at = barrier_at + (2 * sets + 1) * int(sizeof(Mbarrier));
    partial_at = factor_at + int(sizeof(double));
    pivot_at = partial_at + 2 * sets * partials * accumulator_bytes;
    bytes = pivot_at + 2 * sets * p.channels * accumulator_bytes;
  }
};

struct Arguments {
  FusedBatchNormCall call;
  Plan plan;
  SharedLayout layout;
  const void* x;           // the 16-byte boundary before x
  void* y;                 // and before y
  unsigned char* scratch;  // [groups][group_bytes], content unknown at the start
  int shift;               // elements from the 16-byte boundary before x to x
  unsigned whole;          // vectors from there that end within x; the next is not read as a whole
  uint64_t image;          // C·HW, elements
  int tail;  // kMaskedPlanes: elements of a plane beyond all but two vectors of its row
  double per_element, per_element_but_one;  // 1 / (N·HW) and 1 / (N·HW − 1)
};

// -------------------------------------------------------------------------------------------------
// Small device helpers
// -------------------------------------------------------------------------------------------------
__device__ unsigned divide(unsigned n, FastDivmod d) { return __umulhi(2 * n, d.magic) >> d.shift; }

// Keeps a parameter of the kernel in a register: the compiler would rather load it again in each
// row, which takes longer than all else there, but cannot repeat a shuffle. All 32 lanes must call.
template <typename V>
__device__ V in_register(V v) {
  return __shfl_xor_sync(0xffffffffu, v, 0);
}
template <typename V>
__device__ V* in_register(V* p) {
  return reinterpret_cast<V*>(in_register(reinterpret_cast<unsigned long long>(p)));
}

// Sum over the lanes whose numbers differ in the bits from `lowest` up, in all of them, always in
// the same order. All 32 lanes must call.
template <typename V>
__device__ V warp_sum(V v, int lowest = 1) {
#pragma unroll
  for (int bit = 16; bit > 0; bit /= 2)
    if (bit >= lowest) v += __shfl_xor_sync(0xffffffffu, v, bit);
  return v;
}

template <typename A>
__device__ Sums<A> warp_sum(const Sums<A>& own, int lowest = 1) {
  return {warp_sum(own.s1, lowest), warp_sum(own.s2, lowest)};
}

// The set of exchange warps that a group is for (partial sums and results are there for as many),
// and the parity of the group's phase of the set's two barriers.
struct Turn {
  int set;
  unsigned parity;
};

// What all warps of a block know.
template <typename T>
struct Block {
  using A = Accumulator<T>;
  const Arguments& a;
  const Plan& p = a.plan;
  const FusedBatchNormCall& call = a.call;
  const SharedLayout& layout = a.layout;
  unsigned char* const shared = dynamic_shared_memory();  // once: it takes long
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first_group = divide(blockIdx.x, p.team);  // then every teams-th
  const int rank = blockIdx.x - first_group * p.team.divisor;
  const int groups = p.rounds - (first_group + (p.rounds - 1) * p.teams >= p.groups);

  __device__ explicit Block(const Arguments& a) : a(a) {}

  template <typename V>
  __device__ V* at(int offset) const {
    return reinterpret_cast<V*>(shared + offset);
  }
  __device__ Vector<T>* places() const { return at<Vector<T>>(0); }
  __device__ Turn turn(int i) const {  // of group i
    const unsigned phase = divide(i, p.sets);
    return {i - int(phase * p.sets.divisor), phase & 1};
  }
  __device__ Mbarrier* summed(Turn t) const { return gathered() + 1 + 2 * t.set; }
  __device__ Mbarrier* ready(Turn t) const { return summed(t) + 1; }
  __device__ Mbarrier* gathered() const { return at<Mbarrier>(layout.barrier_at); }
  // Of the new value in the running buffers.
  __device__ double* factor() const { return at<double>(layout.factor_at); }
  __device__ Sums<A>* partial(Turn t) const {
    return at<Sums<A>>(layout.partial_at) + t.set * layout.partials;
  }
  __device__ Result<A>* result(Turn t) const {
    return at<Result<A>>(layout.result_at) + t.set * p.channels;
  }
  // Twice as many: a set leaves those of its next group but one, while its next group's are used.
  __device__ A* pivot(Turn t) const {
    return at<A>(layout.pivot_at) + (t.parity * p.sets.divisor + t.set) * p.channels;
  }
  __device__ int group(int i) const { return first_group + i * p.teams; }
};

// -------------------------------------------------------------------------------------------------
// The group: where its vectors lie in x and y, which of their elements count, whose they are
// -------------------------------------------------------------------------------------------------
struct Place {
  unsigned vector;  // of x, counted from the 16-byte boundary before it
  int begin, end;   // the elements that count
};

// Where a vector is in a group: what its row begins at, and its place there. Rows count in vectors
// of x, or (kMaskedPlanes, whose rows do not begin with a vector) one by one.
struct Walk {
  unsigned row, in_row;
};

enum Memory { kRegister, kShared, kL2 };  // where a vector is loaded to

template <typename T, Layout kLayout>
struct Group {
  static constexpr int kSize = Vector<T>::kSize;
  // Not all elements of a vector may count.
  static constexpr bool kMasked = kLayout == kMaskedPlanes || kLayout == kPixels;
  static constexpr int kParts = kLayout == kPixels         ? kSize
                                : kLayout == kPackedPlanes ? 2
                                                           : 1;  // channels of a vector
  // Sums that elements are added to: of each, or of every fourth.
  static constexpr int kSums = has_columns(kLayout) || kSize < 4 ? kSize : 4;
  using A = Accumulator<T>;
  const Arguments& a;
  const FusedBatchNormCall& call = a.call;
  const Plan& p = a.plan;
  unsigned column = 0;  // kPixels: this thread's vector in a row
  int channel = 0;      // of its element 0 in the group; < 0: of the group before
  int split = kSize;    // kPackedPlanes: its elements from here on belong to the next channel

  const unsigned width = in_register(p.width.divisor);
  const unsigned row_stride = in_register(kLayout == kMaskedPlanes ? 1 : p.row_stride);
  const unsigned step_row = in_register(row_stride * p.step_row);
  const unsigned step_in_row = in_register(p.step_in_row);
  const unsigned inner = max(a.whole, 1u) - 1;  // vectors of x between its first and last
  const Vector<T>* const x =
      static_cast<const Vector<T>*>(has_columns(kLayout) ? a.x : in_register(a.x));
  Vector<T>* const y = static_cast<Vector<T>*>(a.y);

  __device__ Walk walk(unsigned v) const {
    const unsigned row = divide(v, p.width);
    return {row * row_stride, v - row * width};
  }
  // Goes on to the thread's next vector.
  __device__ void advance(Walk& w) const {
    w.row += step_row;
    if constexpr (!has_columns(kLayout)) {
      w.in_row += step_in_row;
      if (w.in_row >= width) {
        w.in_row -= width;
        w.row += row_stride;
      }
    }
  }

  __device__ Group(const Block<T>& b, unsigned thread) : a(b.a) {
    const unsigned in_row =
        has_columns(kLayout) ? thread - divide(thread, p.width) * p.width.divisor : 0;
    if constexpr (kLayout == kPackedPlanes) {
      const int offset = in_row * kSize;
      channel = divide(offset, p.pixel);
      split = min((channel + 1) * int(p.pixel.divisor) - offset, kSize);
    } else if constexpr (kLayout == kPixels) {
      const unsigned pixel = divide(in_row, p.pixel), in_pixel = in_row - pixel * p.pixel.divisor;
      const unsigned first = pixel * unsigned(call.C) + a.shift;  // element, of group 0
      column = first / kSize + in_pixel;
      channel = int(in_pixel * kSize) - int(first % kSize);
      if (periodic())
        while (channel < 0 || channel >= call.C) channel += channel < 0 ? call.C : -call.C;
    }
  }

  // What element i has of something that each of the vector's channels has. (Chosen by value: an
  // index that the compiler does not know would move the array to local memory.)
  template <typename V>
  __device__ V pick(const V (&of)[kParts], int i) const {
    if (kLayout == kPackedPlanes) return i < split ? of[0] : of[kParts - 1];
    return of[kLayout == kPixels ? i : 0];
  }

  // Rows of several whole pixels: channels follow each other again and again.
  __device__ bool periodic() const { return p.pixels > 1 && p.pixel.divisor == p.width.divisor; }

  // Where a group begins, in vectors of x (kMaskedPlanes: in elements), and which elements of this
  // thread's vectors are the group's.
  struct Origin {
    std::conditional_t<kLayout == kMaskedPlanes, uint64_t, unsigned> at;
    int begin, end;
  };

  __device__ Origin origin(int g) const {
    if constexpr (kLayout == kMaskedPlanes) return {uint64_t(g) * call.HW + a.shift, 0, kSize};
    Origin o = {g * p.group_stride + column, 0, kSize};
    if (kLayout == kPixels && !periodic()) {
      o.begin = max(0, -channel);
      o.end = min(kSize, min(p.channels, int(call.C) - g * p.channels) - channel);
    }
    return o;
  }

  // The vector where `w` is.
  __device__ Place place(const Origin& o, const Walk& w) const {
    if constexpr (kLayout == kMaskedPlanes) {
      const uint64_t first = w.row * a.image + o.at;
      const int behind = int(first % kSize), to_last = int(w.in_row - width) + 2;  // vectors
      const int end = to_last < 0 ? kSize : min(a.tail + behind - to_last * kSize, kSize);
      return {unsigned(first / kSize) + w.in_row, w.in_row == 0 ? behind : 0, end};
    }
    Place at = {unsigned(o.at) + w.row + (kLayout == kPixels ? 0 : w.in_row), o.begin, o.end};
    if (kLayout == kPixels && at.vector - 1 >= inner) {  // the first of x, or one past the last
      if (at.vector == 0) at.begin = max(at.begin, a.shift);
      const int64_t left = call.N * call.C * call.HW + a.shift - int64_t(at.vector) * kSize;
      at.end = int(min(int64_t(at.end), left));
    }
    return at;
  }

  // Calls use(part, channel) for each of the vector's channels; for any of the group's where no
  // element of it counts.
  template <typename Use>
  __device__ void each_part(Use use) const {
    int c = channel;
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      use(i, min(unsigned(c), unsigned(p.channels) - 1));
      if (++c == int(call.C) && kLayout == kPixels && periodic()) c = 0;
    }
  }

  // What counts of a vector that reaches past the end of x.
  __device__ Vector<T> load_tail(const Place& at) const {
    Vector<T> v;
#pragma unroll
    for (int i = 0; i < kSize; ++i)
      if (i >= at.begin && i < at.end) v.set(i, reinterpret_cast<const T*>(x + at.vector)[i]);
    return v;
  }

  // Loads the vector where `w` is, if any of its elements counts; later, unless into registers.
  __device__ void load(Memory to, Vector<T>& v, const Origin& o, const Walk& w) const {
    const Place at = place(o, w);
    if (kMasked && at.begin >= at.end) return;
    if (to == kL2)
      prefetch_global_L2(x + at.vector);
    else if (kMasked && at.vector >= a.whole)
      v = load_tail(at);
    else if (to == kShared)
      cp_async_16(&v, x + at.vector);
    else
      ld_global_128(&v, x + at.vector);
  }

  // Adds the vector where `w` is: s1 += x − pivot, s2 += (x − pivot)², element by element.
  __device__ void sum(Sums<A> (&sums)[kSums], const Vector<T>& v, const Origin& o, const Walk& w,
                      const A (&pivot)[kParts]) const {
    const Place at = place(o, w);
    const auto add = [&](int i) {
      const A d = widen(v, i) - pick(pivot, i);
      sums[i % kSums].s1 += d;
      sums[i % kSums].s2 += d * d;
    };
    if (!kMasked || at.end - at.begin == kSize) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) add(i);
    } else {
#pragma unroll
      for (int i = 0; i < kSize; ++i)
        if (i >= at.begin && i < at.end) add(i);
    }
  }

  // y = (x − mean)·scale + shift, where shift holds beta and what the rounded mean left over. The
  // mean goes first: folded into the shift, it would take digits along where |mean| ≫ std.
  __device__ void store(const Vector<T>& v, const Origin& o, const Walk& w,
                        const Result<A> (&r)[kParts], bool streaming) const {
    const Place at = place(o, w);
    if (kMasked && at.begin >= at.end) return;
    A normal[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const Result<A> of = pick(r, i);
      normal[i] = (widen(v, i) - of.mean) * of.scale + of.shift;
    }
    const Vector<T> v_y = make_vector<T>(normal);
    Vector<T>* const to = y + at.vector;
    if (!kMasked || at.end - at.begin == kSize) {
      // By intrinsics, in one instruction: the compiler would split a plain assignment.
      const uint4 raw = *reinterpret_cast<const uint4*>(&v_y);
      uint4* const to_raw = reinterpret_cast<uint4*>(to);
      streaming ? __stcs(to_raw, raw) : __stwb(to_raw, raw);
    } else {
#pragma unroll
      for (int i = 0; i < kSize; ++i)
        if (i >= at.begin && i < at.end) reinterpret_cast<T*>(to)[i] = v_y.get(i);
    }
  }
};

// -------------------------------------------------------------------------------------------------
// Worker warps: each thread loads, sums and stores vectors of its own
// -------------------------------------------------------------------------------------------------

// Leaves this thread's sums of a group for the exchange warps, instead of earlier ones or (`more`)
// beside them.
template <typename T, Layout kLayout>
__device__ void leave(const Block<T>& b, const Group<T, kLayout>& group, unsigned thread, Turn turn,
                      Sums<Accumulator<T>> (&sums)[Group<T, kLayout>::kSums], bool more) {
  using A = Accumulator<T>;
  constexpr int kSize = Group<T, kLayout>::kSums;
  Sums<A>* const partial = b.partial(turn);
  const unsigned width = b.p.width.divisor;
  if constexpr (!has_columns(kLayout)) {
    Sums<A> all;
#pragma unroll
    for (int e = 0; e < kSize; ++e) all.add(sums[e]);
    all = warp_sum(all);
    if (b.lane == 0) partial[thread / 32] = all;
  } else if constexpr (kLayout == kPackedPlanes) {
    Sums<A> of[2];
#pragma unroll
    for (int e = 0; e < kSize; ++e)
      if (e < group.split)
        of[0].add(sums[e]);
      else
        of[1].add(sums[e]);
    if (thread < unsigned(b.p.threads)) {
      partial[2 * thread] = of[0];
      partial[2 * thread + 1] = of[1];
    }
  } else {
    const bool by_warp = fits_warp(width);
#pragma unroll 1
    for (unsigned bit = 16; by_warp && bit >= width; bit /= 2)
#pragma unroll
      for (int e = 0; e < kSize; ++e)
        sums[e].add({__shfl_xor_sync(0xffffffffu, sums[e].s1, bit),
                     __shfl_xor_sync(0xffffffffu, sums[e].s2, bit)});
    const unsigned at = by_warp ? thread / 32 * width + b.lane : thread;
    if (by_warp ? unsigned(b.lane) < width : thread < unsigned(b.p.threads))
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        if (more) sums[e].add(partial[at * kSize + e]);
        partial[at * kSize + e] = sums[e];
      }
  }
}

// A thread's vectors are rows of its block's share: the first few in registers, the next in places
// in shared memory. If there are more rows than places, the last ones take turns in kRing of the
// places: forth for the sums, and back for the store, read again. Places are private: no barrier
// guards them.
template <typename T, Layout kLayout, bool kMany, typename Begin, typename Prepare, typename Meet,
          typename Exchange>
__device__ void work(const Block<T>& b, Begin begin, Prepare prepare, Meet meet,
                     Exchange exchange) {
  using G = Group<T, kLayout>;
  using A = typename G::A;
  constexpr int kRegRows = register_rows(kLayout, G::kSize, kMany, kLean);
  constexpr bool kHasRing =
      kMany || kLayout == kPixels || (kLayout == kMaskedPlanes && sizeof(T) != 4);
  const Plan& p = b.p;
  const unsigned thread = threadIdx.x - 32 * p.exchange_warps;
  const G group(b, thread);
  const unsigned first = b.rank * p.share + thread, step = p.step.divisor;
  const bool has_rows = thread < unsigned(p.threads) && first < p.vectors;
  const int rows = has_rows ? min(p.rows, int(divide(p.vectors - 1 - first, p.step)) + 1) : 0;
  const bool overflows = kHasRing && p.rows > p.reg_rows + p.smem_rows;
  const int reg_rows = kRegRows > 0 ? min(rows, p.reg_rows) : 0,
            smem_rows = min(rows - reg_rows, p.smem_rows - (overflows ? kRing : 0)),
            ring_rows = rows - reg_rows - smem_rows;
  const unsigned threads = in_register(unsigned(p.threads));
  const Walk start_of_share = group.walk(first);
  Vector<T> reg[kRegRows > 0 ? kRegRows : 1];

  // Calls use(vector, walk) for this thread's rows in registers.
  const auto each_reg_row = [&](Walk& at, auto use) {
#pragma unroll
    for (int r = 0; r < kRegRows; ++r) {
      if (r >= reg_rows) continue;
      use(reg[r], at);
      group.advance(at);
    }
  };
  // The same for its rows in shared memory, in the places of group i. Their copies are two groups
  // of cp.async, so that the first half can be summed while the second lands.
  const auto each_smem_row = [&](int i, Walk& at, auto before_half, auto use, auto after_half) {
    const unsigned stage = i - divide(i, p.stages) * p.stages.divisor;
    Vector<T>* place = b.places() + stage * p.smem_rows * threads + thread;
    const Vector<T>* const middle = place + (smem_rows + 1) / 2 * threads;
    const Vector<T>* const end = place + smem_rows * threads;
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      before_half(half);
#pragma unroll 1
      for (; place < (half == 0 ? middle : end); place += threads) {
        use(*place, at);
        group.advance(at);
      }
      after_half();
    }
  };

  // Rows beyond the places take turns in the last kRing of them.
  const auto ring = [&](int row) -> Vector<T>& {
    return b.places()[(p.smem_rows - kRing + row % kRing) * threads + thread];
  };
  const auto ring_walk = [&](int row) {
    return group.walk(first + (reg_rows + smem_rows + row) * step);
  };

  // Sends for group i.
  const auto load = [&](int i) {
    const auto origin = group.origin(b.group(i));
    Walk from = start_of_share;
#pragma unroll 1
    for (int row = 0; kHasRing && i < b.groups && row < min(ring_rows, kRing); ++row)
      group.load(kShared, ring(row), origin, ring_walk(row));
    if (i < b.groups)
      each_reg_row(from, [&](Vector<T>& v, const Walk& w) { group.load(kRegister, v, origin, w); });
    each_smem_row(
        i, from, [](int) {},
        [&](Vector<T>& v, const Walk& w) {
          if (i < b.groups) group.load(kShared, v, origin, w);
        },
        cp_async_commit_group);
  };

  // Σ d and Σ d² of group i, with d = x − pivot.
  const auto sum = [&](int i) {
    const auto origin = group.origin(b.group(i));
    const auto turn = b.turn(i);
    const A* const pivots = b.pivot(turn);
    A pivot[G::kParts];
    group.each_part([&](int e, unsigned c) { pivot[e] = pivots[c]; });
    Sums<A> sums[G::kSums];
    Walk at = start_of_share;
    const auto add = [&](const Vector<T>& v, const Walk& w) {
      group.sum(sums, v, origin, w, pivot);
    };
    each_reg_row(at, add);
    each_smem_row(
        i, at,
        [&](int half) {
          if (p.stages.divisor > p.lag + 1)  // a later group may be on its way
            half == 0 ? cp_async_wait_group<3>() : cp_async_wait_group<2>();
          else
            half == 0 ? cp_async_wait_group<1>() : cp_async_wait_group<0>();
        },
        add, [] {});
    Walk ahead = ring_walk(kRing);
    int row = 0, chain = 0;  // where one begins, for all lanes alike
    do {
      const int end = kLayout == kPixels ? min(chain + kChain, ring_rows) : ring_rows;
#pragma unroll 1
      for (; kHasRing && row < end; ++row) {
        cp_async_wait_group<kRing - 1>();
        add(ring(row), at);
        group.advance(at);
        if (row + kRing < ring_rows) group.load(kShared, ring(row), origin, ahead);
        group.advance(ahead);
        cp_async_commit_group();
      }
      leave(b, group, thread, turn, sums, chain > 0);
#pragma unroll
      for (int e = 0; e < G::kSums; ++e) sums[e] = {};
      chain += kChain;
    } while (kLayout == kPixels && overflows && chain < p.rows - p.smem_rows + kRing);
    mbarrier_arrive(b.summed(turn));  // all lanes: what each has read may be overwritten now
  };

  // Asks L2 for the first rows of group i, where memory would rest while another is exchanged.
  const auto prefetch = [&](int i) {
    if (i >= b.groups || p.stages.divisor > 1 || overflows) return;
    const auto origin = group.origin(b.group(i));
    Walk from = start_of_share;
    int left = p.rows / (kLayout == kPixels ? 2 : 4);  // more would drive out what is there
    const auto ask = [&](Vector<T>& v, const Walk& w) {
      if (left-- > 0) group.load(kL2, v, origin, w);
    };
    each_reg_row(from, ask);
    each_smem_row(i, from, [](int) {}, ask, [] {});
  };

  // y of group i, and refills each place that it has stored with group `next`.
  const auto store = [&](int i, int next) {
    const auto origin = group.origin(b.group(i)), next_origin = group.origin(b.group(next));
    const bool refills = next < b.groups;
    Result<A> result[G::kParts];
    const auto turn = b.turn(i);
    mbarrier_wait(b.ready(turn), turn.parity);
    const Result<A>* const results = b.result(turn);
    group.each_part([&](int e, unsigned c) { result[e] = results[c]; });
    // Newest first: L2 still has those.
#pragma unroll 1
    for (int row = ring_rows - 1; kHasRing && row >= 0; --row) {
      cp_async_wait_group<kRing - 1>();
      const Walk here = ring_walk(row);
      group.store(ring(row), origin, here, result, overflows);
      if (row >= kRing)
        group.load(kShared, ring(row), origin, ring_walk(row - kRing));
      else if (refills)
        group.load(kShared, ring(row), next_origin, here);
      cp_async_commit_group();
    }
    Walk to = start_of_share;
    each_reg_row(to, [&](Vector<T>& v, const Walk& w) {
      group.store(v, origin, w, result, overflows);
      if (refills) group.load(kRegister, v, next_origin, w);
    });
    each_smem_row(
        i, to, [](int) {},
        [&](Vector<T>& v, const Walk& w) {
          group.store(v, origin, w, result, overflows);
          if (refills) group.load(kShared, v, next_origin, w);
        },
        cp_async_commit_group);
  };

  if (const int turn = divide(b.first_group, p.stagger); turn < p.stagger_turns)
    nanosleep_cycles(int64_t(turn) * p.stagger_cycles);
  // Step i sums group i + lag, then stores group i and refills its places with group i + stages.
  // Steps are executed in the order of the text, so that what is next is in the instruction cache.
  // Exchange warps come along as far as the block's own barriers, which all come to at one place.
  const int stages = p.stages.divisor;
  const bool works = b.warp >= p.exchange_warps;
#pragma unroll 1
  for (int i = 1 - stages; i < max(b.groups, 1); ++i) {
    const int ahead = i + p.lag;
    if (works && i <= 0) load(i + stages - 1);
    if (i == -p.lag) begin();
    if (works && b.call.training && ahead >= 0 && ahead < b.groups) {
      sum(ahead);
      if constexpr (kMany || kLayout == kPixels) prefetch(ahead + stages);
    }
    if (i == -p.lag) {
      const auto prepared = works ? decltype(prepare())() : prepare();
      meet();
      if (!works) return exchange(prepared);
    }
    if (!b.call.training) cp_async_wait_group<0>();
    if (i >= 0 && i < b.groups) store(i, i + stages);
  }
}

// -------------------------------------------------------------------------------------------------
// Exchange warps: from the block's sums to the team's, and to what the workers need
// -------------------------------------------------------------------------------------------------
struct Moments {
  double mean, var, m2;  // m2: Σ (x − mean)²
};

__device__ Moments batch_moments(const Arguments& a, double pivot, double s1, double s2) {
  const double offset = s1 * a.per_element;
  double m2 = s2 - s1 * offset;
  if (m2 < 0) m2 = 0;  // rounding, in a constant channel; NaN stays
  return {pivot + offset, m2 * a.per_element, m2};
}

// What of the parameters and buffers a channel needs.
template <typename T>
struct Channel {
  using A = Accumulator<T>;
  A gamma = 1, beta = 0, running_mean = 0, running_var = 0;

  __device__ Result<A> result(double mean, double inv_std) const {
    const double scale = inv_std * gamma;
    return {A(mean), A(scale), A(beta - (mean - A(mean)) * scale)};
  }

  // What backward needs, and the new running statistics, with `factor` for the new value's weight.
  __device__ void save(const Arguments& a, int c, const Moments& moments, double inv_std,
                       double factor) const {
    const FusedBatchNormCall& call = a.call;
    static_cast<A*>(call.mean)[c] = A(moments.mean);
    static_cast<A*>(call.inv_std)[c] = A(inv_std);
    if (call.running_mean) {
      const double unbiased = moments.m2 * a.per_element_but_one;
      store_parameter<T>(call.running_mean, c, call.running_float,
                         (1 - factor) * running_mean + factor * moments.mean);
      store_parameter<T>(call.running_var, c, call.running_float,
                         (1 - factor) * running_var + factor * unbiased);
    }
  }
};

// Sum of slots `stride` apart, of which this lane takes number `part` and every parts-th after it.
// Each slot says whether it has arrived.
constexpr int kSlots = 5;  // on their way to a lane: 132 blocks in one go
template <typename A>
__device__ Sums<A> gather(const SumSlot<A>* slots, int count, int stride, int part, int parts) {
  Sums<A> sums;
#pragma unroll 1
  for (int first = part; first < count; first += kSlots * parts) {
    SumSlot<A> slot[kSlots];
    bool complete;
    do {
      complete = true;
#pragma unroll
      for (int k = 0; k < kSlots; ++k) {
        const int at = first + k * parts;
        slot[k] = at < count ? ld_relaxed(&slots[at * stride]) : SumSlot<A>{0, A(-0.0)};
      }
#pragma unroll
      for (int k = 0; k < kSlots; ++k)
        complete = complete && (slot[k].minus_s2 != 0 || signbit(slot[k].minus_s2));
    } while (!complete);
#pragma unroll
    for (int k = 0; k < kSlots; ++k) sums.add(Sums<A>{slot[k].s1, -slot[k].minus_s2});
  }
  __syncwarp();
  return sums;
}

// The pivot of a channel: a mean of some of its elements, so that (pivot − mean)² is a fraction of
// var and nothing cancels. They come in four runs, scattered over the channel: elements that lie
// apart would each be a request of its own, for which small channels have no time. Of any three
// runs the median counts, so that no outlier, nor a run of them, moves the pivot away from all
// others. It is one of T's own values: then d = x − pivot has few digits, and most sums are exact.
constexpr int kRuns = 4, kRunElements = 8;
template <typename T>
struct Sample {
  T run[kRuns];  // a lane's element of each
};

// An exchange warp takes a unit of a group: one channel, or up to 32. The lanes that have the same
// channel share what there is to add. All lanes of the warp call each function.
template <typename T, Layout kLayout>
struct ExchangeWarp {
  using A = Accumulator<T>;
  const Block<T>& b;
  const Plan& p = b.p;
  const FusedBatchNormCall& call = b.call;
  // Set of warps that this one is in; unit in the group.
  const int set = has_columns(kLayout) ? b.turn(b.warp).set : b.warp;
  const int index = has_columns(kLayout) ? divide(b.warp, p.sets) : 0;
  const int bits = has_columns(kLayout) ? b.layout.unit_bits : 0, unit_channels = 1 << bits;
  // This lane's number among those of its channel; how many they are; its channel in the group.
  const int part = b.lane >> bits, parts = 32 >> bits;
  const int local = index * unit_channels + (b.lane & (unit_channels - 1));

  // Whether this lane does for its channel what one lane does.
  __device__ bool leads() const { return local < p.channels && part == 0; }
  // This lane's channel in x, for group i of the block's team.
  __device__ int channel_of(int i) const { return b.group(i) * p.channels + local; }
  // Whether it needs pivots.
  __device__ bool samples(int i) const { return call.training && i < b.groups; }

  // Loads the sample of this lane's channel in group i. (One without a channel reads another's.)
  __device__ Sample<T> sample(int i) const {
    const int64_t channel = min(channel_of(i), int(call.C) - 1);
    const bool apart = call.HW < kRunElements;
    const int e = part % kRunElements;
    Sample<T> s;
#pragma unroll
    for (int r = 0; r < kRuns; ++r) {
      const unsigned seed = apart ? r * kRunElements + e : r;
      const unsigned starts = unsigned(call.HW) - (apart ? 0 : kRunElements - 1);
      const uint64_t n = __umulhi(seed * 0x9e3779b9u, unsigned(call.N)),
                     at = __umulhi(seed * 0x85ebca6bu, starts) + uint64_t(apart ? 0 : e);
      s.run[r] = static_cast<const T*>(
          call.x)[n * b.a.image +
                  (kLayout == kPixels ? channel + at * call.C : channel * call.HW + at)];
    }
    return s;
  }

  // Leaves a group's pivots, which the workers find behind the result of an earlier group.
  __device__ void set_pivots(int i, const Sample<T>& s) const {
    A sum = 0;
#pragma unroll
    for (int r = 0; r < kRuns; ++r) {
      const A v = widen(s.run[r]), next = widen(s.run[(r + 1) % kRuns]);
      sum += max(min(v, next), min(max(v, next), widen(s.run[(r + 2) % kRuns])));
    }
    const A mean = warp_sum(sum, unit_channels) * unit_channels / (kRuns * 32);
    const A pivot = isfinite(mean) ? widen(round_to<T>(mean)) : A(0);
    if (leads()) b.pivot(b.turn(i))[local] = pivot;
  }

  // A channel's sums over the block.
  __device__ Sums<A> block_sums(Turn turn) const {
    constexpr int kSize = Vector<T>::kSize;
    const Sums<A>* const partial = b.partial(turn);
    const int row = b.layout.partial_row, rows = b.layout.partial_rows;
    Sums<A> sums;
    // Adds entry `at` of rows first, first + step …
    const auto add_rows = [&](Sums<A>& to, unsigned at, int first, int step) {
#pragma unroll 2
      for (int r = first; r < rows; r += step) to.add(partial[r * row + at]);
    };
    if constexpr (!has_columns(kLayout)) {
      if (b.lane < rows) sums.add(partial[b.lane]);
    } else if (local >= p.channels) {
    } else if constexpr (kLayout == kPackedPlanes) {  // lanes share the columns of its plane
      const unsigned first = local * unsigned(call.HW), end = first + unsigned(call.HW);
#pragma unroll 1
      for (unsigned c = first / kSize + part; c * kSize < end; c += parts)
        add_rows(sums, 2 * c + (c * kSize < first), 0, 1);
    } else {  // they share the rows; each pixel has an entry
      const unsigned pixel = p.pixel.divisor * kSize, all = p.width.divisor * kSize;  // elements
#pragma unroll 1
      for (unsigned j = 0; j < p.pixels; ++j) {
        const unsigned first = j * unsigned(call.C) + b.a.shift, in_row = first + local;
        const unsigned periodic = in_row - (in_row < all ? 0 : all);
        Sums<A> of_pixel;  // else there would be long chains of additions, see kChain
        add_rows(of_pixel, pixel == all ? periodic : j * pixel + first % kSize + local, part,
                 parts);
        sums.add(of_pixel);
      }
    }
    return warp_sum(sums, unit_channels);
  }

  // From a block's sums to its cluster's: each block sends them to all.
  __device__ Sums<A> cluster_sums(const Sums<A>& own) const {
    const int team = p.team.divisor;
    SumSlot<A>* const slots = b.template at<SumSlot<A>>(b.layout.message_at) + local * team;
    const bool exists = local < p.channels;
#pragma unroll 1
    for (int rank = part; exists && rank < team; rank += parts)
      st_async(&slots[b.rank], rank, SumSlot<A>{own.s1, -own.s2}, b.gathered());
    mbarrier_wait(b.gathered(), 0);
    Sums<A> sums;
#pragma unroll 1
    for (int rank = part; exists && rank < team; rank += parts)
      sums.add(Sums<A>{slots[rank].s1, -slots[rank].minus_s2});
    return warp_sum(sums, unit_channels);
  }

  // From a block's sums to those of a team in the grid, by slots in memory: one for each block and
  // channel, and one for the team's. Few are added up by each block for itself; of many, each
  // channel is one block's, which leaves the team's sums for all.
  __device__ Sums<A> grid_sums(int i, const Sums<A>& own) const {
    const int team = p.team.divisor, channels = has_columns(kLayout) ? p.channels : 1;
    const bool exists = local < channels, few = team <= 4 * kSlots * parts;
    unsigned char* const group = b.a.scratch + b.group(i) * b.layout.group_bytes;
    auto* const counter = reinterpret_cast<unsigned long long*>(group + index * kLineBytes);
    auto* const slots = reinterpret_cast<SumSlot<A>*>(group + b.layout.units * kLineBytes);
    auto* const total = slots + team * channels;
    if (exists && part == 0)
      st_relaxed(&slots[b.rank * channels + local], SumSlot<A>{own.s1, -own.s2});
    if (few) {
      // The count orders nothing: looking at all slots, again and again, would take L2's time.
      if (b.lane == 0) atomicAdd(counter, 1);  // relaxed
      while (b.lane == 0 && ld_relaxed(counter) < team) nanosleep();
      __syncwarp();
      return warp_sum(gather(slots + local, exists ? team : 0, channels, part, parts),
                      unit_channels);
    }
#pragma unroll 1
    for (int c = b.rank; c < channels; c += team) {
      if (c >> bits != index) continue;
      const Sums<A> sums = warp_sum(gather(slots + c, team, channels, b.lane, 32));
      if (b.lane == 0) st_relaxed(&total[c], SumSlot<A>{sums.s1, -sums.s2});
    }
    return gather(total + local, exists, channels, 0, 1);
  }

  // Of this lane's channel in group i, if it is the one that needs it.
  __device__ Channel<T> load_channel(int i) const {
    const int c = channel_of(i);
    Channel<T> channel;
    if (!leads() || i >= b.groups || c >= call.C) return channel;
    if (call.gamma) channel.gamma = load_parameter<T>(call.gamma, c, call.affine_float);
    if (call.beta) channel.beta = load_parameter<T>(call.beta, c, call.affine_float);
    if (call.running_mean && (b.rank == 0 || !call.training)) {
      channel.running_mean = load_parameter<T>(call.running_mean, c, call.running_float);
      channel.running_var = load_parameter<T>(call.running_var, c, call.running_float);
    }
    return channel;
  }

  // `channel`: of the first group.
  __device__ void exchange(Channel<T> channel) const {
    const int sets = p.sets.divisor;
    const auto prepare_pivots = [&](int i) {
      if (samples(i)) set_pivots(i, sample(i));
    };
    prepare_pivots(set + sets);
#pragma unroll 1
    for (int i = set; i < b.groups; i += sets) {
      const auto turn = b.turn(i);
      Moments moments;
      if (call.training) {
        mbarrier_wait(b.summed(turn), turn.parity);
        Sums<A> sums = block_sums(turn);
        if (p.team_kind == kClusterTeam)
          sums = cluster_sums(sums);
        else if (p.team.divisor > 1)
          sums = grid_sums(i, sums);
        moments = batch_moments(b.a, leads() ? b.pivot(turn)[local] : A(0), sums.s1, sums.s2);
      } else {
        moments.mean = channel.running_mean;
        moments.var = channel.running_var;
      }
      const double inv_std = rsqrt(moments.var + call.eps);
      if (leads()) b.result(turn)[local] = channel.result(moments.mean, inv_std);
      mbarrier_arrive(b.ready(turn));
      if (const int c = channel_of(i); call.training && b.rank == 0 && leads() && c < call.C)
        channel.save(b.a, c, moments, inv_std, *b.factor());
      prepare_pivots(i + 2 * sets);
      channel = load_channel(i + sets);
    }
  }
};

// -------------------------------------------------------------------------------------------------
// The kernel
// -------------------------------------------------------------------------------------------------
template <typename T, Layout kLayout, bool kMany>
__global__ void __maxnreg__(max_registers(kLayout, Vector<T>::kSize, kMany, kLean))
    fused_batch_norm_forward_kernel(const __grid_constant__ Arguments a) {
  using A = Accumulator<T>;
  const Block<T> b(a);
  const Plan& p = a.plan;
  const FusedBatchNormCall& call = a.call;
  if (threadIdx.x == 0) {
    double factor = call.momentum;
    if (call.cumulative)
      factor = call.num_batches_tracked ? 1.0 / double(*call.num_batches_tracked + 1) : 0;
    *b.factor() = factor;
  }
  const ExchangeWarp<T, kLayout> warp{b};
  const bool samples = b.warp < p.exchange_warps && warp.samples(warp.set);
  Sample<T> sample;  // sent for before x itself takes all of memory's time
  if (samples) sample = warp.sample(warp.set);
  const auto grid = cooperative_groups::this_grid();
  unsigned arrival = 0;
  if (p.team_kind == kGridTeam) {
    auto* const slots = reinterpret_cast<SumSlot<A>*>(a.scratch);
    const int64_t count = p.groups * b.layout.group_bytes / sizeof(SumSlot<A>),
                  step = int64_t(gridDim.x) * blockDim.x;
#pragma unroll 1
    for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step)
      st_relaxed(&slots[i], SumSlot<A>{0, 0});
    arrival = grid.barrier_arrive();
  }
  if (samples) warp.set_pivots(warp.set, sample);
  // Behind the first loads.
  const auto begin = [&] {
    if (threadIdx.x == 0) {
#pragma unroll 1
      for (int i = 0; i < int(p.sets.divisor); ++i) {
        mbarrier_init(b.summed({i, 0}), blockDim.x - 32 * p.exchange_warps);
        mbarrier_init(b.ready({i, 0}), 32 * b.layout.units);
      }
      mbarrier_init(b.gathered(), 1);
      fence_mbarrier_init();
      if (p.team_kind == kClusterTeam)
        mbarrier_arrive_expect_tx(b.gathered(), p.channels * p.team.divisor * sizeof(SumSlot<A>));
    }
    __syncwarp();  // whole warps, as the cluster's aligned barrier needs them
    if (p.team_kind == kClusterTeam) barrier_cluster_arrive();
    __syncthreads();  // the barriers, the factor and the first pivots are there
  };
  // Behind the first sums, before any exchange.
  const auto meet = [&] {
    __syncwarp();
    if (p.team_kind == kClusterTeam)
      barrier_cluster_wait();      // peers are there, with their mbarriers
    if (p.team_kind == kGridTeam)  // no scratch is zeroed any more, the counter has been read
      grid.barrier_wait(std::move(arrival));
    auto* const batches = reinterpret_cast<unsigned long long*>(call.num_batches_tracked);
    if (call.training && batches && blockIdx.x == 0 && threadIdx.x == 0) atomicAdd(batches, 1);
  };
  // What the first group's channels need takes long to come: it is sent for ahead of their sums.
  const auto prepare = [&] { return warp.load_channel(warp.set); };
  work<T, kLayout, kMany>(b, begin, prepare, meet,
                          [&](const Channel<T>& channel) { warp.exchange(channel); });
}

// -------------------------------------------------------------------------------------------------
// The plan: shape and device in, launch configuration out
// -------------------------------------------------------------------------------------------------
struct Device {
  int multiprocessors;
  int shared_bytes, reserved_bytes;  // of a block: at most, and what each costs besides
  int architecture;                  // what the kernel was compiled for: 10·major + minor
  cudaError_t error;

  Device() {
    int ordinal, major, minor;
    error = cudaGetDevice(&ordinal);
    const auto get = [&](int& value, cudaDeviceAttr attribute) {
      if (!error) error = cudaDeviceGetAttribute(&value, attribute, ordinal);
    };
    get(multiprocessors, cudaDevAttrMultiProcessorCount);
    get(shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    get(reserved_bytes, cudaDevAttrReservedSharedMemoryPerBlock);
    get(major, cudaDevAttrComputeCapabilityMajor);
    get(minor, cudaDevAttrComputeCapabilityMinor);
    if (error) return;
    for (const int compiled : {__CUDA_ARCH_LIST__})  // nvcc's own, in hundreds
      if (compiled / 10 <= 10 * major + minor) architecture = compiled / 10;
  }
};

// What a block moves and waits for (measured on an H100 and an H200), in bytes that could be moved
// meanwhile: what a group costs beside its own where loads and exchange are hidden, where nothing
// hides how long its last vectors take, and where nothing hides the exchange either.
constexpr int64_t kHiddenBytes = 4 << 10, kLandingBytes = 64 << 10, kExchangeBytes = 144 << 10;
constexpr int64_t kAloneBytes = 32 << 10;  // of a group that a block takes alone
constexpr int64_t kEvalBytes = 28 << 10;   // of a block in eval mode: none waits for another
constexpr int64_t kBlockBytes = 72 << 10;  // of a block where there are clusters: three fit
constexpr int64_t kBytesPerCycle = 16;     // that a multiprocessor reads, beside what it writes
constexpr int64_t kStaggerCycles = 5200;   // of reading x, at least, where blocks are staggered
// Rows of a thread in a block with one group, where not all blocks are there at once; or at most.
constexpr int kSmallRows = 14, kMostRows = 18;
constexpr int kPixelRows = 2;  // of the smallest channels-last groups

FastDivmod fast_divmod(int64_t divisor) {
  unsigned shift = 0;
  while ((int64_t(1) << shift) < divisor) ++shift;
  const int64_t magic = ((int64_t(1) << (31 + shift)) + divisor - 1) / divisor;
  return {unsigned(divisor), unsigned(magic), shift};
}

// Bytes from a 16-byte boundary to x.
int shift_bytes(const FusedBatchNormCall& call) {
  return int(reinterpret_cast<uintptr_t>(call.x) % kVectorBytes);
}

// A group of so many channels, whose planes together are whole vectors; or, `masked`, of one.
Plan planes(const FusedBatchNormCall& call, int size, int channels, bool masked) {
  Plan p = {};
  const int64_t width =
      std::max<int64_t>(masked ? (call.HW + size - 2) / size + 1 : call.HW * channels / size, 1);
  p.layout = masked ? kMaskedPlanes : channels > 1 ? kPackedPlanes : kPlanes;
  p.channels = channels;
  p.groups = int(call.C / channels);
  p.vectors = call.C > 0 ? unsigned(call.N * width) : 0;
  p.width = fast_divmod(width);
  p.pixel = channels > 1 ? fast_divmod(call.HW) : p.width;
  p.row_stride = unsigned(p.groups * width);
  p.group_stride = unsigned(width);
  return p;
}

// The fewest channels whose planes together are whole vectors, if there are such groups.
std::optional<Plan> packed_planes(const FusedBatchNormCall& call, int size, bool lean) {
  const int64_t channels = size / std::gcd<int64_t>(call.HW, size),
                width = call.HW * channels / size;
  if (channels == 1 || size == 2 || shift_bytes(call) > 0 || call.C == 0 || call.C % channels ||
      call.HW < size - 1 || width > resident_threads(kPackedPlanes, size, false, lean) / 2 - 32)
    return {};
  return planes(call, size, int(channels), false);
}

// A group of neighbouring channels of a channels-last x, `channels` of them where C allows it.
Plan pixels(const FusedBatchNormCall& call, int size, int channels) {
  Plan p = {};
  const int64_t C = call.C, pixels = call.N * call.HW;
  p.layout = kPixels;
  p.pixels = int(size / std::gcd<int64_t>(C, size));  // of a row, so that rows are whole vectors
  p.row_stride = unsigned(p.pixels * C / size);
  if (p.pixels > 1 && C <= channels) {  // all channels, pixel behind pixel
    p.channels = int(C);
    p.pixel = p.width = fast_divmod(p.row_stride);
    p.vectors = unsigned(ceil_div(pixels * C + size - 1, p.pixels * C)) * p.row_stride;
  } else {  // each pixel has vectors of its own; the first and last may hold other channels too
    p.channels = int(std::min<int64_t>(channels, (C + size - 1) / size * size));
    const int pixel = p.channels / size + (p.pixels > 1 || shift_bytes(call) > 0);
    p.pixel = fast_divmod(pixel);
    p.width = fast_divmod(p.pixels * pixel);
    p.vectors = unsigned((pixels + p.pixels - 1) / p.pixels * p.width.divisor);
  }
  p.groups = ceil_div(C, p.channels);
  p.group_stride = unsigned(p.channels / size);
  return p;
}

struct Planner {
  const FusedBatchNormCall& call;
  const Device& device;
  const int size, accumulator_bytes;
  const int64_t multiprocessor_bytes = device.shared_bytes + device.reserved_bytes;
  const bool lean = is_lean(device.architecture);

  // All blocks must read the counter before it counts: a launch in which they wait for each other.
  bool counts_batches() const { return call.cumulative && call.num_batches_tracked; }
  SharedLayout layout(const Plan& p) const { return SharedLayout(p, accumulator_bytes, size); }
  int worker_threads(const Plan& p, int blocks, bool many = false) const {
    return std::min(resident_threads(p.layout, size, many, lean) / blocks / 32 * 32, kMaxThreads) -
           32 * p.exchange_warps;
  }
  int64_t blocks(const Plan& p) const { return int64_t(p.teams) * p.team.divisor; }
  // Bytes of a block of which so many fit on a multiprocessor.
  int64_t room(int blocks) const { return multiprocessor_bytes / blocks - device.reserved_bytes; }
  // Blocks that a multiprocessor has room for, at least; and all of them.
  int resident(const Plan& p) const {
    return int(
        std::min<int64_t>({multiprocessor_bytes / (p.shared_bytes + device.reserved_bytes),
                           resident_threads(p.layout, size, false, lean) / block_threads(p), 32}));
  }
  // (Clusters leave some multiprocessors out: 8 of an H100's 132.)
  int64_t at_once(const Plan& p) const {
    const int left_out = p.team_kind == kClusterTeam ? device.multiprocessors / 16 : 0;
    return int64_t(resident(p)) * (device.multiprocessors - left_out);
  }
  // Threads are a multiple of this: whole warps, or whole rows, so that each stays in its column.
  int grain(const Plan& p) const {
    return !has_columns(p.layout) || fits_warp(p.width.divisor) ? 32 : p.width.divisor;
  }

  // The plan with a team of so many blocks, of which so many fit on a multiprocessor.
  Plan with_team(Plan p, TeamKind kind, int64_t team, int stages, int lag, int blocks) const {
    p.team_kind = kind;
    p.team = fast_divmod(team);
    p.teams = int(std::max<int64_t>(
        kind == kGridTeam ? std::min<int64_t>(blocks * device.multiprocessors / team, p.groups)
                          : p.groups,
        1));
    p.rounds = ceil_div(p.groups, p.teams);
    p.stages = fast_divmod(stages);
    p.lag = lag;
    p.sets = fast_divmod(lag + 1);
    p.exchange_warps = layout(p).units * (lag + 1);
    return p;
  }

  // The same with so many worker threads in a block, and what rows they have where. None if that
  // does not fit, unless rows may be read again.
  std::optional<Plan> with_threads(Plan p, int threads, int blocks, bool rereads, bool many) const {
    const int team = p.team.divisor, stages = p.stages.divisor;
    p.threads = threads;
    p.rows = ceil_div(p.vectors, int64_t(team) * threads);
    // Rows go to the blocks of a team in turn, where those keep pace with each other; else each has
    // its rows side by side.
    const bool in_turn = stages > 1 || rereads;
    p.share = in_turn ? threads : p.rows * threads;
    p.step = fast_divmod(in_turn ? int64_t(team) * threads : threads);
    p.step_row = p.step.divisor / p.width.divisor;
    p.step_in_row = p.step.divisor % p.width.divisor;
    p.reg_rows = stages == 1 ? std::min(p.rows, register_rows(p.layout, size, many, lean)) : 0;
    p.smem_rows = 0;
    const int rows = p.rows - p.reg_rows;
    const int64_t left = room(blocks) - layout(p).bytes;
    p.smem_rows = int(std::min<int64_t>(rows, left / (int64_t(stages) * threads * kVectorBytes)));
    if (left < 0 || p.smem_rows < (rereads ? std::min(rows, kRing) : rows)) return {};
    p.shared_bytes = layout(p).bytes;
    p.stagger = fast_divmod(std::max(device.multiprocessors / team, 1));
    return p;
  }

  // The same with as many threads as have about so many rows each.
  std::optional<Plan> with_rows(const Plan& group, TeamKind kind, int64_t team, int stages, int lag,
                                int blocks, int rows) const {
    const Plan p = with_team(group, kind, team, stages, lag, blocks);
    const int share = std::max(ceil_div(p.vectors, team), 1), unit = grain(p),
              most = worker_threads(p, blocks) / unit * unit;
    if (most <= 0) return {};
    const int threads =
        int(std::min(ceil_div(share, int64_t(rows) * unit) * int64_t(unit), int64_t(most)));
    rows = ceil_div(share, threads);  // no more threads than that takes
    return with_threads(p, ceil_div(share, int64_t(rows) * unit) * unit, blocks, false, false);
  }

  // Blocks of one multiprocessor start one after the other: in step, all would load, then all
  // store, and memory would rest in between. Each waits until memory has had the time to read what
  // those before it wait for. Not where memory reads all of x in little more time than the last
  // block then sums and stores.
  Plan staggered(Plan p) const {
    const int64_t block_bytes = int64_t(p.rows) * p.threads * kVectorBytes;
    const int turns = resident(p);
    // No block more at once than turns, else those that come later would start out of turn.
    if (blocks(p) > at_once(p))
      p.shared_bytes =
          int(std::max<int64_t>(p.shared_bytes, std::min(room(2), room(turns + 1) + 16)));
    if (blocks(p) * block_bytes / (kBytesPerCycle * device.multiprocessors) < kStaggerCycles)
      return p;
    p.stagger_turns = turns;
    p.stagger_cycles = int(block_bytes / kBytesPerCycle);
    return p;
  }

  // No block waits for another.
  std::optional<Plan> eval(const Plan& group) const {
    const int64_t bytes = x_bytes(group);
    for (int64_t block = std::min(kEvalBytes, multiprocessor_bytes / 4); block > 0; block /= 2)
      if (const auto p = with_rows(group, kBlockTeam, std::max(ceil_div(bytes, block), 1), 1, 0, 2,
                                   kSmallRows))
        return p;
    return {};
  }

  // The same for a team with one group: with the fewest rows of a thread, which take the least
  // time, with which all blocks are there at once.
  std::optional<Plan> with_small_block(const Plan& group, TeamKind kind, int64_t team) const {
    for (int rows = 2; rows <= kMostRows; rows += 4)
      if (const auto p = with_rows(group, kind, team, 1, 0, 2, rows))
        if (blocks(*p) <= at_once(*p)) return p;
    return with_rows(group, kind, team, 1, 0, 2, kSmallRows);
  }

  // One group a block or a team, all of it on the chip, several blocks on a multiprocessor.
  std::optional<Plan> small(const Plan& group) const {
    const int most_cluster = device.architecture >= 90 ? kMaxCluster : 1;
    const int64_t bytes = x_bytes(group), slots = 2 * device.multiprocessors,
                  groups = std::max(group.groups, 1);
    if (counts_batches()) return {};
    // One block, where groups are small, or so many that each multiprocessor has three; without
    // clusters, every other one.
    const bool many =
        most_cluster > 1 ? 2 * groups >= 3 * slots && bytes <= kBlockBytes : 4 * groups >= slots;
    if (bytes <= kAloneBytes || many)
      if (const auto p = with_small_block(group, kBlockTeam, 1)) return staggered(*p);
    // All groups at once, by blocks that are all there at once, where clusters would be too few:
    // the fewer the sooner together.
    if (most_cluster == 1 ||
        (group.channels == 1 && groups * most_cluster < device.multiprocessors))
      for (const int64_t blocks : {slots / 2, slots})
        if (const int64_t team = std::min(blocks / groups, bytes / kHiddenBytes);
            team > 1 && team <= 64 && bytes <= team * kBlockBytes)
          if (const auto p = with_small_block(group, kGridTeam, team)) return p;
    // Blocks of a cluster, which are there at once too; in the largest one, as large as fits.
    for (int cluster = 2; cluster <= most_cluster && cluster <= slots; cluster *= 2)
      if (cluster == most_cluster ||
          (bytes <= cluster * kBlockBytes && 4 * groups * cluster >= 3 * slots))
        if (const auto p = with_small_block(group, kClusterTeam, cluster)) return staggered(*p);
    return {};
  }

  // Groups come one after the other to teams of blocks that stay, several of them under way in
  // each: as many blocks in a team as bring all groups through soonest, by what a multiprocessor
  // moves.
  std::optional<Plan> middle(const Plan& group,
                             std::initializer_list<std::pair<int, int>> stages_and_lag) const {
    std::optional<Plan> best;
    int64_t best_cost = INT64_MAX;
    for (const int blocks : {2, 1}) {
      const int slots = blocks * device.multiprocessors;
      for (const auto& [stages, lag] : stages_and_lag) {
        for (int teams = 1; teams <= std::min(slots, std::max(group.groups, 1)); ++teams) {
          if (teams > 1 && ceil_div(group.groups, teams) == ceil_div(group.groups, teams - 1))
            continue;  // smaller teams for as many rounds
          const int team = std::min(slots / teams, std::max(int(group.vectors / 256), 1));
          const int most = group.layout == kPixels ? 384
                           : blocks == 2           ? 256
                                                   : 448,
                    rows = std::max(ceil_div(ceil_div(group.vectors, team), most), 4);
          const auto p = with_rows(group, kGridTeam, team, stages, lag, blocks, rows);
          if (!p) continue;
          const int64_t bytes = int64_t(p->rows) * p->threads * kVectorBytes * blocks +
                                (stages > lag + 1 ? kHiddenBytes
                                 : lag > 0        ? kLandingBytes
                                                  : kExchangeBytes);
          // Two groups on their way hide less; a block alone has its phases one after the other.
          const int alone = blocks == 2 ? 0 : group.layout == kPixels ? -1 : 1;
          const int64_t cost = p->rounds * bytes * (100 + 2 * (lag == 1) + alone);
          if (cost < best_cost) {
            best_cost = cost;
            best = p;
          }
        }
      }
    }
    return best;
  }

  // One group after the other, each by all blocks; what does not fit on the chip is read again.
  // None if a row is longer than a block has threads, or their sums do not fit.
  std::optional<Plan> large(const Plan& group, bool many_rows) const {
    const int team = std::min<int>(device.multiprocessors, std::max(int(group.vectors / 64), 1));
    const Plan p = with_team(group, kGridTeam, team, 1, 0, 1);
    const bool many = many_rows && p.layout != kPixels;
    const int unit = grain(p), share = std::max(ceil_div(p.vectors, team), 1);
    for (int units = std::min(ceil_div(share, unit), worker_threads(p, 1, many) / unit); units > 0;
         --units)  // as many as there is room for
      if (const auto fitting = with_threads(p, units * unit, 1, true, many)) return fitting;
    return {};
  }
};

// `many_rows`: the type has a kernel with many rows in registers.
Plan make_plan(const FusedBatchNormCall& call, const Device& device, int size,
               int accumulator_bytes, bool masked, bool many_rows) {
  const Planner planner{call, device, size, accumulator_bytes};
  if (call.channels_last && call.C > 0) {
    const int line = kLineBytes * size / kVectorBytes;  // channels of a line of L2
    const Plan narrow = pixels(call, size, line);
    if (!call.training) return *planner.eval(narrow);
    if (x_bytes(narrow) <= kAloneBytes && !planner.counts_batches())
      if (const auto p = planner.with_rows(narrow, kBlockTeam, 1, 1, 0, 2, kPixelRows)) return *p;
    for (const int channels : {line, 2 * line})
      if (const auto p = planner.middle(pixels(call, size, channels), {{2, 1}, {1, 0}})) return *p;
    for (int channels = 2 * line;; channels /= 2)
      if (const auto p = planner.large(pixels(call, size, channels), many_rows)) return *p;
  }
  const Plan group = planes(call, size, 1, masked);
  const auto packed = packed_planes(call, size, planner.lean);
  if (packed)
    if (const auto p = call.training ? planner.small(*packed) : planner.eval(*packed)) return *p;
  if (!call.training) return *planner.eval(group);
  if (const auto p = planner.small(group)) return *p;
  if (const auto p = planner.middle(group, {{4, 2}, {3, 1}})) return *p;
  return *planner.large(group, many_rows);
}

// -------------------------------------------------------------------------------------------------
// Launch
// -------------------------------------------------------------------------------------------------
// The kernel that suits a call, and its arguments but for scratch.
struct Launch {
  void (*kernel)(Arguments);
  Arguments arguments;
};

template <typename T>
Launch typed_launch(const FusedBatchNormCall& call, const Device& device) {
  constexpr int kSize = Vector<T>::kSize;
  constexpr bool kDouble = sizeof(T) == 8;  // fewer kernels: masks are right for all planes
  constexpr int kAccumulatorBytes = sizeof(Accumulator<T>);
  const bool masked = kDouble || call.HW % kSize != 0 || shift_bytes(call) > 0;
  const Plan plan =
      make_plan(call, device, kSize, kAccumulatorBytes, masked, sizeof(T) == 4 || !masked);
  const bool many =
      plan.reg_rows > register_rows(plan.layout, kSize, false, is_lean(device.architecture));
  auto kernel = fused_batch_norm_forward_kernel<T, kMaskedPlanes, false>;
  if constexpr (sizeof(T) == 4)
    if (many) kernel = fused_batch_norm_forward_kernel<T, kMaskedPlanes, true>;
  if constexpr (!kDouble) {
    if (plan.layout == kPackedPlanes)
      kernel = fused_batch_norm_forward_kernel<T, kPackedPlanes, false>;
    if (plan.layout == kPlanes)
      kernel = many ? fused_batch_norm_forward_kernel<T, kPlanes, true>
                    : fused_batch_norm_forward_kernel<T, kPlanes, false>;
  }
  if (plan.layout == kPixels) kernel = fused_batch_norm_forward_kernel<T, kPixels, false>;
  const int shift = shift_bytes(call) / int(sizeof(T));
  const double count = double(call.N) * double(call.HW);
  const Arguments a{call,
                    plan,
                    SharedLayout(plan, kAccumulatorBytes, kSize),
                    static_cast<const T*>(call.x) - shift,
                    static_cast<T*>(call.y) - shift,
                    nullptr,
                    shift,
                    unsigned((call.N * call.C * call.HW + shift) / kSize),
                    uint64_t(call.C * call.HW),
                    int(call.HW - (int64_t(plan.width.divisor) - 2) * kSize),
                    1 / count,
                    1 / (count - 1)};
  return {kernel, a};
}

Launch make_launch(const FusedBatchNormCall& call, const Device& device) {
  switch (call.dtype) {
    case 0:
      return typed_launch<float>(call, device);
    case 1:
      return typed_launch<__half>(call, device);
    case 2:
      return typed_launch<__nv_bfloat16>(call, device);
    default:
      return typed_launch<double>(call, device);
  }
}

}  // namespace

extern "C" const char* fused_batch_norm_launch(const FusedBatchNormCall* call,
                                               void* (*allocate)(size_t bytes, void* context),
                                               void* context, void* stream) {
  const Device device;
  if (device.error) return cudaGetErrorString(device.error);
  auto [kernel, arguments] = make_launch(*call, device);
  const Plan& plan = arguments.plan;
  const size_t scratch_bytes = size_t(plan.groups) * arguments.layout.group_bytes;
  if (scratch_bytes > 0)
    arguments.scratch = static_cast<unsigned char*>(allocate(scratch_bytes, context));
  constexpr int kUnasked = 48 * 1024;  // bytes that a block gets without being asked for
  cudaError_t error = cudaSuccess;
  if (plan.shared_bytes > kUnasked)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 plan.shared_bytes);
  if (error) return cudaGetErrorString(error);
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeCooperative;
  attributes[0].val.cooperative = plan.team_kind == kGridTeam;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = plan.team.divisor;
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(plan.team.divisor * plan.teams);
  config.blockDim = dim3(block_threads(plan));
  config.dynamicSmemBytes = plan.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = plan.team_kind == kClusterTeam ? 2 : 1;
  error = cudaLaunchKernelEx(&config, kernel, arguments);
  return error ? cudaGetErrorString(error) : nullptr;
}

extern "C" const char* fused_batch_norm_plan(const FusedBatchNormCall* call, int* words,
                                             size_t bytes) {
  const Device device;
  if (device.error) return cudaGetErrorString(device.error);
  const Plan plan = make_launch(*call, device).arguments.plan;
  memcpy(words, &plan, std::min(bytes, sizeof plan));
  return nullptr;
}
"""

FUSED_BATCH_NORM_CPP = r"""
#define AT_PER_OPERATOR_HEADERS  // or each header below brings all of ATen, which takes seconds
#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/native_batch_norm_backward.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/InferenceMode.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <numeric>

// The arguments of the operators, as declared, as handed on and as PyTorch's schema.
#define PARAMETERS                                                                \
  const Tensor &x, const MaybeTensor &gamma, const MaybeTensor &beta, double eps, \
      const MaybeTensor &running_mean, const MaybeTensor &running_var,            \
      const MaybeTensor &num_batches_tracked, bool training, const MaybeDouble &momentum
#define ARGUMENTS \
  x, gamma, beta, eps, running_mean, running_var, num_batches_tracked, training, momentum
#define SCHEMA                                                    \
  "(Tensor x, Tensor? gamma, Tensor? beta, float eps=1e-5, "      \
  "Tensor(a!)? running_mean=None, Tensor(b!)? running_var=None, " \
  "Tensor(c!)? num_batches_tracked=None, bool training=True, float? momentum=0.1) -> "
#define QUOTED(name) #name
#define EXPANDED(macro, ...) macro(__VA_ARGS__)
#define NAMESPACE EXPANDED(QUOTED, TORCH_EXTENSION_NAME)  // another one for each build in a process

namespace {

using at::Tensor;
using c10::MemoryFormat;
using c10::ScalarType;
using c10::SymInt;
using std::string;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using MaybeDouble = std::optional<double>;
using MaybeTensor = std::optional<Tensor>;
using Outputs = std::tuple<Tensor, Tensor>;  // y, and [2, C]: the batch's mean, and inv_std

constexpr int64_t kVectorBytes = 16;

// Without streams: in an extension whose toolchain links libstdc++ in, those crash.
string must(const string& argument, const string& requirement, const string& got) {
  return argument + " must " + requirement + ", got " + got;
}

string show(const MaybeTensor& t) {
  if (!t) return "None";
  string sizes;
  for (const SymInt& size : t->sym_sizes())
    sizes += (sizes.empty() ? "" : ", ") + std::to_string(size.guard_int(__FILE__, __LINE__));
  return string(c10::toString(t->scalar_type())) + " (" + sizes + ") on " + t->device().str();
}

int dtype_code(ScalarType type) {
  constexpr ScalarType kTypes[] = {at::kFloat, at::kHalf, at::kBFloat16, at::kDouble};
  const auto* found = std::find(std::begin(kTypes), std::end(kTypes), type);
  TORCH_CHECK(found != std::end(kTypes),
              must("x", "be float32, float16, bfloat16 or float64", c10::toString(type)));
  return int(found - kTypes);
}

// Raises what PyTorch's own layer raises.
void check(PARAMETERS) {
  TORCH_CHECK_VALUE(x.dim() == 4, must("x", "be 4-D (N, C, H, W)", show(x)));
  TORCH_CHECK(x.is_cuda() || x.is_meta(), must("x", "be on a CUDA device", show(x)));
  dtype_code(x.scalar_type());
  const auto check_pair = [&](const char* names, const MaybeTensor& p, const MaybeTensor& q) {
    TORCH_CHECK(!p || !q || p->dtype() == q->dtype(),
                must(names, "be two of one type", show(p) + " and " + show(q)));
  };
  const auto check_one = [&](const char* name, const MaybeTensor& p) {
    TORCH_CHECK(!p || (p->dim() == 1 && p->sym_size(0) == x.sym_size(1) &&
                       (p->dtype() == x.dtype() || p->dtype() == at::kFloat) &&
                       (p->device() == x.device() || x.is_meta())),
                must(name, "be (C,), of x's type or float32, on x's device",
                     show(p) + " for x " + show(x)));
  };
  check_one("gamma", gamma);
  check_one("beta", beta);
  check_one("running_mean", running_mean);
  check_one("running_var", running_var);
  check_pair("gamma and beta", gamma, beta);
  check_pair("running_mean and running_var", running_mean, running_var);
  TORCH_CHECK(running_mean.has_value() == running_var.has_value(),
              must("running_mean and running_var", "be both given, or both None",
                   show(running_mean) + " and " + show(running_var)));
  TORCH_CHECK(!running_mean || (running_mean->is_contiguous() && running_var->is_contiguous()),
              must("running_mean and running_var", "be contiguous", "other strides"));
  TORCH_CHECK(training || running_mean, must("running_mean", "be given in eval mode", "None"));
  const auto& count = num_batches_tracked;
  TORCH_CHECK(!count || (count->dtype() == at::kLong && count->sym_numel() == 1 &&
                         (count->device() == x.device() || x.is_meta())),
              must("num_batches_tracked", "be one int64 on x's device", show(count)));
  for (const auto* buffer : {&running_mean, &running_var, &num_batches_tracked})
    TORCH_CHECK(
        !training || !*buffer || !(*buffer)->is_inference() || c10::InferenceMode::is_enabled(),
        must("buffers made under inference_mode", "be trained under it", show(*buffer)));
  TORCH_CHECK_VALUE(!training || x.sym_size(0) * x.sym_size(2) * x.sym_size(3) != 1,
                    must("x", "have more than 1 value per channel when training", show(x)));
  TORCH_CHECK_VALUE(
      eps > 0 || (eps == 0 && !training),
      must("eps", training ? "be positive when training" : "not be negative", std::to_string(eps)));
}

// x's layout, decided once: where the kernel finds the elements of x, where it writes those of y,
// and what backward is called with. Strides of sizes of 1 say nothing about that, nor do they here.
MemoryFormat format_of(const Tensor& x) {
  const bool contiguous = x.is_contiguous(),
             channels_last = x.is_contiguous(MemoryFormat::ChannelsLast);
  if (contiguous != channels_last)
    return contiguous ? MemoryFormat::Contiguous : MemoryFormat::ChannelsLast;
  // Neither: the copy's, as PyTorch chooses it. Both: the elements lie in the same places, except
  // that there are none in an empty x, all of which are contiguous, but not all channels-last.
  if (contiguous && x.sym_numel() == 0) return MemoryFormat::ChannelsLast;
  return x.suggest_memory_format();
}

// The part of a call that the plan is made from. The kernel numbers in 32 bits: what does not fit
// is refused here, and all products below fit into 64. got(): what to say of such an x.
template <typename Got>
FusedBatchNormCall sized_call(int64_t N, int64_t C, int64_t HW, ScalarType type, bool unaligned,
                              bool channels_last, Got got) {
  FusedBatchNormCall call{};
  call.dtype = dtype_code(type);
  call.channels_last = HW == 1 || (channels_last && C > 1);  // the same places, a better plan
  if (N == 0 || C == 0 || HW == 0) return call;              // nothing to do but to count the batch
  call.N = N;
  call.C = C;
  call.HW = HW;
  constexpr int64_t kMostOfX = (int64_t(1) << 32) - 64,
                    kMostOfGroup = (int64_t(1) << 31) - (1 << 20),
                    kMostChannels = (int64_t(1) << 31) - 512;
  const int64_t size = kVectorBytes / int64_t(c10::elementSize(type));  // elements of a vector
  TORCH_CHECK(double(N) * double(C) * double(HW) < double(kMostOfX * size),
              must("x", "have less than 64 GB", got()));
  TORCH_CHECK(C < kMostChannels,
              must("x", "have fewer than " + std::to_string(kMostChannels) + " channels", got()));
  // Vectors of the narrowest group of channels that there is, edges included.
  int64_t vectors;
  if (call.channels_last) {
    // A row is the fewest pixels that are whole vectors together; the last one reaches beyond x.
    const int64_t pixels = size / std::gcd(C, size), rows = (N * HW + pixels - 1) / pixels,
                  row = pixels * C / size, line = 8;  // vectors
    TORCH_CHECK(
        rows * row < kMostOfX,
        must("x", "have less than 64 GB in whole rows of " + std::to_string(pixels) + " pixels",
             got()));
    const bool edges = pixels > 1 || unaligned;
    vectors = pixels > 1 && C <= line * size
                  ? (rows + 1) * row
                  : rows * pixels * (std::min((C + size - 1) / size, line) + edges);
  } else {
    const bool edges = type == at::kDouble || HW % size > 0 || unaligned;
    vectors = N * (edges ? (HW + size - 2) / size + 1 : HW / size);
  }
  TORCH_CHECK(
      vectors < kMostOfGroup,
      must("x",
           string("have fewer than ") + std::to_string(kMostOfGroup) + " vectors of 16 bytes in " +
               (call.channels_last ? "neighbouring channels" : "a channel's planes"),
           std::to_string(vectors) + " in " + got()));
  return call;
}

// Straight from the allocator: at::empty would fill it, with a kernel of its own, under
// torch.use_deterministic_algorithms(True).
Tensor allocate(c10::SymIntArrayRef sizes, ScalarType type, const Tensor& like,
                MemoryFormat format = MemoryFormat::Contiguous) {
  auto* const allocator =
      like.is_meta() ? c10::GetAllocator(at::kMeta) : c10::cuda::CUDACachingAllocator::get();
  return at::detail::empty_generic_symint(
      sizes, allocator, c10::DispatchKeySet(like.options().computeDispatchKey()), type, format);
}

// From element `shift` of its memory on; no view, since autograd lets nobody change a view that a
// custom operator returns.
Tensor allocate_y(const Tensor& x, MemoryFormat format, const SymInt& shift) {
  if (shift == 0) return allocate(x.sym_sizes(), x.scalar_type(), x, format);
  Tensor y = allocate({x.sym_numel() + shift}, x.scalar_type(), x);
  auto* impl = y.unsafeGetTensorImpl();
  impl->generic_set_sizes_contiguous(x.sym_sizes());
  impl->empty_tensor_restride(format);
  impl->set_sizes_and_strides(x.sym_sizes(), y.sym_strides().vec(), shift);
  return y;
}

// Elements from a 16-byte boundary to x, or to the copy that is made of it where it is not dense.
SymInt misalignment(const Tensor& x, bool dense) {
  if (!dense || x.sym_numel() == 0) return 0;
  const int64_t item = x.element_size();
  if (x.is_meta()) return x.sym_storage_offset() % SymInt(kVectorBytes / item);
  return int64_t(uintptr_t(x.const_data_ptr()) % kVectorBytes) / item;
}

// One launch. For x without memory (fake and meta tensors) none, but outputs of the same layouts.
Outputs run(PARAMETERS) {
  check(ARGUMENTS);
  const c10::DeviceGuard guard(x.device());  // before memory is asked for
  const MemoryFormat format = format_of(x);
  const bool dense = x.is_contiguous(format);
  const SymInt shift = misalignment(x, dense);
  FusedBatchNormCall call{};
  if (!x.unsafeGetTensorImpl()->has_symbolic_sizes_strides())
    call = sized_call(x.size(0), x.size(1), x.size(2) * x.size(3), x.scalar_type(), shift != 0,
                      format == MemoryFormat::ChannelsLast, [&] { return show(x); });
  const auto wide = x.dtype() == at::kDouble ? at::kDouble : at::kFloat;
  const SymInt saved = training ? x.sym_size(1) : SymInt(0);
  const Outputs outputs{allocate_y(x, format, shift), allocate({2, saved}, wide, x)};
  const auto& [y, statistics] = outputs;
  if (x.is_meta()) return outputs;

  const Tensor x_dense = x.contiguous(format);
  const auto packed = [](const MaybeTensor& p) { return p ? p->contiguous() : p; };
  const auto data = [](const MaybeTensor& p) { return p ? p->mutable_data_ptr() : nullptr; };
  const auto is_float = [](const MaybeTensor& p) { return p && p->dtype() == at::kFloat; };
  const MaybeTensor packed_gamma = packed(gamma), packed_beta = packed(beta);
  call.x = x_dense.const_data_ptr();
  call.y = y.mutable_data_ptr();
  call.gamma = data(packed_gamma);
  call.beta = data(packed_beta);
  call.running_mean = data(running_mean);
  call.running_var = data(running_var);
  call.num_batches_tracked = static_cast<int64_t*>(data(num_batches_tracked));
  call.mean = statistics.mutable_data_ptr();
  call.inv_std = static_cast<char*>(call.mean) + x.size(1) * statistics.element_size();
  call.eps = eps;
  call.momentum = momentum.value_or(0);
  call.cumulative = !momentum.has_value();
  call.affine_float = is_float(gamma) || is_float(beta);
  call.running_float = is_float(running_mean);
  call.training = training;
  // Freed on return: the allocator gives it away again only behind this launch on this stream.
  std::pair<const Tensor&, Tensor> scratch{x, {}};
  const auto allocate_scratch = [](size_t bytes, void* context) {
    auto& [like, memory] = *static_cast<decltype(scratch)*>(context);
    memory = allocate({int64_t(bytes)}, at::kByte, like);
    return memory.mutable_data_ptr();
  };
  const auto stream_of = &c10::cuda::getCurrentCUDAStream;
  const char* error =
      fused_batch_norm_launch(&call, allocate_scratch, &scratch, stream_of(x.device().index()));
  TORCH_CHECK(!error, must("fused_batch_norm_forward_kernel",
                           (training ? "train with x " : "normalise x ") + show(x),
                           string("CUDA error: ") + error));
  // Nothing is refused any more.
  for (const auto* buffer : {&running_mean, &running_var, &num_batches_tracked})
    if (training && *buffer) (*buffer)->unsafeGetTensorImpl()->bump_version();
  return outputs;
}

// Eval has an operator that changes no buffer: of one that is said to change, torch.compile would
// save the new value for backward, and reuse the memory.
template <Outputs (*run)(PARAMETERS)>
Tensor eval(const Tensor& x, const MaybeTensor& gamma, const MaybeTensor& beta, double eps,
            const MaybeTensor& running_mean, const MaybeTensor& running_var) {
  return std::get<0>(run(x, gamma, beta, eps, running_mean, running_var, {}, false, {}));
}

Outputs dispatch(PARAMETERS) {
  const auto find = [](const char* name) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
  };
  static const auto to_train = find(NAMESPACE "::train").typed<decltype(run)>();
  static const auto to_eval = find(NAMESPACE "::eval").typed<decltype(eval<run>)>();
  if (training) return to_train.call(ARGUMENTS);
  return {to_eval.call(x, gamma, beta, eps, running_mean, running_var), Tensor()};
}

template <Outputs (*run)(PARAMETERS)>
Tensor fused_batch_norm_forward(PARAMETERS) {
  return std::get<0>(run(ARGUMENTS));
}

// t in this format, strides of sizes of 1 included: PyTorch's backward on the CPU chooses its loop
// and the layout of what it returns by different rules, which agree on such tensors only.
Tensor in_format(const Tensor& t, MemoryFormat format) {
  const Tensor dense = t.contiguous(format);
  const SymInt C = t.sym_size(1), H = t.sym_size(2), W = t.sym_size(3);
  const std::array<SymInt, 4> strides = format == MemoryFormat::ChannelsLast
                                            ? std::array<SymInt, 4>{H * W * C, 1, W * C, C}
                                            : std::array<SymInt, 4>{C * H * W, H * W, W, 1};
  const bool own = std::equal(strides.begin(), strides.end(), dense.sym_strides().begin());
  return own ? dense : dense.as_strided_symint(dense.sym_sizes(), strides);
}

struct FusedBatchNormBackward final : Node {
  std::array<SavedVariable, 5> saved;  // x, gamma, running_mean, running_var, statistics
  double eps;
  bool training;
  ScalarType affine_type;  // of gamma and beta

  string name() const override { return "FusedBatchNormBackward"; }

  // Asked for by compiled autograd, of an eager forward: a compiled one has another node.
  void compiled_args(torch::autograd::CompiledNodeArgs&) const override {
    TORCH_CHECK_NOT_IMPLEMENTED(
        false, must("forward", "be compiled as well", "compiled autograd over an eager forward"));
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& variable : saved) variable.reset_data();
  }

  std::vector<Tensor> apply(std::vector<Tensor>&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::array<Tensor, 5> unpacked;
    for (size_t i = 0; i < saved.size(); ++i) unpacked[i] = saved[i].unpack();
    const auto& [x, gamma, running_mean, running_var, statistics] = unpacked;
    if (!grads[0].defined()) return std::vector<Tensor>(3);
    const auto needed = [&](size_t i) { return task_should_compute_output(i); };
    const auto per_channel = x.options().dtype(affine_type);
    if (x.sym_numel() == 0) {
      const auto zeros = [&](size_t i) {
        return needed(i) ? x.new_zeros_symint({x.sym_size(1)}, per_channel) : Tensor();
      };
      return {at::zeros_like(x), zeros(1), zeros(2)};
    }
    // PyTorch's kernels take all else in float32 whatever x is, but not every mixture.
    const auto wide = x.dtype() == at::kDouble ? at::kDouble : at::kFloat;
    const auto widen = [&](const Tensor& p) { return p.defined() ? p.to(wide) : p; };
    const Tensor none = training ? Tensor() : running_mean.narrow(0, 0, 0).to(wide);  // [0]
    const Tensor mean = training ? statistics.select(0, 0) : none;
    const Tensor inv_std = training ? statistics.select(0, 1) : none;
    // On a GPU they allocate the gradient of beta as gamma is, so there has to be one.
    const bool ones = !gamma.defined() && needed(2);
    const Tensor scale = ones ? x.new_ones_symint({x.sym_size(1)}, per_channel) : gamma;
    const MemoryFormat format = format_of(x);
    auto [grad_x, grad_gamma, grad_beta] = at::native_batch_norm_backward(
        in_format(grads[0], format), in_format(x, format), widen(scale), widen(running_mean),
        widen(running_var), mean, inv_std, training, eps, {needed(0), needed(1), needed(2)});
    const auto narrow = [&](const Tensor& p) { return p.defined() ? p.to(affine_type) : p; };
    return {grad_x, narrow(grad_gamma), narrow(grad_beta)};
  }
};

// Nodes have shared_ptr as owners, in later versions of torch intrusive_ptr.
template <typename Owner = decltype(torch::autograd::Edge::function)>
Owner own(Node* node) {
  if constexpr (std::is_constructible_v<Owner, Node*, void (*)(Node*)>)
    return Owner(node, [](auto* node) { deleteNode(node); });
  else
    return Owner::unsafe_steal_from_new(node);
}

Outputs run_with_autograd(PARAMETERS) {
  using namespace torch::autograd;
  TORCH_CHECK_NOT_IMPLEMENTED(
      !isFwGradDefined(x) && !isFwGradDefined(gamma) && !isFwGradDefined(beta),
      must("gradients", "be taken by backward", "a tangent of forward-mode differentiation"));
  const auto run_below = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return dispatch(ARGUMENTS);
  };
  if (!compute_requires_grad(x, gamma, beta)) return run_below();
  auto* const node = new FusedBatchNormBackward;
  const auto owner = own(node);
  node->set_next_edges(collect_next_edges(x, gamma, beta));
  node->eps = eps;
  node->training = training;
  const MaybeTensor& affine = gamma ? gamma : beta;
  node->affine_type = affine ? affine->scalar_type() : x.scalar_type();
  const auto save = [](const MaybeTensor& t) { return SavedVariable(t, false); };
  const MaybeTensor none;
  // Before the launch: it is refused, say, for an x that was made under inference_mode.
  node->saved = {save(x), save(gamma), save(training ? none : running_mean),
                 save(training ? none : running_var), save(none)};
  const Outputs outputs = run_below();
  node->saved.back() = save(std::get<1>(outputs));
  set_history(std::get<0>(outputs), owner);
  return outputs;
}

void refuse_vmap(const c10::OperatorHandle&, c10::Stack*) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, must("x", "be one 4-D tensor (N, C, H, W)", "vmap's batch"));
}

// The launch plan of a contiguous, aligned x on the current device: the words of struct Plan.
std::vector<int64_t> plan(int64_t N, int64_t C, int64_t HW, ScalarType dtype, bool training,
                          MaybeDouble momentum, bool channels_last) {
  const auto got = [&] {
    return string(c10::toString(dtype)) + " (N = " + std::to_string(N) +
           ", C = " + std::to_string(C) + ", HW = " + std::to_string(HW) + ")";
  };
  TORCH_CHECK(N >= 0 && C >= 0 && HW >= 0, must("N, C and HW", "not be negative", got()));
  int64_t counter;
  FusedBatchNormCall call = sized_call(N, C, HW, dtype, false, channels_last, got);
  call.num_batches_tracked = &counter;
  call.momentum = momentum.value_or(0);
  call.cumulative = !momentum.has_value();
  call.training = training;
  int words[64] = {};
  const char* error = fused_batch_norm_plan(&call, words, sizeof words);
  TORCH_CHECK(!error, must("the device", "run the kernel", string("CUDA error: ") + error));
  return {std::begin(words), std::end(words)};
}

}  // namespace

EXPANDED(TORCH_LIBRARY, TORCH_EXTENSION_NAME, m) {
  const auto any_device = c10::DispatchKey::CompositeExplicitAutograd;
  const auto autograd = c10::DispatchKey::Autograd;
  m.def("fused_batch_norm_forward" SCHEMA "Tensor");
  m.impl("fused_batch_norm_forward", any_device, &fused_batch_norm_forward<run>);
  m.impl("fused_batch_norm_forward", autograd, &fused_batch_norm_forward<run_with_autograd>);
  m.def("train" SCHEMA "(Tensor y, Tensor statistics)");
  m.impl("train", any_device, &run);
  m.impl("train", autograd, &run_with_autograd);
  m.def(
      "eval(Tensor x, Tensor? gamma, Tensor? beta, float eps, "
      "Tensor? running_mean, Tensor? running_var) -> Tensor");
  m.impl("eval", any_device, &eval<run>);
  m.impl("eval", autograd, &eval<run_with_autograd>);
  for (const char* name : {"fused_batch_norm_forward", "train", "eval"})
    m.impl(name, c10::DispatchKey::FuncTorchBatched,
           torch::CppFunction::makeFromBoxedFunction<&refuse_vmap>());
  m.def(
      "fused_batch_norm_plan(int N, int C, int HW, ScalarType dtype, bool training, "
      "float? momentum, bool channels_last=False) -> int[]",
      &plan);
}
"""


def _build_fused_batch_norm():
    """Compiles the two texts. Returns (operators, None), or (None, what is missing to run here)."""
    extension = torch.utils.cpp_extension
    digits = ("".join(filter(str.isdigit, part)) for part in torch.__version__.split(".")[:2])
    if tuple(int(d or 0) for d in digits) < (2, 9):
        return None, f"torch must be 2.9 or later, got {torch.__version__}"
    if torch.version.cuda is None:
        return None, f"torch must be a CUDA build, got {torch.__version__} without CUDA"
    if extension.CUDA_HOME is None:
        return None, "nvcc must be installed (on PATH or under CUDA_HOME), got none"
    for path in (extension.TORCH_LIB_PATH, extension.CUDA_HOME):  # torch tells the linker unquoted
        if " " in path:
            return None, f"torch and CUDA must be installed under paths without spaces, got {path}"
    if shutil.which("ninja") is None:  # a venv that is not activated keeps it beside its python
        beside = os.path.dirname(sys.executable)
        os.environ["PATH"] = beside + os.pathsep + os.environ.get("PATH", "")
    arch_list = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if torch.cuda.is_available():  # for the devices that are here, whatever the list says
        devices = range(torch.cuda.device_count())
        capabilities = {torch.cuda.get_device_capability(i) for i in devices}
        architectures = [f"-gencode=arch=compute_{a}{b},code=sm_{a}{b}" for a, b in capabilities]
    elif arch_list:
        architectures = []  # torch's own flags, made from the list
    else:
        return None, "a CUDA device must be present (or TORCH_CUDA_ARCH_LIST set), got none"
    cpp_source = FUSED_BATCH_NORM_CALL + FUSED_BATCH_NORM_CPP
    cuda_source = FUSED_BATCH_NORM_CALL + FUSED_BATCH_NORM_CUDA
    # A directory, and operators, for each build: torch would load what another process built there.
    built_from = (cpp_source, cuda_source, sorted(architectures) or arch_list, torch.__version__)
    digest = hashlib.sha256(repr(built_from).encode()).hexdigest()[:12]
    name = "_".join(("fused_batch_norm", digest))
    directory = None
    with contextlib.suppress(OSError):
        directory = extension._get_build_directory(name, verbose=False)
    if directory is None or not os.access(directory, os.W_OK):
        setting = os.environ.get("TORCH_EXTENSIONS_DIR", "none, nor such a home directory")
        return None, f"TORCH_EXTENSIONS_DIR must be a directory that can be written, got {setting}"
    lock = os.path.join(directory, "lock")
    if hasattr(extension, "FileBaton") and os.path.exists(lock):  # not so from torch 2.14 on
        # torch would wait without a word, and for ever if nobody builds.
        waiting = "waiting for the build that holds %s: delete it if none is running"
        logging.getLogger("fused_batch_norm").warning(waiting, lock)
    library = extension.load_inline(
        name=name,
        cpp_sources=[cpp_source],
        cuda_sources=[cuda_source],
        extra_cflags=["-O1"],  # it only checks and launches
        extra_cuda_cflags=["-O3", "-split-compile=0", "-Xcompiler=-O1", *sorted(architectures)],
        no_implicit_headers=True,
        is_python_module=False,  # it registers operators, under its own name
    )
    return getattr(torch.ops, os.path.basename(library).removesuffix(".so")), None


_fused_batch_norm, _fused_batch_norm_missing = _build_fused_batch_norm()


class ModelNew(torch.nn.Module):
    """Batch normalisation of (N, C, H, W), as PyTorch's 2-D batch norm layer computes it.

        y = gamma · (x − mean) / √(var + eps) + beta

    In train mode, or without running buffers, mean and biased var are the batch's, over N, H and W,
    and the same launch updates `running_mean`, `running_var` (unbiased) and `num_batches_tracked`.
    In eval mode they are the running buffers.

    Args:
        num_features: C.
        eps: added to var.
        momentum: weight of the new value in the running buffers; None for the cumulative average.
        affine: with parameters `gamma` (ones) and `beta` (zeros).
        track_running_stats: with running buffers.
        device, dtype: of parameters and buffers.

    forward(x): x: (N, C, H, W) float32 | float16 | bfloat16 | float64, CUDA; parameters and buffers
    of the same type or float32. Returns y like x, in NCHW or channels-last as x (other strides cost
    a copy of x). Differentiable by backward. Raises ValueError for x that is not 4-D or has one
    value per channel in training and for eps that is not positive, RuntimeError for a wrong C,
    dtype or device.

    State dicts load with the names gamma, beta | weight, bias | bn.weight, bn.bias.

    Source: Ioffe and Szegedy, Batch Normalization, 2015, algorithms 1 and 2.
    """

    _version = 2  # of its state dicts, counted as PyTorch does: 1 lacks num_batches_tracked

    def __init__(
        self,
        num_features,
        eps=1e-5,
        momentum=0.1,
        affine=True,
        track_running_stats=True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.affine, self.track_running_stats = affine, track_running_stats
        empty = lambda: torch.empty(num_features, device=device, dtype=dtype)
        for name in ("gamma", "beta"):
            self.register_parameter(name, torch.nn.Parameter(empty()) if affine else None)
        for name in ("running_mean", "running_var"):
            self.register_buffer(name, empty() if track_running_stats else None)
        count = torch.empty((), device=device, dtype=torch.long) if track_running_stats else None
        self.register_buffer("num_batches_tracked", count)
        self.reset_parameters()

    def reset_running_stats(self):
        if self.track_running_stats:
            self.running_mean.zero_()
            self.running_var.fill_(1)
            self.num_batches_tracked.zero_()

    @torch.no_grad()
    def reset_parameters(self):
        self.reset_running_stats()
        if self.affine:
            self.gamma.fill_(1)
            self.beta.zero_()

    def forward(self, x):
        if _fused_batch_norm is None:
            raise RuntimeError(f"fused_batch_norm cannot run here: {_fused_batch_norm_missing}")
        # From the dictionaries, as attributes take 0.4 µs each; pruned, say, gamma is only that.
        parameters, buffers = self._parameters, self._buffers
        if self.training and not self.track_running_stats:
            buffers = dict.fromkeys(buffers)
        running_mean = buffers["running_mean"]
        return _fused_batch_norm.fused_batch_norm_forward.default(
            x,
            parameters["gamma"] if "gamma" in parameters else self.gamma,  # noqa: SIM401
            parameters["beta"] if "beta" in parameters else self.beta,  # noqa: SIM401
            self.eps,
            running_mean,
            buffers["running_var"],
            buffers["num_batches_tracked"] if self.training else None,
            self.training or running_mean is None,
            self.momentum,
        )

    def __prepare_scriptable__(self):  # called by torch.jit.script
        raise NotImplementedError(
            "ModelNew must be traced, exported or compiled, got torch.jit.script"
        )

    def extra_repr(self):
        names = ("eps", "momentum", "affine", "track_running_stats")
        return ", ".join([str(self.num_features), *(f"{n}={getattr(self, n)}" for n in names)])

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        renamed = {"weight": "gamma", "bias": "beta", **{name: name for name in self._buffers}}
        for outer in ("", "bn."):
            for theirs, ours in renamed.items():
                if outer + theirs != ours and prefix + outer + theirs in state_dict:
                    state_dict[prefix + ours] = state_dict.pop(prefix + outer + theirs)
        count = self.num_batches_tracked
        if count is not None and local_metadata.get("version", 1) < self._version:
            count = torch.tensor(0) if count.is_meta else count
            state_dict.setdefault(prefix + "num_batches_tracked", count)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
