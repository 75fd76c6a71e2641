// The PTX wrappers of the CUDA text, as the emulator means them. Their contracts, and the types
// Mbarrier, CachePolicy and SumSlot, stand in the text, which includes this file instead of its own.
#pragma once

__forceinline__ unsigned char* dynamic_shared_memory() { return emulator::shared_memory(); }
__forceinline__ void mbarrier_init(Mbarrier* b, unsigned arrivals) { emulator::barrier_init(b, arrivals); }
__forceinline__ void fence_mbarrier_init() { emulator::barrier_init_fence(); }
__forceinline__ void mbarrier_arrive(Mbarrier* b) { emulator::barrier_arrive(b, 0); }
__forceinline__ void mbarrier_arrive_expect_tx(Mbarrier* b, unsigned bytes) { emulator::barrier_arrive(b, bytes); }
__forceinline__ void mbarrier_wait(Mbarrier* b, unsigned parity) { emulator::barrier_wait(b, parity); }
__forceinline__ void mbarrier_wait_cluster(Mbarrier* b, unsigned parity) { emulator::barrier_wait_for_peers(b, parity); }
__forceinline__ CachePolicy createpolicy_evict_last() { return 0; }
__forceinline__ CachePolicy createpolicy_evict_first() { return 0; }
__forceinline__ void cp_async_16(void* shared, const void* global, CachePolicy) { emulator::copy_16(shared, global); }
__forceinline__ void cp_async_commit_group() { emulator::copies_commit(); }
template <int kPending> __forceinline__ void cp_async_wait_group() { emulator::copies_wait(kPending); }
__forceinline__ void barrier_cluster_arrive() { emulator::cluster_arrive(); }
__forceinline__ void barrier_cluster_wait() { emulator::cluster_wait(); }
template <typename A> __forceinline__ void st_async(SumSlot<A>* shared, int rank, SumSlot<A> slot, Mbarrier* b) {
  emulator::send_to_peer(shared, unsigned(rank), &slot, sizeof slot, b);
}
template <typename V> __forceinline__ V ld_relaxed(const V* address) {
  V value;
  emulator::load_atomic(&value, address, sizeof value);
  return value;
}
template <typename A> __forceinline__ void st_relaxed(SumSlot<A>* address, SumSlot<A> slot) {
  emulator::store_atomic(address, &slot, sizeof slot);
}
__forceinline__ void red_add_relaxed(void* word) { emulator::add_atomic(static_cast<unsigned long long*>(word), 1); }
__forceinline__ void nanosleep() { emulator::nap(); }
__forceinline__ void nanosleep_cycles(int64_t) { emulator::nap(); }
__forceinline__ uint4 ld_global_128(const void* address, CachePolicy) { return *static_cast<const uint4*>(address); }
__forceinline__ void st_global_128(void* address, uint4 raw, bool) { emulator::store_aligned(address, &raw, sizeof raw); }
