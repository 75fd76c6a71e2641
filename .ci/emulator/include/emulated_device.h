// The device helpers of the CUDA text that hold PTX, as the emulator means them. Their contracts, and the types Barrier, Keep
// and Word, stand in the text, which includes this file in the place of its own helpers.
#pragma once

__forceinline__ unsigned char* dynamic_shared() { return emulator::shared_memory(); }
__forceinline__ void barrier_init(Barrier* b, unsigned arrivals) { emulator::barrier_init(b, arrivals); }
__forceinline__ void barrier_init_fence() { emulator::barrier_init_fence(); }
__forceinline__ void barrier_arrive(Barrier* b) { emulator::barrier_arrive(b, 0); }
__forceinline__ void barrier_arrive_expect(Barrier* b, unsigned bytes) { emulator::barrier_arrive(b, bytes); }
__forceinline__ void barrier_wait(Barrier* b, unsigned parity) { emulator::barrier_wait(b, parity); }
__forceinline__ void barrier_wait_for_peers(Barrier* b, unsigned parity) { emulator::barrier_wait_for_peers(b, parity); }
__forceinline__ Policy make_policy(Keep) { return 0; }
__forceinline__ void copy_bulk(void* shared, const void* global, unsigned bytes, Barrier* b, Policy) {
  emulator::copy_bulk(shared, global, bytes, b);
}
__forceinline__ void copy_16(void* shared, const void* global, Policy) { emulator::copy_16(shared, global); }
__forceinline__ void copies_arrive(Barrier* b) { emulator::copies_arrive(b); }
__forceinline__ void copies_commit() { emulator::copies_commit(); }
template <int kOnTheirWay> __forceinline__ void copies_wait() { emulator::copies_wait(kOnTheirWay); }
__forceinline__ void cluster_arrive() { emulator::cluster_arrive(); }
__forceinline__ void cluster_wait() { emulator::cluster_wait(); }
template <typename V> __forceinline__ void send_to_peer(V* shared, int rank, const V& value, Barrier* b) {
  static_assert(sizeof(V) == 16);
  emulator::send_to_peer(shared, unsigned(rank), &value, b);
}
__forceinline__ Word load_word(const Word* address) {
  Word word;
  emulator::load_atomic(&word, address, sizeof word);
  return word;
}
__forceinline__ void store_word(Word* address, Word word) { emulator::store_atomic(address, &word, sizeof word); }
__forceinline__ void add_one(void* word) { emulator::add_atomic(static_cast<unsigned long long*>(word), 1); }
__forceinline__ void nap() { emulator::nap(); }
__forceinline__ void rest(int64_t) { emulator::nap(); }
template <typename V> __forceinline__ V load_vector(const V* address, Policy) { return *address; }
template <typename V> __forceinline__ void store_vector(V* address, V v, bool) {
  static_assert(sizeof(V) == 16);
  emulator::store_aligned(address, &v, sizeof v);
}
