// What the stand-in headers call: the emulated GPU, seen from the CUDA text.
//
// The CUDA text is compiled with -fsanitize=thread, which puts a call in front of every load and store;
// runtime/memory.cpp answers these calls. Everything else that a kernel can do to other threads passes through the
// functions below. Each may switch to another fibre, so the compiler must not move memory accesses over them
// (it cannot: they are opaque calls).
#pragma once
#include <cstddef>
#include <cstdint>

struct uint3 { unsigned x, y, z; };
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulator {

__attribute__((const)) unsigned char* shared_memory();  // the block's dynamic shared memory
__attribute__((const)) unsigned lane();

// Barriers of the block, of the grid and the cluster (in two steps), and of the lanes in `mask`. All order memory but the
// cluster's, which only tells that its blocks run.
void sync_block();
void grid_arrive();
void grid_wait();
void cluster_arrive();
void cluster_wait();
void sync_warp(unsigned mask);

// Values between the lanes in `mask`; these do not order memory. Lane i gets the value of lane `from`.
uint64_t shuffle(unsigned mask, uint64_t value, unsigned from_lane);

// mbarriers in shared memory, and the asynchronous copies that arrive on them.
void barrier_init(uint64_t* barrier, unsigned arrivals);
void barrier_init_fence();
void barrier_arrive(uint64_t* barrier, unsigned expected_bytes);
void barrier_wait(uint64_t* barrier, unsigned parity);
void copy_bulk(void* shared, const void* global, unsigned bytes, uint64_t* barrier);
void copy_16(void* shared, const void* global);
void copies_arrive(uint64_t* barrier);
// 16 bytes to where block `rank` of the cluster has what this block has at `shared`, counted on its `barrier`.
void send_to_peer(void* shared, unsigned rank, const void* value, uint64_t* barrier);
void barrier_wait_for_peers(uint64_t* barrier, unsigned parity);
// ... or that their thread waits for.
void copies_commit();
void copies_wait(unsigned groups_on_their_way);

// Relaxed 16-byte accesses: atomic, so no data race among themselves, but they order nothing else.
void load_atomic(void* value, const void* address, size_t bytes);
void store_atomic(void* address, const void* value, size_t bytes);
void add_atomic(unsigned long long* address, unsigned long long value);
void store_aligned(void* address, const void* value, size_t bytes);
void nap();

// The host's side.
struct Launch {
  unsigned grid_x, grid_y, threads;
  unsigned blocks() const { return grid_x * grid_y; }
  size_t shared_bytes;
  bool cooperative;
  unsigned cluster;  // blocks of one
  const void* kernel;
};
int launch(const Launch& launch, void (*body)(const void* arguments), const void* arguments, size_t argument_bytes);
int attribute(int which, int* value);
int set_shared_limit(const void* kernel, int bytes);
int capability();

}  // namespace emulator
