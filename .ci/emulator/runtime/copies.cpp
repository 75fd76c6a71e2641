// mbarriers, and copies that their thread waits for. A copy lands as late as the rules allow: its
// bytes turn to poison when it is issued, and arrive when its thread has waited for it. Who touches
// them before races with the copy.
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

static Mbarrier& find(const uint64_t* barrier, const void* place) {
  auto& barriers = current->block->barriers;
  const auto found = barriers.find(offset_of(barrier, 8, "an mbarrier", place));
  if (found == barriers.end())
    fail("barrier", name_of(*current) + " uses an mbarrier that nobody has initialised", place);
  if (!has_seen(*current, found->second.initialised))
    fail("data race", name_of(*current) + " uses an mbarrier, unordered with its initialisation",
         place);
  return found->second;
}

void mbarrier_init(uint64_t* barrier, unsigned arrivals) {
  const void* place = __builtin_return_address(0);
  Block& block = *current->block;
  const uint32_t offset = offset_of(barrier, 8, "an mbarrier", place);
  require_aligned(barrier, 8, Access::kWrite, place);
  access(barrier, 8, Access::kWrite, false, now(*current, false), place);
  if (arrivals == 0 || arrivals >= 1u << 20)
    fail("barrier", "an mbarrier counts 1 to 2^20 - 1 arrivals", place);
  Mbarrier b{};
  b.arrivals = b.pending = arrivals;
  b.initialised = now(*current, false);
  b.gathering.at.resize(current->clock.at.size());
  b.completed.at.resize(current->clock.at.size());
  block.barriers.emplace(offset, std::move(b));
  block.barriers_begin = std::min(block.barriers_begin, offset);
  block.barriers_end = std::max(block.barriers_end, offset + 8);
}

void mbarrier_arrive(uint64_t* barrier) {
  const void* place = __builtin_return_address(0);
  preempt();
  Mbarrier& b = find(barrier, place);
  release(b.gathering);
  machine.naps_since_event = 0;
  if (b.pending == 0)
    fail("barrier", "more arrivals in one phase of an mbarrier than it was initialised for", place);
  if (--b.pending > 0) return;
  b.completed.join(b.gathering);
  b.pending = b.arrivals;
  ++b.phase;
  for (Fibre* fibre : b.waiting) make_ready(*fibre);
  b.waiting.clear();
}

void mbarrier_wait(uint64_t* barrier, unsigned parity) {
  const void* place = __builtin_return_address(0);
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

void cp_async_16(void* shared, const void* global) {
  const void* place = __builtin_return_address(0);
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

}  // namespace emulator
