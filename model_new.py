"""Batch normalisation of an NCHW tensor, forward, as one fused CUDA kernel in one launch.

    y = gamma · (x − mean) / √(var + eps) + beta        mean, biased var: per channel, over N, H and W

x is read from memory once and y is written once, as a copy would do: between the sweep that sums and the
sweep that writes, a channel's data stays on the chip.

Few channels at a time are under way, and a channel is shared by a team of blocks. make_plan() in the CUDA text chooses,
from shape and device, one of these structures of the one kernel, and the sizes in it:

    resident   a block's share of a channel fits into registers and half of a multiprocessor's shared memory: each thread loads
               vectors of its own, sums them, waits for the team, and stores them normalised. Blocks overlap each other's phases.
    packed     the same where planes do not end with a 16-byte vector (7×7, say), on a few channels side by side that do.
    ring       one block per multiprocessor takes channel after channel, as tiles:

               producer ──► ring of tiles in shared memory ──► store ──► y
                                │                              ▲
                                └──► statistics ──► exchange ──┘
                                     (sums)         (with the team's other blocks: mean, inv_std)

               Each arrow is a few warps that run on their own, held together by barriers per tile and per channel, so the
               next channels' tiles already come in while this one's sums travel.
    hold       the same for what the ring cannot hold: part of it stays in registers (`held`), part is read a second time
               (`streamed`).
"""

import os
import shutil
import sys
import warnings

import torch
import torch.utils.cpp_extension

FUSED_BATCH_NORM_CALL = r"""
#include <stddef.h>
#include <stdint.h>

// One call, as the C++ text hands it to the CUDA text.
struct FusedBatchNormCall {
  const void* x;                 // [N, C, HW], dtype
  void* y;                       // [N, C, HW], dtype; as far from a 16-byte boundary as x
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
  int cumulative;                // momentum is None: the cumulative average
  int dtype;                     // 0 float, 1 half, 2 bfloat16, 3 double
  int affine_float;              // gamma and beta are float whatever x is
  int running_float;             // so are the running buffers
  int training;                  // 0: normalise with the running buffers
};

// Each returns null, or what went wrong.
extern "C" const char* fused_batch_norm_launch(
    const FusedBatchNormCall* call, void* (*allocate)(size_t bytes, void* context), void* context, void* stream);
extern "C" const char* fused_batch_norm_describe(const FusedBatchNormCall* call, char* text, size_t text_bytes);
"""

