"""Batch normalisation of an NCHW tensor, forward, as one fused CUDA kernel in one launch.

    y = gamma · (x − mean) / √(var + eps) + beta        mean, biased var: per channel, over N, H and W

x is read from memory once and y is written once, as a copy would do: between the sweep that sums and the
sweep that writes, a channel's data stays on the chip.

    channel c  =  tile tile tile tile tile tile …       its N planes, cut into tiles of up to 16 KB
                  │    │    │    │                      dealt in turn to a team of blocks, one block per
                block block block block …               multiprocessor; teams take channels in turn

    in a block:   producer ──► ring of tiles in shared memory ──► store ──► y
                                     │                              ▲
                                     └──► statistics ──► exchange ──┘
                                          (sums)         (with the team's other blocks: mean, inv_std)

Each arrow is a few warps that run on their own, held together by barriers per tile and per channel, so the
next channels' tiles already come in while this one's sums travel. What the ring cannot hold is kept in
registers (`held`) or read a second time (`streamed`). make_plan() in the CUDA text decides all of that from
shape and device.
"""

import os
import shutil
import sys

import torch
import torch.utils.cpp_extension

FUSED_BATCH_NORM_CALL = r'''
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
  double momentum;               // negative: cumulative average
  int dtype;                     // 0 float, 1 half, 2 bfloat16, 3 double
  int affine_float;              // gamma and beta are float whatever x is
  int running_float;             // so are the running buffers
  int training;                  // 0: normalise with the running buffers
};

// Each returns null, or what went wrong.
extern "C" const char* fused_batch_norm_launch(
    const FusedBatchNormCall* call, void* (*allocate)(size_t bytes, void* context), void* context, void* stream);
extern "C" const char* fused_batch_norm_describe(const FusedBatchNormCall* call, char* text, size_t text_bytes);
'''

