"""Batch normalisation, forward, as one fused CUDA kernel in one launch.

    y = gamma · (x − mean) / √(var + eps) + beta     mean, biased var: per channel, over N, H and W

x (NCHW or channels-last) is read from memory once and y is written once, as a copy would do: a
team of blocks keeps a group of channels on the chip from the sums to the store. (Of a group that
the chip does not hold, a part is read twice.)

    worker warps                                        exchange warps
      load the first groups
      for each group i of this team:                      for each group i:
        sum group i + stages − 1 ── sums, "summed" ───────► wait for the block's sums of i
                                                            and, of a larger team, for the others'
        wait for the result of i ◄───────── "ready" ─────── mean, inv_std, result
        store group i, and refill each of its               running buffers
        places with group i + stages                        pivots of a group to come

group     neighbouring channels that a block works on: one; several small planes that are whole
          vectors together; or, channels-last, those of a part of each pixel
team      blocks that share a group: one, or co-resident blocks of a cooperative launch
share     a block's part of a group; each thread owns vectors of it: the first ones in registers,
          the next in shared memory; the last ones, if there are more, are read again for the store
stage     groups in flight in a block: one is stored while the sums of the others travel
exchange  from the block's sums to the team's mean and variance, by warps of their own

A thread's vectors are its own, so no barrier guards them. To change what is computed for an
element, see Group::sum and Group::store; what an x is cut into, Planner::choose and cost; the order
of loads, sums and stores, fused_batch_norm_forward_kernel; what PyTorch sees, the C++ text.
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
#include <array>
#include <cmath>
#include <cstring>
#include <map>
#include <numeric>
#include <optional>
#include <type_traits>
#include <utility>

namespace {

// -------------------------------------------------------------------------------------------------
// Constants
// -------------------------------------------------------------------------------------------------
constexpr int kVectorBytes = 16;   // one access of one thread
constexpr int kLineBytes = 128;    // a cache line of L2
constexpr int kMaxThreads = 1024;  // of a block
constexpr int kMaxStages = 3;      // groups in flight in a block
constexpr int kUnitChannels = 8;   // channels of an exchange warp, more where kMaxUnits bounds it
constexpr int kMaxUnits = 4;       // exchange warps of a block with one stage
constexpr int kRing = 4;           // places of a thread through which reread vectors go
// A thread adds at most about so many vectors to one sum: values of few digits, such as 16-bit
// ones, are each rounded like the one before, so that the errors of a longer chain add up.
constexpr int kChain = 32;

// -------------------------------------------------------------------------------------------------
// PTX, one instruction a function, named after it
// -------------------------------------------------------------------------------------------------
using Mbarrier = uint64_t;  // in shared memory
// The cache policy of x: L2 evicts it last. (createpolicy.fractional would make the same value.)
constexpr uint64_t kEvictLast = 0x14f0000000000000;

// A block's sums as they travel to its team, in one access. Scratch is zeroed first; −s2 has its
// sign bit set even where s2 is 0, so a slot that has arrived differs from an empty one.
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
  ASM("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals) : "memory");
}

__device__ void mbarrier_arrive(Mbarrier* b) {
  ASM("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
}

__device__ bool mbarrier_test_wait(Mbarrier* b, unsigned parity) {
#if __CUDA_ARCH__ >= 900  // try_wait may suspend the thread for a while
#define WAIT "mbarrier.try_wait.parity.shared.b64 p, [%1], %2;"
#else
#define WAIT "mbarrier.test_wait.parity.shared.b64 p, [%1], %2;"
#endif
  unsigned complete;
  ASM("{ .reg .pred p; " WAIT " selp.u32 %0, 1, 0, p; }" : "=r"(complete) : "r"(shared_address(b)),
      "r"(parity) : "memory");
  return complete;
}

// Copies 16 bytes asynchronously. L2 fetches the whole line.
__device__ void cp_async_16(void* shared, const void* global) {
  ASM("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2;" ::"r"(
          shared_address(shared)),
      "l"(global), "l"(kEvictLast) : "memory");
}

// Makes one group of this thread's copies since the last commit.
__device__ void cp_async_commit_group() { ASM("cp.async.commit_group;" :: : "memory"); }

// Returns when all but the last kPending groups have landed; this thread sees them.
template <int kPending>
__device__ void cp_async_wait_group() {
  ASM("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ void prefetch_global_L2(const void* global) {
  ASM("prefetch.global.L2::evict_last [%0];" ::"l"(global) : "memory");
}

__device__ void ld_global_128(void* to, const void* global) {
  uint4 v;
  ASM("ld.global.L1::no_allocate.L2::cache_hint.L2::128B.v4.b32 {%0, %1, %2, %3}, [%4], %5;" : "=r"(
          v.x),
      "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(global), "l"(kEvictLast));
  memcpy(to, &v, sizeof v);
}
#else  // sm_75. Barriers: arrivals so far in the low half, arrivals of a phase in the high half
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

__device__ void ld_global_128(void* to, const void* global) {
  *static_cast<uint4*>(to) = *static_cast<const uint4*>(global);
}
__device__ void cp_async_16(void* shared, const void* global) { ld_global_128(shared, global); }
__device__ void cp_async_commit_group() {}
template <int kPending>
__device__ void cp_async_wait_group() {}
__device__ void prefetch_global_L2(const void*) {}
#endif

// Returns when the phase of this parity is complete.
__device__ void mbarrier_wait(Mbarrier* b, unsigned parity) {
  while (!mbarrier_test_wait(b, parity)) {
  }
}

// Relaxed: one access that orders nothing.
__device__ unsigned long long ld_relaxed(const unsigned long long* from) {
  unsigned long long v;
  ASM("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(from) : "memory");
  return v;
}

template <typename A>
__device__ SumSlot<A> ld_relaxed(const SumSlot<A>* from) {
  ulonglong2 bits;
  if constexpr (sizeof(A) == 4)
    bits.x = ld_relaxed(reinterpret_cast<const unsigned long long*>(from));
  else
    ASM("{ .reg .b128 v; ld.relaxed.gpu.global.b128 v, [%2]; mov.b128 {%0, %1}, v; }" : "=l"(
            bits.x),
        "=l"(bits.y) : "l"(from) : "memory");
  SumSlot<A> slot;
  memcpy(&slot, &bits, sizeof slot);
  return slot;
}

template <typename A>
__device__ void st_relaxed(SumSlot<A>* to, SumSlot<A> slot) {
  ulonglong2 bits;
  memcpy(&bits, &slot, sizeof slot);
  if constexpr (sizeof(A) == 4)
    ASM("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(to), "l"(bits.x) : "memory");
  else
    ASM("{ .reg .b128 v; mov.b128 v, {%1, %2}; st.relaxed.gpu.global.b128 [%0], v; }" ::"l"(to),
        "l"(bits.x), "l"(bits.y) : "memory");
}

__device__ void nanosleep() { __nanosleep(40); }

// Sleeps for about so many clock cycles.
__device__ void nanosleep_cycles(int64_t cycles) {
  const int64_t start = clock64();
  while (clock64() - start < cycles) __nanosleep(20);
}
#undef ASM
#undef WAIT
#else
#include "emulated_device.h"
#endif

// -------------------------------------------------------------------------------------------------
// Types
// -------------------------------------------------------------------------------------------------
template <typename T>
struct alignas(kVectorBytes) Vector {  // as words: 16-bit elements would take a register each
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

// Sums over a part of a channel, with d = x − pivot. All parts of a channel have the same pivot, so
// they simply add.
template <typename A>
struct alignas(2 * sizeof(A)) Sums {
  A s1 = 0, s2 = 0;  // Σ d, Σ d²

  __device__ void add(const Sums& other) {
    s1 += other.s1;
    s2 += other.s2;
  }
};

// A parameter, or an element of a running buffer: a float, or of x's own type.
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
// The plan, as data
// -------------------------------------------------------------------------------------------------
struct FastDivmod {  // n / divisor == umulhi(2n, magic) >> shift for all n < 2³¹
  unsigned divisor, magic, shift;
};

enum Layout {   // of a group of neighbouring channels, on which a block works
  kNchw,        // one channel; its planes are lines of whole vectors
  kNchwMasked,  // one channel; a plane may start or end within a vector
  kNchwPacked,  // several, whose planes together are whole vectors; a vector may hold two of them
  kNhwc,        // several; each element of a vector has a channel of its own
  kNhwcMasked,  // as kNhwc; a vector may hold elements of other groups
};

__host__ __device__ constexpr bool is_nhwc(Layout layout) { return layout >= kNhwc; }
__host__ __device__ constexpr bool is_masked(Layout layout) {
  return layout == kNchwMasked || layout == kNhwcMasked;
}
// Whether a thread's vectors are all in one column of the group's lines, so that it knows once
// which channels its elements belong to.
__host__ __device__ constexpr bool keeps_column(Layout layout) { return layout >= kNchwPacked; }
// Whether a warp takes whole lines: lanes that are `width` apart have the same column.
__host__ __device__ constexpr bool fits_warp(Layout layout, unsigned width) {
  return is_nhwc(layout) && width <= 32 && (width & (width - 1)) == 0;
}

// The kernels: one for each layout (float64 has the masked ones alone: they are right for all x),
// and for kNchw a `deep` one, for x larger than the chip: one block on a multiprocessor, with up
// to 16 vectors of a thread in registers.
constexpr int kLayouts = 5;
// Whether a kernel can read vectors again. Planes that small that they are packed are few.
__host__ __device__ constexpr bool can_reread(Layout layout, bool deep) {
  return deep || (layout != kNchw && layout != kNchwPacked);
}
// Vectors of a thread in registers, where a vector has `size` elements. `extra`: as below.
__host__ __device__ constexpr int register_vectors(Layout layout, int size, bool deep, bool extra) {
  if (deep) return extra ? 12 : 16;
  return layout == kNchw && size == 4 ? 3 : 0;
}
// Registers of a thread, so few that nothing spills. `extra`: on architectures other than sm_90 the
// same code takes more. With 56, a multiprocessor has room for five blocks of 224 threads.
__host__ __device__ constexpr int max_registers(Layout layout, int size, bool deep, bool extra) {
  if (deep) return 128;
  const int least = size == 2 ? 96 : keeps_column(layout) ? (size == 4 ? 72 : 80) : 56;
  return least + (extra ? 24 : 0);
}
// Threads for which a multiprocessor has registers; a warp's are in one of its 4 sub-partitions.
__host__ __device__ constexpr int resident_threads(Layout layout, int size, bool deep, bool extra) {
  return 4 * 32 * (65536 / 4 / (32 * max_registers(layout, size, deep, extra)));
}
constexpr bool takes_extra(int architecture) { return architecture / 10 != 9; }
#ifdef __CUDA_ARCH__
constexpr bool kExtra = takes_extra(__CUDA_ARCH__ / 10);
#else
constexpr bool kExtra = false;
#endif

struct Plan {
  // The group: lines of vectors, one for an image (NCHW) or for a few pixels (NHWC).
  Layout layout;          // 0 NCHW, 1 NCHW masked, 2 NCHW packed, 3 NHWC, 4 NHWC masked
  int channels;           // of a group
  int groups;             // of x
  unsigned vectors;       // of a group, in all its lines
  FastDivmod width;       // vectors of a line
  unsigned line_stride;   // vectors of x from a line to the next
  unsigned group_stride;  // vectors of x from a group to the next
  int pixels;             // of a line (NHWC): so many that lines begin with a vector of x
  FastDivmod segment;     // of a line: vectors of a pixel (NHWC), elements of a plane (packed)
  // The team: blocks that share a group.
  int cooperative;  // 1: blocks wait for each other, in a cooperative launch
  FastDivmod team;  // blocks of a team
  int teams;        // of the launch
  int rounds;       // groups that a team works on, at most
  // The block.
  int workers;             // threads that load, sum and store
  int exchange_warps;      // of all stages
  FastDivmod stages;       // groups in flight: one is stored while the sums of others travel
  unsigned share;          // vectors of a group from a block's first one to the next block's
  FastDivmod step;         // vectors of a group from a thread's vector to its next one
  int vectors_per_thread;  // at most
  int reg_vectors;         // of these in registers
  int smem_vectors;        // of these in shared memory; what remains is read again for the store
  int deep;                // 1: the kernel with many vectors in registers
  int unit_bits;           // an exchange warp has up to 1 << unit_bits channels
  int units;               // exchange warps of a stage
  int partial_lines;       // lines of partial sums, which are added up for the block's sums
  int partial_stride;      // partial sums from an element of the vectors to the next (NHWC)
  int partials;            // partial sums of a stage
  int channel_stride;      // channels of a group, rounded up to whole 16 bytes of sums
  int stage_at;            // bytes of shared memory before what the stages share
  int stage_bytes;         // of shared memory for a stage's barriers, sums, results and pivots
  int shared_bytes;        // of shared memory of a block
  int group_bytes;         // of scratch memory for a group's counters and slots
  // Blocks of one multiprocessor may start one after the other.
  int multiprocessors;  // blocks that start at once
  int stagger_turns;    // blocks of a multiprocessor that are co-resident at first
  int stagger_cycles;   // clock cycles by which each of them starts later than the one before
};

int ceil_div(int64_t a, int64_t b) { return int((a + b - 1) / b); }

// Threads of a block, in whole warps.
int block_threads(const Plan& p) { return 32 * (p.exchange_warps + ceil_div(p.workers, 32)); }

struct Arguments : FusedBatchNormCall, Plan {
  const void* x_vectors;    // the 16-byte boundary at or before x
  void* y_vectors;          // and before y
  unsigned char* scratch;   // [groups][group_bytes], of unknown content at the start
  int misalignment;         // elements from x_vectors to x
  unsigned whole_vectors;   // from x_vectors on that end within x; the next one may not
  uint64_t image;           // elements of an image: C·HW
  int tail;                 // kNchwMasked: elements of a plane beyond all but 2 vectors of a line
  double per_element;       // 1 / (N·HW)
  double per_element_less;  // 1 / (N·HW − 1)
};

// -------------------------------------------------------------------------------------------------
// Small device functions
// -------------------------------------------------------------------------------------------------
__device__ unsigned divide(unsigned n, FastDivmod d) { return __umulhi(2 * n, d.magic) >> d.shift; }

// Keeps a parameter of the kernel in a register. The compiler would load it again for each vector,
// which takes longer than all else there, but cannot repeat a shuffle. All 32 lanes must call.
template <typename V>
__device__ V in_register(V v) {
  return __shfl_xor_sync(0xffffffffu, v, 0);
}
template <typename V>
__device__ V* in_register(V* p) {
  return reinterpret_cast<V*>(in_register(reinterpret_cast<unsigned long long>(p)));
}

// Sum over the lanes whose numbers differ in bits of at least `lowest`; each of them gets it,
// always added in the same order. All 32 lanes must call.
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

// -------------------------------------------------------------------------------------------------
// The block: what its warps share
// -------------------------------------------------------------------------------------------------
// | what         | written by                | read by                | visible through
// | places       | a worker's loads          | the same worker        | cp_async_wait_group
// | partial sums | workers, in sum(i)        | exchange warps         | `summed` of group i
// | result       | exchange warps            | workers, in store(i)   | `ready` of group i
// | pivots       | exchange warps            | workers, in sum(i)     | `ready` of group i − stages
// | slots        | exchange warps of a block | those of the team      | nothing: a slot tells
// | counter      | exchange warps of a block | those of the team      | nothing: it saves polls
// | factor       | thread 0                  | exchange warps         | the first __syncthreads
//
// Overwritten: a place after its thread has stored it. A stage's partial sums in sum(i + stages),
// which comes after store(i), which waited for `ready`, on which exchange warps arrive after they
// have read them. A result after `summed` of group i + stages, on which workers arrive after
// store(i). Pivots of group i + 2·stages take the place of group i's after `summed` of i: there are
// two copies a stage, as those of group i + stages are then in use. Slots and counters: never, each
// group of a launch has its own. The first pivots are visible through the first __syncthreads.

// A stage's barriers, of which phase i / stages is group i's.
struct StageBarriers {
  Mbarrier summed;  // all workers have left their sums
  Mbarrier ready;   // the stage's exchange warps have left the result
};

struct alignas(kVectorBytes) Head {  // of a block's shared memory; the places follow
  double factor;                     // weight of the new value in the running buffers
  StageBarriers barriers[kMaxStages];
};

template <typename T>
struct Stage {  // as group i finds it
  using A = Accumulator<T>;
  Mbarrier *summed, *ready;
  unsigned parity;          // of group i's phase
  Sums<A>* partial;         // [partials], see Worker::store_partials
  A *mean, *scale, *shift;  // [channels] the result: y = (x − mean)·scale + shift
  A* pivot;                 // [channels]
};

template <typename T>
struct Block {
  using A = Accumulator<T>;
  const Arguments& a;
  unsigned char* const shared = dynamic_shared_memory();  // asked for once: it takes long
  Head& head = *reinterpret_cast<Head*>(shared);
  Vector<T>* const places = reinterpret_cast<Vector<T>*>(shared + sizeof(Head));
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first_group = divide(blockIdx.x, a.team);  // then every teams-th
  const int rank = blockIdx.x - first_group * a.team.divisor;
  const int groups = a.rounds - (first_group + (a.rounds - 1) * a.teams >= a.Plan::groups);

  __device__ explicit Block(const Arguments& a) : a(a) {}

  __device__ int group(int i) const { return first_group + i * a.teams; }
  __device__ Stage<T> stage(int i) const {
    const unsigned phase = divide(i, a.stages), stage = i - phase * a.stages.divisor;
    auto* const partial = reinterpret_cast<Sums<A>*>(shared + a.stage_at + stage * a.stage_bytes);
    auto* const result = reinterpret_cast<A*>(partial + a.partials);
    const int channels = a.channel_stride;
    StageBarriers& barriers = head.barriers[stage];
    return {&barriers.summed,
            &barriers.ready,
            phase & 1,
            partial,
            result,
            result + channels,
            result + 2 * channels,
            result + (3 + (phase & 1)) * channels};
  }
};

// -------------------------------------------------------------------------------------------------
// The group: where its vectors lie in x and y, which of their elements count, whose they are
// -------------------------------------------------------------------------------------------------
enum Memory { kRegister, kShared, kL2 };  // where a vector is loaded to

template <typename T, Layout kLayout>
struct Group {
  using A = Accumulator<T>;
  static constexpr int kSize = Vector<T>::kSize;
  static constexpr int kChannelsPerVector = keeps_column(kLayout) ? kSize : 1;
  // Sums of a thread: one for each element of a vector where those may differ in channel; else one
  // for every fourth, which makes shorter chains of additions.
  static constexpr int kAccumulators = keeps_column(kLayout) || kSize < 4 ? kSize : 4;
  // What lines are counted in: vectors of x; elements, where they need not begin with a vector.
  using Index = std::conditional_t<kLayout == kNchwMasked, uint64_t, unsigned>;

  // Where a vector is in a group: what its line begins at, and its place in the line.
  struct Cursor {
    Index line;
    unsigned in_line;
  };
  // Where a group begins, in vectors from a.x_vectors on (kNchwMasked: in elements), and which
  // elements of this thread's vectors are the group's; or which elements of one vector count.
  struct Origin {
    Index at;
    int begin, end;
  };
  struct Elements {
    int begin, end;
  };

  const Arguments& a;
  const unsigned width = in_register(a.width.divisor);
  const Index line_stride = in_register(kLayout == kNchwMasked ? Index(a.image) : a.line_stride);
  const Cursor step = cursor(a.step.divisor);
  const Vector<T>* const x = static_cast<const Vector<T>*>(a.x_vectors);
  Vector<T>* const y = static_cast<Vector<T>*>(a.y_vectors);
  // keeps_column: of this thread's vectors.
  unsigned column = 0;  // kNhwc*: in a line, of group 0
  int channel = 0;      // of element 0 in the group; < 0: it is of the group before
  int split = kSize;    // kNchwPacked: from this element on they are of the next channel

  __device__ Group(const Arguments& a, unsigned thread) : a(a) {
    const unsigned in_line = keeps_column(kLayout) ? thread - divide(thread, a.width) * width : 0;
    if constexpr (kLayout == kNchwPacked) {
      const int element = in_line * kSize;
      channel = divide(element, a.segment);
      split = min((channel + 1) * int(a.HW) - element, kSize);
    } else if constexpr (kLayout == kNhwc) {
      column = in_line;
      channel = in_line * kSize;
    } else if constexpr (kLayout == kNhwcMasked) {
      const unsigned pixel = divide(in_line, a.segment);
      const unsigned in_pixel = in_line - pixel * a.segment.divisor;
      const uint64_t first = pixel * uint64_t(a.C) + a.misalignment;  // element of x, in group 0
      column = unsigned(first / kSize) + in_pixel;
      channel = int(in_pixel * kSize) - int(first % kSize);
      if (periodic())
        while (channel < 0 || channel >= a.C) channel += channel < 0 ? a.C : -a.C;
    }
  }

  // Lines of several whole pixels, whose channels follow each other again and again.
  __device__ bool periodic() const {
    return kLayout == kNhwcMasked && a.pixels > 1 && a.segment.divisor == a.width.divisor;
  }

  // Of vector v of the group.
  __device__ Cursor cursor(unsigned v) const {
    const unsigned line = divide(v, a.width);
    return {line * line_stride, v - line * width};
  }

  // Goes on to the thread's next vector.
  __device__ void advance(Cursor& c) const {
    c.line += step.line;
    if constexpr (!keeps_column(kLayout)) {
      c.in_line += step.in_line;
      if (c.in_line >= width) {
        c.in_line -= width;
        c.line += line_stride;
      }
    }
  }

  // Of group g.
  __device__ Origin origin(int g) const {
    if constexpr (kLayout == kNchwMasked) return {uint64_t(g) * a.HW + a.misalignment, 0, kSize};
    Origin o = {g * a.group_stride + column, 0, kSize};
    if (kLayout == kNhwcMasked && !periodic()) {
      o.begin = max(0, -channel);
      o.end = min(kSize, min(a.channels, int(a.C) - g * a.channels) - channel);
    }
    return o;
  }

  // The vector at c in the group that begins at o, counted from a.x_vectors.
  __device__ unsigned vector(const Origin& o, const Cursor& c) const {
    if constexpr (kLayout == kNchwMasked) return unsigned((o.at + c.line) / kSize) + c.in_line;
    return o.at + c.line + (is_nhwc(kLayout) ? 0 : c.in_line);
  }

  // Whether all its elements count, as in most vectors: for these, no more is asked.
  __device__ bool is_whole(const Origin& o, const Cursor& c) const {
    if (kLayout == kNchwMasked) return c.in_line - 1 < max(width, 3u) - 3;  // not at a plane's edge
    if (kLayout == kNhwcMasked)  // not at an edge of the group or of x
      return o.end - o.begin == kSize && is_inside_x(vector(o, c));
    return true;
  }
  // Neither the first one of x, nor past the last whole one.
  __device__ bool is_inside_x(unsigned v) const { return v - 1 < max(a.whole_vectors, 1u) - 1; }

  // Those that count, of any vector. May be none.
  __device__ Elements elements(const Origin& o, const Cursor& c) const {
    Elements e = {o.begin, o.end};
    if constexpr (kLayout == kNchwMasked) {
      const int before = int((o.at + c.line) % kSize);  // elements of the plane before
      const int past = int(c.in_line - width) + 2;      // vectors past the last but two
      if (c.in_line == 0) e.begin = before;
      if (past >= 0) e.end = min(a.tail + before - past * kSize, kSize);
    } else if constexpr (kLayout == kNhwcMasked) {
      if (is_inside_x(vector(o, c))) return e;
      const int64_t first = int64_t(vector(o, c)) * kSize - a.misalignment;  // element of x
      e.begin = int(max(int64_t(e.begin), -first));
      // (Pixels past the last one of x may be more than 2³¹ elements away.)
      e.end = int(max(min(int64_t(e.end), a.N * a.C * a.HW - first), int64_t(0)));
    }
    return e;
  }

  // What the channels of this thread's vectors have in `from` [channels of the group]: the one
  // channel, or that of each element; any channel's, where that element does not count.
  __device__ void load_channels(A (&of)[kChannelsPerVector], const A* from) const {
    if constexpr (kLayout == kNhwc) {  // side by side, and aligned
#pragma unroll
      for (int k = 0; k < kSize; k += 4) {
        const uint4 words = *reinterpret_cast<const uint4*>(from + channel + k);
        memcpy(&of[k], &words, sizeof words);
      }
    } else {
      int c = channel;
#pragma unroll
      for (int k = 0; k < kChannelsPerVector; ++k) {
        of[k] = from[min(unsigned(c), unsigned(a.channels) - 1)];
        if (kLayout != kNchwPacked || k + 1 == split) ++c;
        if (c == int(a.C) && periodic()) c = 0;
      }
    }
  }

  // Loads the vector at c. Into a register at once; into shared memory and L2 asynchronously.
  __device__ void load(Memory to, Vector<T>& v, const Origin& o, const Cursor& c) const {
    const unsigned at = vector(o, c);
    if (!is_whole(o, c)) {
      const Elements e = elements(o, c);
      if (e.begin >= e.end) return;
      if (at >= a.whole_vectors) {  // reaches past the end of x
        if (to != kL2) v = load_elements(at, e);
        return;
      }
    }
    if (to == kL2)
      prefetch_global_L2(x + at);
    else if (to == kShared)
      cp_async_16(&v, x + at);
    else
      ld_global_128(&v, x + at);
  }

  __device__ Vector<T> load_elements(unsigned at, const Elements& e) const {
    Vector<T> v;
#pragma unroll
    for (int i = 0; i < kSize; ++i)
      if (i >= e.begin && i < e.end) v.set(i, reinterpret_cast<const T*>(x + at)[i]);
    return v;
  }

  // s1 += x − pivot, s2 += (x − pivot)², for each element of the vector at c.
  __device__ void sum(Sums<A> (&sums)[kAccumulators], const Vector<T>& v, const Origin& o,
                      const Cursor& c, const A (&pivot)[kChannelsPerVector]) const {
    const auto add = [&](int i) {
      const A d = widen(v, i) - pivot[i % kChannelsPerVector];
      sums[i % kAccumulators].s1 += d;
      sums[i % kAccumulators].s2 += d * d;
    };
    if (is_whole(o, c)) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) add(i);
    } else {
      const Elements e = elements(o, c);
#pragma unroll
      for (int i = 0; i < kSize; ++i)
        if (i >= e.begin && i < e.end) add(i);
    }
  }

  struct Result {  // of the channels of this thread's vectors
    A mean[kChannelsPerVector], scale[kChannelsPerVector], shift[kChannelsPerVector];
  };

  // y = (x − mean)·scale + shift; shift holds beta, and what rounding the mean has lost. The mean
  // is subtracted first: folded into the shift, it would cost digits where |mean| ≫ std.
  __device__ void store(const Vector<T>& v, const Origin& o, const Cursor& c, const Result& r,
                        bool streaming) const {
    const bool whole = is_whole(o, c);
    const Elements e = whole ? Elements{0, kSize} : elements(o, c);
    if (e.begin >= e.end) return;
    A normal[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const int k = i % kChannelsPerVector;
      normal[i] = (widen(v, i) - r.mean[k]) * r.scale[k] + r.shift[k];
    }
    const Vector<T> v_y = make_vector<T>(normal);
    Vector<T>* const to = y + vector(o, c);
    if (whole) {
      // By intrinsics, as one instruction: the compiler would split a plain assignment.
      const uint4 words = *reinterpret_cast<const uint4*>(&v_y);
      uint4* const to_words = reinterpret_cast<uint4*>(to);
      streaming ? __stcs(to_words, words) : __stwb(to_words, words);
    } else {
#pragma unroll
      for (int i = 0; i < kSize; ++i)
        if (i >= e.begin && i < e.end) reinterpret_cast<T*>(to)[i] = v_y.get(i);
    }
  }
};

// -------------------------------------------------------------------------------------------------
// Worker warps: each thread loads, sums and stores vectors of its own
// -------------------------------------------------------------------------------------------------
// The first of a thread's vectors are in registers, the next ones in places in shared memory. Where
// there are more, the last ones go through kRing of the places, forwards for the sums, backwards
// for the store: those are read twice. All places are private, so no barrier guards them.
template <typename T, Layout kLayout, bool kDeep>
struct Worker {
  using G = Group<T, kLayout>;
  using A = typename G::A;
  using Cursor = typename G::Cursor;
  static constexpr int kRegVectors = register_vectors(kLayout, G::kSize, kDeep, kExtra);
  static constexpr bool kCanReread = can_reread(kLayout, kDeep);
  const Block<T>& b;
  const Arguments& a = b.a;
  const unsigned thread = threadIdx.x - 32 * a.exchange_warps;
  const G group{a, thread};
  const unsigned workers = in_register(unsigned(a.workers));
  const unsigned first = b.rank * a.share + thread;  // vector of the group
  const bool has_vectors = thread < unsigned(a.workers) && first < a.vectors;
  const int vectors =
      has_vectors ? min(a.vectors_per_thread, int(divide(a.vectors - 1 - first, a.step)) + 1) : 0;
  const bool rereads = kCanReread && a.vectors_per_thread > a.reg_vectors + a.smem_vectors;
  const int reg_vectors = kRegVectors > 0 ? min(vectors, a.reg_vectors) : 0;
  const int smem_vectors = min(vectors - reg_vectors, a.smem_vectors - (rereads ? kRing : 0));
  const int ring_vectors = vectors - reg_vectors - smem_vectors;
  const Cursor start = group.cursor(first);
  Vector<T> reg[kRegVectors > 0 ? kRegVectors : 1];

  // Calls use(vector, cursor) for the vectors in registers.
  template <typename Use>
  __device__ void each_reg_vector(Cursor& c, Use use) {
#pragma unroll
    for (int r = 0; r < kRegVectors; ++r) {
      if (r >= reg_vectors) continue;
      use(reg[r], c);
      group.advance(c);
    }
  }

  // The same for those in shared memory, at the places of group i, in two halves, each behind
  // before_half(0 or 1): loads of a half are one group of cp.async, so that the first half is
  // summed while the second lands.
  template <typename Use, typename BeforeHalf>
  __device__ void each_smem_vector(int i, Cursor& c, Use use, BeforeHalf before_half) const {
    const unsigned stage = i - divide(i, a.stages) * a.stages.divisor;
    Vector<T>* place = b.places + stage * a.smem_vectors * workers + thread;
    const Vector<T>* const middle = place + (smem_vectors + 1) / 2 * workers;
    const Vector<T>* const end = place + smem_vectors * workers;
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      before_half(half);
#pragma unroll 1
      for (; place < (half == 0 ? middle : end); place += workers) {
        use(*place, c);
        group.advance(c);
      }
    }
  }

  // The place, and the cursor, of the r-th vector that has no place of its own.
  __device__ Vector<T>& ring(int r) const {
    return b.places[(a.smem_vectors - kRing + r % kRing) * workers + thread];
  }
  __device__ Cursor ring_cursor(int r) const {
    const int v = reg_vectors + smem_vectors + r;
    if (keeps_column(kLayout)) return {start.line + v * group.step.line, start.in_line};
    return group.cursor(first + v * a.step.divisor);
  }

  // Issues the loads of group i: two groups of cp.async.
  __device__ void load(int i) {
    const bool exists = i < b.groups;
    const auto origin = group.origin(b.group(i));
    Cursor c = start;
#pragma unroll 1
    for (int r = 0; kCanReread && exists && r < min(ring_vectors, kRing); ++r)
      group.load(kShared, ring(r), origin, ring_cursor(r));
    if (exists)
      each_reg_vector(c, [&](auto& v, auto& at) { group.load(kRegister, v, origin, at); });
    const auto load_one = [&](auto& v, auto& at) {
      if (exists) group.load(kShared, v, origin, at);
    };
    each_smem_vector(i, c, load_one, commit_first_half);
    cp_async_commit_group();
  }
  static __device__ void commit_first_half(int half) {
    if (half == 1) cp_async_commit_group();
  }

  // Σ d and Σ d² of group i, the last one whose loads have been issued.
  __device__ void sum(int i) {
    const auto origin = group.origin(b.group(i));
    const auto stage = b.stage(i);
    A pivot[G::kChannelsPerVector];
    group.load_channels(pivot, stage.pivot);
    Sums<A> sums[G::kAccumulators];
    Cursor c = start;
    const auto add = [&](auto& v, auto& at) { group.sum(sums, v, origin, at, pivot); };
    each_reg_vector(c, add);
    each_smem_vector(i, c, add, [](int half) {
      half == 0 ? cp_async_wait_group<1>() : cp_async_wait_group<0>();
    });
    // As many turns for all lanes, since store_partials needs whole warps. Each turn's load is one
    // group of cp.async, which has kRing turns to land.
    const int turns = rereads ? a.vectors_per_thread - a.reg_vectors - a.smem_vectors + kRing : 0;
    Cursor ahead = ring_cursor(kRing);
#pragma unroll 1
    for (int r = 0;; ++r) {
      const bool last = r >= turns;
      if (last || (is_nhwc(kLayout) && r > 0 && r % kChain == 0)) {
        store_partials(stage.partial, sums, r > kChain);
        if (last) break;
#pragma unroll
        for (int e = 0; e < G::kAccumulators; ++e) sums[e] = {};
      }
      cp_async_wait_group<kRing - 1>();
      if (r < ring_vectors) {
        add(ring(r), c);
        group.advance(c);
        if (r + kRing < ring_vectors) group.load(kShared, ring(r), origin, ahead);
        group.advance(ahead);
      }
      cp_async_commit_group();
    }
    mbarrier_arrive(stage.summed);  // by all lanes: each vouches for what it has read and written
  }

  // Hands this thread's sums to the exchange warps; `accumulate`: adds them to those it has handed
  // over for this group before. Channel → partial sum, as block_sums finds them:
  //   one channel  [warp]
  //   kNchwPacked  [line of the block][column][first or second channel of the vector]
  //   kNhwc*       [element][line of the block, or warp where it has whole lines][column], so that
  //                lanes write side by side
  __device__ void store_partials(Sums<A>* partial, Sums<A> (&sums)[G::kAccumulators],
                                 bool accumulate) const {
    if constexpr (!keeps_column(kLayout)) {
      Sums<A> all;
#pragma unroll
      for (int e = 0; e < G::kAccumulators; ++e) all.add(sums[e]);
      all = warp_sum(all);
      if (b.lane == 0) partial[thread / 32] = all;
    } else if constexpr (kLayout == kNchwPacked) {
      Sums<A> of[2];
#pragma unroll
      for (int e = 0; e < G::kAccumulators; ++e)
        if (e < group.split)
          of[0].add(sums[e]);
        else
          of[1].add(sums[e]);
      if (thread < unsigned(a.workers)) {
        partial[2 * thread] = of[0];
        partial[2 * thread + 1] = of[1];
      }
    } else {
      const unsigned width = a.width.divisor;
      const bool by_warp = fits_warp(kLayout, width);
#pragma unroll 1
      for (unsigned bit = 16; by_warp && bit >= width; bit /= 2)
#pragma unroll
        for (int e = 0; e < G::kAccumulators; ++e)
          sums[e].add({__shfl_xor_sync(0xffffffffu, sums[e].s1, bit),
                       __shfl_xor_sync(0xffffffffu, sums[e].s2, bit)});
      const unsigned at = by_warp ? thread / 32 * width + b.lane : thread;
      if (by_warp ? unsigned(b.lane) < width : thread < unsigned(a.workers))
#pragma unroll
        for (int e = 0; e < G::kAccumulators; ++e) {
          Sums<A>& to = partial[e * a.partial_stride + at];
          if (accumulate) sums[e].add(to);
          to = sums[e];
        }
    }
  }

  // Prefetches the first vectors of group i into L2, where memory would rest during the exchange of
  // the only group in flight: more than a part would drive out what L2 holds.
  __device__ void prefetch(int i) {
    if (i >= b.groups || a.stages.divisor > 1 || rereads) return;
    const auto origin = group.origin(b.group(i));
    Cursor c = start;
    const int part = a.vectors_per_thread / (is_nhwc(kLayout) ? 2 : 4);
#pragma unroll 1
    for (int r = 0; r < min(vectors, part); ++r) {
      group.load(kL2, reg[0], origin, c);
      group.advance(c);
    }
  }

  // y of group i, once its result is there; refills each place with group `next` as it is stored.
  __device__ void store(int i, int next) {
    const auto origin = group.origin(b.group(i)), next_origin = group.origin(b.group(next));
    const bool refills = next < b.groups;
    const auto stage = b.stage(i);
    mbarrier_wait(stage.ready, stage.parity);
    typename G::Result result;
    group.load_channels(result.mean, stage.mean);
    group.load_channels(result.scale, stage.scale);
    group.load_channels(result.shift, stage.shift);
    // Newest first: L2 still has those. The ring holds the last kRing; each turn as in sum().
#pragma unroll 1
    for (int r = ring_vectors - 1; kCanReread && r >= 0; --r) {
      cp_async_wait_group<kRing - 1>();
      const Cursor c = ring_cursor(r);
      group.store(ring(r), origin, c, result, rereads);
      if (r >= kRing)
        group.load(kShared, ring(r), origin, ring_cursor(r - kRing));
      else if (refills)
        group.load(kShared, ring(r), next_origin, c);
      cp_async_commit_group();
    }
    const auto store_and_refill = [&](Memory memory) {
      return [&, memory](auto& v, auto& at) {
        group.store(v, origin, at, result, rereads);
        if (refills) group.load(memory, v, next_origin, at);
      };
    };
    Cursor c = start;
    each_reg_vector(c, store_and_refill(kRegister));
    each_smem_vector(i, c, store_and_refill(kShared), commit_first_half);
    cp_async_commit_group();
  }
};

// -------------------------------------------------------------------------------------------------
// Exchange warps: from the block's sums to the team's, and to what the workers need
// -------------------------------------------------------------------------------------------------
template <typename A>
struct Channel {  // what a channel has of parameters and buffers
  A gamma = 1, beta = 0, running_mean = 0, running_var = 0;
};

// Sum of `count` slots `stride` apart, of which this lane takes number `part` and every parts-th
// after it. Polls those that have not arrived.
constexpr int kSlots = 5;  // in flight to a lane: with 32 lanes, those of 132 blocks at once
// Whether each block adds up the sums of all the team's blocks for itself, with so many lanes.
__host__ __device__ constexpr bool sums_directly(int team, int lanes) {
  return team <= 4 * kSlots * lanes;
}
template <typename A>
__device__ Sums<A> gather(const SumSlot<A>* slots, int count, int stride, int part, int parts) {
  const SumSlot<A> nothing = {0, A(-0.0)};  // arrived, and adds 0
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
        slot[k] = at < count ? ld_relaxed(&slots[at * stride]) : nothing;
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

// The pivot of a channel is a mean of some of its elements, so that (pivot − mean)² is a fraction
// of var and nothing cancels. Each lane gives the medians of any three neighbours in a ring of its
// elements, so that neither an outlier nor a run of them moves the pivot away from all others. The
// lanes' elements lie side by side, in runs: apart, each would be a request of its own, for which
// small channels have no time. Of NHWC there are more, since as little as one lane has a channel.
// The pivot is rounded to T: then d = x − pivot has few digits, and most sums are exact.
template <typename T, Layout kLayout>
struct Sample {
  static constexpr int kRuns = is_nhwc(kLayout) ? 8 : 4;
  T of[kRuns];
};

// An exchange warp has a unit of a group: one channel, or up to 32. Lanes that have the same
// channel share what there is to add. All lanes of the warp call each function.
template <typename T, Layout kLayout>
struct ExchangeWarp {
  using A = Accumulator<T>;
  static constexpr int kRuns = Sample<T, kLayout>::kRuns;
  const Block<T>& b;
  const Arguments& a = b.a;
  // The stage whose groups this warp takes; its unit of the group.
  const int unit = keeps_column(kLayout) ? divide(b.warp, a.stages) : 0;
  const int stage = b.warp - unit * a.stages.divisor;
  const int bits = keeps_column(kLayout) ? a.unit_bits : 0, unit_channels = 1 << bits;
  // This lane's number among those of its channel, how many they are, its channel in the group.
  const int part = b.lane >> bits, parts = 32 >> bits;
  const int channel = unit * unit_channels + (b.lane & (unit_channels - 1));
  // Whether this lane does what one lane does for the channel.
  const bool leads = channel < a.channels && part == 0;

  // This lane's channel in x, in group i of the block's team.
  __device__ int channel_in_x(int i) const { return b.group(i) * a.channels + channel; }
  __device__ bool samples(int i) const { return a.training && i < b.groups; }

  // Loads the sample of group i. (A lane without a channel reads another's.)
  __device__ Sample<T, kLayout> sample(int i) const {
    const int64_t c = min(channel_in_x(i), int(a.C) - 1);
    const bool apart = a.HW < parts;  // planes are shorter than a run
    Sample<T, kLayout> s;
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      const unsigned seed = apart ? kRuns * part + run : run;
      const uint64_t n = __umulhi(seed * 0x9e3779b9u, unsigned(a.N));
      const uint64_t start = __umulhi(seed * 0x85ebca6bu, unsigned(a.HW) - (apart ? 0 : parts - 1));
      const uint64_t at = start + (apart ? 0 : part);
      s.of[run] = static_cast<const T*>(
          a.x)[n * a.image + (is_nhwc(kLayout) ? c + at * a.C : c * a.HW + at)];
    }
    return s;
  }

  // Leaves the pivots of group i.
  __device__ void set_pivots(int i, const Sample<T, kLayout>& s) const {
    A median[kRuns];
#pragma unroll
    for (int r = 0; r < kRuns; ++r) {
      const A u = widen(s.of[r]), v = widen(s.of[(r + 1) % kRuns]),
              w = widen(s.of[(r + 2) % kRuns]);
      median[r] = max(min(u, v), min(max(u, v), w));
      median[r] *= A(unit_channels) / (32 * kRuns);  // divided first: a sum could overflow
    }
    // In pairs: so a mean of equal numbers is that number, and d is 0 in a constant channel.
#pragma unroll
    for (int half = kRuns / 2; half > 0; half /= 2)
#pragma unroll
      for (int r = 0; r < half; ++r) median[r] += median[r + half];
    const A mean = warp_sum(median[0], unit_channels);
    const A pivot = isfinite(mean) ? widen(round_to<T>(mean)) : A(0);
    if (leads) b.stage(i).pivot[channel] = pivot;
  }

  // A channel's sums over the block, from where store_partials left them.
  __device__ Sums<A> block_sums(const Sums<A>* partial) const {
    constexpr int kSize = Vector<T>::kSize;
    Sums<A> sums;
    const unsigned width = a.width.divisor;
    const auto add_lines = [&](const Sums<A>* from, int stride, int first, int step) {
      Sums<A> of_lines;  // a sum of its own: one chain of all would be long, see kChain
#pragma unroll 2
      for (int line = first; line < a.partial_lines; line += step)
        of_lines.add(from[line * stride]);
      sums.add(of_lines);
    };
    // NHWC: of element i of the lines, whose sums the channel's lanes share.
    const auto add_element = [&](unsigned i) {
      add_lines(partial + i % kSize * a.partial_stride + i / kSize, width, part, parts);
    };
    if constexpr (!keeps_column(kLayout)) {
      if (b.lane < a.partial_lines) sums.add(partial[b.lane]);
    } else if (channel >= a.channels) {
    } else if constexpr (kLayout == kNchwPacked) {  // lanes share the columns of the plane
      const unsigned first = channel * unsigned(a.HW), end = first + unsigned(a.HW);
#pragma unroll 1
      for (unsigned column = first / kSize + part; column * kSize < end; column += parts)
        add_lines(partial + 2 * column + (column * kSize < first), 2 * width, 0, 1);
    } else if constexpr (kLayout == kNhwc) {
      add_element(channel);
    } else {  // each pixel of a line has an element
      const unsigned segment = a.segment.divisor * kSize, elements = width * kSize;
#pragma unroll 1
      for (unsigned pixel = 0; pixel < a.pixels; ++pixel) {
        const unsigned first = pixel * unsigned(a.C) + a.misalignment, in_line = first + channel;
        const unsigned periodic = in_line - (in_line < elements ? 0 : elements);
        add_element(segment == elements ? periodic : pixel * segment + first % kSize + channel);
      }
    }
    return warp_sum(sums, unit_channels);
  }

  // The team's sums, through slots in memory: one for each block and channel, and one for the
  // team's. Each block adds up few slots for itself; of many, each channel is one block's, which
  // leaves the team's sums for all.
  __device__ Sums<A> team_sums(int i, const Sums<A>& own) const {
    const int team = a.team.divisor, channels = keeps_column(kLayout) ? a.channels : 1;
    const bool exists = channel < channels;
    unsigned char* const group = a.scratch + int64_t(b.group(i)) * a.group_bytes;
    auto* const counter = reinterpret_cast<unsigned long long*>(group + unit * kLineBytes);
    auto* const slots = reinterpret_cast<SumSlot<A>*>(group + a.units * kLineBytes);
    auto* const totals = slots + team * channels;
    if (exists && part == 0)
      st_relaxed(&slots[b.rank * channels + channel], SumSlot<A>{own.s1, -own.s2});
    if (sums_directly(team, parts)) {
      // The counter saves polling all the slots, which would take L2's time; it orders nothing.
      if (b.lane == 0) atomicAdd(counter, 1);
      while (b.lane == 0 && ld_relaxed(counter) < team) nanosleep();
      __syncwarp();
      return warp_sum(gather(slots + channel, exists ? team : 0, channels, part, parts),
                      unit_channels);
    }
#pragma unroll 1
    for (int c = b.rank; c < channels; c += team) {
      if (c >> bits != unit) continue;
      const Sums<A> sums = warp_sum(gather(slots + c, team, channels, b.lane, 32));
      if (b.lane == 0) st_relaxed(&totals[c], SumSlot<A>{sums.s1, -sums.s2});
    }
    return gather(totals + channel, exists, channels, 0, 1);
  }

  // Of this lane's channel in group i, where this lane needs it.
  __device__ Channel<A> load_channel(int i) const {
    const int c = channel_in_x(i);
    Channel<A> of;
    if (!leads || i >= b.groups || c >= a.C) return of;
    if (a.gamma) of.gamma = load_parameter<T>(a.gamma, c, a.affine_float);
    if (a.beta) of.beta = load_parameter<T>(a.beta, c, a.affine_float);
    if (a.running_mean && (b.rank == 0 || !a.training)) {
      of.running_mean = load_parameter<T>(a.running_mean, c, a.running_float);
      of.running_var = load_parameter<T>(a.running_var, c, a.running_float);
    }
    return of;
  }

  // For each group of this warp's stage: waits for the block's sums, leaves the result, saves the
  // statistics. `of`: the channel in the first of them.
  __device__ void exchange(Channel<A> of) const {
    const int stages = a.stages.divisor;
    const auto prepare_pivots = [&](int i) {
      if (samples(i)) set_pivots(i, sample(i));
    };
    prepare_pivots(stage + stages);
#pragma unroll 1
    for (int i = stage; i < b.groups; i += stages) {
      const auto own = b.stage(i);
      double mean = of.running_mean, var = of.running_var, m2 = 0;  // m2: Σ (x − mean)²
      if (a.training) {
        mbarrier_wait(own.summed, own.parity);
        Sums<A> sums = block_sums(own.partial);
        if (a.team.divisor > 1) sums = team_sums(i, sums);
        const double offset = sums.s1 * a.per_element;
        m2 = sums.s2 - sums.s1 * offset;
        if (m2 < 0) m2 = 0;  // by rounding, in a constant channel; NaN stays
        mean = (leads ? own.pivot[channel] : A(0)) + offset;
        var = m2 * a.per_element;
      }
      const double inv_std = rsqrt(var + a.eps), scale = inv_std * of.gamma;
      if (leads) {
        own.mean[channel] = A(mean);
        own.scale[channel] = A(scale);
        own.shift[channel] = A(of.beta - (mean - A(mean)) * scale);
      }
      mbarrier_arrive(own.ready);
      if (a.training && b.rank == 0 && leads) save(channel_in_x(i), of, mean, m2, inv_std);
      prepare_pivots(i + 2 * stages);
      of = load_channel(i + stages);
    }
  }

  // Of channel c: what backward needs, and the running buffers.
  __device__ void save(int c, const Channel<A>& of, double mean, double m2, double inv_std) const {
    if (c >= a.C) return;
    static_cast<A*>(a.mean)[c] = A(mean);
    static_cast<A*>(a.inv_std)[c] = A(inv_std);
    if (!a.running_mean) return;
    const double factor = b.head.factor, unbiased = m2 * a.per_element_less;
    store_parameter<T>(a.running_mean, c, a.running_float,
                       (1 - factor) * of.running_mean + factor * mean);
    store_parameter<T>(a.running_var, c, a.running_float,
                       (1 - factor) * of.running_var + factor * unbiased);
  }
};

// -------------------------------------------------------------------------------------------------
// The kernel
// -------------------------------------------------------------------------------------------------
template <typename T, Layout kLayout, bool kDeep>
__global__ void __maxnreg__(max_registers(kLayout, Vector<T>::kSize, kDeep, kExtra))
    fused_batch_norm_forward_kernel(const __grid_constant__ Arguments a) {
  using A = Accumulator<T>;
  const Block<T> b(a);
  const bool works = b.warp >= a.exchange_warps;
  if (threadIdx.x == 0) {
    double factor = a.momentum;
    if (a.cumulative) factor = a.num_batches_tracked ? 1.0 / double(*a.num_batches_tracked + 1) : 0;
    b.head.factor = factor;
  }
  const ExchangeWarp<T, kLayout> exchange_warp{b};
  const bool samples = !works && exchange_warp.samples(exchange_warp.stage);
  Sample<T, kLayout> sample;  // loaded before x itself takes all of the bandwidth
  if (samples) sample = exchange_warp.sample(exchange_warp.stage);
  const auto grid = cooperative_groups::this_grid();
  unsigned arrival = 0;
  if (a.cooperative) {
    auto* const slots = reinterpret_cast<SumSlot<A>*>(a.scratch);
    const int64_t count = int64_t(a.groups) * a.group_bytes / sizeof(SumSlot<A>);
    const int64_t step = int64_t(gridDim.x) * blockDim.x;
#pragma unroll 1
    for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step)
      st_relaxed(&slots[i], SumSlot<A>{0, 0});
    arrival = grid.barrier_arrive();
  }
  if (samples) exchange_warp.set_pivots(exchange_warp.stage, sample);

  // In step, the blocks of a multiprocessor would all load, then all store, and memory would rest
  // in between: each waits until memory has had time to read what those before it have asked for.
  if (a.stagger_cycles > 0)
    if (const int turn = blockIdx.x / a.multiprocessors; turn < a.stagger_turns)
      nanosleep_cycles(int64_t(turn) * a.stagger_cycles);

  // Step i sums group i + stages − 1, then stores group i and refills its places with group
  // i + stages. Before step 0 there is nothing to store, and the loads are issued by themselves:
  //   stages = 1   step  0: load 0, sum 0,             store 0, refilling with 1
  //                step  1:         sum 1,             store 1, refilling with 2 …
  //   stages = 3   step −2: load 0, sum 0              (exchange warps: group 0)
  //                step −1: load 1, sum 1              (groups 0 and 1)
  //                step  0: load 2, sum 2 (0, 1, 2),   store 0, refilling with 3
  //                step  1:         sum 3 (1, 2, 3),   store 1, refilling with 4 …
  // So the group to be summed is always the last one loaded, and its two groups of cp.async are the
  // last ones committed: while its first half is summed, 1 may be pending, then 0.
  // A step's code stands in the order of its execution, once each: what comes next is in the
  // instruction cache.
  Worker<T, kLayout, kDeep> worker{b};
  const int stages = a.stages.divisor;
#pragma unroll 1
  for (int i = 1 - stages; i < max(b.groups, 1); ++i) {
    const bool first = i == 1 - stages;
    const int newest = i + stages - 1;
    if (works && i <= 0) worker.load(newest);
    if (first) {
      if (threadIdx.x == 0) {
#pragma unroll 1
        for (int stage = 0; stage < stages; ++stage) {
          mbarrier_init(&b.head.barriers[stage].summed, blockDim.x - 32 * a.exchange_warps);
          mbarrier_init(&b.head.barriers[stage].ready, 32 * a.units);
        }
      }
      __syncthreads();  // shows the barriers, the factor and the first pivots
    }
    if (works && a.training && newest < b.groups) {
      worker.sum(newest);
      if constexpr (kDeep || is_nhwc(kLayout)) worker.prefetch(newest + stages);
    }
    if (first) {
      // What the first channels need takes long to come: it is loaded ahead of their sums.
      const Channel<A> of = works ? Channel<A>{} : exchange_warp.load_channel(exchange_warp.stage);
      // Behind it, all scratch is zero, and all have read the counter of batches.
      if (a.cooperative) grid.barrier_wait(std::move(arrival));
      auto* const batches = reinterpret_cast<unsigned long long*>(a.num_batches_tracked);
      if (a.training && batches && blockIdx.x == 0 && threadIdx.x == 0) atomicAdd(batches, 1);
      if (!works) return exchange_warp.exchange(of);
    }
    if (!a.training) cp_async_wait_group<0>();
    if (i >= 0 && i < b.groups) worker.store(i, i + stages);
  }
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

// What a plan takes: fitted to 41,000 plans of 339 shapes, timed on an H200 (by --nets --regret of
// check.py).
constexpr double kBytes = 43690;        // bytes a µs that memory moves for one multiprocessor
constexpr double kVector = .0876;       // µs to sum and store one vector of each thread
constexpr double kMaskedVector = .289;  // µs for that where not all elements of a vector may count
constexpr double kWarp = .0393;         // µs for each worker warp of a multiprocessor, a round
constexpr double kExposed = 1.58;       // of a round's work, what nothing hides at the end
constexpr double kExchange = 3.68;      // µs from a block's last vector to its first store
constexpr double kHop = .93;            // µs more for each time that blocks read others' sums
constexpr double kPartial = .0575;      // µs more for each partial sum that a lane adds
constexpr double kGridLaunch = 1.65;    // µs more for a cooperative launch
constexpr double kStaggered = .694;     // of an exchange, what staggered blocks do not hide
constexpr double kLockstep = .33;    // of NCHW's memory time, more where all load, then all store
constexpr double kBusiest = .604;    // weight of the busiest multiprocessor's bytes
constexpr double kSplitLine = .151;  // weight of bytes in cache lines that groups share
constexpr double kReread = 1.14;     // weight of bytes read again that L2 does not hold
constexpr int64_t kBytesPerCycle = 16;  // that a multiprocessor reads while all others do
// What is tried. Little else was ever the fastest.
constexpr int kVectorsOfBlocks[] = {1, 2, 3, 4, 6, 8, 11, 14, 18, 24};  // of a thread, no team
constexpr double kLeastWarps = 8, kMostWarps = 24;  // workers of a multiprocessor
constexpr int kMostPacked = 16;                     // channels of packed planes
constexpr int kFewTeams = 8;                        // all numbers of teams up to this one
constexpr int kLeastVectors = 2;                    // NHWC: of a pixel, whole sectors of 32 bytes
constexpr int kRereadTeams = 2;                     // teams that may read vectors again
constexpr int kMostTurns = 8;                       // blocks of a multiprocessor that are staggered
constexpr double kLeastStaggered = 11e6;  // bytes of x below which blocks are not staggered
constexpr int64_t kEvalBytes = 28 << 10;  // of a block in eval mode, where none waits for another
constexpr int kEvalVectors = 14;          // of its threads
constexpr size_t kMostKept = 1000;        // plans that a thread remembers

FastDivmod fast_divmod(int64_t divisor) {
  unsigned shift = 0;
  while ((int64_t(1) << shift) < divisor) ++shift;
  const int64_t magic = ((int64_t(1) << (31 + shift)) + divisor - 1) / divisor;
  return {unsigned(divisor), unsigned(magic), shift};
}

// Elements from a 16-byte boundary to x, of which a vector has `size`.
int misalignment_of(const FusedBatchNormCall& call, int size) {
  return int(reinterpret_cast<uintptr_t>(call.x) % kVectorBytes * size / kVectorBytes);
}

// A group of one channel, masked or not; or of several, whose planes together are whole vectors.
// None if there is none such.
std::optional<Plan> nchw(const FusedBatchNormCall& call, int size, int channels, bool masked) {
  Plan p = {};
  const int64_t width =
      std::max<int64_t>(masked ? (call.HW + size - 2) / size + 1 : call.HW * channels / size, 1);
  if (call.C % channels || call.N * width >= int64_t(1) << 31) return {};
  p.layout = masked ? kNchwMasked : channels > 1 ? kNchwPacked : kNchw;
  p.channels = channels;
  p.groups = int(call.C / channels);
  p.vectors = call.C > 0 ? unsigned(call.N * width) : 0;
  p.width = fast_divmod(width);
  p.line_stride = unsigned(p.groups * width);
  p.group_stride = unsigned(width);
  p.segment = fast_divmod(channels > 1 ? call.HW : width);
  return p;
}

// A group of neighbouring channels of a channels-last x, `channels` of them where C allows it.
std::optional<Plan> nhwc(const FusedBatchNormCall& call, int size, int channels) {
  Plan p = {};
  const int64_t C = call.C, pixels = call.N * call.HW;
  const int misalignment = misalignment_of(call, size);
  p.layout = size > 2 && C % channels == 0 && C % size == 0 && channels % size == 0 && !misalignment
                 ? kNhwc
                 : kNhwcMasked;
  p.pixels = int(size / std::gcd<int64_t>(C, size));
  p.line_stride = unsigned(p.pixels * C / size);
  int64_t lines;
  if (p.pixels > 1 && C <= channels) {  // all channels, pixel behind pixel
    p.channels = int(C);
    p.segment = p.width = fast_divmod(p.line_stride);
    lines = (pixels * C + size - 1 + p.pixels * C - 1) / (p.pixels * C);
  } else {  // each pixel has vectors of its own, of which the first and last may be shared
    p.channels = int(std::min<int64_t>(channels, (C + size - 1) / size * size));
    p.segment = fast_divmod(p.channels / size + (p.pixels > 1 || misalignment > 0));
    p.width = fast_divmod(p.pixels * p.segment.divisor);
    lines = (pixels + p.pixels - 1) / p.pixels;
  }
  if (lines * p.width.divisor >= int64_t(1) << 31) return {};
  p.vectors = unsigned(lines * p.width.divisor);
  p.groups = ceil_div(C, p.channels);
  p.group_stride = unsigned(p.channels / size);
  return p;
}

// The plan of least cost, among: groups × teams × blocks of a multiprocessor × stages × workers.
struct Planner {
  const FusedBatchNormCall& call;
  const Device& device;
  const int size, accumulator_bytes;  // elements of a vector; bytes of a sum
  const bool masked = size == 2 || call.HW % size != 0 || misalignment_of(call, size) > 0;
  const bool extra = takes_extra(device.architecture);
  const int multiprocessors = device.multiprocessors;
  const int64_t multiprocessor_bytes = device.shared_bytes + device.reserved_bytes;
  const double part =  // of x, for one multiprocessor, in bytes
      kVectorBytes * std::max(double(call.N) * call.C * call.HW / size, 1.) / multiprocessors;
  Plan best = {};
  double best_cost = INFINITY;

  // The plan of a group with so many teams, in each so many blocks, so many groups in flight; and
  // how an exchange is cut.
  Plan with_team(Plan p, bool cooperative, int64_t team, int teams, int stages) const {
    p.cooperative = cooperative;
    p.team = fast_divmod(team);
    p.teams = std::max(teams, 1);
    p.rounds = ceil_div(std::max(p.groups, 1), p.teams);
    p.stages = fast_divmod(stages);
    const int least = std::max(kUnitChannels, ceil_div(p.channels * stages, kMaxUnits));
    while (1 << p.unit_bits < std::min(p.channels, least)) ++p.unit_bits;
    p.units = ceil_div(p.channels, 1 << p.unit_bits);
    p.exchange_warps = p.units * stages;
    // Each unit's counter has a cache line, so that polling it delays no other's; then the slots.
    const int64_t slots_bytes = (team + 1) * p.channels * 2 * accumulator_bytes;
    if (cooperative && team > 1)
      p.group_bytes = kLineBytes * (p.units + ceil_div(slots_bytes, kLineBytes));
    return p;
  }

  // The plan with so many workers, each with so many vectors in shared memory; where things lie.
  Plan with_places(Plan p, int workers, int smem_vectors) const {
    const int stages = p.stages.divisor;
    p.workers = workers;
    p.smem_vectors = smem_vectors;
    const bool by_warp = unit(p) == 32;
    p.partial_lines = ceil_div(workers, by_warp ? 32 : p.width.divisor);
    // Not a multiple of the banks, so that lanes that add different elements find them in others.
    if (is_nhwc(p.layout))
      p.partial_stride = (p.partial_lines * p.width.divisor + 15) / 16 * 16 + 2;
    p.partials = !call.training            ? 0
                 : is_nhwc(p.layout)       ? size * p.partial_stride
                 : p.layout == kNchwPacked ? 2 * p.partial_lines * p.width.divisor
                                           : p.partial_lines;
    p.channel_stride = ceil_div(p.channels, 4) * 4;
    p.stage_at = int(sizeof(Head)) + stages * smem_vectors * workers * kVectorBytes;
    p.stage_bytes =
        ceil_div((2 * p.partials + (3 + 2) * p.channel_stride) * accumulator_bytes, 16) * 16;
    p.shared_bytes = p.stage_at + stages * p.stage_bytes;
    return p;
  }

  // Workers come in whole warps; or in whole lines, so that each stays in its column.
  int unit(const Plan& p) const {
    return !keeps_column(p.layout) || fits_warp(p.layout, p.width.divisor) ? 32 : p.width.divisor;
  }

  // The plan with at most about so many workers in a block, of which `blocks` shall fit on a
  // multiprocessor, and where their vectors are. None if those do not fit, nor can be read again.
  std::optional<Plan> with_workers(Plan p, int workers, int blocks, bool deep = false) const {
    const int team = p.team.divisor, stages = p.stages.divisor, share = ceil_div(p.vectors, team);
    const int resident = resident_threads(p.layout, size, deep, extra) / blocks;
    const int most = std::min(resident / 32 * 32, kMaxThreads) - 32 * p.exchange_warps;
    const bool rereads =
        call.training && p.teams <= kRereadTeams && stages == 1 && can_reread(p.layout, deep);
    p.deep = deep;
    workers = std::min(std::max(workers, unit(p)), most) / unit(p) * unit(p);
    if (workers <= 0 || p.unit_bits > 5) return {};  // an exchange warp has 32 lanes
    // No more workers than as many vectors of a thread take.
    workers =
        ceil_div(std::max(share, 1), int64_t(ceil_div(std::max(share, 1), workers)) * unit(p)) *
        unit(p);
    for (; workers > 0; workers = rereads ? workers - unit(p) : 0) {
      p.vectors_per_thread = ceil_div(share, workers);
      p.reg_vectors = std::min(p.vectors_per_thread, register_vectors(p.layout, size, deep, extra));
      if (stages > 1) p.reg_vectors = 0;
      const int rest = p.vectors_per_thread - p.reg_vectors;
      const int64_t place_bytes = int64_t(stages) * workers * kVectorBytes;
      // A block gets whole pieces of 256 bytes, 128 from sm_80 on.
      const int64_t left = multiprocessor_bytes / blocks / 256 * 256 - device.reserved_bytes -
                           with_places(p, workers, 0).shared_bytes;
      const int64_t most_places = call.training ? kChain : rest;  // they are summed in one chain
      const int64_t places = std::min<int64_t>({rest, left / place_bytes, most_places});
      if (left < 0 || places < (rereads ? std::min(rest, kRing) : rest)) continue;
      // Vectors go to the blocks of a team in turn where those keep pace with each other; else each
      // has its own side by side.
      const bool in_turn = stages > 1 || deep || places < rest;
      p.share = in_turn ? workers : p.vectors_per_thread * workers;
      p.step = fast_divmod(in_turn ? int64_t(team) * workers : workers);
      return with_places(p, workers, int(places));
    }
    return {};
  }

  // The same with blocks of a multiprocessor that start one after the other. If more follow
  // later than are co-resident, no block more may be than in turns.
  std::optional<Plan> staggered(const std::optional<Plan>& of) const {
    const double x_bytes = part * multiprocessors;
    if (!of || x_bytes < kLeastStaggered || resident(*of) < 2 || resident(*of) > kMostTurns ||
        of->teams <= multiprocessors)
      return {};
    Plan p = *of;
    p.multiprocessors = multiprocessors;
    p.stagger_turns = resident(p);
    p.stagger_cycles =
        int(int64_t(p.vectors_per_thread) * p.workers * kVectorBytes / kBytesPerCycle);
    if (int64_t(p.teams) * p.team.divisor > int64_t(multiprocessors) * p.stagger_turns)
      p.shared_bytes =
          int(std::max<int64_t>(p.shared_bytes, multiprocessor_bytes / (p.stagger_turns + 1) -
                                                    device.reserved_bytes + 16));
    return p;
  }

  // Blocks for which a multiprocessor has room.
  int resident(const Plan& p) const {
    return int(std::min<int64_t>(
        {multiprocessor_bytes / (p.shared_bytes + device.reserved_bytes),
         std::max(resident_threads(p.layout, size, p.deep, extra) / block_threads(p), 1), 32}));
  }

  // µs of the exchange: from a block's last vector to its first store.
  double exchange(const Plan& p) const {
    const int team = p.team.divisor, lanes = 32 >> p.unit_bits;  // of a channel
    const int lines = p.partial_lines;
    const double sums = is_nhwc(p.layout)         ? ceil_div(lines, lanes) * p.pixels
                        : p.layout == kNchwPacked ? lines * ceil_div(call.HW, int64_t(size) * lanes)
                                                  : 0;
    const int hops = team == 1 ? 0
                     : sums_directly(team, lanes)
                         ? ceil_div(team, kSlots * lanes)
                         : 1 + ceil_div(team, kSlots * 32) * ceil_div(p.channels, team);
    return kExchange + kPartial * sums + kHop * hops;
  }

  // µs of the whole plan. In each round, a multiprocessor moves, sums and stores a group's share in
  // each of its blocks; then it waits for the exchange, unless other groups or blocks keep it busy.
  double cost(const Plan& p) const {
    const int team = p.team.divisor, blocks = ceil_div(int64_t(team) * p.teams, multiprocessors);
    const int at_once = std::min(resident(p), blocks);
    const double waves = double(team) * p.teams / multiprocessors / resident(p);
    const double rounds = p.rounds * std::max(waves, 1.);
    const double work = p.vectors_per_thread * (is_masked(p.layout) ? kMaskedVector : kVector) +
                        kWarp * at_once * ceil_div(p.workers, 32);
    const double busiest =
        double(p.vectors) * kVectorBytes / team * blocks * p.rounds / part;  // 1: all alike
    // Bytes of lines that a group shares with its neighbours; more where those come later.
    const auto split = [&](int64_t run) {
      return double(kLineBytes - std::gcd(run, kLineBytes)) / run;
    };
    const int64_t run = p.channels * (is_nhwc(p.layout) ? 1 : call.HW) * kVectorBytes / size;
    const double shared =
        (p.groups > 1 ? split(run) : 0) + (p.groups > p.teams ? split(run * p.teams) : 0);
    const int ring_vectors = p.vectors_per_thread - p.reg_vectors - p.smem_vectors;
    const double in_l2 = multiprocessor_bytes * rounds / part;  // about
    const double reread =
        ring_vectors > 0 ? std::max(double(ring_vectors + kRing) / p.vectors_per_thread - in_l2, 0.)
                         : 0;
    const double memory = part / kBytes * (2 + kReread * reread) * (1 + kSplitLine * shared) *
                          (1 + kBusiest * (busiest - 1)) / rounds;
    const double wait = exchange(p), busy = std::hypot(memory, work);
    const double others = p.rounds > 1 ? 1 : at_once;  // blocks in other phases
    const double round = std::hypot(busy, (busy / others + wait) / p.stages.divisor);
    const bool lockstep = p.cooperative && rounds <= 1 && !is_nhwc(p.layout);
    return kGridLaunch * p.cooperative + (p.stagger_turns > 0 ? kStaggered : 1) * wait +
           (lockstep ? 1 + kLockstep : 1) * memory + kExposed * work + (rounds - 1) * round;
  }

  void consider(const std::optional<Plan>& p) {
    const double its_cost = p ? cost(*p) : INFINITY;
    if (its_cost < best_cost) best = *p;
    best_cost = std::min(best_cost, its_cost);
  }

  // A group for each block, in a launch in which none waits for another; and persistent teams.
  void consider_group(const std::optional<Plan>& maybe_group) {
    if (!maybe_group) return;
    const Plan& group = *maybe_group;
    const int groups = std::max(group.groups, 1);
    // All must have read the counter of batches before it counts: then blocks wait for each other.
    const bool counts_batches = call.cumulative && call.num_batches_tracked;
    if (!counts_batches)
      for (const int vectors : kVectorsOfBlocks) {
        const int workers = group.vectors / vectors + unit(group) - 1;
        const auto p = with_workers(with_team(group, false, 1, groups, 1), workers, 2);
        consider(p);
        consider(staggered(p));
      }
    const int most_blocks = is_nhwc(group.layout) ? 2 : 3;
    for (int blocks = 1; blocks <= most_blocks; ++blocks) {
      const int slots = blocks * multiprocessors;
      for (int teams = std::min(slots, groups), rounds; teams > 0;
           teams = std::min(teams - 1, std::max(teams * 4 / 5, kFewTeams))) {
        rounds = ceil_div(groups, teams);
        teams = ceil_div(groups, rounds);  // the fewest, so the largest, for as many rounds
        const int team = std::min(slots / teams, std::max(int(group.vectors / 64), 1));
        if (team * teams <= slots - multiprocessors) continue;  // fewer blocks would do
        const bool cooperative = team > 1 || counts_batches;
        // Where work is least: as many warps as what they save in vectors of a thread.
        const double vector = is_masked(group.layout) ? kMaskedVector : kVector;
        const double warps = std::sqrt(vector * group.vectors * blocks / (32 * kWarp * team));
        const int workers = int(32 / blocks * std::clamp(warps, kLeastWarps, kMostWarps));
        // A single group in flight is tried for NCHW where it is the only one, or read again.
        const bool single = teams >= groups || is_nhwc(group.layout) || teams <= kRereadTeams;
        for (int stages = single ? 1 : 2; stages <= std::min(rounds, kMaxStages); ++stages)
          consider(
              with_workers(with_team(group, cooperative, team, teams, stages), workers, blocks));
        if (group.layout == kNchw && size > 2 && blocks == 1 && teams <= kRereadTeams)
          consider(
              with_workers(with_team(group, cooperative, team, teams, 1), kMaxThreads, 1, true));
      }
    }
  }

  // In eval mode no block waits for another. None if not even a line of the group fits.
  std::optional<Plan> eval(const std::optional<Plan>& group) const {
    if (!group) return {};
    for (int64_t bytes = std::min(kEvalBytes, multiprocessor_bytes / 4); bytes > 0; bytes /= 2) {
      const int64_t team = std::max(ceil_div(int64_t(group->vectors) * kVectorBytes, bytes), 1);
      const Plan p = with_team(*group, false, team, group->groups, 1);
      if (const auto q =
              with_workers(p, ceil_div(group->vectors, team * kEvalVectors) + unit(p) - 1, 2))
        return q;
    }
    return {};
  }

  Plan choose() {
    if (call.channels_last && call.C > 0) {
      // Groups that divide C, in whole sectors of L2 or of a line or more; else any, in vectors.
      const int line = kLineBytes * size / kVectorBytes, vectors = ceil_div(call.C, size);
      if (!call.training) return *eval(nhwc(call, size, line));
      for (int v = std::min(kLeastVectors, vectors); v <= vectors && v * size <= 32 * kMaxUnits;
           ++v)
        if (vectors % v == 0 && (v % 2 == 0 || v * size >= line || v == vectors))
          consider_group(nhwc(call, size, v * size));
      for (int c = line; std::isinf(best_cost); c /= 2) consider_group(nhwc(call, size, c));
      return best;
    }
    // The fewest channels whose planes are whole vectors, and more; one, but not with short lines.
    const auto group = nchw(call, size, 1, masked);
    const int least = int(size / std::gcd<int64_t>(call.HW, size));
    for (int channels = least > 1 ? least : 2; channels <= kMostPacked; channels *= 2) {
      const int64_t width = call.HW * channels / size;
      if (size == 2 || misalignment_of(call, size) > 0 || call.C == 0 || call.C % channels > 0 ||
          call.HW < size - 1 || width > resident_threads(kNchwPacked, size, false, extra) / 2 - 32)
        break;
      const auto packed = nchw(call, size, channels, false);
      if (call.training) consider_group(packed);
      if (const auto p = call.training || least == 1 ? std::nullopt : eval(packed)) return *p;
    }
    if (!call.training) return *eval(group);
    if (!masked || group->width.divisor > 32 || std::isinf(best_cost)) consider_group(group);
    return best;
  }
};

// A thread's plans are kept: a net asks for the same ones again and again.
Plan& make_plan(const FusedBatchNormCall& call, const Device& device, int size,
                int accumulator_bytes) {
  static thread_local std::map<std::array<int64_t, 11>, Plan> plans;
  if (plans.size() >= kMostKept) plans.clear();
  const auto [kept, is_new] =
      plans.try_emplace({call.N, call.C, call.HW, call.dtype, call.training, call.channels_last,
                         call.cumulative && call.num_batches_tracked, misalignment_of(call, size),
                         device.multiprocessors, device.shared_bytes, device.architecture});
  if (is_new) kept->second = Planner{call, device, size, accumulator_bytes}.choose();
  return kept->second;
}

// -------------------------------------------------------------------------------------------------
// Launch
// -------------------------------------------------------------------------------------------------
using Kernel = void (*)(Arguments);

template <typename T, Layout kLayout, bool kDeep = false>
constexpr Kernel kKernel = fused_batch_norm_forward_kernel<T, kLayout, kDeep>;

// The kernel that suits a call, and its arguments but for scratch.
template <typename T>
std::pair<Kernel, Arguments> typed_launch(const FusedBatchNormCall& call, const Device& device) {
  constexpr int kSize = Vector<T>::kSize;
  constexpr bool kFew = sizeof(T) == 8;  // float64: masked kernels alone
  constexpr Kernel kKernels[kLayouts] = {
      kKernel < T,
      kFew ? kNchwMasked : kNchw >,
      kKernel<T, kNchwMasked>,
      kKernel < T,
      kFew ? kNchwMasked : kNchwPacked >
      , kKernel < T, kFew ? kNhwcMasked : kNhwc >, kKernel<T, kNhwcMasked>};
  const Plan& p = make_plan(call, device, kSize, sizeof(Accumulator<T>));
  const int misalignment = misalignment_of(call, kSize);
  const double count = double(call.N) * double(call.HW);
  const Arguments arguments = {call,
                               p,
                               static_cast<const T*>(call.x) - misalignment,
                               static_cast<T*>(call.y) - misalignment,
                               nullptr,
                               misalignment,
                               unsigned((call.N * call.C * call.HW + misalignment) / kSize),
                               uint64_t(call.C * call.HW),
                               int(call.HW - (int64_t(p.width.divisor) - 2) * kSize),
                               1 / count,
                               1 / (count - 1)};
  return {p.deep ? kKernel < T, kFew ? kNchwMasked : kNchw, !kFew > : kKernels[p.layout],
          arguments};
}

std::pair<Kernel, Arguments> make_launch(const FusedBatchNormCall& call, const Device& device) {
  constexpr decltype(&typed_launch<float>) kTypes[] = {
      typed_launch<float>, typed_launch<__half>, typed_launch<__nv_bfloat16>, typed_launch<double>};
  return kTypes[call.dtype](call, device);
}

cudaError_t launch(Kernel kernel, const Arguments& arguments, const Device& device, void* stream) {
  constexpr int kUnasked = 48 * 1024;  // bytes that a block gets without being asked for
  // Always the most that the device has: another thread may launch between this and the launch.
  if (arguments.shared_bytes > kUnasked)
    if (const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                device.shared_bytes))
      return error;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = arguments.cooperative;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(arguments.team.divisor * arguments.teams);
  config.blockDim = dim3(block_threads(arguments));
  config.dynamicSmemBytes = arguments.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, arguments);
}

}  // namespace

extern "C" const char* fused_batch_norm_launch(const FusedBatchNormCall* call,
                                               void* (*allocate)(size_t bytes, void* context),
                                               void* context, void* stream) {
  Device device;
  cudaError_t error = device.error;
  bool again = !error;
  while (again) {
    auto [kernel, arguments] = make_launch(*call, device);
    if (const size_t bytes = size_t(arguments.groups) * arguments.group_bytes)
      arguments.scratch = static_cast<unsigned char*>(allocate(bytes, context));
    error = launch(kernel, arguments, device, stream);
    // There are fewer multiprocessors than the device says (a green context, MPS): planned again.
    again = error == cudaErrorCooperativeLaunchTooLarge && device.multiprocessors > 1;
    device.multiprocessors -= ceil_div(device.multiprocessors, 8);
    if (error) cudaGetLastError();  // or a later call of someone else would raise it
  }
  return error ? cudaGetErrorString(error) : nullptr;
}

extern "C" const char* fused_batch_norm_plan(const FusedBatchNormCall* call, int* words,
                                             size_t bytes) {
  const Device device;
  if (device.error) return cudaGetErrorString(device.error);
  const Plan plan = make_launch(*call, device).second;
  memcpy(words, &plan, std::min(bytes, sizeof plan));
  return nullptr;
}
"""

