// mbarriers, messages between the blocks of a cluster, which count on them, and copies that their
// thread waits for.
//
// Both land as late as the rules allow: their bytes turn to poison when they are issued. A copy's
// arrive when its thread has waited for it, a message's when the schedule says so, at the latest
// when no thread can go on without them. Who touches them before a wait has told it that they are
// there races with the copy or the message.
#include <algorithm>
#include <cstring>

#include "machine.h"

namespace emulator {

static uint32_t offset_of(const void* shared, size_t bytes, const char* what, const void* place) {
  const uintptr_t offset = uintptr_t(shared) - uintptr_t(current->block->shared);
  if (offset + bytes > machine.launch.shared_bytes || offset + bytes < bytes)
    fail("out of bounds",
         name_of(*current) + ": " + what + " lies outside the block's shared memory", place);
  return uint32_t(offset);
}

// This block's, or the one at the same place in a peer.
static Mbarrier& find(const uint64_t* barrier, const void* place, Block& block = *current->block) {
  const auto found = block.barriers.find(offset_of(barrier, 8, "an mbarrier", place));
  if (found == block.barriers.end())
    fail("barrier", name_of(*current) + " uses an mbarrier that nobody has initialised", place);
  Mbarrier& b = found->second;
  const bool seen = &block == current->block ? has_seen(*current, b.initialised)
                                             : barriers_known(*current, kCluster) >= b.shown;
  if (!seen)
    fail("data race", name_of(*current) + " uses an mbarrier, unordered with its initialisation",
         place);
  return b;
}

void mbarrier_init(uint64_t* barrier, unsigned arrivals) {
  const void* place = walk(__builtin_return_address(0));
  Block& block = *current->block;
  const uint32_t offset = offset_of(barrier, 8, "an mbarrier", place);
  require_aligned(barrier, 8, Access::kWrite, place);
  access(barrier, 8, Access::kWrite, false, now(*current, false), place);
  if (arrivals == 0 || arrivals >= 1u << 20)
    fail("barrier", "an mbarrier counts 1 to 2^20 - 1 arrivals", place);
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

void fence_mbarrier_init() {
  for (auto& [offset, b] : current->block->barriers) {
    if (b.fenced || b.initialised_by != current) continue;
    b.fenced = true;
    b.shown = current->arrivals[kCluster] + 1;
  }
}

static void complete_if_due(Mbarrier& b) {
  if (b.pending != 0 || b.bytes != 0) return;
  if (b.messages != 0)
    fail("barrier",
         "an mbarrier's phase ends while messages are in flight: it expects too few bytes",
         nullptr);
  b.completed.join(b.gathering);
  b.pending = b.arrivals;
  ++b.phase;
  for (Fibre* fibre : b.waiting) make_ready(*fibre);
  b.waiting.clear();
}

static void arrive(uint64_t* barrier, unsigned expected_bytes, const void* place) {
  preempt();
  Mbarrier& b = find(barrier, place);
  release(b.gathering);
  b.bytes += expected_bytes;
  if (b.bytes >= 1 << 20) fail("barrier", "an mbarrier expects 2^20 bytes or more", place);
  machine.naps_since_event = 0;
  if (b.pending == 0)
    fail("barrier", "more arrivals in one phase of an mbarrier than it was initialised for", place);
  --b.pending;
  complete_if_due(b);
}

void mbarrier_arrive(uint64_t* barrier) { arrive(barrier, 0, walk(__builtin_return_address(0))); }

void mbarrier_arrive_expect_tx(uint64_t* barrier, unsigned bytes) {
  const void* place = walk(__builtin_return_address(0));
  require_clusters(place);
  arrive(barrier, bytes, place);
}

void mbarrier_wait(uint64_t* barrier, unsigned parity) {
  const void* place = walk(__builtin_return_address(0));
  preempt();
  Mbarrier& b = find(barrier, place);
  if (parity > 1) fail("barrier", "a parity is 0 or 1", place);
  // Looked at again after waking up: a thread that comes so late that the next phase is over too
  // has missed its own.
  while ((b.phase & 1) == parity) {
    b.waiting.push_back(current);
    current->barrier = barrier;
    current->parity = parity;
    block_on("mbarrier_wait", place);
  }
  acquire(b.completed);
}

// The messages of one phase of an mbarrier are steps of a participant of their own.
static Epoch message_epoch(Block& block, Mbarrier& b, const void* place) {
  if (b.agent < 0) {
    if (block.agents == kAgents)
      fail("limit", "more mbarriers with messages than the emulator has clocks for", place);
    b.agent = int(machine.launch.threads + block.agents++);
  }
  return epoch(block, b.agent, Time(b.phase + 1), false);
}

void send_to_peer(void* shared, unsigned rank, const void* value, unsigned bytes,
                  uint64_t* barrier) {
  const void* place = walk(__builtin_return_address(0));
  preempt();
  require_clusters(place);
  if (rank >= machine.launch.cluster)
    fail("cluster",
         name_of(*current) + " sends to block " + std::to_string(int(rank)) + " of a cluster of " +
             std::to_string(machine.launch.cluster),
         place);
  const uint32_t offset = offset_of(shared, bytes, "a message", place);
  require_aligned(shared, bytes, Access::kWrite, place);
  unsigned char* const to =
      shared_of(current->block->slot - current->block->rank() + rank) + offset;
  Block& peer = visit(rank, uintptr_t(to), Access::kWrite, place);
  Mbarrier& b = find(barrier, place, peer);
  access(to, bytes, Access::kWrite, false, message_epoch(peer, b, place), place);
  poison(to, bytes);
  ++b.messages;
  machine.messages.push_back({&peer, offset_of(barrier, 8, "", place), to, bytes, {}});
  memcpy(machine.messages.back().value, value, bytes);
}

void cp_async_16(void* shared, const void* global) {
  const void* place = walk(__builtin_return_address(0));
  offset_of(shared, 16, "a copy's destination", place);
  require_aligned(shared, 16, Access::kWrite, place);
  require_aligned(global, 16, Access::kRead, place);
  const bool at_once = machine.device.capability < 80;  // no cp.async there: a plain copy
  const Epoch mark =
      at_once ? now(*current, false) : epoch(*current->block, current->thread, kNotYet, false);
  access(global, 16, Access::kRead, false, mark, place);
  access(shared, 16, Access::kWrite, false, mark, place);
  if (at_once) {
    memcpy(shared, global, 16);
    return;
  }
  poison(shared, 16);
  current->copies.push_back(
      {static_cast<unsigned char*>(shared), static_cast<const unsigned char*>(global)});
}

void cp_async_commit_group() {
  if (machine.device.capability >= 80) current->groups.push_back(current->copies.size());
}

// The thread has seen what it waited for, as if it had just written it itself.
void cp_async_wait_group(unsigned groups_on_their_way) {
  preempt();
  auto& copies = current->copies;
  auto& groups = current->groups;
  if (groups.size() <= groups_on_their_way) return;
  const size_t done = groups.size() - groups_on_their_way, landed = groups[done - 1];
  for (size_t i = 0; i < landed; ++i) {
    memcpy(copies[i].to, copies[i].from, 16);
    track(copies[i].to, 16, now(*current, false));
  }
  copies.erase(copies.begin(), copies.begin() + landed);
  groups.erase(groups.begin(), groups.begin() + done);
  for (size_t& group : groups) group -= landed;
}

void land(size_t which) {
  std::swap(machine.messages[which], machine.messages.back());
  const Message message = machine.messages.back();
  machine.messages.pop_back();
  memcpy(message.to, message.value, message.bytes);
  Mbarrier& b = message.block->barriers.at(message.barrier);
  b.gathering.at[b.agent] = Time(b.phase + 1);
  machine.naps_since_event = 0;
  --b.messages;
  b.bytes -= message.bytes;
  complete_if_due(b);
}

}  // namespace emulator