FUSED_BATCH_NORM_CUDA = r'''
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <type_traits>

namespace {

// ---------------------------------------------------------------------------------------------
// Constants
// ---------------------------------------------------------------------------------------------
constexpr int kVectorBytes = 16;      // one access of one thread
constexpr int kMaxThreads = 512;      // 16 warps with 128 registers a thread fill a multiprocessor
constexpr int kMaxSlots = 32;         // tiles in a block's ring
constexpr int kChannelSlots = 16;     // channels that may be under way in a block
constexpr int kMaxStatistics = 12;    // warps that sum
constexpr int kMaxTeamPerLane = 8;    // blocks that one lane of an exchange warp listens to: teams of up to 256
constexpr int kHeldPerTile = 2;       // vectors of a tile that a statistics thread can hold in registers

// ---------------------------------------------------------------------------------------------
// The hardware: all that is not plain CUDA C++, each in one function
// ---------------------------------------------------------------------------------------------
using Barrier = uint64_t;             // an mbarrier in shared memory
enum class Keep { kFirst, kLast };    // what L2 evicts first or last

struct alignas(16) Word {             // travels between blocks in one piece, so that a tag vouches for its value
  double value;
  unsigned long long tag;
};

#ifdef __CUDACC__
#include <cuda_awbarrier_primitives.h>

__device__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char fused_batch_norm_shared[];
  return fused_batch_norm_shared;
}

__device__ unsigned shared_address(const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }

__device__ void barrier_init(Barrier* b, unsigned arrivals) { __mbarrier_init(b, arrivals); }

// Makes initialised barriers visible to the copy engine.
__device__ void barrier_init_fence() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ void barrier_arrive(Barrier* b) { (void)__mbarrier_arrive(b); }

// One arrival; the phase also waits for `bytes` of bulk copies.
__device__ void barrier_arrive_expect(Barrier* b, unsigned bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("{ .reg .b64 state; mbarrier.arrive.expect_tx.shared.b64 state, [%0], %1; }"
               ::"r"(shared_address(b)), "r"(bytes) : "memory");
#else
  __trap();
#endif
}

// Returns when the phase of this parity is complete. A new barrier's phase before the first (parity 1) is.
__device__ void barrier_wait(Barrier* b, unsigned parity) {
#if __CUDA_ARCH__ >= 900
  while (!__mbarrier_try_wait_parity(b, parity, 1000)) {}
#else
  while (!__mbarrier_test_wait_parity(b, parity)) {}
#endif
}

// Hopper's copy engine: `bytes` (a multiple of 16) land some time later and are counted on the barrier.
__device__ void copy_bulk(void* shared, const void* global, unsigned bytes, Barrier* b, Keep keep) {
#if __CUDA_ARCH__ >= 900
  uint64_t policy;
  if (keep == Keep::kLast)
    asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  else
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
               ::"r"(shared_address(shared)), "l"(global), "r"(bytes), "r"(shared_address(b)), "l"(policy) : "memory");
#else
  __trap();
#endif
}

// 16 bytes by this thread; those past `valid_bytes` are not read, and arrive as zeros.
__device__ void copy_16(void* shared, const void* global, unsigned valid_bytes) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               ::"r"(shared_address(shared)), "l"(global), "r"(valid_bytes) : "memory");
#else
  for (unsigned i = 0; i < 16; ++i)
    static_cast<unsigned char*>(shared)[i] = i < valid_bytes ? static_cast<const unsigned char*>(global)[i] : 0;
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

__device__ void nap() { __nanosleep(40); }

template <typename V>
__device__ void store_vector(V* address, V vector, bool streaming) {
  const uint4 raw = *reinterpret_cast<const uint4*>(&vector);
  if (streaming)
    __stcs(reinterpret_cast<uint4*>(address), raw);
  else
    *reinterpret_cast<uint4*>(address) = raw;
}
#else
#include "emulated_device.h"
#endif

// ---------------------------------------------------------------------------------------------
// Types
// ---------------------------------------------------------------------------------------------
template <typename T>
struct alignas(kVectorBytes) Vector {
  static constexpr int kSize = kVectorBytes / sizeof(T);
  T element[kSize];
};

template <typename T> struct Accumulator { using type = float; };
template <> struct Accumulator<double> { using type = double; };

__device__ float widen(float v) { return v; }
__device__ double widen(double v) { return v; }
__device__ float widen(__half v) { return __half2float(v); }
__device__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T, typename A> __device__ T narrow(A v) {
  if constexpr (sizeof(T) >= 4) return T(v);
  else if constexpr (std::is_same<T, __half>::value) return __float2half_rn(float(v));
  else return __float2bfloat16_rn(float(v));
}

// Element i of a parameter or a running buffer, which is float or of x's own type.
template <typename T>
__device__ double load_parameter(const void* p, int64_t i, bool is_float) {
  return is_float ? double(static_cast<const float*>(p)[i]) : double(widen(static_cast<const T*>(p)[i]));
}

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
struct Plan {
  int masked;            // planes do not start and end at 16-byte boundaries: mask their edges
  int bulk;              // tiles come by the copy engine, else by 16-byte asynchronous copies
  int team, teams;       // blocks that share a channel; how many such teams
  int cooperative;       // all blocks resident, with a barrier across the grid
  int producers, statistics, exchangers, storers;  // warps of each role
  int plane_vectors;     // 16-byte vectors that cover one plane
  int64_t channel_vectors;
  int tile_vectors;      // vectors of a tile
  int tiles;             // tiles of one channel in one block, in the order held, streamed, resident:
  int held;              // ... kept in the registers of the statistics warps
  int streamed;          // ... let go after the sums and read again; the rest stays in the ring
  int slots;             // tiles that the ring has room for
  int in_flight;         // tiles that the producer lets be on their way
  int step_planes, step_vectors;  // team · tile_vectors vectors, as whole planes and the rest
  uint64_t magic;        // q / plane_vectors == q · magic >> shift for all q < 2³¹
  int shift;
  int64_t scratch_words;
  int shared_bytes;
};

struct Arguments {
  FusedBatchNormCall call;
  Plan plan;
  Word* scratch;         // [C][team][2], content unknown at the start
};

template <typename A>
struct Result {          // what the store warps need: y = ((x − mean) − mean_low)·scale + beta
  A mean, mean_low, scale, beta;
};

struct Partial {         // sums of one warp over its part of a channel
  double mean, m2, count;
};

// Where things lie in a block's shared memory.
struct Shared {
  unsigned char* ring;   // [slots][tile_vectors] vectors
  Barrier *full, *empty; // [slots]: tile has landed; tile may be overwritten
  Barrier *summed, *ready, *done;  // [kChannelSlots]: partials are there; result is there; result was read
  Partial* partial;      // [kChannelSlots][kMaxStatistics]
  void* result;          // [kChannelSlots] Result

  __host__ __device__ Shared(unsigned char* base, const Plan& p) {
    ring = base;
    full = reinterpret_cast<Barrier*>(ring + size_t(p.slots) * p.tile_vectors * kVectorBytes);
    empty = full + p.slots;
    summed = empty + p.slots;
    ready = summed + kChannelSlots;
    done = ready + kChannelSlots;
    partial = reinterpret_cast<Partial*>(done + kChannelSlots);
    result = partial + kChannelSlots * kMaxStatistics;
  }
};
constexpr int kShareBytes = 3 * kChannelSlots * sizeof(Barrier) + kChannelSlots * kMaxStatistics * sizeof(Partial) +
                            kChannelSlots * sizeof(Result<double>) + 2 * kMaxSlots * sizeof(Barrier);

// ---------------------------------------------------------------------------------------------
// Small device helpers
// ---------------------------------------------------------------------------------------------
// Sum over the warp, in every lane, always in the same order. All 32 lanes must call.
template <typename V>
__device__ V warp_sum(V v) {
  for (int lanes = 16; lanes > 0; lanes /= 2) v += __shfl_xor_sync(0xffffffffu, v, lanes);
  return v;
}

// A position in the ring, and the parity of the phase that it is in.
struct RingPosition {
  int slot = 0;
  unsigned parity = 0;
  __device__ void advance(int tiles, int slots) {
    slot += tiles;
    while (slot >= slots) {
      slot -= slots;
      parity ^= 1;
    }
  }
};

// The first vector of a tile within its channel, and how many vectors of the channel are left from there on.
struct Cursor {
  int64_t left;
  int plane, offset;
  __device__ Cursor(const Plan& p, int tile) {
    const int64_t first = int64_t(tile) * p.tile_vectors;
    left = p.channel_vectors - first;
    plane = int(first / p.plane_vectors);
    offset = int(first % p.plane_vectors);
  }
  __device__ void advance(const Plan& p) {  // to this block's next tile
    left -= int64_t(p.team) * p.tile_vectors;
    plane += p.step_planes;
    offset += p.step_vectors;
    if (offset >= p.plane_vectors) {
      offset -= p.plane_vectors;
      ++plane;
    }
  }
  __device__ int count(const Plan& p) const {  // vectors of this tile
    return left <= 0 ? 0 : left < p.tile_vectors ? int(left) : p.tile_vectors;
  }
};

// One vector of a tile in x and y: its first element's index, and which of its elements belong to the plane.
template <typename T, bool kMasked>
struct Place {
  int64_t element;
  int begin = 0, end = Vector<T>::kSize;
  __device__ Place(const Arguments& a, int64_t channel, const Cursor& cursor, int v) {
    constexpr int kSize = Vector<T>::kSize;
    const unsigned q = cursor.offset + v;
    const unsigned row = unsigned(q * a.plan.magic >> a.plan.shift);
    const int64_t in_plane = int64_t(q - row * a.plan.plane_vectors) * kSize;
    element = ((cursor.plane + int(row)) * a.call.C + channel) * a.call.HW;
    if (kMasked) {  // the plane's cover starts at the 16-byte boundary before it
      const int64_t start = element + int64_t(reinterpret_cast<uintptr_t>(a.call.x) / sizeof(T));
      const int shift = int(start & (kSize - 1));
      begin = in_plane == 0 ? shift : 0;
      const int64_t behind = a.call.HW + shift - in_plane;
      end = behind < 0 ? 0 : behind < kSize ? int(behind) : kSize;
      element -= shift;
    }
    element += in_plane;
  }
  __device__ bool has(int i) const { return !kMasked || (i >= begin && i < end); }
  __device__ bool whole() const { return !kMasked || (begin == 0 && end == Vector<T>::kSize); }
};

// Sums about a pivot: with d = x − pivot, s1 = Σ d and s2 = Σ d².
template <typename A>
struct Sums {
  A s1 = 0, s2 = 0;
  unsigned count = 0;
  template <typename T, bool kMasked>
  __device__ void add(const Vector<T>& x, const Place<T, kMasked>& place, A pivot) {
#pragma unroll
    for (int i = 0; i < Vector<T>::kSize; ++i) {
      if (!place.has(i)) continue;
      const A d = widen(x.element[i]) - pivot;
      s1 += d;
      s2 += d * d;
    }
    count += kMasked ? max(place.end - place.begin, 0) : Vector<T>::kSize;
  }
  __device__ void add(const Sums& other) {
    s1 += other.s1;
    s2 += other.s2;
    count += other.count;
  }
};

// y = ((x − mean) − mean_low)·scale + beta for one vector. The mean is subtracted first and in two parts: the
// folded form x·scale + shift loses digits where |mean| ≫ std.
template <typename T, bool kMasked, typename A>
__device__ void normalise_and_store(const Arguments& a, const Vector<T>& x, const Place<T, kMasked>& place, const Result<A>& r) {
  Vector<T> y;
#pragma unroll
  for (int i = 0; i < Vector<T>::kSize; ++i)
    y.element[i] = narrow<T>(((widen(x.element[i]) - r.mean) - r.mean_low) * r.scale + r.beta);
  T* const to = static_cast<T*>(a.call.y) + place.element;
  if (place.whole()) {
    store_vector(reinterpret_cast<Vector<T>*>(to), y, a.plan.streamed > 0);
  } else {
#pragma unroll
    for (int i = 0; i < Vector<T>::kSize; ++i)
      if (place.has(i)) to[i] = y.element[i];
  }
}

// ---------------------------------------------------------------------------------------------
// Roles: what each warp of a block does, over all channels of its team
// ---------------------------------------------------------------------------------------------

// Producer: keeps the ring full, first with a channel's tiles in order, then with its streamed tiles again.
template <typename T, bool kMasked>
class Producer {
 public:
  __device__ Producer(const Arguments& a, const Shared& shared, int warp)
      : a_(a), shared_(shared), warp_(warp), channel_(blockIdx.x / a.plan.team), start_(a.plan, blockIdx.x % a.plan.team), cursor_(start_) {}

  // Sends tiles on their way until all have been sent, or `most` in this call.
  __device__ void run(int64_t most) {
    const Plan& p = a_.plan;
    const int streamed_first = p.held, streamed_end = p.held + p.streamed;
    for (; channel_ < a_.call.C && most > 0; --most) {
      if (tile_ == streamed_first) streamed_start_ = cursor_;
      if (tile_ == p.tiles) cursor_ = streamed_start_;  // once more, now from L2 if it kept them
      barrier_wait(&shared_.empty[position_.slot], position_.parity ^ 1);
      if (sent_ >= p.in_flight) {  // more at once makes the blocks drift apart, which costs DRAM locality
        barrier_wait(&shared_.full[lag_.slot], lag_.parity);
        lag_.advance(1, p.slots);
      }
      const bool soon_again = tile_ >= streamed_first && tile_ < streamed_end;
      load(soon_again || p.streamed == 0 ? Keep::kLast : Keep::kFirst);
      position_.advance(1, p.slots);
      ++sent_;
      cursor_.advance(p);
      if (++tile_ == p.tiles + p.streamed) {
        tile_ = 0;
        channel_ += p.teams;
        cursor_ = start_;
      }
    }
  }

 private:
  __device__ void load(Keep keep) {
    const Plan& p = a_.plan;
    const int lane = threadIdx.x % 32;
    const int count = cursor_.count(p);
    Barrier* const full = &shared_.full[position_.slot];
    unsigned char* const tile = shared_.ring + size_t(position_.slot) * p.tile_vectors * kVectorBytes;
    const T* const x = static_cast<const T*>(a_.call.x);
    if (p.bulk) {  // one copy per plane that the tile touches, a lane each
      if (lane == 0) barrier_arrive_expect(full, unsigned(count) * kVectorBytes);
      __syncwarp();
      for (int64_t row = lane; row * p.plane_vectors < cursor_.offset + count; row += 32) {
        const int begin = int(max(int64_t(0), row * p.plane_vectors - cursor_.offset));
        const int end = int(min(int64_t(count), (row + 1) * p.plane_vectors - cursor_.offset));
        const Place<T, false> from(a_, channel_, cursor_, begin);
        copy_bulk(tile + begin * kVectorBytes, x + from.element, unsigned(end - begin) * kVectorBytes, full, keep);
      }
    } else {
      const int64_t elements = a_.call.N * a_.call.C * a_.call.HW;
      for (int v = warp_ * 32 + lane; v < count; v += p.producers * 32) {
        const Place<T, kMasked> from(a_, channel_, cursor_, v);
        const int64_t behind = elements - from.element;  // nothing past the end of x is read
        const int valid = from.end <= from.begin ? 0 : behind < Vector<T>::kSize ? int(behind) : Vector<T>::kSize;
        copy_16(tile + v * kVectorBytes, x + from.element, unsigned(valid) * sizeof(T));
      }
      copies_arrive(full);
    }
  }

  const Arguments& a_;
  const Shared& shared_;
  const int warp_;
  int64_t channel_;
  const Cursor start_;
  Cursor cursor_, streamed_start_ = cursor_;
  RingPosition position_, lag_;
  int64_t sent_ = 0;
  int tile_ = 0;
};

// Lets a slot go: called by a whole warp that has read it. The barrier counts max(statistics, storers) arrivals,
// whichever of the two roles makes them.
__device__ void release(const Plan& p, Barrier* empty, int warps) {
  __syncwarp();
  if (int(threadIdx.x % 32) * warps < max(p.statistics, p.storers)) barrier_arrive(empty);
}

// Statistics: sums of each channel, as its tiles land.
template <typename T, bool kMasked, int kHeldTiles>
__device__ void summarise(const Arguments& a, const Shared& shared, int warp) {
  using A = typename Accumulator<T>::type;
  const Plan& p = a.plan;
  const int lane = threadIdx.x % 32, thread = warp * 32 + lane, threads = p.statistics * 32;
  RingPosition position, channel_position;
  const Cursor start(p, blockIdx.x % p.team);
  Vector<T> held[kHeldTiles * kHeldPerTile + 1];

  for (int64_t channel = blockIdx.x / p.team; channel < a.call.C; channel += p.teams) {
    // The pivot: the mean of the first vectors that this warp has, so |pivot − mean|² is at most
    // (elements per pivot element)·var, whatever the data, and nothing cancels.
    Cursor cursor = start;
    barrier_wait(&shared.full[position.slot], position.parity);
    const Vector<T>* tile = reinterpret_cast<const Vector<T>*>(shared.ring) + size_t(position.slot) * p.tile_vectors;
    Sums<A> first, sums;
    if (thread < cursor.count(p)) first.add(tile[thread], Place<T, kMasked>(a, channel, cursor, thread), A(0));
    const unsigned first_count = warp_sum(first.count);
    A pivot = warp_sum(first.s1) / A(max(first_count, 1u));
    if (!isfinite(pivot)) pivot = 0;

#pragma unroll
    for (int t = 0; t < kHeldTiles; ++t) {  // register arrays want indices known at compile time
      if (t < p.held) {
        barrier_wait(&shared.full[position.slot], position.parity);
        tile = reinterpret_cast<const Vector<T>*>(shared.ring) + size_t(position.slot) * p.tile_vectors;
        Sums<A> part;
#pragma unroll
        for (int i = 0; i < kHeldPerTile; ++i) {
          const int v = thread + i * threads;
          if (v < cursor.count(p)) {
            held[t * kHeldPerTile + i] = tile[v];
            part.add(held[t * kHeldPerTile + i], Place<T, kMasked>(a, channel, cursor, v), pivot);
          }
        }
        sums.add(part);
        release(p, &shared.empty[position.slot], p.statistics);
        position.advance(1, p.slots);
        cursor.advance(p);
      }
    }
    for (int t = p.held; t < p.tiles; ++t) {
      barrier_wait(&shared.full[position.slot], position.parity);
      tile = reinterpret_cast<const Vector<T>*>(shared.ring) + size_t(position.slot) * p.tile_vectors;
      const int count = cursor.count(p);
      Sums<A> part;  // of one tile: rounding errors of short sums stay short
#pragma unroll 4
      for (int v = thread; v < count; v += threads) part.add(tile[v], Place<T, kMasked>(a, channel, cursor, v), pivot);
      sums.add(part);
      if (t < p.held + p.streamed) release(p, &shared.empty[position.slot], p.statistics);
      position.advance(1, p.slots);
      cursor.advance(p);
    }
    position.advance(p.streamed, p.slots);  // their second time is the store warps' business

    // mean = pivot + s1/count, m2 = s2 − s1²/count
    const double s1 = warp_sum(sums.s1), s2 = warp_sum(sums.s2), count = warp_sum(sums.count);
    if (lane == 0) {
      barrier_wait(&shared.done[channel_position.slot], channel_position.parity ^ 1);  // else a slow reader's partials vanish
      const double offset = s1 / (count > 0 ? count : 1);
      shared.partial[channel_position.slot * kMaxStatistics + warp] = Partial{double(pivot) + offset, s2 - s1 * offset, count};
      barrier_arrive(&shared.summed[channel_position.slot]);
    }
    __syncwarp();

    if (kHeldTiles > 0 && p.held > 0) {
      barrier_wait(&shared.ready[channel_position.slot], channel_position.parity);
      const Result<A> result = static_cast<const Result<A>*>(shared.result)[channel_position.slot];
      __syncwarp();
      if (lane == 0) barrier_arrive(&shared.done[channel_position.slot]);
      cursor = start;
#pragma unroll
      for (int t = 0; t < kHeldTiles; ++t) {
        if (t < p.held) {
#pragma unroll
          for (int i = 0; i < kHeldPerTile; ++i) {
            const int v = thread + i * threads;
            if (v < cursor.count(p))
              normalise_and_store(a, held[t * kHeldPerTile + i], Place<T, kMasked>(a, channel, cursor, v), result);
          }
          cursor.advance(p);
        }
      }
    }
    channel_position.advance(1, kChannelSlots);
  }
}

// Chan's merge of what the lanes hold: mean = Σ nᵢ·meanᵢ / Σ nᵢ, then m2 = Σ (m2ᵢ + nᵢ·(meanᵢ − mean)²).
template <int kEach>
__device__ Partial merge(const Partial (&part)[kEach]) {
  Partial all{0, 0, 0};
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    all.count += part[i].count;
    all.mean += part[i].count * part[i].mean;
  }
  all.count = warp_sum(all.count);
  all.mean = warp_sum(all.mean) / (all.count > 0 ? all.count : 1);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const double distance = part[i].mean - all.mean;
    if (part[i].count > 0) all.m2 += part[i].m2 + part[i].count * distance * distance;
  }
  all.m2 = warp_sum(all.m2);
  return all;
}

// The team's sums, from this block's: publish, listen until all have, merge in the order of the ranks.
__device__ Partial exchange(const Arguments& a, int64_t channel, Partial own) {
  const int lane = threadIdx.x % 32, team = a.plan.team, rank = blockIdx.x % team;
  Word* const words = a.scratch + channel * team * 2;
  if (lane < 2) store_word(&words[rank * 2 + lane], Word{lane == 0 ? own.mean : own.m2, (unsigned long long)own.count + 1});

  Partial part[kMaxTeamPerLane];
#pragma unroll
  for (int i = 0; i < kMaxTeamPerLane; ++i) part[i] = Partial{0, 0, lane + 32 * i < team ? -1.0 : 0.0};
  for (bool missing = true; missing;) {
    missing = false;
#pragma unroll
    for (int i = 0; i < kMaxTeamPerLane; ++i) {
      if (part[i].count < 0) {
        const Word mean = load_word(&words[(lane + 32 * i) * 2]), m2 = load_word(&words[(lane + 32 * i) * 2 + 1]);
        if (mean.tag != 0 && m2.tag != 0) part[i] = Partial{mean.value, m2.value, double(mean.tag - 1)};
        else missing = true;
      }
    }
    if (missing) nap();
  }
  __syncwarp();
  return merge(part);
}

// Exchange: from the warps' sums to the team's, and to what the store warps need.
template <typename T>
__device__ void finish(const Arguments& a, const Shared& shared, int warp, double factor) {
  using A = typename Accumulator<T>::type;
  const Plan& p = a.plan;
  const FusedBatchNormCall& call = a.call;
  const int lane = threadIdx.x % 32;
  RingPosition position;
  position.advance(warp, kChannelSlots);
  for (int64_t channel = blockIdx.x / p.team + int64_t(warp) * p.teams; channel < call.C; channel += int64_t(p.exchangers) * p.teams) {
    const double gamma = call.gamma ? load_parameter<T>(call.gamma, channel, call.affine_float) : 1;
    const double beta = call.beta ? load_parameter<T>(call.beta, channel, call.affine_float) : 0;
    double mean, var;
    if (call.training) {
      barrier_wait(&shared.summed[position.slot], position.parity);
      Partial own[1] = {{0, 0, 0}};
      if (lane < p.statistics) own[0] = shared.partial[position.slot * kMaxStatistics + lane];
      Partial sums = merge(own);
      if (p.team > 1) sums = exchange(a, channel, sums);
      mean = sums.mean;
      var = sums.m2 / sums.count;
      if (lane == 0 && blockIdx.x % p.team == 0 && call.running_mean) {
        const double unbiased = sums.m2 / (sums.count - 1);
        const double old_mean = load_parameter<T>(call.running_mean, channel, call.running_float);
        const double old_var = load_parameter<T>(call.running_var, channel, call.running_float);
        store_parameter<T>(call.running_mean, channel, call.running_float, old_mean + factor * (mean - old_mean));
        store_parameter<T>(call.running_var, channel, call.running_float, old_var + factor * (unbiased - old_var));
      }
    } else {
      barrier_wait(&shared.done[position.slot], position.parity ^ 1);
      mean = load_parameter<T>(call.running_mean, channel, call.running_float);
      var = load_parameter<T>(call.running_var, channel, call.running_float);
    }
    const double inv_std = 1 / sqrt(var + call.eps);
    if (lane == 0) {
      const A high = A(mean);
      static_cast<Result<A>*>(shared.result)[position.slot] = {high, A(mean - high), A(inv_std * gamma), A(beta)};
      barrier_arrive(&shared.ready[position.slot]);
      if (blockIdx.x % p.team == 0) {
        static_cast<A*>(call.mean)[channel] = high;
        static_cast<A*>(call.inv_std)[channel] = A(inv_std);
      }
    }
    position.advance(p.exchangers, kChannelSlots);
  }
}

// Store: y for the tiles in the ring, then for those that were read again.
template <typename T, bool kMasked>
__device__ void normalise(const Arguments& a, const Shared& shared, int warp) {
  using A = typename Accumulator<T>::type;
  const Plan& p = a.plan;
  const int lane = threadIdx.x % 32, thread = warp * 32 + lane, threads = p.storers * 32;
  RingPosition position, channel_position;
  const int rank = blockIdx.x % p.team;
  const Cursor streamed_start(p, p.held * p.team + rank), resident_start(p, (p.held + p.streamed) * p.team + rank);
  for (int64_t channel = blockIdx.x / p.team; channel < a.call.C; channel += p.teams) {
    barrier_wait(&shared.ready[channel_position.slot], channel_position.parity);
    const Result<A> result = static_cast<const Result<A>*>(shared.result)[channel_position.slot];
    __syncwarp();
    if (lane == 0) barrier_arrive(&shared.done[channel_position.slot]);
    channel_position.advance(1, kChannelSlots);

    position.advance(p.held + p.streamed, p.slots);
    Cursor cursor = resident_start;
    for (int t = p.held + p.streamed; t < p.tiles + p.streamed; ++t) {
      if (t == p.tiles) cursor = streamed_start;
      barrier_wait(&shared.full[position.slot], position.parity);
      const Vector<T>* tile = reinterpret_cast<const Vector<T>*>(shared.ring) + size_t(position.slot) * p.tile_vectors;
      const int count = cursor.count(p);
#pragma unroll 4
      for (int v = thread; v < count; v += threads)
        normalise_and_store(a, tile[v], Place<T, kMasked>(a, channel, cursor, v), result);
      release(p, &shared.empty[position.slot], p.storers);
      position.advance(1, p.slots);
      cursor.advance(p);
    }
  }
}

// ---------------------------------------------------------------------------------------------
// The kernel
// ---------------------------------------------------------------------------------------------
template <typename T, bool kMasked, int kHeldTiles>
__global__ void __launch_bounds__(kMaxThreads, 1) fused_batch_norm_forward_kernel(const __grid_constant__ Arguments a) {
  const Plan& p = a.plan;
  const FusedBatchNormCall& call = a.call;
  const Shared shared(dynamic_shared(), p);
  const int warp = threadIdx.x / 32;

  if (threadIdx.x == 0) {
    for (int s = 0; s < p.slots; ++s) {
      barrier_init(&shared.full[s], p.bulk ? 1 : p.producers * 32);
      barrier_init(&shared.empty[s], max(p.statistics, p.storers));
    }
    for (int s = 0; s < kChannelSlots; ++s) {
      barrier_init(&shared.summed[s], p.statistics);
      barrier_init(&shared.ready[s], 1);
      barrier_init(&shared.done[s], p.storers + (p.held > 0 ? p.statistics : 0));
    }
    barrier_init_fence();
  }
  __syncthreads();  // else a warp may wait on a barrier that is not there yet

  Producer<T, kMasked> producer(a, shared, warp);
  if (warp < p.producers) producer.run(p.in_flight);  // the first tiles travel while the grid gathers

  double factor = call.momentum;  // of the new value in the running buffers
  if (factor < 0) factor = call.num_batches_tracked ? 1.0 / double(*call.num_batches_tracked + 1) : 0;
  if (p.cooperative) {
    for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < p.scratch_words; i += int64_t(gridDim.x) * blockDim.x)
      store_word(&a.scratch[i], Word{0, 0});
    cooperative_groups::this_grid().sync();  // else a block's words could be wiped, or the counter read late
  }
  if (call.training && call.num_batches_tracked && blockIdx.x == 0 && threadIdx.x == 0) *call.num_batches_tracked += 1;

  int role = warp;
  if (role < p.producers) {
    producer.run(INT64_MAX);
  } else if ((role -= p.producers) < p.exchangers) {
    finish<T>(a, shared, role, factor);
  } else if ((role -= p.exchangers) < p.storers) {
    normalise<T, kMasked>(a, shared, role);
  } else if (call.training) {
    summarise<T, kMasked, kHeldTiles>(a, shared, role - p.storers);
  }
}

// ---------------------------------------------------------------------------------------------
// Plan: shape and device in, launch configuration out
// ---------------------------------------------------------------------------------------------
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Device {
  int multiprocessors, shared_bytes, architecture;  // architecture: what the kernel was compiled for, as 10·major + minor
};

template <typename T, int kHeldTiles>
Plan make_plan(const FusedBatchNormCall& call, const Device& device) {
  constexpr int64_t kTileBytes = 16 * 1024;  // measured: smaller ones cost barriers, larger ones grain
  constexpr int64_t kRoundBytes = 4 * 1024;  // what a channel costs beside its bytes, as bytes
  constexpr int64_t kWaitBytes = 48 * 1024;  // what an exchange costs that no other work hides, as bytes
  constexpr int64_t kAgainBytes = 1;         // per byte that is read again
  Plan p = {};
  const int kSize = Vector<T>::kSize;
  p.masked = call.HW % kSize != 0 || reinterpret_cast<uintptr_t>(call.x) % kVectorBytes != 0;
  p.bulk = !p.masked && device.architecture >= 90;
  p.plane_vectors = int(std::max<int64_t>(p.masked ? (call.HW + kSize - 2) / kSize + 1 : call.HW / kSize, 1));
  p.channel_vectors = call.N * p.plane_vectors;
  const int64_t ring_bytes = device.shared_bytes - kShareBytes;

  // The team: as many blocks as bring the channels through soonest. In bytes that one block moves: its share of
  // every channel of its team, and what it waits for.
  int64_t best = INT64_MAX;
  for (int team = 1; team <= std::min<int64_t>(device.multiprocessors, std::max<int64_t>(p.channel_vectors, 1)) && team <= 32 * kMaxTeamPerLane; ++team) {
    const int64_t share = ceil_div(p.channel_vectors, team) * kVectorBytes;
    const int64_t rounds = ceil_div(call.C, device.multiprocessors / team);
    const int64_t beyond = std::max<int64_t>(share - ring_bytes * 7 / 8, 0);
    const int64_t tight = std::min<int64_t>(std::max<int64_t>(2 * share - ring_bytes, 0), ring_bytes);
    const int64_t cost = rounds * (share + kRoundBytes + beyond * kAgainBytes + (team > 1 ? kWaitBytes * tight / ring_bytes : 0));
    if (cost < best) {
      best = cost;
      p.team = team;
    }
    if (share <= kRoundBytes) break;
  }
  p.teams = int(std::min<int64_t>(device.multiprocessors / p.team, std::max<int64_t>(call.C, 1)));
  p.cooperative = call.training && (p.team > 1 || (call.momentum < 0 && call.num_batches_tracked));
  p.scratch_words = call.training && p.team > 1 ? call.C * p.team * 2 : 0;

  const int64_t share = ceil_div(p.channel_vectors, p.team);
  const bool hold = call.training && kHeldTiles > 0 && share * kVectorBytes > ring_bytes * 3 / 4;
  p.producers = p.bulk ? 1 : 4;
  p.statistics = hold ? 12 : 4;
  p.storers = hold ? 2 : 4;
  p.exchangers = std::min(kMaxThreads / 32 - p.producers - p.statistics - p.storers, p.team > 1 ? 6 : 2);
  const int64_t most = std::min<int64_t>(hold ? kHeldPerTile * p.statistics * 32 : kTileBytes / kVectorBytes, std::max<int64_t>(ring_bytes / 4 / kVectorBytes, 1));
  p.tile_vectors = int(std::max<int64_t>(ceil_div(share, std::max<int64_t>(ceil_div(share, most), 1)), 1));
  p.tiles = int(ceil_div(p.channel_vectors, int64_t(p.team) * p.tile_vectors));
  p.slots = int(std::min<int64_t>(ring_bytes / (int64_t(p.tile_vectors) * kVectorBytes), kMaxSlots));
  p.in_flight = std::min(4, p.slots);
  if (call.training) {
    p.held = hold ? std::min(p.tiles, kHeldTiles) : 0;
    p.streamed = std::max(p.tiles - p.held - p.slots, 0);
  }
  const int64_t step = int64_t(p.team) * p.tile_vectors;
  p.step_planes = int(step / p.plane_vectors);
  p.step_vectors = int(step % p.plane_vectors);
  int bits = 0;
  while ((int64_t(1) << bits) < p.plane_vectors) ++bits;
  p.shift = 31 + bits;
  p.magic = uint64_t(((__uint128_t(1) << p.shift) + p.plane_vectors - 1) / p.plane_vectors);
  p.shared_bytes = int(int64_t(p.slots) * p.tile_vectors * kVectorBytes + kShareBytes);
  return p;
}

// ---------------------------------------------------------------------------------------------
// Launch
// ---------------------------------------------------------------------------------------------
using Allocate = void* (*)(size_t bytes, void* context);

// Calls use(kernel, plan) for the kernel that suits the call. Returns null, or what went wrong.
template <typename T, bool kMasked, int kHeldTiles, typename Use>
const char* with_kernel(const FusedBatchNormCall& call, Use use) {
  const auto kernel = fused_batch_norm_forward_kernel<T, kMasked, kHeldTiles>;
  Device device;
  cudaFuncAttributes attributes;
  int ordinal;
  cudaError_t error = cudaGetDevice(&ordinal);
  if (!error) error = cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, ordinal);
  if (!error) error = cudaDeviceGetAttribute(&device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, ordinal);
  if (!error) error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
  if (error) return cudaGetErrorString(error);
  device.architecture = attributes.ptxVersion;
  return use(kernel, make_plan<T, kHeldTiles>(call, device));
}

constexpr int kHeldTiles = 10;  // × kHeldPerTile vectors: 80 of a thread's 128 registers

template <typename T, typename Use>
const char* with_mask(const FusedBatchNormCall& call, Use use) {
  const bool masked = call.HW % Vector<T>::kSize != 0 || reinterpret_cast<uintptr_t>(call.x) % kVectorBytes != 0;
  return masked ? with_kernel<T, true, 0>(call, use) : with_kernel<T, false, kHeldTiles>(call, use);
}

template <typename Use>
const char* with_type(const FusedBatchNormCall& call, Use use) {
  switch (call.dtype) {
    case 0: return with_mask<float>(call, use);
    case 1: return with_mask<__half>(call, use);
    case 2: return with_mask<__nv_bfloat16>(call, use);
    default: return with_mask<double>(call, use);
  }
}

}  // namespace

extern "C" const char* fused_batch_norm_launch(const FusedBatchNormCall* call, Allocate allocate, void* context, void* stream) {
  return with_type(*call, [&](auto kernel, const Plan& plan) -> const char* {
    Arguments arguments{*call, plan, nullptr};
    if (plan.scratch_words > 0) arguments.scratch = static_cast<Word*>(allocate(plan.scratch_words * sizeof(Word), context));
    cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes);
    if (error) return cudaGetErrorString(error);
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = plan.cooperative;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(plan.team * plan.teams);
    config.blockDim = dim3(32 * (plan.producers + plan.exchangers + plan.storers + plan.statistics));
    config.dynamicSmemBytes = plan.shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = 1;
    error = cudaLaunchKernelEx(&config, kernel, arguments);
    return error ? cudaGetErrorString(error) : nullptr;
  });
}

extern "C" const char* fused_batch_norm_describe(const FusedBatchNormCall* call, char* text, size_t text_bytes) {
  return with_type(*call, [&](auto, const Plan& p) -> const char* {
    snprintf(text, text_bytes,
             "masked=%d bulk=%d team=%d teams=%d cooperative=%d producers=%d exchangers=%d storers=%d statistics=%d "
             "tile_bytes=%d tiles=%d held=%d streamed=%d slots=%d in_flight=%d shared_bytes=%d scratch_bytes=%lld",
             p.masked, p.bulk, p.team, p.teams, p.cooperative, p.producers, p.exchangers, p.storers, p.statistics,
             p.tile_vectors * kVectorBytes, p.tiles, p.held, p.streamed, p.slots, p.in_flight, p.shared_bytes,
             (long long)(p.scratch_words * sizeof(Word)));
    return nullptr;
  });
}
'''

