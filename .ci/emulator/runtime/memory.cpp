// Every load and store of the CUDA text: is the address its own, written, and ordered with what
// others did there?
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "machine.h"

namespace emulator {

static std::vector<Range> exposed;  // sorted by address
std::vector<Range>& ranges() { return exposed; }

// A NaN in every format that the kernel reads: fp64, fp32, fp16, bf16.
constexpr uint16_t kPoison = 0x7ff4;
void poison(void* address, size_t bytes) {
  auto* to = static_cast<unsigned char*>(address);
  for (size_t i = 0; i < bytes; ++i) to[i] = i % 2 ? kPoison >> 8 : kPoison & 0xff;
}

void reset_cells(Range& range) {
  const size_t count = (range.end - range.begin + kCellBytes - 1) / kCellBytes;
  range.cells.assign(count, Cell{kBeforeLaunch, 0, 0, 0});
  if (!range.fresh) return;
  // Eight bytes at a time: two may look like poison by chance in what the host has written.
  constexpr size_t kWord = 8;
  for (uintptr_t at = range.begin; at < range.end; at += kWord) {
    const size_t bytes = std::min<size_t>(kWord, range.end - at);
    unsigned char poisoned[kWord];
    poison(poisoned, bytes);
    if (memcmp(poisoned, reinterpret_cast<const void*>(at), bytes) != 0) continue;
    for (size_t i = 0; i < bytes; i += kCellBytes)
      range.cells[(at - range.begin + i) / kCellBytes].write = 0;
  }
}

Epoch epoch(const Block& block, unsigned participant, Time time, bool atomic) {
  return kValid | (atomic ? kAtomic : 0) | Epoch(block.index) << 36 | Epoch(participant) << 24 |
         time;
}

Epoch now(const Fibre& fibre, bool atomic) {
  return epoch(*fibre.block, fibre.thread, fibre.clock.at[fibre.thread], atomic);
}

static unsigned block_of(Epoch e) { return e >> 36 & (kMaxBlocks - 1); }

unsigned barriers_known(const Fibre& fibre, Level level) {
  return fibre.clock.at[machine.launch.threads + kAgents + level];
}

// Threads of one block order each other by clocks; those of different blocks only by barriers of
// the grid.
bool has_seen(const Fibre& fibre, Epoch e) {
  const Time time = e & kNotYet;
  const unsigned block = block_of(e), participant = e >> 24 & 0xfff;
  if (time == 0) return true;
  if (block == fibre.block->index) return time <= fibre.clock.at[participant];
  const unsigned known = barriers_known(fibre, kGrid);
  return known > 0 && time <= machine.grid.published[known & 1][block].at[participant];
}

void acquire(const Clock& source) { current->clock.join(source); }

void release(Clock& target) {
  target.join(current->clock);
  if (++current->clock.at[current->thread] >= kNotYet)
    fail("limit", "too many steps in one launch", nullptr);
}

static std::string name_of_epoch(Epoch e, uint32_t place_low) {
  const unsigned participant = e >> 24 & 0xfff;
  // The text of one launch lies within 4 GiB, so the high half of any place of it is right.
  const uintptr_t place = (uintptr_t(machine.launch.kernel) & ~uintptr_t(0xffffffff)) | place_low;
  std::string who =
      participant < machine.launch.threads ? "thread " + std::to_string(participant) : "a message";
  if ((e & kNotYet) == kNotYet)
    who = "an asynchronous copy that no wait has awaited, issued by " + who;
  return who + " of block " + std::to_string(block_of(e)) + " at " +
         name_of(reinterpret_cast<const void*>(place));
}

[[noreturn]] static void fail_access(const char* detector, Access kind, const std::string& where,
                                     const std::string& why, const void* place) {
  fail(detector, name_of(*current) + (kind == Access::kRead ? " reads " : " writes ") + where + why,
       place);
}

static std::string hex(uintptr_t value) {
  char text[20];
  snprintf(text, sizeof text, "0x%zx", size_t(value));
  return text;
}

// of the current cluster
static unsigned first_slot() { return current->block->slot - current->block->rank(); }

// The rank of the block of the current cluster in whose shared memory, or behind it, the address
// lies; -1: in none's.
static int peer_at(uintptr_t address) {
  for (unsigned rank = 0; rank < machine.launch.cluster; ++rank)
    if (address - uintptr_t(shared_of(first_slot() + rank)) < kSharedRoom) return int(rank);
  return -1;
}

static std::string name_of_address(uintptr_t address) {
  for (const Range& range : exposed)
    if (address >= range.begin && address < range.end)
      return range.name + " + " + std::to_string(address - range.begin) + " bytes";
  if (const int rank = peer_at(address); rank >= 0) {
    const Block& own = *current->block;
    return "shared memory + " + hex(address - uintptr_t(shared_of(first_slot() + rank))) +
           (unsigned(rank) == own.rank()
                ? ""
                : " of block " + std::to_string(own.index - own.rank() + rank));
  }
  return hex(address);
}

// Another block's shared memory is there from the start to the end of that block.
Block& visit(unsigned rank, uintptr_t address, Access kind, const void* place) {
  Block* const peer = machine.slots[first_slot() + rank].get();
  if (peer == nullptr)
    fail_access("cluster", kind, name_of_address(address), ", which has returned", place);
  if (barriers_known(*current, kCluster) == 0)
    fail_access("cluster", kind, name_of_address(address),
                ", which may not have started: no barrier has shown it", place);
  return *peer;
}

// The cells of the accessed bytes, and the block whose shared memory it is, if any; no cells for
// the fibre's own stack and for constants of the program.
struct Found {
  Cell* cells;
  const Block* owner;
};
static Found find_cells(uintptr_t address, size_t bytes, Access kind, const void* place) {
  const Fibre& fibre = *current;
  if (address >= fibre.stack_low && address + bytes <= fibre.stack_high) return {};
  Block& block = *fibre.block;
  const uintptr_t shared = uintptr_t(block.shared);
  if (address >= shared && address + bytes <= shared + machine.launch.shared_bytes)
    return {block.cells.data() + (address - shared) / kCellBytes, &block};
  size_t low = 0, high = exposed.size();  // the last range that begins at or before the address
  while (low < high) {
    const size_t middle = (low + high) / 2;
    if (exposed[middle].begin <= address)
      low = middle + 1;
    else
      high = middle;
  }
  if (low > 0 && address < exposed[low - 1].end) {
    Range& range = exposed[low - 1];
    if (address + bytes > range.end)
      fail_access("out of bounds", kind, name_of_address(address),
                  ", past its " + std::to_string(range.end - range.begin) + " bytes", place);
    if (kind == Access::kWrite && !range.writable)
      fail_access("out of bounds", kind, name_of_address(address), ", which is an input", place);
    return {range.cells.data() + (address - range.begin) / kCellBytes, nullptr};
  }
  if (const int rank = peer_at(address); rank >= 0) {
    if (address + bytes > uintptr_t(shared_of(first_slot() + rank)) + machine.launch.shared_bytes)
      fail_access("out of bounds", kind, name_of_address(address),
                  ", of " + hex(machine.launch.shared_bytes) + " bytes", place);
    Block& peer = visit(rank, address, kind, place);
    return {peer.cells.data() + (address - uintptr_t(peer.shared)) / kCellBytes, &peer};
  }
  if (kind == Access::kRead && address >= machine.arguments_begin &&
      address + bytes <= machine.arguments_end)
    return {};
  Dl_info object;
  if (kind == Access::kRead && dladdr(reinterpret_cast<void*>(address), &object)) return {};
  std::string where = "memory of no tensor";
  if (low > 0 && address - exposed[low - 1].end < 1u << 20)
    where = std::to_string(address - exposed[low - 1].end) + " bytes past the end of " +
            exposed[low - 1].name;
  fail_access("out of bounds", kind, where, "", place);
}

static bool compatible(Epoch earlier, bool atomic) {
  return (atomic && (earlier & kAtomic)) || has_seen(*current, earlier);
}

static void add_read(Cell& cell, Epoch mark, uint32_t place) {
  if (cell.read == mark) return;
  if (cell.read == 0 || ((cell.read & kValid) && has_seen(*current, cell.read))) {
    cell.read = mark;
  } else if (cell.read & kValid) {
    machine.reads.push_back({cell.read, mark});
    cell.read = machine.reads.size();
  } else {
    std::vector<Epoch>& list = machine.reads[cell.read - 1];
    if (list.back() == mark) return;
    if (list.size() == list.capacity()) {  // forget reads that this one is ordered behind
      size_t kept = 0;
      for (Epoch e : list)
        if (!has_seen(*current, e)) list[kept++] = e;
      list.resize(kept);
    }
    list.push_back(mark);
  }
  cell.read_place = place;
}

void access(const void* pointer, size_t bytes, Access kind, bool atomic, Epoch mark,
            const void* place) {
  const uintptr_t address = uintptr_t(pointer);
  const auto [cells, owner] = find_cells(address, bytes, kind, place);
  if (cells == nullptr) return;
  const uintptr_t offset = owner ? address - uintptr_t(owner->shared) : 0;
  if (owner && !atomic && offset < owner->barriers_end && offset + bytes > owner->barriers_begin)
    for (uintptr_t b = offset & ~uintptr_t(7); b < offset + bytes; b += 8)
      if (owner->barriers.count(b))
        fail_access("barrier", kind, name_of_address(address), ", where an mbarrier lives", place);
  const size_t count = ((address & (kCellBytes - 1)) + bytes + kCellBytes - 1) / kCellBytes;
  const auto race = [&, cells = cells](const Cell& cell, Epoch earlier, const char* did,
                                       uint32_t earlier_place) {
    fail_access(
        "data race", kind, name_of_address(address + (&cell - cells) * kCellBytes),
        std::string(", unordered with ") + name_of_epoch(earlier, earlier_place) + ", which " + did,
        place);
  };
  for (Cell* cell = cells; cell < cells + count; ++cell) {
    if (cell->write && !compatible(cell->write, atomic))
      race(*cell, cell->write, "wrote it", cell->write_place);
    if (kind == Access::kRead) {
      if (!cell->write)
        fail_access("unwritten", kind, name_of_address(address + (cell - cells) * kCellBytes),
                    ", which nobody has written", place);
      add_read(*cell, mark, uint32_t(uintptr_t(place)));
      continue;
    }
    if (cell->read & kValid) {
      if (!compatible(cell->read, atomic)) race(*cell, cell->read, "read it", cell->read_place);
    } else if (cell->read) {
      for (Epoch e : machine.reads[cell->read - 1])
        if (!compatible(e, atomic)) race(*cell, e, "read it", cell->read_place);
    }
    *cell = {mark, atomic ? cell->read : 0, uint32_t(uintptr_t(place)), cell->read_place};
  }
}

void track(const void* address, size_t bytes, Epoch mark) {
  Cell* const cells = find_cells(uintptr_t(address), bytes, Access::kWrite, nullptr).cells;
  for (Cell* cell = cells; cell < cells + bytes / kCellBytes; ++cell)
    if ((cell->write & kNotYet) == kNotYet) cell->write = mark;
}

static void show_overlapping(const void* address, size_t bytes, bool to_all);

static void check_plain(const void* address, size_t bytes, Access kind, const void* place) {
  if (!current) return;
  walk(place);
  access(address, bytes, kind, false, now(*current, false), place);
  if (!machine.stores.empty()) show_overlapping(address, bytes, true);
}

void require_aligned(const void* address, size_t alignment, Access kind, const void* place) {
  if (uintptr_t(address) % alignment)
    fail_access("misaligned", kind, name_of_address(uintptr_t(address)),
                ", not a multiple of " + std::to_string(alignment), place);
}

static void check_aligned(const void* address, size_t bytes, size_t alignment, Access kind,
                          const void* place) {
  if (!current ||
      (uintptr_t(address) >= current->stack_low && uintptr_t(address) < current->stack_high))
    return;
  require_aligned(address, alignment, kind, place);
  check_plain(address, bytes, kind, place);
}

// Relaxed stores to different words may become visible in any order. Each waits in machine.stores
// until the schedule shows it, or until somebody looks who has been told of it, by a barrier say;
// stores to one word keep their order.
void show(size_t which) {
  const RelaxedStore store = machine.stores[which];
  machine.stores.erase(machine.stores.begin() + which);
  memcpy(store.to, store.value, store.bytes);
  machine.naps_since_event = 0;
}

static void show_overlapping(const void* address, size_t bytes, bool to_all) {
  const auto* begin = static_cast<const unsigned char*>(address);
  for (size_t i = 0; i < machine.stores.size();) {
    const RelaxedStore& store = machine.stores[i];
    if (store.to < begin + bytes && begin < store.to + store.bytes &&
        (to_all || has_seen(*current, store.done)))
      show(i);
    else
      ++i;
  }
}

void load_atomic(void* value, const void* address, size_t bytes) {
  const void* place = walk(__builtin_return_address(0));
  poll(place);
  require_aligned(address, bytes, Access::kRead, place);
  access(address, bytes, Access::kRead, true, now(*current, true), place);
  show_overlapping(address, bytes, false);
  memcpy(value, address, bytes);
}

void store_atomic(void* address, const void* value, size_t bytes) {
  const void* place = walk(__builtin_return_address(0));
  preempt();
  require_aligned(address, bytes, Access::kWrite, place);
  access(address, bytes, Access::kWrite, true, now(*current, true), place);
  show_overlapping(address, bytes, true);
  if (machine.stores.size() == 64) show(machine.random.below(64));
  RelaxedStore store{
      static_cast<unsigned char*>(address), {}, unsigned(bytes), now(*current, false)};
  memcpy(store.value, value, bytes);
  machine.stores.push_back(store);
  machine.naps_since_event = 0;
}

void add_atomic(unsigned long long* address, unsigned long long value) {
  const void* place = walk(__builtin_return_address(0));
  preempt();
  require_aligned(address, sizeof *address, Access::kWrite, place);
  access(address, sizeof *address, Access::kRead, true, now(*current, true), place);
  access(address, sizeof *address, Access::kWrite, true, now(*current, true), place);
  show_overlapping(address, sizeof *address, true);
  *address += value;
  machine.naps_since_event = 0;
}

void store_aligned(void* address, const void* value, size_t bytes) {
  check_aligned(address, bytes, bytes, Access::kWrite, __builtin_return_address(0));
  memcpy(address, value, bytes);
}

}  // namespace emulator