FUSED_BATCH_NORM_CUDA = r"""
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <type_traits>
#include <utility>

namespace {

// ---------------------------------------------------------------------------------------------
// Constants
// ---------------------------------------------------------------------------------------------
constexpr int kVectorBytes = 16;      // one access of one thread
constexpr int kAtOnce = 4;            // vectors that a lane has on their way from shared memory
constexpr int kLineWords = 8;         // words (below) in a line of L2
// Resident and packed
constexpr int kResidentThreads = 512; // at most, in a block of which a multiprocessor takes two
constexpr int kPackedThreads = 448;   // the same, since two channels a vector take more registers
constexpr int kResidentVectors = 14;  // of a thread, if the block has not too many
// Of them in registers, as many as spill nothing, where a vector has `size` elements; the others in shared memory.
constexpr int resident_held(int size, bool packed) { return packed && size == 8 ? 1 : 3; }
constexpr int kResidentOverheadBytes = 2048;  // of a block's shared memory, for all but x and the threads' sums
constexpr int kResidentTeamPerLane = 2;  // blocks of a cooperative launch that one lane listens to: teams of up to 64
constexpr int kMaxCluster = 8;        // blocks, that any GPU with clusters takes
constexpr int kMaxPack = 8;           // channels that lie side by side in a packed plane
// Ring and hold
constexpr int kRingThreads = 512;     // at most, in a block that has a multiprocessor to itself
constexpr int kHoldThreads = 384;     // the same where they hold tiles, in 168 registers each
constexpr int kMaxSlots = 32;         // tiles in a block's ring: more barriers take longer to set up than they win
constexpr int kOverheadBytes = 6144;  // of shared memory, for all but the ring
constexpr int kTeamPerLane = 5;       // blocks that one lane of an exchange warp listens to: teams of up to 160
constexpr int kHoldVectors = 2;       // that a thread holds of a tile
// Tiles that it holds: as many as spill nothing, fewer where each is much code.
template <typename T, bool kMasked>
constexpr int kHeldTiles = kMasked ? 7 : sizeof(T) != 4 ? 10 : 14;

// ---------------------------------------------------------------------------------------------
// The hardware: all that is not plain CUDA C++, each in one function
// ---------------------------------------------------------------------------------------------
using Barrier = uint64_t;             // an mbarrier in shared memory
enum class Keep { kFirst, kLast };    // what L2 evicts first or last
using Policy = uint64_t;              // the same, as a copy wants it

struct alignas(16) Word {             // travels between blocks in one piece, so that a tag vouches for its value
  double value;
  unsigned long long tag;
};

#ifdef __CUDACC__

__device__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char fused_batch_norm_shared[];
  return fused_batch_norm_shared;
}

__device__ unsigned shared_address(const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }

#if __CUDA_ARCH__ >= 800
__device__ void barrier_init(Barrier* b, unsigned arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals) : "memory");
}

__device__ void barrier_arrive(Barrier* b) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(shared_address(b)) : "memory");
}

__device__ bool barrier_test(Barrier* b, unsigned parity) {
  unsigned complete;
#if __CUDA_ARCH__ >= 900  // may sleep a while
  asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
               : "=r"(complete) : "r"(shared_address(b)), "r"(parity) : "memory");
#else
  asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
               : "=r"(complete) : "r"(shared_address(b)), "r"(parity) : "memory");
#endif
  return complete;
}
#else  // the same in software: arrivals a phase in bits 0-15, arrivals still to come in bits 16-31, phase above
__device__ void barrier_init(Barrier* b, unsigned arrivals) { *b = arrivals | arrivals << 16; }

__device__ void barrier_arrive(Barrier* b) {
  __threadfence_block();
  auto* const word = reinterpret_cast<unsigned long long*>(b);
  unsigned long long old = *const_cast<volatile unsigned long long*>(word), seen;
  do {
    seen = old;
    const unsigned long long next = (seen >> 16 & 0xffff) > 1 ? seen - 0x10000 : (seen & 0xffff) * 0x10001 | ((seen >> 32) + 1) << 32;
    old = atomicCAS(word, seen, next);
  } while (old != seen);
}

__device__ bool barrier_test(Barrier* b, unsigned parity) {
  const bool complete = (*const_cast<volatile Barrier*>(b) >> 32 & 1) != parity;
  __threadfence_block();
  return complete;
}
#endif

// Returns when the phase of this parity is complete. A new barrier's phase before the first (parity 1) is.
__device__ void barrier_wait(Barrier* b, unsigned parity) {
  while (!barrier_test(b, parity)) {}
}

// The same where other blocks of the cluster have sent what the barrier waited for.
__device__ void barrier_wait_for_peers(Barrier* b, unsigned parity) {
#if __CUDA_ARCH__ >= 900
  unsigned complete;
  do {
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(complete) : "r"(shared_address(b)), "r"(parity) : "memory");
  } while (!complete);
#else
  __trap();
#endif
}

// Makes initialised barriers visible to the copy engine, and to the cluster behind its barrier.
__device__ void barrier_init_fence() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// One arrival; the phase also waits for `bytes` of bulk copies or from peers.
__device__ void barrier_arrive_expect(Barrier* b, unsigned bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("{ .reg .b64 state; mbarrier.arrive.expect_tx.shared.b64 state, [%0], %1; }"
               ::"r"(shared_address(b)), "r"(bytes) : "memory");
#else
  __trap();
#endif
}

__device__ Policy make_policy(Keep keep) {
  Policy policy = 0;
#if __CUDA_ARCH__ >= 800
  if (keep == Keep::kLast)
    asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  else
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
#endif
  return policy;
}

// Hopper's copy engine: `bytes` (a multiple of 16) land some time later and are counted on the barrier.
__device__ void copy_bulk(void* shared, const void* global, unsigned bytes, Barrier* b, Policy policy) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
               ::"r"(shared_address(shared)), "l"(global), "r"(bytes), "r"(shared_address(b)), "l"(policy) : "memory");
#else
  __trap();
#endif
}

// 16 bytes by this thread, some time later. L2 fetches the whole line of 128.
__device__ void copy_16(void* shared, const void* global, Policy policy) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "l"(policy) : "memory");
#else
  *static_cast<uint4*>(shared) = *static_cast<const uint4*>(global);
#endif
}

// Makes a group of this thread's copy_16 since the last one.
__device__ void copies_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Returns when all groups but the last `kOnTheirWay` have landed, for this thread to see.
template <int kOnTheirWay>
__device__ void copies_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kOnTheirWay) : "memory");
#endif
}

// One arrival, made when all copy_16 of this thread so far have landed.
__device__ void copies_arrive(Barrier* b) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(b)) : "memory");
#else
  barrier_arrive(b);
#endif
}

// The barrier of all threads of a cluster of blocks, in two halves. It tells that the others are there, and orders no memory:
// to do so, each thread would wait until all that the multiprocessor has under way has gone through, some microseconds.
__device__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#else
  __trap();
#endif
}

__device__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __trap();
#endif
}

// Writes 16 bytes to the same place in another block of the cluster, some time later, and counts them on that block's barrier.
template <typename V>
__device__ void send_to_peer(V* shared, int rank, const V& value, Barrier* b) {
#if __CUDA_ARCH__ >= 900
  static_assert(sizeof(V) == 16, "one message");
  const uint4 raw = *reinterpret_cast<const uint4*>(&value);
  asm volatile("{ .reg .b32 to, barrier; mapa.shared::cluster.u32 to, %0, %2; mapa.shared::cluster.u32 barrier, %1, %2;"
               "  st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [to], {%3, %4, %5, %6}, [barrier]; }"
               ::"r"(shared_address(shared)), "r"(shared_address(b)), "r"(rank), "r"(raw.x), "r"(raw.y), "r"(raw.z), "r"(raw.w) : "memory");
#else
  __trap();
#endif
}

__device__ Word load_word(const Word* p) {
  unsigned long long value, tag;
  asm volatile("{ .reg .b128 word; ld.relaxed.gpu.global.b128 word, [%2]; mov.b128 {%0, %1}, word; }"
               : "=l"(value), "=l"(tag) : "l"(p) : "memory");
  return Word{__longlong_as_double(value), tag};
}

__device__ void store_word(Word* p, Word word) {
  asm volatile("{ .reg .b128 word; mov.b128 word, {%1, %2}; st.relaxed.gpu.global.b128 [%0], word; }"
               ::"l"(p), "l"(__double_as_longlong(word.value)), "l"(word.tag) : "memory");
}

// Adds 1, which orders nothing else, and waits for nothing.
__device__ void add_one(void* word) { asm volatile("red.relaxed.gpu.global.add.u64 [%0], 1;" ::"l"(word) : "memory"); }

__device__ void nap() { __nanosleep(40); }

// Sleeps for so many clock cycles, about.
__device__ void rest(int64_t cycles) {
  const int64_t start = clock64();
  while (clock64() - start < cycles) __nanosleep(20);
}

// 16 bytes.
template <typename V>
__device__ V load_vector(const V* address, Policy policy) {
  uint4 raw;
#if __CUDA_ARCH__ >= 800
  asm volatile("ld.global.L1::no_allocate.L2::cache_hint.L2::128B.v4.b32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(raw.x), "=r"(raw.y), "=r"(raw.z), "=r"(raw.w) : "l"(address), "l"(policy));
#else
  raw = *reinterpret_cast<const uint4*>(address);
#endif
  return *reinterpret_cast<const V*>(&raw);
}

// 16 bytes, in one instruction: the compiler would split a plain assignment.
template <typename V>
__device__ void store_vector(V* address, const V& vector, bool streaming) {
  const uint4 raw = *reinterpret_cast<const uint4*>(&vector);
  if (streaming)
    asm volatile("st.global.cs.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(raw.x), "r"(raw.y), "r"(raw.z), "r"(raw.w) : "memory");
  else
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(raw.x), "r"(raw.y), "r"(raw.z), "r"(raw.w) : "memory");
}
#else
#include "emulated_device.h"
#endif

// ---------------------------------------------------------------------------------------------
// Types
// ---------------------------------------------------------------------------------------------
template <typename T>
struct alignas(kVectorBytes) Vector {  // kept as words: as elements, 16-bit ones would take a register each
  static constexpr int kSize = kVectorBytes / sizeof(T);
  unsigned word[4] = {};
  __device__ T get(int i) const {
    unsigned bits[2] = {word[i * sizeof(T) / 4] >> (i * sizeof(T) % 4 * 8), sizeof(T) == 8 ? word[i * 2 % 4 + 1] : 0};
    T element;
    memcpy(&element, bits, sizeof(T));
    return element;
  }
  __device__ void push(T element) {  // becomes element 0; the others move up
    constexpr int kWords = (sizeof(T) + 3) / 4, kBits = sizeof(T) % 4 * 8;
#pragma unroll
    for (int i = 3; i >= 0; --i) {
      if (kBits > 0) word[i] = word[i] << kBits | (i > 0 ? word[i - 1] >> kBits : 0);
      else if (i >= kWords) word[i] = word[i - kWords];
    }
    unsigned bits[2] = {};
    memcpy(bits, &element, sizeof(T));
    word[0] = kBits > 0 ? word[0] | bits[0] : bits[0];
    if (kWords > 1) word[1] = bits[1];
  }
};

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

template <typename T> struct Accumulator { using type = float; };
template <> struct Accumulator<double> { using type = double; };

__device__ float widen(float v) { return v; }
__device__ double widen(double v) { return v; }
__device__ float widen(__half v) { return __half2float(v); }
__device__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T, typename A> __device__ T narrow(A v) {
  if constexpr (sizeof(T) >= 4) return T(v);
  else if constexpr (std::is_same<T, __half>::value) return __floats2half2_rn(float(v), 0).x;
  else return __float2bfloat16_rn(float(v));
}

// An element of a parameter or a running buffer, which is float or of x's own type. As it lies in memory: a conversion
// behind the load would wait for it.
template <typename T>
struct Parameter {
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  Bits bits = 0;
  __device__ void load(const void* p, int64_t i, bool is_float) {
    if (is_float) bits = static_cast<const uint32_t*>(p)[i];
    else if constexpr (sizeof(T) == 2) bits = static_cast<const uint16_t*>(p)[i];
    else bits = static_cast<const Bits*>(p)[i];
  }
  __device__ typename Accumulator<T>::type value(bool is_float) const {
    float single;
    T own;
    memcpy(&single, &bits, sizeof single);
    memcpy(&own, &bits, sizeof own);
    return is_float ? single : widen(own);
  }
};

template <typename T>
__device__ void store_parameter(void* p, int64_t i, bool is_float, double v) {
  if (is_float)
    static_cast<float*>(p)[i] = float(v);
  else
    static_cast<T*>(p)[i] = narrow<T>(v);
}

// ---------------------------------------------------------------------------------------------
// Plan: what the launch and the kernel need to know beyond the call
// ---------------------------------------------------------------------------------------------
struct Divisor {         // n / divisor == umulhi(2n, magic) >> shift for all n < 2³¹
  unsigned magic;
  int shift;
};

enum Structure { kResident, kPacked, kRing, kHold };

struct Plan {
  int structure;         // 0 resident, 1 packed, 2 ring, 3 hold
  int pack;              // channels in a plane: 1, or (packed) as many as end with a vector together
  int64_t packs, plane;  // such planes in one of the N images; elements of one
  Divisor by_channel;    // elements of one channel in a plane
  int bulk;              // tiles come by the copy engine, else by 16-byte asynchronous copies
  int team, teams;       // blocks that share a channel; how many such teams
  Divisor by_team;
  int cluster;           // the team is a thread-block cluster
  int cooperative;       // all blocks resident, with a barrier across the grid
  int exchangers, producers, storers, statistics;  // warps of each role, in this order
  unsigned plane_vectors, channel_vectors;         // 16-byte vectors that cover one plane; those of all N planes
  Divisor by_plane_vectors;
  unsigned tile_vectors; // vectors of a tile
  unsigned step_vectors, step_offset;  // from a block's tile to its next: vectors in all, beyond whole planes,
  int64_t step_elements;               // and the elements of x that those planes are apart; packed: from a thread's vector to its next
  int tiles;             // tiles of one channel in one block, in this order:
  int held;              // ... kept in registers
  int streamed;          // ... let go after the sums and read again; the rest stays in the ring
  int slots;             // tiles that the ring has room for
  int channel_slots;     // channels that can be under way in a block
  unsigned threads;      // of a resident block, behind the exchangers', that take vectors
  unsigned kept_vectors; // of its tile, in shared memory
  int early;             // ... of each thread, that it sums before the others have landed
  Divisor by_turn;       // teams that start at once: a turn
  int turns;             // of such teams that are there at first; 0 if none waits
  int turn_cycles;       // by which one starts later than the one before
  int in_flight;         // tiles that the producer lets be on their way
  int channel_words;     // of scratch: a line for the count of the blocks that have published, then a word for each block
  int64_t scratch_words; // of all channels
  int shared_bytes;
  double per_element, per_element_but_one;  // 1 / (N·HW) and 1 / (N·HW − 1)
};

struct Arguments {
  FusedBatchNormCall call;
  Plan plan;
  Word* scratch;         // [C][channel_words], content unknown at the start
};

template <typename A>
struct Result {          // what the store warps need: y = (x − mean)·scale + shift
  A mean, scale, shift;
};

// Sums over some part of a channel, with d = x − pivot: Σ d and Σ d². All parts of a channel have the same pivot.
template <typename A>
struct Sums {
  A s1 = 0, s2 = 0;
  template <typename B>
  __device__ void add(const Sums<B>& other) {
    s1 += other.s1;
    s2 += other.s2;
  }
};

template <typename A>
struct Partial {         // what a statistics warp has summed
  A pivot;
  Sums<A> sums;
};

// Where things lie in a block's shared memory.
struct Shared {
  unsigned char* ring;   // [slots][tile_vectors] vectors
  Barrier *full, *empty; // [slots]: tile has landed; tile may be overwritten
  Barrier *summed, *ready;  // [channel_slots]: partials are there; result is there
  void* partial;         // [channel_slots][statistics] Partial
  void* result;          // [channel_slots] Result

  __device__ Shared(unsigned char* base, const Plan& p) {
    ring = base;
    full = reinterpret_cast<Barrier*>(ring + size_t(p.slots) * p.tile_vectors * kVectorBytes);
    empty = full + p.slots;
    summed = empty + p.slots;
    ready = summed + p.channel_slots;
    partial = ready + p.channel_slots;
    result = static_cast<Partial<double>*>(partial) + p.channel_slots * p.statistics;
  }
};

// ---------------------------------------------------------------------------------------------
// Small device helpers
// ---------------------------------------------------------------------------------------------
// Sum over the warp, in every lane, always in the same order. All 32 lanes must call.
template <typename V>
__device__ V warp_sum(V v) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) v += __shfl_xor_sync(0xffffffffu, v, lanes);
  return v;
}

template <typename A>
__device__ Sums<A> warp_sum(const Sums<A>& own) { return {warp_sum(own.s1), warp_sum(own.s2)}; }

__device__ unsigned divide(unsigned n, Divisor d) { return __umulhi(2 * n, d.magic) >> d.shift; }

// A place in a ring, and the parity of the phase that it is in.
struct RingPosition {
  int slot = 0;
  unsigned parity = 0;
  __device__ void advance(int steps, int slots) {  // less than a turn
    slot += steps;
    if (slot >= slots) {
      slot -= slots;
      parity ^= 1;
    }
  }
};

// What all warps of a block know.
struct Block {
  const Arguments& a;
  const Shared shared;
  const int first_channel = divide(blockIdx.x, a.plan.by_team);  // then every teams-th
  const int rank = blockIdx.x - first_channel * a.plan.team;     // in the team
  const int lane = threadIdx.x % 32;
  __device__ Block(const Arguments& a) : a(a), shared(dynamic_shared(), a.plan) {}
};

// A tile of a channel: `count` vectors from vector `offset` of a plane on, and what that plane's first element is in x.
struct Tile {
  unsigned first, count, offset;
  int64_t plane;
  __device__ Tile(const Block& b, int64_t channel, int index) {
    const Plan& p = b.a.plan;
    first = unsigned(index * p.team + b.rank) * p.tile_vectors;
    const unsigned n = divide(first, p.by_plane_vectors);
    offset = first - n * p.plane_vectors;
    plane = (n * p.packs + channel) * p.plane;
    clip(p);
  }
  __device__ void clip(const Plan& p) { count = first < p.channel_vectors ? min(p.tile_vectors, p.channel_vectors - first) : 0; }
  __device__ void advance(const Block& b) {  // to the block's next tile, without a division
    const Plan& p = b.a.plan;
    first += p.step_vectors;
    offset += p.step_offset;
    plane += p.step_elements;
    if (offset >= p.plane_vectors) {
      offset -= p.plane_vectors;
      plane += p.packs * p.plane;
    }
    clip(p);
  }
};

// How many elements behind a 16-byte boundary, where its cover starts, a plane starts that is not made of whole vectors.
template <typename T>
__device__ int shift_of(const Block& b, int64_t plane) {
  return int((plane + reinterpret_cast<uintptr_t>(b.a.call.x) / sizeof(T)) & (Vector<T>::kSize - 1));
}

// Where in x and y the first vector of a tile starts.
template <typename T, bool kMasked>
__device__ int64_t first_element(const Block& b, const Tile& tile) {
  return tile.plane + int64_t(tile.offset) * Vector<T>::kSize - (kMasked ? shift_of<T>(b, tile.plane) : 0);
}

// One vector of a tile: its first element's index in x and y, and which of its elements belong to the plane.
template <typename T, bool kMasked>
struct Place {
  static constexpr int kSize = Vector<T>::kSize;
  int64_t element;
  int begin = 0, end = kSize;
  __device__ Place(const Block& b, const Tile& tile, unsigned v) {
    const Arguments& a = b.a;
    const unsigned q = tile.offset + v, row = divide(q, a.plan.by_plane_vectors);
    if (!kMasked) {
      element = tile.plane + int64_t(q) * kSize + row * ((a.plan.packs - 1) * a.plan.plane);
    } else {  // the plane's cover starts at the 16-byte boundary before it
      element = tile.plane + row * (a.plan.packs * a.plan.plane);
      const int64_t in_plane = int64_t(q - row * a.plan.plane_vectors) * kSize;
      const int shift = shift_of<T>(b, element);
      begin = in_plane == 0 ? shift : 0;
      end = int(max(int64_t(0), min(int64_t(kSize), a.plan.plane + shift - in_plane)));
      element += in_plane - shift;
    }
  }
  __device__ bool has(int i) const { return !kMasked || (i >= begin && i < end); }
  __device__ int count() const { return max(end - begin, 0); }
};

// What of one vector of x belongs to the plane, element by element. Rolled: few vectors reach past the end of x, and unrolled
// in each place that loads, it would take a sixth of the compilation.
template <typename T, bool kMasked>
__device__ Vector<T> elementwise(const Block& b, const Place<T, kMasked>& place) {
  Vector<T> x;
#pragma unroll 1
  for (int i = Vector<T>::kSize - 1; i >= 0; --i) x.push(place.has(i) ? static_cast<const T*>(b.a.call.x)[place.element + i] : T());
  return x;
}

// This lane's share in the choice of a channel's pivot: one of 32 elements, the same in every block and warp. They lie in four
// runs of eight, scattered over the channel: 32 that lie apart would be as many requests, for which small channels have no time.
// It is far from being needed when it is loaded.
template <typename T>
__device__ T load_sample(const Block& b, int64_t channel) {
  const FusedBatchNormCall& call = b.a.call;
  if (channel >= call.C) return T();
  const int length = call.HW < 8 ? 1 : 8, runs = 32 / length, run = b.lane % runs;
  const int64_t n = __umulhi(run * 0x9e3779b9u, unsigned(call.N)), i = __umulhi(run * 0x85ebca6bu, unsigned(call.HW - length + 1)) + b.lane / runs;
  return static_cast<const T*>(call.x)[(n * call.C + channel) * call.HW + i];
}

// The pivot: a mean of the sample, so that (pivot − mean)² is a fraction of var and nothing cancels. A mean of medians of three
// lanes each, of three runs, so that no outlier, nor a run of them, moves it away from all the others.
template <typename A>
__device__ A pivot_of(A sample) {
  const A second = __shfl_xor_sync(0xffffffffu, sample, 1), third = __shfl_xor_sync(0xffffffffu, sample, 2);
  const A median = max(min(sample, second), min(max(sample, second), third));
  const A pivot = warp_sum(median) / 32;
  return isfinite(pivot) ? pivot : A(0);
}

// Something for a vector's elements: `a` for the first `split`, `b` for those of the next channel (kPacked).
template <typename V>
struct Pick {
  V a, b;
  int split;
  __device__ V operator[](int i) const { return i < split ? a : b; }
};

template <typename T, typename V>
__device__ Pick<V> same(V v) { return {v, v, Vector<T>::kSize}; }

// Adds one vector of x to sums of its elements: of each, or of every second, third … one.
template <typename T, bool kMasked, int kSums, typename A>
__device__ void add_vector(Sums<A> (&sums)[kSums], const Vector<T>& x, const Place<T, kMasked>& place, const Pick<A>& pivot) {
#pragma unroll
  for (int i = 0; i < Vector<T>::kSize; ++i) {
    const A d = place.has(i) ? widen(x.get(i)) - pivot[i] : A(0);
    sums[i % kSums].s1 += d;
    sums[i % kSums].s2 += d * d;
  }
}

// The sums of elements begin … end − 1.
template <typename A, int kSums>
__device__ Sums<A> add_up(const Sums<A> (&sums)[kSums], int begin = 0, int end = kSums) {
  Sums<A> all;
#pragma unroll
  for (int i = 0; i < kSums; ++i)
    if (i >= begin && i < end) all.add(sums[i]);
  return all;
}

// y = (x − mean)·scale + shift for one vector, where shift holds beta and what the rounded mean left over. The mean
// goes first: folded into the shift, it would take digits along where |mean| ≫ std.
template <typename T, bool kMasked, typename A>
__device__ void normalise(const Block& b, const Vector<T>& x, const Place<T, kMasked>& place, const Pick<Result<A>>& r) {
  A normal[Vector<T>::kSize];
#pragma unroll
  for (int i = 0; i < Vector<T>::kSize; ++i) normal[i] = (widen(x.get(i)) - r[i].mean) * r[i].scale + r[i].shift;
  const Vector<T> y = make_vector<T>(normal);
  T* const to = static_cast<T*>(b.a.call.y) + place.element;
  if (!kMasked || place.count() == Vector<T>::kSize) {
    store_vector(reinterpret_cast<Vector<T>*>(to), y, b.a.plan.streamed > 0);
  } else {
#pragma unroll
    for (int i = 0; i < Vector<T>::kSize; ++i)
      if (place.has(i)) to[i] = y.get(i);
  }
}

// ---------------------------------------------------------------------------------------------
// Roles: what each warp of a block does, over all channels of its team
// ---------------------------------------------------------------------------------------------
template <typename T>
__device__ Vector<T>* tile_at(const Block& b, int slot) {
  return reinterpret_cast<Vector<T>*>(b.shared.ring) + unsigned(slot) * b.a.plan.tile_vectors;
}

// Calls use(v, vector) for a tile's vectors first, first + step … up to `end`, kAtOnce at a time.
template <int kAtOnce, typename T, typename Use>
__device__ void for_each_vector(const Vector<T>* tile, unsigned first, unsigned end, unsigned step, Use use) {
  unsigned v = first;
#pragma unroll 1
  for (; v + step * (kAtOnce - 1) < end; v += step * kAtOnce) {
    Vector<T> x[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) x[i] = tile[v + step * i];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) use(v + step * i, x[i]);
  }
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i)
    if (v + step * i < end) use(v + step * i, tile[v + step * i]);
}

// What lies past the end of x is not read.
template <typename T, bool kMasked>
__device__ bool inside(const Block& b, const Place<T, kMasked>& from) {
  return !kMasked || from.element + Vector<T>::kSize <= b.a.call.N * b.a.call.C * b.a.call.HW;
}

// Loads one vector of x: into a register, or some time later into shared memory.
template <typename T, bool kMasked>
__device__ Vector<T> load(const Block& b, const Place<T, kMasked>& from, Policy policy) {
  if (inside(b, from)) return load_vector(reinterpret_cast<const Vector<T>*>(static_cast<const T*>(b.a.call.x) + from.element), policy);
  return elementwise(b, from);
}

template <typename T, bool kMasked>
__device__ void fetch(const Block& b, const Place<T, kMasked>& from, Vector<T>* to, Policy policy) {
  if (inside(b, from)) copy_16(to, static_cast<const T*>(b.a.call.x) + from.element, policy);
  else *to = elementwise(b, from);
}

// Sends a tile on its way into a slot of the ring: by the copy engine, a warp for all, or by `producers` warps.
template <typename T, bool kMasked>
__device__ void send(const Block& b, const Tile& tile, int slot, int warp, Policy policy) {
  const Plan& p = b.a.plan;
  const T* const x = static_cast<const T*>(b.a.call.x);
  Barrier* const full = &b.shared.full[slot];
  Vector<T>* const to = tile_at<T>(b, slot);
  if (p.bulk) {
    unsigned count = tile.count;
    while (kMasked && count > 0) {
      const Place<T, kMasked> last(b, tile, count - 1);
      if (inside(b, last)) break;
      --count;
      if (b.lane == 0) to[count] = elementwise(b, last);
    }
    if (b.lane == 0) barrier_arrive_expect(full, count * kVectorBytes);
    const unsigned behind = tile.offset + count;
    if (behind <= p.plane_vectors) {  // within one plane
      if (b.lane == 0 && count > 0) copy_bulk(to, x + first_element<T, kMasked>(b, tile), count * kVectorBytes, full, policy);
      return;
    }
    __syncwarp();  // the bytes are announced before they are sent for
    for (unsigned plane = b.lane * p.plane_vectors; plane < behind; plane += 32 * p.plane_vectors) {  // a copy each
      const unsigned begin = max(plane, tile.offset) - tile.offset, end = min(plane + p.plane_vectors, behind) - tile.offset;
      if (begin < end) copy_bulk(to + begin, x + Place<T, kMasked>(b, tile, begin).element, (end - begin) * kVectorBytes, full, policy);
    }
  } else {
#pragma unroll 2
    for (unsigned v = warp * 32 + b.lane; v < tile.count; v += p.producers * 32) fetch(b, Place<T, kMasked>(b, tile, v), to + v, policy);
    copies_arrive(full);
    barrier_arrive(full);  // for all but the copies, whose own arrival orders nothing else
  }
}

// The whole warp has read a tile. Each lane says so for itself: one for all would need the warp's barrier, which compilers leave
// out where lanes run together anyway, and then compute-sanitizer sees no order.
__device__ void release(const Block& b, int slot) { barrier_arrive(&b.shared.empty[slot]); }

// Producer: keeps the ring full. Without the copy engine, several warps share each tile.
template <typename T, bool kMasked>
struct Producer {
  const Block& b;
  const int warp;
  int64_t channel = b.first_channel;
  Tile tile{b, channel, 0};
  int index = 0, sent = 0;  // of the tile in its channel; in all
  RingPosition position, landing;
  const Policy keep_first = make_policy(Keep::kFirst), keep_last = make_policy(Keep::kLast);

  __device__ Producer(const Block& b, int warp) : b(b), warp(warp) {}

  // Sends tiles on their way until all have been sent, or `most` in all.
  __device__ void run(int most) {
    const Plan& p = b.a.plan;
#pragma unroll 1
    for (; channel < b.a.call.C && sent != most; ++sent) {
      barrier_wait(&b.shared.empty[position.slot], position.parity ^ 1);
      if (sent >= p.in_flight) {  // more at once would make the blocks drift apart, which costs DRAM locality
        barrier_wait(&b.shared.full[landing.slot], landing.parity);
        landing.advance(1, p.slots);
      }
      __syncwarp();  // else the slot could come round again before a slow lane has looked
      const bool again = index >= p.held && index < p.held + p.streamed;
      send<T, kMasked>(b, tile, position.slot, warp, again || p.streamed == 0 ? keep_last : keep_first);
      position.advance(1, p.slots);
      if (++index == p.tiles) {
        index = 0;
        channel += p.teams;
        tile = Tile(b, channel, 0);
      } else {
        tile.advance(b);
      }
    }
  }
};

// A statistics warp's sums over its tiles of one channel.
template <typename T, bool kMasked, int kAtOnce, typename A = typename Accumulator<T>::type>
struct Summary {
  const Block& b;
  const A pivot;
  Sums<A> sums;

  __device__ void add(const Vector<T>* vectors, const Tile& tile, unsigned first, unsigned step) {
    Sums<A> part[kAtOnce];  // of one tile: rounding errors of short sums stay short
    for_each_vector<kAtOnce>(vectors, first, tile.count, step,
                             [&](unsigned v, const Vector<T>& x) { add_vector(part, x, Place<T, kMasked>(b, tile, v), same<T>(pivot)); });
    sums.add(add_up(part));
  }

  __device__ void publish(Partial<A>* partial, Barrier* summed) {
    const Sums<A> warp = warp_sum(sums);
    if (b.lane == 0) *partial = Partial<A>{pivot, warp};
    barrier_arrive(summed);  // all lanes, which have read tiles that other warps then let go
  }
};

template <typename A>
__device__ Partial<A>* partial_at(const Block& b, int channel_slot, int index) {
  return static_cast<Partial<A>*>(b.shared.partial) + channel_slot * b.a.plan.statistics + index;
}

template <typename A>
__device__ Result<A> wait_for_result(const Block& b, RingPosition at) {
  barrier_wait(&b.shared.ready[at.slot], at.parity);
  return static_cast<const Result<A>*>(b.shared.result)[at.slot];
}

// Statistics. All warps share each tile.
template <typename T, bool kMasked>
__device__ void summarise(const Block& b, int warp, T sample) {
  using A = typename Accumulator<T>::type;
  const Plan& p = b.a.plan;
  RingPosition position, at;
  for (int64_t channel = b.first_channel; channel < b.a.call.C; channel += p.teams) {
    Summary<T, kMasked, kAtOnce> summary{b, pivot_of(widen(sample))};
    sample = load_sample<T>(b, channel + p.teams);
    Tile tile(b, channel, 0);
    for (int t = 0; t < p.tiles; ++t, tile.advance(b)) {
      barrier_wait(&b.shared.full[position.slot], position.parity);
      summary.add(tile_at<T>(b, position.slot), tile, warp * 32 + b.lane, p.statistics * 32);
      position.advance(1, p.slots);
    }
    summary.publish(partial_at<A>(b, at.slot, warp), &b.shared.summed[at.slot]);
    at.advance(1, p.channel_slots);
  }
}

// Statistics and store in one, for channels that the ring cannot hold: each thread keeps its vectors of the first tiles in
// registers, leaves the last tiles in the ring, lets the others go, and when the result is there stores the first, then the
// last, and reads the others again.
template <typename T, bool kMasked>
__device__ void hold(const Block& b, int warp, T sample) {
  using A = typename Accumulator<T>::type;
  constexpr int kTiles = kHeldTiles<T, kMasked>;
  const Plan& p = b.a.plan;
  const unsigned lane = warp * 32 + b.lane, lanes = p.statistics * 32;
  const int kept = p.held + p.streamed;  // the first of the tiles that stay in the ring
  RingPosition position, at;
  for (int64_t channel = b.first_channel; channel < b.a.call.C; channel += p.teams) {
    Vector<T> held[kTiles][kHoldVectors];
    // Calls use(vector, v) for this thread's vectors of one of the tiles in registers.
    const auto each_held = [&](Vector<T> (&vectors)[kHoldVectors], const Tile& tile, auto use) {
#pragma unroll
      for (int i = 0; i < kHoldVectors; ++i) {
        const unsigned v = lane + lanes * i;
        if (v < tile.count) use(vectors[i], v);
      }
    };
    Summary<T, kMasked, kHoldVectors> summary{b, pivot_of(widen(sample))};
    sample = load_sample<T>(b, channel + p.teams);
    Tile tile(b, channel, 0);
#pragma unroll
    for (int h = 0; h < kTiles; ++h, tile.advance(b)) {
      barrier_wait(&b.shared.full[position.slot], position.parity);
      Sums<A> part[2];
      each_held(held[h], tile, [&](Vector<T>& x, unsigned v) {
        x = tile_at<T>(b, position.slot)[v];
        add_vector(part, x, Place<T, kMasked>(b, tile, v), same<T>(summary.pivot));
      });
      summary.sums.add(add_up(part));
      release(b, position.slot);
      position.advance(1, p.slots);
    }
    RingPosition to_store;
#pragma unroll 1
    for (int t = p.held; t < p.tiles; ++t, tile.advance(b)) {
      barrier_wait(&b.shared.full[position.slot], position.parity);
      summary.add(tile_at<T>(b, position.slot), tile, lane, lanes);
      if (t < kept) release(b, position.slot);
      else if (t == kept) to_store = position;
      position.advance(1, p.slots);
    }
    summary.publish(partial_at<A>(b, at.slot, warp), &b.shared.summed[at.slot]);

    const auto result = same<T>(wait_for_result<A>(b, at));
    at.advance(1, p.channel_slots);
    // As soon as a tile in registers is stored, a streamed one comes into its place; meanwhile the ring's are stored.
    Tile stored(b, channel, 0);
#pragma unroll 1
    for (int first = 0; first < kept; first += p.held) {
#pragma unroll
      for (int h = 0; h < kTiles; ++h, stored.advance(b)) {
        if (first + h < kept)
          each_held(held[h], stored, [&](const Vector<T>& x, unsigned v) { normalise(b, x, Place<T, kMasked>(b, stored, v), result); });
        if (const int next = first + h + p.held; next < kept) {
          const Tile streamed(b, channel, next);
          each_held(held[h], streamed, [&](Vector<T>& x, unsigned v) { x = load(b, Place<T, kMasked>(b, streamed, v), make_policy(Keep::kFirst)); });
        }
      }
      if (first == 0) {
        tile = Tile(b, channel, kept);
        for (int t = kept; t < p.tiles; ++t, tile.advance(b)) {
          for_each_vector<kHoldVectors>(tile_at<T>(b, to_store.slot), lane, tile.count, lanes,
                                        [&](unsigned v, const Vector<T>& x) { normalise(b, x, Place<T, kMasked>(b, tile, v), result); });
          release(b, to_store.slot);
          to_store.advance(1, p.slots);
        }
      }
    }
  }
}

// The team's sums, from this block's: publish, wait until all have, gather, add in the order of the ranks. The count
// orders nothing: each word itself says whether it has arrived, by −s2, whose sign bit is set even if s2 is 0.
template <int kPerLane>
__device__ Sums<double> exchange(const Block& b, int64_t channel, const Sums<double>& own) {
  const int lane = b.lane, team = b.a.plan.team;
  Word* const published = b.a.scratch + channel * b.a.plan.channel_words;  // counts the blocks
  Word* const words = published + kLineWords;
  if (lane == 0) {
    store_word(&words[b.rank], Word{own.s1, (unsigned long long)__double_as_longlong(-own.s2)});
    add_one(&published->tag);
    while (load_word(published).tag < team) nap();  // one word a block: all words, again and again, would take L2's time
  }
  __syncwarp();
  Word word[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) word[i] = Word{0, lane + 32 * i < team ? 0 : (unsigned long long)__double_as_longlong(-0.0)};
  for (bool missing = true; missing;) {
    missing = false;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i)
      if (word[i].tag == 0) word[i] = load_word(&words[lane + 32 * i]);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) missing = missing || word[i].tag == 0;
  }
  __syncwarp();
  Sums<double> sums;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) sums.add(Sums<double>{word[i].value, -__longlong_as_double(word[i].tag)});
  return warp_sum(sums);
}

// Mean and inv_std = 1 / √(var + eps) of a channel, and m2 = Σ (x − mean)².
struct Moments {
  double mean, inv_std, m2;
  __device__ Moments(const Arguments& a, double pivot, const Sums<double>& sums) {
    const double offset = sums.s1 * a.plan.per_element;
    mean = pivot + offset;
    m2 = sums.s2 - sums.s1 * offset;
    if (m2 < 0) m2 = 0;  // rounding, in a constant channel; NaN stays
    inv_std = rsqrt(m2 * a.plan.per_element + a.call.eps);
  }
};

// What of the parameters and buffers a channel needs, by one thread; loaded before it is needed, since that takes long.
template <typename T, typename A = typename Accumulator<T>::type>
struct Channel {
  const FusedBatchNormCall& call;
  const int c;
  Parameter<T> gamma, beta, running_mean, running_var;

  __device__ Channel(const FusedBatchNormCall& call, int c, bool needed, bool running) : call(call), c(c) {
    if (needed && call.gamma) {
      gamma.load(call.gamma, c, call.affine_float);
      beta.load(call.beta, c, call.affine_float);
    }
    if (needed && running && call.running_mean) {
      running_mean.load(call.running_mean, c, call.running_float);
      running_var.load(call.running_var, c, call.running_float);
    }
  }

  __device__ Result<A> result(double mean, double inv_std) const {
    double scale = inv_std, shift = 0;
    if (call.gamma) {
      scale *= gamma.value(call.affine_float);
      shift = beta.value(call.affine_float);
    }
    return {A(mean), A(scale), A(shift - (mean - A(mean)) * scale)};
  }

  // By one thread: what backward needs, and the new running statistics.
  __device__ void save(const Plan& p, const Moments& moments, double factor) const {
    static_cast<A*>(call.mean)[c] = A(moments.mean);
    static_cast<A*>(call.inv_std)[c] = A(moments.inv_std);
    if (call.running_mean) {
      const double unbiased = moments.m2 * p.per_element_but_one;
      store_parameter<T>(call.running_mean, c, call.running_float, (1 - factor) * running_mean.value(call.running_float) + factor * moments.mean);
      store_parameter<T>(call.running_var, c, call.running_float, (1 - factor) * running_var.value(call.running_float) + factor * unbiased);
    }
  }
};

// Exchange: from the warps' sums to the team's, and to what the store warps need. Each warp takes whole channels.
template <typename T>
__device__ void finish(const Block& b, int warp, double factor) {
  using A = typename Accumulator<T>::type;
  const Plan& p = b.a.plan;
  const FusedBatchNormCall& call = b.a.call;
  RingPosition at;
  at.advance(warp, p.channel_slots);
  for (int64_t channel = b.first_channel + int64_t(warp) * p.teams; channel < call.C; channel += int64_t(p.exchangers) * p.teams) {
    const Channel<T> parameters(call, channel, b.lane == 0, b.rank == 0);
    barrier_wait(&b.shared.summed[at.slot], at.parity);
    const Partial<A>* const partial = partial_at<A>(b, at.slot, 0);
    const double pivot = partial->pivot;
    Sums<double> sums;
    if (b.lane < p.statistics) sums.add(partial[b.lane].sums);
    sums = warp_sum(sums);
    if (p.team > 1) sums = exchange<kTeamPerLane>(b, channel, sums);
    const Moments moments(b.a, pivot, sums);
    if (b.lane == 0) static_cast<Result<A>*>(b.shared.result)[at.slot] = parameters.result(moments.mean, moments.inv_std);
    barrier_arrive(&b.shared.ready[at.slot]);  // all lanes, which have read partials that later channels overwrite
    if (b.lane == 0 && b.rank == 0) parameters.save(p, moments, factor);
    at.advance(p.exchangers, p.channel_slots);
  }
}

// Store: y for the tiles in the ring. All warps share each tile.
template <typename T, bool kMasked>
__device__ void store(const Block& b, int warp) {
  using A = typename Accumulator<T>::type;
  const Plan& p = b.a.plan;
  RingPosition position, at;
  for (int64_t channel = b.first_channel; channel < b.a.call.C; channel += p.teams) {
    const auto result = same<T>(wait_for_result<A>(b, at));
    Tile tile(b, channel, 0);
    for (int t = 0; t < p.tiles; ++t, tile.advance(b)) {
      barrier_wait(&b.shared.full[position.slot], position.parity);
      for_each_vector<kAtOnce>(tile_at<T>(b, position.slot), warp * 32 + b.lane, tile.count, p.storers * 32,
                               [&](unsigned v, const Vector<T>& x) { normalise(b, x, Place<T, kMasked>(b, tile, v), result); });
      release(b, position.slot);
      position.advance(1, p.slots);
    }
    at.advance(1, p.channel_slots);
  }
}

// Resident and packed: no roles, no ring; each thread loads, sums and stores vectors of its own. Warps 0 … pack − 1 look
// after one channel each where it is about sums, not vectors. `wait_for_grid`: before a team of a cooperative launch exchanges.
template <typename T, bool kMasked, bool kPacked, typename Wait>
__device__ void resident(const Block& b, Wait wait_for_grid) {
  using A = typename Accumulator<T>::type;
  constexpr int kSize = Vector<T>::kSize, kHeld = resident_held(kSize, kPacked);
  const Plan& p = b.a.plan;
  const FusedBatchNormCall& call = b.a.call;
  const int warp = threadIdx.x / 32, channel = b.first_channel * p.pack + warp;
  const bool looks_after = warp < p.pack && channel < call.C, leads = looks_after && b.lane == 0;
  const T sample = load_sample<T>(b, !kPacked ? b.first_channel : looks_after ? channel : call.C);
  const Channel<T> parameters(call, channel, leads, b.rank == 0 || !call.training);

  // In shared memory, behind x: [pack][team] sums of a cluster's blocks, [pack] pivots and results, the barrier that the
  // cluster's sums come to, sums of the threads or warps.
  const Tile share(b, b.first_channel, 0);
  Vector<T>* const kept = tile_at<T>(b, 0);
  auto* const team_sums = reinterpret_cast<Sums<double>*>(kept + p.kept_vectors);
  auto* const results = reinterpret_cast<Result<A>*>(team_sums + kMaxPack * kMaxCluster);
  auto* const pivots = reinterpret_cast<A*>(results + kMaxPack);
  auto* const gathered = reinterpret_cast<Barrier*>(pivots + kMaxPack);
  auto* const partial = reinterpret_cast<Pick<Sums<A>>*>(gathered + 1);
  if (p.cluster) {
    if (threadIdx.x == 0) {
      barrier_init(gathered, 1);
      barrier_init_fence();
      barrier_arrive_expect(gathered, p.pack * p.team * sizeof(Sums<double>));
    }
    __syncwarp();      // .aligned: the warp's threads come to it together
    cluster_arrive();  // waited for below: then the peers are there
  }
  // In step, the blocks of a multiprocessor would all load, then all store, and memory would rest in between.
  if (const int turn = divide(b.first_channel, p.by_turn); turn < p.turns) rest(int64_t(turn) * p.turn_cycles);

  // A thread's vectors lie `threads` apart, so in packed planes all of them at the same place of the plane: the end of one
  // channel (`first` of the pack), from element `split` on the next one.
  const auto element_of = [&](unsigned thread) { return (thread - divide(thread, p.by_plane_vectors) * p.plane_vectors) * kSize; };
  const int first = kPacked ? divide(element_of(threadIdx.x), p.by_channel) : 0, next = min(first + 1, p.pack - 1);
  const int split = kPacked ? min(int((first + 1) * call.HW - element_of(threadIdx.x)), kSize) : kSize;
  const auto pick = [&](const auto* values) { return Pick<std::decay_t<decltype(*values)>>{values[first], values[next], split}; };

  // Calls use(vector, place) for this thread's first kHeld vectors, in registers; for the others, in shared memory, in two groups,
  // the first of which can be summed while the second still lands: then(), behind each.
  const unsigned thread = threadIdx.x - 32 * p.exchangers, end = thread < p.threads ? share.count : 0, behind = kHeld * p.threads;
  const Place<T, kMasked> own(b, share, thread);
  const auto place_of = [&](unsigned v, int i) {
    if (!kPacked) return Place<T, kMasked>(b, share, v);
    Place<T, kMasked> place = own;
    place.element += i * p.step_elements;
    return place;
  };
  Vector<T> held[kHeld];
  const auto each_held = [&](auto use) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const unsigned v = thread + i * p.threads;
      if (v < end) use(held[i], place_of(v, i));
    }
  };
  const auto each_kept = [&](auto use, auto then) {
#pragma unroll 1
    for (int group = 0; group < 2; ++group) {
      int i = kHeld + (group == 0 ? 0 : p.early);
      const unsigned stop = group == 0 ? min(end, behind + p.early * p.threads) : end;
#pragma unroll 1
      for (unsigned v = thread + i * p.threads; v < stop; v += p.threads, ++i) use(kept[v - behind], place_of(v, i));
      then();
    }
  };

  const Policy policy = make_policy(Keep::kLast);
  each_held([&](Vector<T>& x, const auto& place) { x = load(b, place, policy); });
  each_kept([&](Vector<T>& x, const auto& place) { fetch(b, place, &x, policy); }, [] { copies_commit(); });
  __syncwarp();  // or threads that waited for their turn for longer would come apart from their warp
  if (p.cluster) cluster_wait();
  if (!call.training) {
    if (leads) results[warp] = parameters.result(parameters.running_mean.value(call.running_float), rsqrt(parameters.running_var.value(call.running_float) + call.eps));
    copies_wait<0>();
  } else {
    Pick<A> pivot = same<T>(pivot_of(widen(sample)));
    if (kPacked) {
      if (leads) pivots[warp] = pivot.a;
      __syncthreads();
      pivot = pick(pivots);
    }
    Sums<A> part[kSize];
    const auto add = [&](const Vector<T>& x, const auto& place) { add_vector(part, x, place, pivot); };
    each_held(add);
    copies_wait<1>();
    each_kept(add, [] { copies_wait<0>(); });
    if (kPacked) {
      partial[threadIdx.x] = {add_up(part, 0, split), add_up(part, split, kSize), 0};
    } else {
      const Sums<A> all = warp_sum(add_up(part));
      if (b.lane == 0) partial[warp].a = all;
    }
    wait_for_grid();
    __syncthreads();
    if (looks_after) {
      Sums<double> sums;
      if (kPacked) {
        const unsigned own = warp * unsigned(call.HW), column = own / kSize, columns = (own + unsigned(call.HW) - 1) / kSize + 1 - column;
        for (unsigned i = b.lane; i < columns * (p.threads / p.plane_vectors); i += 32) {
          const unsigned row = i / columns, at = column + i - row * columns;
          const Pick<Sums<A>>& of = partial[row * p.plane_vectors + at];
          sums.add(at * kSize < own ? of.b : of.a);
        }
      } else if (b.lane < int(blockDim.x / 32)) {
        sums.add(partial[b.lane].a);
      }
      sums = warp_sum(sums);
      if (p.cluster) {
        Sums<double>* const of_channel = team_sums + warp * p.team;
        if (b.lane < p.team) send_to_peer(&of_channel[b.rank], b.lane, sums, gathered);
        barrier_wait_for_peers(gathered, 0);
        sums = warp_sum(b.lane < p.team ? of_channel[b.lane] : Sums<double>());
      }
      if (!kPacked && p.cooperative) sums = exchange<kResidentTeamPerLane>(b, channel, sums);
      const Moments moments(b.a, kPacked ? pivots[warp] : pivot.a, sums);
      if (leads) {
        results[warp] = parameters.result(moments.mean, moments.inv_std);
        if (b.rank == 0) parameters.save(p, moments, call.momentum);
      }
    }
  }
  __syncthreads();
  if (end == 0) return;
  const Pick<Result<A>> result = pick(results);
  const auto store = [&](const Vector<T>& x, const auto& place) { normalise(b, x, place, result); };
  each_held(store);
  each_kept(store, [] {});
}

// ---------------------------------------------------------------------------------------------
// The kernel
// ---------------------------------------------------------------------------------------------
template <Structure kStructure>
constexpr int kBlockThreads = kStructure == kResident ? kResidentThreads : kStructure == kPacked ? kPackedThreads : kStructure == kRing ? kRingThreads : kHoldThreads;

template <typename T, bool kMasked, Structure kStructure>
__global__ void __launch_bounds__(kBlockThreads<kStructure>, kStructure <= kPacked ? 2 : 1)
    fused_batch_norm_forward_kernel(const __grid_constant__ Arguments a) {
  const Block b(a);
  const Plan& p = a.plan;
  const FusedBatchNormCall& call = a.call;
  const int warp = threadIdx.x / 32;

  if (kStructure > kPacked && b.lane == 0) {  // one barrier after the other is faster than a warp's lanes at once
    const int warps = blockDim.x / 32;
    for (int s = warp; s < p.slots; s += warps) {
      barrier_init(&b.shared.full[s], p.bulk ? 1 : p.producers * 64);
      barrier_init(&b.shared.empty[s], 32 * (p.storers > 0 ? p.storers : p.statistics));
    }
    for (int s = warp; s < p.channel_slots; s += warps) {
      barrier_init(&b.shared.summed[s], 32 * p.statistics);
      barrier_init(&b.shared.ready[s], 32);
    }
    barrier_init_fence();
  }
  double factor = call.momentum;  // of the new value in the running buffers
  if (call.cumulative) factor = call.num_batches_tracked ? 1.0 / double(*call.num_batches_tracked + 1) : 0;
  if (p.cooperative) {
    for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < p.scratch_words; i += int64_t(p.team) * p.teams * blockDim.x)
      store_word(&a.scratch[i], Word{0, 0});
  }
  const auto grid = cooperative_groups::this_grid();
  unsigned arrival = 0;
  if (p.cooperative) arrival = grid.barrier_arrive();
  const auto wait_for_grid = [&] {  // in training, before any exchange
    if (p.cooperative) grid.barrier_wait(std::move(arrival));  // else words could be wiped that a block has published, or the counter read late
    if (call.num_batches_tracked && blockIdx.x == 0 && threadIdx.x == 0) add_one(call.num_batches_tracked);
  };
  if constexpr (kStructure <= kPacked) return resident<T, kMasked, kStructure == kPacked>(b, wait_for_grid);

  __syncthreads();  // else a warp may wait on a barrier that is not there yet
  int role = warp - p.exchangers;  // warp 0 loads nothing: the grid's barrier has kept its first thread
  const auto sample = load_sample<T>(b, role < p.producers ? call.C : b.first_channel);
  Producer<T, kMasked> producer(b, role);
  if (role >= 0 && role < p.producers) producer.run(p.in_flight);  // the first tiles travel while the grid gathers
  wait_for_grid();

  if (role < 0) {
    finish<T>(b, warp, factor);
  } else if (role < p.producers) {
    producer.run(-1);
  } else if ((role -= p.producers) < p.storers) {
    if constexpr (kStructure == kRing) store<T, kMasked>(b, role);
  } else {
    role -= p.storers;
    if constexpr (kStructure == kHold) hold<T, kMasked>(b, role, sample);
    else summarise<T, kMasked>(b, role, sample);
  }
}

// ---------------------------------------------------------------------------------------------
// Plan: shape and device in, launch configuration out
// ---------------------------------------------------------------------------------------------
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Device {
  int multiprocessors, shared_bytes, reserved_bytes;  // of shared memory, that a block may have; that it costs besides
  int architecture = 0;  // what the kernel was compiled for: 10·major + minor
  cudaError_t error;

  // Attributes of the device alone: to ask for a kernel's takes longer than all of these.
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
      if (compiled / 10 <= 10 * major + minor) architecture = std::max(architecture, compiled / 10);
  }
};

// What a block moves and waits for, all in bytes (measured on an H200).
constexpr int64_t kTileBytes = 16 * 1024;      // of a tile, at most: larger ones cost grain
constexpr int64_t kLeastTileBytes = 8000;      // at least, if it can be: smaller ones cost barriers
constexpr int64_t kFlightBytes = 48 * 1024;    // on their way to one block
constexpr int64_t kRoundBytes = 4 * 1024;      // what a channel costs beside its bytes
constexpr int64_t kWaitBytes = 48 * 1024;      // what an exchange costs that no other work hides
constexpr int64_t kEvalBytes = 28 * 1024;      // of a block in eval mode, where no block waits for another
constexpr int64_t kBytesPerCycle = 16;         // that memory has for a multiprocessor in a clock cycle, beside what it writes
constexpr int64_t kTurnsCycles = 5200;         // that reading x takes at least where blocks start in turns
constexpr int64_t kBlockBytes = 72 * 1024;     // of a block where there are clusters: three of them fit on a multiprocessor

Divisor divisor(int64_t d) {
  Divisor by = {};
  while ((int64_t(1) << by.shift) < d) ++by.shift;
  by.magic = unsigned(ceil_div(int64_t(1) << (31 + by.shift), d));
  return by;
}

// `size`: elements of a vector; `masked`: planes do not start and end at vectors; `held_tiles`: that stay in registers.
Plan make_plan(const FusedBatchNormCall& call, const Device& device, int size, bool masked, int held_tiles) {
  Plan bare = {};
  bare.per_element = 1 / (double(call.N) * double(call.HW));
  bare.per_element_but_one = 1 / (double(call.N) * double(call.HW) - 1);
  Plan p = bare;
  const auto set_planes = [&](int pack, bool covered) {
    p.pack = pack;
    p.packs = call.C / pack;
    p.plane = call.HW * pack;
    p.plane_vectors = unsigned(std::max<int64_t>(covered ? (p.plane + size - 2) / size + 1 : p.plane / size, 1));
    p.channel_vectors = call.C > 0 ? unsigned(call.N * p.plane_vectors) : 0;
    p.by_plane_vectors = divisor(p.plane_vectors);
    if (pack > 1) p.by_channel = divisor(call.HW);
  };
  const auto set_tiles = [&](int64_t tile_vectors) {
    p.tile_vectors = unsigned(tile_vectors);
    p.step_vectors = unsigned(p.team * tile_vectors);
    p.step_offset = p.step_vectors % p.plane_vectors;
    p.step_elements = int64_t(p.step_vectors / p.plane_vectors) * p.packs * p.plane;
  };
  const auto set_scratch = [&](bool exchanged) {  // in whole lines: blocks look at the count while others still write their words
    p.channel_words = exchanged ? int(ceil_div(p.team, kLineWords) + 1) * kLineWords : 0;
    p.scratch_words = call.C * p.channel_words;
  };

  // Resident or packed, if that fits with `team` blocks a channel, two blocks to a multiprocessor or more.
  const int64_t half_bytes = (device.shared_bytes - device.reserved_bytes) / 2;
  const auto resident = [&](int64_t team, bool cooperative) {
    p.structure = p.pack > 1 ? kPacked : kResident;
    p.team = int(team);
    p.teams = int(std::max<int64_t>(p.packs, 1));
    p.by_team = divisor(team);
    p.cluster = call.training && team > 1 && !cooperative;
    p.cooperative = cooperative;
    set_scratch(cooperative);
    p.slots = p.tiles = 1;
    if (p.pack > 1) {  // whole planes, so that a thread's vectors are all at the same place of theirs
      set_tiles(ceil_div(call.N, team) * p.plane_vectors);
      const int64_t planes = std::max(std::min<int64_t>(ceil_div(ceil_div(p.tile_vectors, kResidentVectors), p.plane_vectors), kPackedThreads / p.plane_vectors),
                                      ceil_div(32 * p.pack - 31, p.plane_vectors));  // a warp for each channel
      p.threads = unsigned(planes * p.plane_vectors);
      p.step_elements = planes * p.packs * p.plane;
    } else {
      set_tiles(ceil_div(ceil_div(std::max(p.channel_vectors, 1u), team), 8) * 8);  // whole 128-byte lines
      p.threads = unsigned(std::min<int64_t>(ceil_div(p.tile_vectors, 32 * kResidentVectors) * 32, kResidentThreads - 32 * cooperative));
    }
    p.exchangers = cooperative;
    p.statistics = int(ceil_div(p.threads, 32));
    p.kept_vectors = unsigned(std::max<int64_t>(int64_t(p.tile_vectors) - int64_t(resident_held(size, p.pack > 1)) * p.threads, 0));
    p.early = int(p.kept_vectors / (2 * p.threads));
    const int64_t sums = p.pack > 1 ? 32 * p.statistics * sizeof(Pick<Sums<float>>) : 0;
    const int64_t bytes = int64_t(p.kept_vectors) * kVectorBytes + kResidentOverheadBytes + sums;
    // A turn: a block for each multiprocessor. The next one starts when memory has had the time to read what this one waits for.
    // Not where memory reads all of x in little more time than the last turn then sums and stores.
    const int turn = int(std::max<int64_t>(device.multiprocessors / team, 1));
    p.by_turn = divisor(turn);
    p.turns = int(std::min<int64_t>({device.shared_bytes / (bytes + device.reserved_bytes), 2 * kResidentThreads / (32 * p.statistics), 32}));
    // No block more at once than turns, else those that come in later waves would start out of turn.
    const bool waves = call.training && int64_t(p.teams) * team > int64_t(p.turns) * device.multiprocessors;
    p.shared_bytes = int(waves ? std::max(bytes, std::min<int64_t>(half_bytes, device.shared_bytes / (p.turns + 1))) : bytes);
    const int64_t cycles = int64_t(p.teams) * team * p.tile_vectors * kVectorBytes / (kBytesPerCycle * device.multiprocessors);
    if (!call.training || cooperative || cycles < kTurnsCycles) p.turns = 0;
    p.turn_cycles = int(int64_t(p.tile_vectors) * kVectorBytes / kBytesPerCycle);
    return p.threads <= unsigned(p.pack > 1 ? kPackedThreads : kResidentThreads) && bytes <= half_bytes;
  };
  const int most_cluster = device.architecture >= 90 ? kMaxCluster : 1;
  const auto find_resident = [&] {
    const int64_t bytes = int64_t(p.channel_vectors) * kVectorBytes;
    if (!call.training)  // no block waits for another
      return resident(std::max<int64_t>(ceil_div(bytes, std::min(kEvalBytes, half_bytes - 2 * kResidentOverheadBytes)), 1), false);
    if (call.cumulative && call.num_batches_tracked) return false;  // all must read the counter before it counts
    const int64_t slots = 2 * device.multiprocessors, packs = std::max<int64_t>(p.packs, 1);
    // One block a channel, where channels are small, or so many that each multiprocessor has three; without clusters, every other one.
    const bool many = most_cluster > 1 ? 2 * packs >= 3 * slots && bytes <= kBlockBytes : 4 * packs >= slots;
    if ((bytes <= 8 * kRoundBytes || many) && resident(1, false)) return true;
    // All channels at once, by blocks that are all there at once, where clusters would be too few: the fewer the sooner together.
    if (p.pack == 1 && (packs * most_cluster < device.multiprocessors || most_cluster == 1))
      for (const int64_t blocks : {slots / 2, slots})
        if (const int64_t team = std::min(blocks / packs, bytes / kRoundBytes); team > 1 && team <= 32 * kResidentTeamPerLane && resident(team, true)) return true;
    // Blocks of a cluster, which are there at once too; in the largest one, as large as fits.
    for (int cluster = 2; cluster <= most_cluster && cluster <= slots; cluster *= 2)
      if ((cluster == most_cluster || (bytes <= cluster * kBlockBytes && 4 * packs * cluster >= 3 * slots)) && resident(cluster, false)) return true;
    return false;
  };
  const int pack = int(size / std::gcd<int64_t>(call.HW, size));
  const bool aligned = reinterpret_cast<uintptr_t>(call.x) % kVectorBytes == 0;
  if (pack > 1 && size > 2 && aligned && call.C > 0 && call.C % pack == 0 && call.HW >= size - 1 && call.HW * pack / size <= kPackedThreads) {
    set_planes(pack, false);
    if (find_resident()) return p;
  }
  p = bare;
  set_planes(1, masked);
  const Plan with_planes = p;
  if (find_resident()) return p;

  p = with_planes;
  const int64_t ring_bytes = device.shared_bytes - kOverheadBytes;

  // The team: as many blocks as bring the channels through soonest, by what one block moves and waits for.
  int64_t best = INT64_MAX;
  const int most_team = int(std::min<int64_t>({device.multiprocessors, 32 * kTeamPerLane, std::max(p.channel_vectors, 1u)}));
  for (int team = 1; team <= most_team; ++team) {
    const int64_t share = ceil_div(p.channel_vectors, team) * kVectorBytes;
    const int64_t rounds = ceil_div(call.C, device.multiprocessors / team);
    const int64_t again = std::max<int64_t>(share - ring_bytes * 7 / 8, 0);
    const int64_t tight = std::min<int64_t>(std::max<int64_t>(3 * share - ring_bytes, 0), ring_bytes);
    const int64_t cost = rounds * (share + kRoundBytes + again + (team > 1 ? kWaitBytes * tight / ring_bytes : 0));
    if (cost < best) {
      best = cost;
      p.team = team;
    }
    if (share <= kRoundBytes) break;
  }
  p.teams = int(std::min<int64_t>(device.multiprocessors / p.team, std::max<int64_t>(call.C, 1)));
  p.by_team = divisor(p.team);
  p.cooperative = p.team > 1 || (call.cumulative && call.num_batches_tracked);
  set_scratch(p.team > 1);

  // Roles, and tiles of equal size.
  p.bulk = device.architecture >= 90 && p.plane_vectors >= 32;
  const int64_t share = ceil_div(p.channel_vectors, p.team);
  const auto lay_out = [&](bool hold) {
    p.structure = hold ? kHold : kRing;
    p.producers = p.bulk || hold ? 1 : 4;
    p.storers = hold ? 0 : 4;
    p.statistics = hold ? 10 : 4;
    p.exchangers = hold ? 1 : p.team > 1 && p.bulk ? 6 : 4;
    const int64_t lanes = 32 * p.statistics;
    const int64_t most = std::min<int64_t>(hold ? kHoldVectors * lanes : kTileBytes / kVectorBytes, std::max<int64_t>(ring_bytes / (4 * kVectorBytes), 1));
    p.tiles = int(std::max<int64_t>(ceil_div(share, most), hold ? held_tiles : 1));
    if (hold) {  // whole warps: each then stores 512 bytes that start at a multiple of 512
      p.tile_vectors = unsigned(std::min(std::max<int64_t>(ceil_div(ceil_div(share, p.tiles), 32) * 32, 1), most));
    } else {  // so many that they fill the ring, and keep all lanes of a role busy; rather few, for the barriers' sake
      int64_t best_score = -1;
      for (int64_t tiles = p.tiles; tiles <= 2 * p.tiles; ++tiles) {
        const int64_t vectors = std::min(std::max<int64_t>(ceil_div(ceil_div(share, tiles), 8) * 8, 1), most);  // whole 128-byte lines
        if (best_score >= 0 && vectors * kVectorBytes < kLeastTileBytes) break;
        const int64_t score = std::min<int64_t>(ring_bytes / (vectors * kVectorBytes), kMaxSlots) * vectors * 1000 * vectors / (ceil_div(vectors, lanes) * lanes);
        if (score * 100 > best_score * 102) {
          best_score = score;
          p.tile_vectors = unsigned(vectors);
        }
      }
    }
    p.tiles = int(std::max<int64_t>(ceil_div(p.channel_vectors, int64_t(p.team) * p.tile_vectors), hold ? held_tiles : 1));
    p.slots = int(std::min<int64_t>(ring_bytes / (int64_t(p.tile_vectors) * kVectorBytes), kMaxSlots));
    p.held = hold ? held_tiles : 0;
    p.streamed = hold ? std::max(p.tiles - p.held - p.slots, 0) : 0;
    return p.tiles + 4 <= p.slots;
  };
  if (!lay_out(false)) lay_out(true);
  const int64_t tile_bytes = int64_t(p.tile_vectors) * kVectorBytes;
  p.in_flight = int(std::max<int64_t>(std::min<int64_t>(kFlightBytes / tile_bytes, p.slots - 1), 1));
  set_tiles(p.tile_vectors);
  // Where a tile is in the ring, all channels whose tiles were `slots` and more before it have been stored. Beyond
  // those, a role may be at as many channels as it has warps.
  const int warps = std::max({p.exchangers, p.storers, p.statistics});
  p.channel_slots = int(std::max<int64_t>(std::min<int64_t>(ceil_div(p.slots, std::max(p.tiles, 1)) + warps + 2, ceil_div(call.C, p.teams)), warps));
  p.shared_bytes = int(p.slots * tile_bytes) + kOverheadBytes;
  return p;
}

// ---------------------------------------------------------------------------------------------
// Launch
// ---------------------------------------------------------------------------------------------
using Allocate = void* (*)(size_t bytes, void* context);
constexpr int kUnaskedBytes = 48 * 1024;  // of shared memory, that any block may have

template <typename T, bool kMasked>
auto kernel_for(int structure) {
  if (structure == kRing) return fused_batch_norm_forward_kernel<T, kMasked, kRing>;
  if (structure == kHold) return fused_batch_norm_forward_kernel<T, kMasked, kHold>;
  if constexpr (!kMasked) {
    if (structure == kPacked) return fused_batch_norm_forward_kernel<T, false, kPacked>;
  }
  return fused_batch_norm_forward_kernel<T, kMasked, kResident>;
}

// Calls use(kernel, plan) for the kernel that suits the call. Returns null, or what went wrong.
template <typename T, typename Use>
const char* with_kernel(const FusedBatchNormCall& call, Use use) {
  const Device device;
  if (device.error) return cudaGetErrorString(device.error);
  const int size = Vector<T>::kSize;
  constexpr bool kAlwaysMasked = sizeof(T) == 8;  // right for whole vectors too; each kernel less is 0.3 s of compilation
  const bool masked = kAlwaysMasked || call.HW % size != 0 || reinterpret_cast<uintptr_t>(call.x) % kVectorBytes != 0;
  const Plan plan = make_plan(call, device, size, masked, masked ? kHeldTiles<T, true> : kHeldTiles<T, false>);
  if constexpr (!kAlwaysMasked) {
    if (!masked || plan.structure == kPacked) return use(kernel_for<T, false>(plan.structure), plan);
  }
  return use(kernel_for<T, true>(plan.structure), plan);
}

template <typename Use>
const char* with_type(const FusedBatchNormCall& call, Use use) {
  switch (call.dtype) {
    case 0: return with_kernel<float>(call, use);
    case 1: return with_kernel<__half>(call, use);
    case 2: return with_kernel<__nv_bfloat16>(call, use);
    default: return with_kernel<double>(call, use);
  }
}

}  // namespace

extern "C" const char* fused_batch_norm_launch(const FusedBatchNormCall* call, Allocate allocate, void* context, void* stream) {
  return with_type(*call, [&](auto kernel, const Plan& plan) -> const char* {
    Arguments arguments{*call, plan, nullptr};
    if (plan.scratch_words > 0) arguments.scratch = static_cast<Word*>(allocate(plan.scratch_words * sizeof(Word), context));
    cudaError_t error = cudaSuccess;
    if (plan.shared_bytes > kUnaskedBytes)
      error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes);
    if (error) return cudaGetErrorString(error);
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeCooperative;
    attributes[0].val.cooperative = plan.cooperative;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x = plan.team;
    attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(plan.team * plan.teams);
    config.blockDim = dim3(32 * (plan.producers + plan.exchangers + plan.storers + plan.statistics));
    config.dynamicSmemBytes = plan.shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = attributes;
    config.numAttrs = plan.cluster ? 2 : 1;
    error = cudaLaunchKernelEx(&config, kernel, arguments);
    return error ? cudaGetErrorString(error) : nullptr;
  });
}

extern "C" const char* fused_batch_norm_describe(const FusedBatchNormCall* call, char* text, size_t text_bytes) {
  return with_type(*call, [&](auto, const Plan& p) -> const char* {
    snprintf(text, text_bytes,
             "structure=%d pack=%d bulk=%d team=%d teams=%d cooperative=%d exchangers=%d producers=%d storers=%d statistics=%d "
             "threads=%u turns=%d turn_cycles=%d tile_bytes=%d tiles=%d held=%d streamed=%d slots=%d in_flight=%d shared_bytes=%d scratch_bytes=%lld",
             p.structure, p.pack, p.bulk, p.team, p.teams, p.cooperative, p.exchangers, p.producers, p.storers, p.statistics,
             p.threads, p.turns, p.turn_cycles, int(p.tile_vectors) * kVectorBytes, p.tiles, p.held, p.streamed, p.slots, p.in_flight, p.shared_bytes,
             (long long)(p.scratch_words * sizeof(Word)));
    return nullptr;
  });
}
"""