FUSED_BATCH_NORM_CPP = r'''
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <c10/core/Allocator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <string>
#include <tuple>

namespace {

using at::Tensor;
using c10::ScalarType;
using MaybeTensor = std::optional<Tensor>;

// `allowed` types are x's own and float32.
void check_parameter(const char* name, const MaybeTensor& p, const Tensor& x) {
  if (!p.has_value()) return;
  TORCH_CHECK(p->dim() == 1 && p->size(0) == x.size(1), name, " must have shape (C,) = (", x.size(1), ",), got ", p->sizes());
  TORCH_CHECK(p->scalar_type() == x.scalar_type() || p->scalar_type() == ScalarType::Float,
              name, " must be ", x.scalar_type(), " as x is, or Float, got ", p->scalar_type());
  TORCH_CHECK(p->device() == x.device(), name, " must be on x's device ", x.device(), ", got ", p->device());
  TORCH_CHECK(p->is_contiguous(), name, " must be contiguous, got strides ", p->strides());
}

void check_pair(const char* name, const MaybeTensor& a, const char* other_name, const MaybeTensor& b) {
  TORCH_CHECK(a.has_value() == b.has_value() && (!a.has_value() || a->scalar_type() == b->scalar_type()),
              other_name, " must be given with ", name, " and have its dtype, got ",
              a.has_value() ? toString(a->scalar_type()) : "None", " and ", b.has_value() ? toString(b->scalar_type()) : "None");
}

int dtype_code(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return 0;
    case ScalarType::Half: return 1;
    case ScalarType::BFloat16: return 2;
    case ScalarType::Double: return 3;
    default: TORCH_CHECK(false, "x must be float32, float16, bfloat16 or float64, got ", type);
  }
}

// Memory straight from the caching allocator: at::empty would fill it, with a kernel of its own, under
// torch.use_deterministic_algorithms(True).
Tensor allocate(c10::IntArrayRef sizes, ScalarType type, const Tensor& like) {
  return at::detail::empty_generic(sizes, c10::GetAllocator(like.device().type()), c10::DispatchKeySet(like.options().computeDispatchKey()), type, std::nullopt);
}

void* data(const MaybeTensor& t) { return t.has_value() ? t->mutable_data_ptr() : nullptr; }

std::tuple<Tensor, Tensor, Tensor> fused_batch_norm_forward(
    const Tensor& x_any, const MaybeTensor& gamma, const MaybeTensor& beta, const MaybeTensor& running_mean,
    const MaybeTensor& running_var, const MaybeTensor& num_batches_tracked, bool training, std::optional<double> momentum, double eps) {
  TORCH_CHECK_VALUE(x_any.dim() == 4, "x must be 4-D (N, C, H, W), got ", x_any.dim(), "-D ", x_any.sizes());
  TORCH_CHECK(x_any.is_cuda(), "x must be on a CUDA device, got ", x_any.device());
  const int dtype = dtype_code(x_any.scalar_type());
  const int64_t N = x_any.size(0), C = x_any.size(1), HW = x_any.size(2) * x_any.size(3);
  check_parameter("gamma", gamma, x_any);
  check_parameter("beta", beta, x_any);
  check_parameter("running_mean", running_mean, x_any);
  check_parameter("running_var", running_var, x_any);
  check_pair("gamma", gamma, "beta", beta);
  check_pair("running_mean", running_mean, "running_var", running_var);
  TORCH_CHECK(training || running_mean.has_value(), "running_mean must be given in eval mode, got None");
  if (num_batches_tracked.has_value())
    TORCH_CHECK(num_batches_tracked->scalar_type() == ScalarType::Long && num_batches_tracked->numel() == 1 && num_batches_tracked->device() == x_any.device(),
                "num_batches_tracked must be one int64 on ", x_any.device(), ", got ", num_batches_tracked->sizes(), " ", num_batches_tracked->scalar_type(), " on ", num_batches_tracked->device());
  TORCH_CHECK_VALUE(!training || N * HW != 1, "x must have more than 1 value per channel when training, got ", x_any.sizes());
  TORCH_CHECK(HW < (int64_t(1) << 31), "x must have H*W below 2**31, got ", HW);

  const c10::DeviceGuard guard(x_any.device());

  // The kernel reads NCHW. Other layouts cost a copy each way and are kept.
  const Tensor x = x_any.contiguous();
  constexpr int64_t kVectorBytes = 16;
  const int64_t item = x.element_size();
  const int64_t shift = int64_t(reinterpret_cast<uintptr_t>(x.const_data_ptr()) % kVectorBytes) / item;
  Tensor y;
  if (shift == 0) {
    y = allocate(x.sizes(), x.scalar_type(), x);
  } else {  // y lies as x does, so that both have their 16-byte boundaries at the same elements
    y = allocate({x.numel() + shift}, x.scalar_type(), x);
    y = y.as_strided(x.sizes(), x.strides(), shift);
  }
  const ScalarType saved_type = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const Tensor mean = allocate({C}, saved_type, x), inv_std = allocate({C}, saved_type, x);

  FusedBatchNormCall call{};
  call.x = x.const_data_ptr();
  call.y = y.mutable_data_ptr();
  call.gamma = data(gamma);
  call.beta = data(beta);
  call.running_mean = data(running_mean);
  call.running_var = data(running_var);
  call.num_batches_tracked = static_cast<int64_t*>(data(num_batches_tracked));
  call.mean = mean.mutable_data_ptr();
  call.inv_std = inv_std.mutable_data_ptr();
  call.N = N;
  call.C = x.numel() > 0 ? C : 0;  // nothing to do but to count the batch
  call.HW = HW;
  call.eps = eps;
  call.momentum = momentum.value_or(-1);
  call.dtype = dtype;
  call.affine_float = gamma.has_value() && gamma->scalar_type() == ScalarType::Float;
  call.running_float = running_mean.has_value() && running_mean->scalar_type() == ScalarType::Float;
  call.training = training;
  Tensor scratch;  // freed on return: the allocator gives it away again only behind this launch on this stream
  struct Context { Tensor* scratch; const Tensor* x; } context{&scratch, &x};
  const char* error = fused_batch_norm_launch(
      &call,
      [](size_t bytes, void* context) {
        auto* c = static_cast<Context*>(context);
        *c->scratch = allocate({int64_t(bytes)}, ScalarType::Byte, *c->x);
        return c->scratch->mutable_data_ptr();
      },
      &context, c10::cuda::getCurrentCUDAStream(x.device().index()).stream());
  TORCH_CHECK(error == nullptr, "fused_batch_norm_forward_kernel must be launchable on ", x.device(), ", got CUDA error: ", error);
  if (!x.is_same(x_any)) y = y.contiguous(x_any.suggest_memory_format());
  return {y, mean, inv_std};
}

// The launch plan for a contiguous, aligned x on the current device, as "field=value field=value …".
std::string fused_batch_norm_plan(int64_t N, int64_t C, int64_t HW, ScalarType dtype, bool training, std::optional<double> momentum) {
  FusedBatchNormCall call{};
  int64_t counter;
  call.num_batches_tracked = &counter;
  call.N = N;
  call.C = C;
  call.HW = HW;
  call.momentum = momentum.value_or(-1);
  call.dtype = dtype_code(dtype);
  call.training = training;
  char text[1024];
  const char* error = fused_batch_norm_describe(&call, text, sizeof text);
  TORCH_CHECK(error == nullptr, "the current device must be able to run the kernel, got CUDA error: ", error);
  return text;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("fused_batch_norm_forward", &fused_batch_norm_forward);
  m.def("fused_batch_norm_plan", &fused_batch_norm_plan);
}
'''