// ---- what the compiler calls

using namespace emulator;

extern "C" {
void __tsan_init() {}

// gcc also calls the hooks for 16 bytes for two double; where a type wants more than 8,
// -fsanitize=alignment looks.
#define HOOKS(bytes)                                                                             \
  void __tsan_read##bytes(void* p) {                                                             \
    check_aligned(p, bytes, bytes < 8 ? bytes : 8, Access::kRead, __builtin_return_address(0));  \
  }                                                                                              \
  void __tsan_write##bytes(void* p) {                                                            \
    check_aligned(p, bytes, bytes < 8 ? bytes : 8, Access::kWrite, __builtin_return_address(0)); \
  }                                                                                              \
  void __tsan_unaligned_read##bytes(void* p) {                                                   \
    check_plain(p, bytes, Access::kRead, __builtin_return_address(0));                           \
  }                                                                                              \
  void __tsan_unaligned_write##bytes(void* p) {                                                  \
    check_plain(p, bytes, Access::kWrite, __builtin_return_address(0));                          \
  }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)

void __tsan_read_range(void* p, size_t bytes) {
  check_plain(p, bytes, Access::kRead, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t bytes) {
  check_plain(p, bytes, Access::kWrite, __builtin_return_address(0));
}

void* emulated_memcpy(void* to, const void* from, size_t bytes) {
  if (bytes) {
    check_plain(from, bytes, Access::kRead, __builtin_return_address(0));
    check_plain(to, bytes, Access::kWrite, __builtin_return_address(0));
  }
  return memmove(to, from, bytes);
}
void* emulated_memset(void* to, int value, size_t bytes) {
  if (bytes) check_plain(to, bytes, Access::kWrite, __builtin_return_address(0));
  return memset(to, value, bytes);
}
// clang's names for the same
void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
  return emulated_memcpy(to, from, bytes);
}
void* __tsan_memmove(void* to, const void* from, size_t bytes) {
  return emulated_memcpy(to, from, bytes);
}
void* __tsan_memset(void* to, int value, size_t bytes) { return emulated_memset(to, value, bytes); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

// -fsanitize=alignment,bounds,…: what C++ leaves undefined. Also checked on the host, where the
// launcher goes on.
static void undefined(const char* what, const void* place) {
  if (current) fail("undefined", name_of(*current) + ": " + what, place);
  record("undefined", what, place);
}
#define UNDEFINED(name, what) \
  void __ubsan_handle_##name(void*, void*, void*) { undefined(what, __builtin_return_address(0)); }
UNDEFINED(type_mismatch_v1, "a misaligned or null pointer is used")
UNDEFINED(out_of_bounds, "an index outside its array")
UNDEFINED(add_overflow, "signed overflow")
UNDEFINED(sub_overflow, "signed overflow")
UNDEFINED(mul_overflow, "signed overflow")
UNDEFINED(negate_overflow, "signed overflow")
UNDEFINED(divrem_overflow, "a division by zero")
UNDEFINED(shift_out_of_bounds, "a shift by a negative number of bits or by too many")
UNDEFINED(pointer_overflow, "pointer arithmetic leaves the address space")
}