FUSED_BATCH_NORM_CPP = r"""
#define AT_PER_OPERATOR_HEADERS  // or each header below brings all of ATen, which takes seconds
#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/native_batch_norm_backward.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include <algorithm>
#include <array>

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
  if (!t)
    return "None";
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
    TORCH_CHECK(p.has_value() == q.has_value() && (!p || p->dtype() == q->dtype()),
                must(names, "be two of one type, or None", show(p) + " and " + show(q)));
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
  TORCH_CHECK(!running_mean || (running_mean->is_contiguous() && running_var->is_contiguous()),
              must("running_mean and running_var", "be contiguous", "other strides"));
  TORCH_CHECK(training || running_mean, must("running_mean", "be given in eval mode", "None"));
  const auto& count = num_batches_tracked;
  TORCH_CHECK(!count || (count->dtype() == at::kLong && count->sym_numel() == 1 &&
                         (count->device() == x.device() || x.is_meta())),
              must("num_batches_tracked", "be one int64 on x's device", show(count)));
  TORCH_CHECK_VALUE(!training || x.sym_size(0) * x.sym_size(2) * x.sym_size(3) != 1,
                    must("x", "have more than 1 value per channel when training", show(x)));
  TORCH_CHECK_VALUE(
      eps > 0 || (eps == 0 && !training),
      must("eps", training ? "be positive when training" : "not be negative", std::to_string(eps)));
}

// Straight from the allocator: at::empty would fill it, with a kernel of its own, under
// torch.use_deterministic_algorithms(True).
Tensor allocate(c10::SymIntArrayRef sizes, ScalarType type, const Tensor& like,
                c10::MemoryFormat format = c10::MemoryFormat::Contiguous) {
  return at::detail::empty_generic_symint(sizes, c10::GetAllocator(like.device().type()),
                                          c10::DispatchKeySet(like.options().computeDispatchKey()),
                                          type, format);
}

// NCHW or channels-last as x, from element `shift` of its memory on; no view, since autograd lets
// nobody change a view that a custom operator returns.
Tensor allocate_y(const Tensor& x, const SymInt& shift) {
  const auto format = x.suggest_memory_format();
  if (shift == 0)
    return allocate(x.sym_sizes(), x.scalar_type(), x, format);
  Tensor y = allocate({x.sym_numel() + shift}, x.scalar_type(), x);
  auto* impl = y.unsafeGetTensorImpl();
  impl->generic_set_sizes_contiguous(x.sym_sizes());
  impl->empty_tensor_restride(format);
  impl->set_sizes_and_strides(x.sym_sizes(), y.sym_strides().vec(), shift);
  return y;
}

int64_t elements_behind_boundary(const Tensor& t) {
  return int64_t(uintptr_t(t.const_data_ptr()) % kVectorBytes / t.element_size());
}

// One launch. For x without memory (fake and meta tensors) none, but outputs of the same layouts.
Outputs run(PARAMETERS) {
  check(ARGUMENTS);
  const SymInt shift = x.is_meta()
                           ? x.sym_storage_offset() % SymInt(kVectorBytes / x.element_size())
                           : SymInt(elements_behind_boundary(x));
  const auto wide = x.dtype() == at::kDouble ? at::kDouble : at::kFloat;
  const SymInt saved = training ? x.sym_size(1) : SymInt(0);
  const Outputs outputs{allocate_y(x, shift), allocate({2, saved}, wide, x)};
  const auto& [y, statistics] = outputs;
  if (x.is_meta())
    return outputs;

  const int64_t N = x.size(0), C = x.size(1), HW = x.size(2) * x.size(3);
  // The kernel numbers a channel's 16-byte vectors (two more a plane for its edges) in 31 bits.
  const int64_t plane_vectors = HW * int64_t(x.element_size()) / kVectorBytes + 2;
  TORCH_CHECK(N * plane_vectors < (int64_t(1) << 31) - (1 << 20),
              must("x", "have less than 32 GB a channel", show(x)));
  const c10::DeviceGuard guard(x.device());
  // The kernel takes NCHW, and y as far behind a boundary as x. Anything else costs copies.
  const Tensor x_nchw = x.contiguous();
  const int64_t x_shift = elements_behind_boundary(x_nchw);
  const bool direct = y.is_contiguous() && x_shift == shift;
  const Tensor y_nchw = direct ? y : allocate_y(x_nchw, x_shift);
  const auto packed = [](const MaybeTensor& p) { return p ? p->contiguous() : p; };
  const auto data = [](const MaybeTensor& p) { return p ? p->mutable_data_ptr() : nullptr; };
  const auto is_float = [](const MaybeTensor& p) { return p && p->dtype() == at::kFloat; };
  const MaybeTensor packed_gamma = packed(gamma), packed_beta = packed(beta);
  FusedBatchNormCall call{};
  call.x = x_nchw.const_data_ptr();
  call.y = y_nchw.mutable_data_ptr();
  call.gamma = data(packed_gamma);
  call.beta = data(packed_beta);
  call.running_mean = data(running_mean);
  call.running_var = data(running_var);
  call.num_batches_tracked = static_cast<int64_t*>(data(num_batches_tracked));
  call.mean = statistics.mutable_data_ptr();
  call.inv_std = static_cast<char*>(call.mean) + C * statistics.element_size();
  call.N = N;
  call.C = x.numel() > 0 ? C : 0;  // nothing to do but to count the batch
  call.HW = HW;
  call.eps = eps;
  call.momentum = momentum.value_or(0);
  call.cumulative = !momentum.has_value();
  call.dtype = dtype_code(x.scalar_type());
  call.affine_float = is_float(gamma);
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
  TORCH_CHECK(!error, must("fused_batch_norm_forward_kernel", "run for x " + show(x),
                           string("CUDA error: ") + error));
  for (const auto* buffer : {&running_mean, &running_var, &num_batches_tracked})
    if (training && *buffer)
      (*buffer)->unsafeGetTensorImpl()->bump_version();
  if (!direct)
    y.copy_(y_nchw);
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
  if (training)
    return to_train.call(ARGUMENTS);
  return {to_eval.call(x, gamma, beta, eps, running_mean, running_var), Tensor()};
}

template <Outputs (*run)(PARAMETERS)>
Tensor fused_batch_norm_forward(PARAMETERS) {
  return std::get<0>(run(ARGUMENTS));
}

struct FusedBatchNormBackward final : Node {
  std::array<SavedVariable, 5> saved;  // x, gamma, running_mean, running_var, statistics
  double eps;
  bool training;

  string name() const override { return "FusedBatchNormBackward"; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& variable : saved)
      variable.reset_data();
  }

  std::vector<Tensor> apply(std::vector<Tensor>&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::array<Tensor, 5> unpacked;
    for (size_t i = 0; i < saved.size(); ++i)
      unpacked[i] = saved[i].unpack();
    const auto& [x, gamma, running_mean, running_var, statistics] = unpacked;
    if (!grads[0].defined())
      return std::vector<Tensor>(3);
    const auto zeros = [](const Tensor& p) { return p.defined() ? at::zeros_like(p) : p; };
    if (x.sym_numel() == 0)
      return {zeros(x), zeros(gamma), zeros(gamma)};
    // PyTorch's kernels take all else in float32 whatever x is, but not every mixture.
    const auto wide = x.dtype() == at::kDouble ? at::kDouble : at::kFloat;
    const auto widen = [&](const Tensor& p) { return p.defined() ? p.to(wide) : p; };
    const Tensor none = training ? Tensor() : running_mean.narrow(0, 0, 0).to(wide);  // [0]
    const Tensor mean = training ? statistics.select(0, 0) : none;
    const Tensor inv_std = training ? statistics.select(0, 1) : none;
    const auto needed = [&](size_t i) { return task_should_compute_output(i); };
    auto [grad_x, grad_gamma, grad_beta] = at::native_batch_norm_backward(
        grads[0], x, widen(gamma), widen(running_mean), widen(running_var), mean, inv_std, training,
        eps, {needed(0), needed(1), needed(2)});
    const auto as_gamma = [&](const Tensor& p) { return p.defined() ? p.to(gamma.dtype()) : p; };
    return {grad_x, as_gamma(grad_gamma), as_gamma(grad_beta)};
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
  if (!compute_requires_grad(x, gamma, beta))
    return run_below();
  auto* const node = new FusedBatchNormBackward;
  const auto owner = own(node);
  node->set_next_edges(collect_next_edges(x, gamma, beta));
  node->eps = eps;
  node->training = training;
  const Outputs outputs = run_below();
  const auto save = [](const MaybeTensor& t) { return SavedVariable(t, false); };
  const MaybeTensor none;
  node->saved = {save(x), save(gamma), save(training ? none : running_mean),
                 save(training ? none : running_var), save(std::get<1>(outputs))};
  set_history(std::get<0>(outputs), owner);
  return outputs;
}

// The launch plan of a contiguous, aligned x on the current device, as "field=value field=value …".
string plan(int64_t N, int64_t C, int64_t HW, ScalarType dtype, bool training,
            MaybeDouble momentum) {
  int64_t counter;
  FusedBatchNormCall call{};
  call.num_batches_tracked = &counter;
  call.N = N;
  call.C = C;
  call.HW = HW;
  call.momentum = momentum.value_or(0);
  call.cumulative = !momentum.has_value();
  call.dtype = dtype_code(dtype);
  call.training = training;
  char text[1024];
  const char* error = fused_batch_norm_describe(&call, text, sizeof text);
  TORCH_CHECK(!error, must("the device", "run the kernel", string("CUDA error: ") + error));
  return text;
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
  m.def(
      "fused_batch_norm_plan(int N, int C, int HW, ScalarType dtype, bool training, "
      "float? momentum) -> str",
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
    if (
        torch.cuda.is_available()
    ):  # for the devices that are here, whatever TORCH_CUDA_ARCH_LIST says
        devices = range(torch.cuda.device_count())
        capabilities = {torch.cuda.get_device_capability(i) for i in devices}
        architectures = [f"-gencode=arch=compute_{a}{b},code=sm_{a}{b}" for a, b in capabilities]
    elif os.environ.get("TORCH_CUDA_ARCH_LIST"):
        architectures = []  # torch's own flags, made from the list
    else:
        return None, "a CUDA device must be present (or TORCH_CUDA_ARCH_LIST set), got none"
    directory = extension._get_build_directory("fused_batch_norm", verbose=False)
    lock = os.path.join(directory, "lock")
    if os.path.exists(lock):  # torch would wait without a word, and for ever if nobody builds
        warnings.warn(
            f"waiting for the build that holds {lock}: delete it if none is running", stacklevel=2
        )
    library = extension.load_inline(
        name="fused_batch_norm",
        cpp_sources=[FUSED_BATCH_NORM_CALL + FUSED_BATCH_NORM_CPP],
        cuda_sources=[FUSED_BATCH_NORM_CALL + FUSED_BATCH_NORM_CUDA],
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
    of the same type or float32. Returns y like x, in NCHW or channels-last as x (channels-last
    costs a copy each way). Differentiable by backward. Raises ValueError for x that is not 4-D or
    has one value per channel in training and for eps that is not positive, RuntimeError for a wrong
    C, dtype or device.

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
            buffers["num_batches_tracked"],
            self.training or running_mean is None,
            self.momentum,
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
