// mbarriers, and the asynchronous copies that arrive on them or that their thread waits for.
//
// A copy lands as late as the rules allow: its bytes turn to poison when it is issued and arrive only when the schedule
// says so, at the latest when no thread can go on without them. Who touches them before a wait has told it that they
// are there races with the copy.
#include <algorithm>
#include <cstring>

#include "machine.h"

namespace emulator {

static uint32_t offset_of(const void* shared, size_t bytes, const char* what, const void* place) {
  const uintptr_t offset = uintptr_t(shared) - uintptr_t(current->block->shared);
  if (offset + bytes > machine.launch.shared_bytes || offset + bytes < bytes)
    fail("out of bounds", name_of(*current) + ": " + what + " lies outside the block's shared memory", place);
  return uint32_t(offset);
}

// This block's, or the one at the same place in a peer.
static Mbarrier& find(const uint64_t* barrier, const void* place, Block& block = *current->block) {
  const auto found = block.barriers.find(offset_of(barrier, 8, "an mbarrier", place));
  if (found == block.barriers.end()) fail("barrier", name_of(*current) + " uses an mbarrier that nobody has initialised", place);
  Mbarrier& b = found->second;
  const bool seen = &block == current->block ? has_seen(*current, b.initialised) : barriers_known(*current, kCluster) >= b.shown;
  if (!seen) fail("data race", name_of(*current) + " uses an mbarrier, unordered with its initialisation", place);
  if (!b.fenced && b.initialised_by != current)
    fail("barrier", name_of(*current) + " uses an mbarrier whose initialisation no barrier_init_fence published", place);
  return b;
}

void barrier_init(uint64_t* barrier, unsigned arrivals) {
  const void* place = walk(__builtin_return_address(0));
  Block& block = *current->block;
  const uint32_t offset = offset_of(barrier, 8, "an mbarrier", place);
  require_aligned(barrier, 8, Access::kWrite, place);
  access(barrier, 8, Access::kWrite, false, now(*current, false), place);
  if (arrivals == 0 || arrivals >= 1u << 20) fail("barrier", "an mbarrier counts 1 to 2^20 - 1 arrivals", place);
  Mbarrier b{};
  b.arrivals = b.pending = arrivals;
  b.initialised_by = current;
  b.initialised = now(*current, false);
  b.gathering.at.resize(current->clock.at.size());
  b.completed.at.resize(current->clock.at.size());
  block.barriers.emplace(offset, std::move(b));
  block.barriers_begin = std::min(block.barriers_begin, offset);
  block.barriers_end = std::max(block.barriers_end, offset + 8);
}

void barrier_init_fence() {
  for (auto& [offset, b] : current->block->barriers) {
    if (b.fenced || b.initialised_by != current) continue;
    b.fenced = true;
    b.shown = current->arrivals[kCluster] + 1;
  }
}

static void complete_if_due(Mbarrier& b) {
  if (b.pending != 0 || b.bytes != 0) return;
  if (b.copies != 0) fail("barrier", "an mbarrier's phase ends while copies of it are in flight: it expects too few bytes", nullptr);
  b.completed.join(b.gathering);
  b.pending = b.arrivals;
  ++b.phase;
  for (Fibre* fibre : b.waiting) make_ready(*fibre);
  b.waiting.clear();
}

static void arrive(Mbarrier& b, const void* place) {
  machine.naps_since_event = 0;
  if (b.pending == 0) fail("barrier", "more arrivals in one phase of an mbarrier than it was initialised for", place);
  --b.pending;
  complete_if_due(b);
}

static void arrive_now(uint64_t* barrier, unsigned expected_bytes, const void* place) {
  preempt();
  Mbarrier& b = find(barrier, place);
  release(b.gathering);
  b.bytes += expected_bytes;
  if (b.bytes >= 1 << 20) fail("barrier", "an mbarrier expects 2^20 bytes or more", place);
  arrive(b, place);
}

void barrier_arrive(uint64_t* barrier, unsigned expected_bytes) {
  arrive_now(barrier, expected_bytes, walk(__builtin_return_address(0)));
}

static void wait(uint64_t* barrier, unsigned parity, bool for_peers, const void* place) {
  preempt();
  Mbarrier& b = find(barrier, place);
  if (b.from_peers && !for_peers) fail("barrier", "barrier_wait on an mbarrier that peers send to: it shows only this block's own doings", place);
  if (parity > 1) fail("barrier", "a parity is 0 or 1", place);
  // Looked at again after waking up: a thread that comes so late that the next phase is over too has missed its own.
  while ((b.phase & 1) == parity) {
    b.waiting.push_back(current);
    current->barrier = barrier;
    current->parity = parity;
    block_on("barrier_wait", place);
  }
  acquire(b.completed);
}

void barrier_wait(uint64_t* barrier, unsigned parity) { wait(barrier, parity, false, walk(__builtin_return_address(0))); }

void barrier_wait_for_peers(uint64_t* barrier, unsigned parity) {
  const void* place = walk(__builtin_return_address(0));
  require_clusters(place);
  wait(barrier, parity, true, place);
}

// Bytes that `agent` will write at `time`: ordered behind all that the issuing thread has seen, known to nobody yet.
static void issue(void* shared, const void* global, unsigned bytes, Epoch mark, const void* place) {
  access(global, bytes, Access::kRead, false, mark, place);
  access(shared, bytes, Access::kWrite, false, mark, place);
  poison(shared, bytes);
}

static Epoch copy_epoch(Block& block, Mbarrier& b, const void* place) {
  if (b.agent < 0) {
    if (block.agents == kCopyAgents) fail("limit", "more mbarriers with copies than the emulator has clocks for", place);
    b.agent = int(machine.launch.threads + block.agents++);
  }
  return epoch(block, b.agent, Time(b.phase + 1), false);
}

void copy_bulk(void* shared, const void* global, unsigned bytes, uint64_t* barrier) {
  const void* place = walk(__builtin_return_address(0));
  preempt();
  Block& block = *current->block;
  if (machine.device.capability < 90) fail("device", "bulk copies need compute capability 9.0", place);
  Mbarrier& b = find(barrier, place);
  offset_of(shared, bytes, "a bulk copy's destination", place);
  require_aligned(shared, 16, Access::kWrite, place);
  require_aligned(global, 16, Access::kRead, place);
  if (bytes == 0 || bytes % 16) fail("misaligned", "a bulk copy moves a multiple of 16 bytes, not " + std::to_string(bytes), place);
  issue(shared, global, bytes, copy_epoch(block, b, place), place);
  ++b.copies;
  machine.in_flight.push_back({&block, offset_of(barrier, 8, "", place),
                               {{static_cast<unsigned char*>(shared), static_cast<const unsigned char*>(global), bytes}},
                               bytes, false});
}

void send_to_peer(void* shared, unsigned rank, const void* value, uint64_t* barrier) {
  const void* place = walk(__builtin_return_address(0));
  preempt();
  require_clusters(place);
  if (rank >= machine.launch.cluster)
    fail("cluster", name_of(*current) + " sends to block " + std::to_string(int(rank)) + " of a cluster of " +
                        std::to_string(machine.launch.cluster), place);
  const uint32_t offset = offset_of(shared, 16, "a message", place);
  require_aligned(shared, 16, Access::kWrite, place);
  unsigned char* const to = shared_of(current->block->slot - current->block->rank() + rank) + offset;
  Block& peer = visit(rank, uintptr_t(to), Access::kWrite, place);
  Mbarrier& b = find(barrier, place, peer);
  access(to, 16, Access::kWrite, false, copy_epoch(peer, b, place), place);
  poison(to, 16);
  b.from_peers = true;
  ++b.copies;
  const auto* const bytes = static_cast<const unsigned char*>(value);
  machine.in_flight.push_back({&peer, offset_of(barrier, 8, "", place), {{to, nullptr, 16}}, 16, false, {bytes, bytes + 16}});
}

void copy_16(void* shared, const void* global) {
  const void* place = walk(__builtin_return_address(0));
  offset_of(shared, 16, "a copy's destination", place);
  require_aligned(shared, 16, Access::kWrite, place);
  require_aligned(global, 16, Access::kRead, place);
  if (machine.device.capability < 80) {  // no cp.async there: a plain copy
    access(global, 16, Access::kRead, false, now(*current, false), place);
    access(shared, 16, Access::kWrite, false, now(*current, false), place);
    memcpy(shared, global, 16);
    return;
  }
  issue(shared, global, 16, epoch(*current->block, current->thread, kNotYet, false), place);
  current->untracked.push_back({static_cast<unsigned char*>(shared), static_cast<const unsigned char*>(global), 16});
}

void copies_arrive(uint64_t* barrier) {
  const void* place = walk(__builtin_return_address(0));
  if (machine.device.capability < 80) return arrive_now(barrier, 0, place);
  preempt();
  Block& block = *current->block;
  Mbarrier& b = find(barrier, place);
  const Epoch mark = copy_epoch(block, b, place);
  for (const Fibre::Piece& piece : current->untracked) track(piece.to, piece.bytes, mark);
  machine.in_flight.push_back({&block, offset_of(barrier, 8, "", place), std::move(current->untracked), 0, true});
  current->untracked.clear();
  current->groups.clear();
}

void copies_commit() {
  if (machine.device.capability >= 80) current->groups.push_back(current->untracked.size());
}

// The thread has seen what it waited for, as if it had just written it itself.
void copies_wait(unsigned groups_on_their_way) {
  preempt();
  auto& pieces = current->untracked;
  auto& groups = current->groups;
  if (groups.size() <= groups_on_their_way) return;
  const size_t done = groups.size() - groups_on_their_way, landed = groups[done - 1];
  for (size_t i = 0; i < landed; ++i) {
    memcpy(pieces[i].to, pieces[i].from, pieces[i].bytes);
    track(pieces[i].to, pieces[i].bytes, now(*current, false));
  }
  pieces.erase(pieces.begin(), pieces.begin() + landed);
  groups.erase(groups.begin(), groups.begin() + done);
  for (size_t& group : groups) group -= landed;
}

void land(size_t which) {
  std::swap(machine.in_flight[which], machine.in_flight.back());
  const Copies copies = std::move(machine.in_flight.back());
  machine.in_flight.pop_back();
  for (const Fibre::Piece& piece : copies.pieces) memcpy(piece.to, piece.from ? piece.from : copies.value.data(), piece.bytes);
  Mbarrier& b = copies.block->barriers.at(copies.barrier);
  b.gathering.at[b.agent] = Time(b.phase + 1);
  machine.naps_since_event = 0;
  if (copies.arrives) return arrive(b, nullptr);
  --b.copies;
  b.bytes -= copies.bytes;
  complete_if_due(b);
}

}  // namespace emulator