FUSED_BATCH_NORM_CPP = r"""
#define AT_PER_OPERATOR_HEADERS  // or each header below brings all of ATen, which takes seconds
#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/batch_norm_backward.h>
#include <ATen/ops/empty.h>
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
    const Tensor x_dense = in_format(x, format), grad = in_format(grads[0], format);
    const std::array<bool, 3> mask{needed(0), needed(1), needed(2)};
    // The backward that PyTorch's own layer takes, by PyTorch's own choice: cuDNN's where it can,
    // since the native one has one block a channel for NCHW. cuDNN's wants aligned memory, and
    // nothing more of the forward. Where x is traced, without memory, both decompose alike.
    const auto is_aligned = [](const Tensor& t) {
      return t.has_storage() && !t.is_meta() && !t.key_set().has(c10::DispatchKey::Python) &&
             uintptr_t(t.const_data_ptr()) % kVectorBytes == 0;
    };
    const bool chooses = training && scale.defined() && is_aligned(x_dense) && is_aligned(grad);
    auto [grad_x, grad_gamma, grad_beta] =
        chooses ? at::batch_norm_backward(grad, x_dense, widen(scale), {}, {}, mean, inv_std, true,
                                          eps, mask, at::empty({0}, x.options().dtype(at::kByte)))
                : at::native_batch_norm_backward(grad, x_dense, widen(scale), widen(running_mean),
                                                 widen(running_var), mean, inv_std, training, eps,
                                                 mask);
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
