// The PTX wrappers of the CUDA text, as the emulator means them. Their contracts, and the types
// Mbarrier and SumSlot, stand in the text, which includes this file instead of its own.
#pragma once

using emulator::barrier_cluster_arrive;
using emulator::barrier_cluster_wait;
using emulator::cp_async_commit_group;
using emulator::fence_mbarrier_init;
using emulator::mbarrier_arrive;
using emulator::mbarrier_arrive_expect_tx;
using emulator::mbarrier_init;
using emulator::mbarrier_wait;
using emulator::nanosleep;
__forceinline__ void nanosleep_cycles(int64_t) { nanosleep(); }
__forceinline__ unsigned char* dynamic_shared_memory() { return emulator::shared_memory(); }
__forceinline__ void cp_async_16(void* shared, const void* global) {
  emulator::cp_async_16(shared, global);
}
// What is asked for must be there: a byte of it is read.
__forceinline__ void prefetch_global_L2(const void* global) {
  (void)*static_cast<const volatile char*>(global);
}
template <int kPending>
__forceinline__ void cp_async_wait_group() {
  emulator::cp_async_wait_group(kPending);
}
template <typename A>
__forceinline__ void st_async(SumSlot<A>* shared, int rank, SumSlot<A> slot, Mbarrier* b) {
  emulator::send_to_peer(shared, unsigned(rank), &slot, sizeof slot, b);
}
template <typename V>
__forceinline__ V ld_relaxed(const V* address) {
  V value;
  emulator::load_atomic(&value, address, sizeof value);
  return value;
}
template <typename A>
__forceinline__ void st_relaxed(SumSlot<A>* address, SumSlot<A> slot) {
  emulator::store_atomic(address, &slot, sizeof slot);
}
__forceinline__ void ld_global_128(void* to, const void* global) {
  *static_cast<uint4*>(to) = *static_cast<const uint4*>(global);
}