def _build_fused_batch_norm():
    """Compiles the two texts. Returns (module, None), or (None, what is missing to run here)."""
    version = tuple(int("".join(filter(str.isdigit, part)) or 0) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < (2, 9):
        return None, f"torch must be 2.9 or later, got {torch.__version__}"
    if torch.version.cuda is None:
        return None, f"torch must be a CUDA build, got {torch.__version__} without CUDA"
    if torch.utils.cpp_extension.CUDA_HOME is None:
        return None, "nvcc of a CUDA toolkit must be installed (on PATH or under CUDA_HOME), got none"
    if shutil.which("ninja") is None:  # a venv that is not activated keeps it beside its python
        os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", "")
    if torch.cuda.is_available():  # for the devices that are here, whatever TORCH_CUDA_ARCH_LIST says
        capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        architectures = [f"-gencode=arch=compute_{a}{b},code=sm_{a}{b}" for a, b in sorted(capabilities)]
    elif os.environ.get("TORCH_CUDA_ARCH_LIST"):
        architectures = []  # torch's own flags, made from the list
    else:
        return None, "a CUDA device must be present (or TORCH_CUDA_ARCH_LIST set, to compile without one), got none"
    module = torch.utils.cpp_extension.load_inline(
        name="fused_batch_norm",
        cpp_sources=[FUSED_BATCH_NORM_CALL + FUSED_BATCH_NORM_CPP],
        cuda_sources=[FUSED_BATCH_NORM_CALL + FUSED_BATCH_NORM_CUDA],
        extra_cflags=["-O1"],  # it only checks and launches
        extra_cuda_cflags=["-O3", *architectures],
        no_implicit_headers=True,
    )
    return module, None


_fused_batch_norm, _fused_batch_norm_missing = _build_fused_batch_norm()


def _fused_batch_norm_backward(grad_y, x, gamma, running_mean, running_var, mean, inv_std, training, eps, needs):
    """Gradients of x, gamma and beta (None where not needed), by PyTorch's own kernels."""
    return torch.ops.aten.native_batch_norm_backward(
        grad_y, x, gamma, running_mean, running_var, mean, inv_std, training, eps, needs
    )


class _FusedBatchNorm(torch.autograd.Function):
    """The kernel as an autograd node, for eager mode."""

    @staticmethod
    def forward(ctx, x, gamma, beta, buffers, training, momentum, eps):
        y, mean, inv_std = _fused_batch_norm.fused_batch_norm_forward(x, gamma, beta, *buffers, training, momentum, eps)
        ctx.save_for_backward(x, gamma, mean, inv_std, *(() if training else buffers[:2]))
        ctx.training, ctx.eps = training, eps
        return y

    @staticmethod
    def backward(ctx, grad_y):
        x, gamma, mean, inv_std, *running = ctx.saved_tensors
        grads = _fused_batch_norm_backward(
            grad_y, x, gamma, *(running or (None, None)), mean, inv_std, ctx.training, ctx.eps, ctx.needs_input_grad[:3]
        )
        return *grads, None, None, None, None


@torch.library.custom_op("fused_batch_norm::forward", mutates_args=())
def _fused_batch_norm_op(
    x: torch.Tensor,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    num_batches_tracked: torch.Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """The kernel as torch.compile wants it: no argument changes, the new running buffers are returned."""
    buffers = [b if b is None else b.clone() for b in (running_mean, running_var, num_batches_tracked)]
    y, mean, inv_std = _fused_batch_norm.fused_batch_norm_forward(x, gamma, beta, *buffers, training, momentum, eps)
    return y, mean, inv_std, [b for b in buffers if b is not None]


@_fused_batch_norm_op.register_fake
def _(x, gamma, beta, running_mean, running_var, num_batches_tracked, training, momentum, eps):
    saved = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean, inv_std = x.new_empty(x.shape[1], dtype=saved), x.new_empty(x.shape[1], dtype=saved)
    buffers = [torch.empty_like(b) for b in (running_mean, running_var, num_batches_tracked) if b is not None]
    return torch.empty_like(x), mean, inv_std, buffers


def _fused_batch_norm_op_setup(ctx, inputs, output):
    x, gamma, _, running_mean, running_var, _, training, _, eps = inputs
    ctx.save_for_backward(x, gamma, None if training else running_mean, None if training else running_var, *output[1:3])
    ctx.training, ctx.eps = training, eps


def _fused_batch_norm_op_backward(ctx, grad_y, *_):
    grads = _fused_batch_norm_backward(grad_y, *ctx.saved_tensors, ctx.training, ctx.eps, ctx.needs_input_grad[:3])
    return *grads, None, None, None, None, None, None


_fused_batch_norm_op.register_autograd(_fused_batch_norm_op_backward, setup_context=_fused_batch_norm_op_setup)


class ModelNew(torch.nn.Module):
    """Batch normalisation over N, H, W of (N, C, H, W), as PyTorch's 2-D batch norm layer computes it.

        y = gamma · (x − mean) / √(var + eps) + beta

    In train mode, or without running buffers, mean and biased var are the batch's, and one launch also updates
    `running_mean`, `running_var` (unbiased) and `num_batches_tracked`. In eval mode they are the running buffers.

    Args:
        num_features: C.
        eps: added to var.
        momentum: weight of the new value in the running buffers; None for the cumulative average.
        affine: with parameters `gamma` (ones) and `beta` (zeros).
        track_running_stats: with running buffers.
        device, dtype: of parameters and buffers.

    forward(x): x: (N, C, H, W) float32 | float16 | bfloat16 | float64, CUDA; parameters and buffers of the same type or
    float32. Contiguous and channels-last layouts are kept (channels-last costs a copy each way). Returns y like x.
    Differentiable. Raises ValueError for x that is not 4-D or has one value per channel in training, RuntimeError for
    a wrong C, dtype or device. State dicts load with the names gamma, beta | weight, bias | bn.weight, bn.bias.

    Source: Ioffe and Szegedy, Batch Normalization, 2015, algorithms 1 and 2.
    """

    def __init__(self, num_features, eps=1e-5, momentum=0.1, affine=True, track_running_stats=True, device=None, dtype=None):
        super().__init__()
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.affine, self.track_running_stats = affine, track_running_stats
        like = {"device": device, "dtype": dtype}
        self.gamma = torch.nn.Parameter(torch.ones(num_features, **like)) if affine else None
        self.beta = torch.nn.Parameter(torch.zeros(num_features, **like)) if affine else None
        self.register_buffer("running_mean", torch.zeros(num_features, **like) if track_running_stats else None)
        self.register_buffer("running_var", torch.ones(num_features, **like) if track_running_stats else None)
        tracked = torch.tensor(0, dtype=torch.long, device=device) if track_running_stats else None
        self.register_buffer("num_batches_tracked", tracked)

    def forward(self, x):
        if _fused_batch_norm is None:
            raise RuntimeError(f"fused_batch_norm_forward cannot run here: {_fused_batch_norm_missing}")
        gamma, beta = self.gamma, self.beta
        if self.training and not self.track_running_stats:
            buffers = (None, None, None)
        else:
            buffers = (self.running_mean, self.running_var, self.num_batches_tracked)
        training = self.training or buffers[0] is None
        if torch.compiler.is_compiling():
            y, _, _, updated = _fused_batch_norm_op(x, gamma, beta, *buffers, training, self.momentum, self.eps)
            if training:
                for buffer, value in zip(buffers, updated):
                    buffer.copy_(value)
            return y
        if torch.is_grad_enabled() and (x.requires_grad or (gamma is not None and (gamma.requires_grad or beta.requires_grad))):
            return _FusedBatchNorm.apply(x, gamma, beta, buffers, training, self.momentum, self.eps)
        return _fused_batch_norm.fused_batch_norm_forward(x, gamma, beta, *buffers, training, self.momentum, self.eps)[0]

    def extra_repr(self):
        return "{num_features}, eps={eps}, momentum={momentum}, affine={affine}, track_running_stats={track_running_stats}".format(
            **self.__dict__
        )

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for outer in ("", "bn."):
            for theirs, ours in (("weight", "gamma"), ("bias", "beta"), *((n, n) for n in self._buffers)):
                if outer + theirs != ours and prefix + outer + theirs in state_dict:
                    state_dict[prefix + ours] = state_dict.pop(prefix + outer + theirs)
        super()._load_from_state_dict(state_dict, prefix, *args)
