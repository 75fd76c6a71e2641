// What the stand-in headers call: the emulated GPU, seen from the CUDA text.
//
// The CUDA text is compiled with -fsanitize=thread, which puts a call in front of every load and
// store; runtime/memory.cpp answers these calls. Everything else that a kernel can do to other
// threads passes through the functions below. Each may switch to another fibre, so the compiler
// must not move memory accesses over them (it cannot: they are opaque calls).
#pragma once
#include <cstddef>
#include <cstdint>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulator {

__attribute__((const)) unsigned char* shared_memory();  // the block's dynamic shared memory
__attribute__((const)) unsigned lane();

// Barriers of the warp, of the block, and of the grid (in two steps). All order memory.
void sync_warp();
void sync_block();
void grid_arrive();
void grid_wait();

// Values between the lanes in `mask`; these do not order memory. Lane i gets the value of lane
// `from`.
uint64_t shuffle(unsigned mask, uint64_t value, unsigned from_lane);

// mbarriers in shared memory.
void mbarrier_init(uint64_t* barrier, unsigned arrivals);
void mbarrier_arrive(uint64_t* barrier);
void mbarrier_wait(uint64_t* barrier, unsigned parity);

// Asynchronous copies, which their thread waits for.
void cp_async_16(void* shared, const void* global);
void cp_async_commit_group();
void cp_async_wait_group(unsigned groups_on_their_way);

// Relaxed accesses: atomic, so no data race among themselves, but they order nothing else.
void load_atomic(void* value, const void* address, size_t bytes);
void store_atomic(void* address, const void* value, size_t bytes);
void add_atomic(unsigned long long* address, unsigned long long value);
void store_aligned(void* address, const void* value, size_t bytes);
void nanosleep();

// The host's side.
struct Launch {
  unsigned blocks, threads;
  size_t shared_bytes;
  bool cooperative;
  const void* kernel;
};
int launch(const Launch& launch, void (*body)(const void* arguments), const void* arguments,
           size_t argument_bytes);
int attribute(int which, int* value);
int set_shared_limit(const void* kernel, int bytes);
int capability();
int keep_error(int error);  // as the last one, unless it is 0; returns it
int take_error();           // the last one, which is then none

}  // namespace emulator
