// Launches, fibres, the schedule, and the barriers of warp, block and grid.
#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <utility>

#include "machine.h"

// Saves the registers that a callee must keep, changes stacks, restores. (swapcontext would enter
// the kernel.)
extern "C" void emulator_switch(void** save_stack_pointer, void* load_stack_pointer);
#if defined(__x86_64__)
__asm__(R"(
.text
.globl emulator_switch
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, .-emulator_switch
)");
constexpr size_t kSavedWords = 6, kReturnWord = 6;  // from the stack pointer upwards
#elif defined(__aarch64__)
__asm__(R"(
.text
.globl emulator_switch
.type emulator_switch, %function
emulator_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size emulator_switch, .-emulator_switch
)");
constexpr size_t kSavedWords = 20, kReturnWord = 11;
#else
#error "the emulator knows how to switch stacks on x86-64 and aarch64 only"
#endif

extern "C" {
uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;
}

namespace emulator {

Machine machine;
Fibre* current;

enum Policy { kRoundRobin, kRandom, kStarve, kLastFirst };
static Policy policy;
static uint64_t seed, launches;
static void (*body)(const void*);
static const void* body_arguments;
static unsigned next_block, blocks_left;
static std::vector<unsigned> block_order;
static void* host_stack_pointer;
static std::string error;  // of the first detector that fired since it was last taken
static std::map<const void*, int> shared_limits;
static int last_error;  // that the runtime keeps for cudaGetLastError

// ---- who runs next

// A fibre that can run waits here under a key; the smallest key runs. A policy is a way to choose
// keys.
struct Ready {
  uint64_t key;
  Fibre* fibre;
  // std::push_heap keeps the largest in front
  bool operator<(const Ready& other) const { return key > other.key; }
};
static std::vector<Ready> ready;
static std::vector<Fibre*> napping;
static uint64_t sequence;
constexpr uint64_t kStarved = 1ull << 62;
// kStarve: this lane of this warp of this block; negative: every
static struct {
  int block, warp, lane;
} victim;
static uint64_t shuffle_window;  // kRandom: how far a fibre may fall behind its turn

static bool is_victim(const Fibre& fibre) {
  return policy == kStarve && (victim.block < 0 || int(fibre.block->index) == victim.block) &&
         (victim.warp < 0 || int(fibre.thread / 32) == victim.warp) &&
         (victim.lane < 0 || int(fibre.thread % 32) == victim.lane);
}

static uint64_t key_of(const Fibre& fibre) {
  switch (policy) {
    case kRoundRobin:
      return sequence++;
    case kRandom:
      return sequence++ + machine.random.below(shuffle_window);
    case kStarve:
      return sequence++ + (is_victim(fibre) ? kStarved : 0);
    case kLastFirst:
      return kStarved - (uint64_t(fibre.block->index) << 16 | fibre.thread);
  }
  return 0;
}

void make_ready(Fibre& fibre) {
  fibre.state = State::kReady;
  ready.push_back({key_of(fibre), &fibre});
  std::push_heap(ready.begin(), ready.end());
}

static void wake(size_t which) {
  std::swap(napping[which], napping.back());
  Fibre* fibre = napping.back();
  napping.pop_back();
  make_ready(*fibre);
}

[[noreturn]] static void report_deadlock();

// Picks the next fibre. Stores become visible, and napping threads look again, mostly when nothing
// else can happen.
static Fibre* next_fibre() {
  Machine& m = machine;
  for (;;) {
    if (!m.stores.empty() && m.random.below(64) == 0) show(m.random.below(m.stores.size()));
    if (!napping.empty() && m.random.below(64) == 0) wake(m.random.below(napping.size()));
    if (!ready.empty()) {
      std::pop_heap(ready.begin(), ready.end());
      Fibre* fibre = ready.back().fibre;
      ready.pop_back();
      return fibre;
    }
    // In vain: each thread has looked so often since anything has changed.
    const bool in_vain = m.naps_since_event > 1000 + 64 * m.slots.size() * m.launch.threads;
    const bool may_wake = !napping.empty() && !in_vain;
    if (!m.stores.empty() && (!may_wake || m.random.below(2))) {
      show(m.random.below(m.stores.size()));
    } else if (may_wake) {
      while (!napping.empty()) wake(napping.size() - 1);
    } else {
      report_deadlock();
    }
  }
}

static void run(Fibre* fibre) {
  Fibre* from = current;
  if (fibre == from) return;
  current = fibre;
  threadIdx = {fibre->thread, 0, 0};
  blockIdx = {fibre->block->index, 0, 0};
  emulator_switch(from ? &from->stack_pointer : &host_stack_pointer, fibre->stack_pointer);
}

static void leave_to_host() {
  void* abandoned;
  current = nullptr;
  emulator_switch(&abandoned, host_stack_pointer);
}

void block_on(const char* waits_for, const void* place) {
  current->state = State::kBlocked;
  current->waits_for = waits_for;
  current->place = place;
  run(next_fibre());
}

void preempt() {
  if (policy == kRandom && machine.random.below(2)) return;
  make_ready(*current);
  run(next_fibre());
}

static void sleep(const void* place) {
  current->state = State::kNapping;
  current->waits_for = "polling";
  current->place = place;
  ++machine.naps_since_event;
  napping.push_back(current);
  run(next_fibre());
}

void nanosleep() { sleep(__builtin_return_address(0)); }

void poll(const void* place) {
  if (++machine.naps_since_event % 8)
    preempt();
  else
    sleep(place);
}

// ---- errors

std::string name_of(const Fibre& fibre) {
  return "thread " + std::to_string(fibre.thread) + " of block " +
         std::to_string(fibre.block->index);
}

// "[library+0xoffset]", which emulator_end turns into a line of the CUDA text.
std::string name_of(const void* place) {
  Dl_info object;
  if (!place || !dladdr(place, &object)) return "an unknown place";
  char text[32];
  snprintf(text, sizeof text, "+0x%zx]", size_t(uintptr_t(place) - uintptr_t(object.dli_fbase)));
  return std::string("[") + object.dli_fname + text;
}

static const char* const kPolicyNames[] = {"round_robin", "random", "starve", "last_first"};

struct Failed {};  // from the host's own stack; a fibre is left behind instead

void record(const char* detector, const std::string& what, const void* place) {
  if (error.empty()) {
    const Device& d = machine.device;
    error = std::string("emulator: ") + detector + ": " + what +
            (place ? "\n  at " + name_of(place) : "") + "\n  seed " + std::to_string(seed) +
            ", policy " + kPolicyNames[policy] + ", launch " + std::to_string(launches) +
            " since set_schedule; device: " + std::to_string(d.multiprocessors) +
            " multiprocessors, " + std::to_string(d.shared_bytes) +
            " bytes of shared memory, capability " + std::to_string(d.capability / 10) + "." +
            std::to_string(d.capability % 10);
  }
}

void fail(const char* detector, const std::string& what, const void* place) {
  record(detector, what, place);
  if (current == nullptr) throw Failed();
  leave_to_host();
  __builtin_unreachable();
}

// One line for each group of neighbouring threads that wait alike.
static void report_deadlock() {
  std::string text = "no thread can go on:";
  for (const auto& block : machine.slots) {
    if (!block) continue;
    std::string previous;
    unsigned first = 0, last = 0;
    const auto flush = [&] {
      if (!previous.empty())
        text += "\n    block " + std::to_string(block->index) + ", threads " +
                std::to_string(first) + " to " + std::to_string(last) + ": " + previous;
    };
    for (const Fibre& fibre : block->fibres) {
      std::string now = "finished";
      if (fibre.state != State::kFinished)
        now = std::string(fibre.waits_for) + " at " + name_of(fibre.place);
      if (fibre.state == State::kBlocked && !strcmp(fibre.waits_for, "mbarrier_wait")) {
        const unsigned offset = unsigned(uintptr_t(fibre.barrier) - uintptr_t(block->shared));
        const Mbarrier& b = block->barriers.at(offset);
        now += " on shared memory + " + std::to_string(offset) + " for parity " +
               std::to_string(fibre.parity) + " (in phase " + std::to_string(b.phase) + ", " +
               std::to_string(b.pending) + " of " + std::to_string(b.arrivals) +
               " arrivals missing)";
      }
      const Grid& grid = machine.grid;
      if (fibre.state == State::kBlocked && fibre.arrivals > grid.passed)
        now += " (" + std::to_string(grid.arrived) + " of " +
               std::to_string(machine.launch.blocks * machine.launch.threads) +
               " threads have arrived at the grid's barrier)";
      if (now != previous) {
        flush();
        previous = now;
        first = fibre.thread;
      }
      last = fibre.thread;
    }
    flush();
  }
  fail("deadlock", text, nullptr);
}

// ---- barriers

// Everyone in the block has now seen what everyone else had seen.
static void merge_clocks(Block& block) {
  Clock all = block.fibres[0].clock;
  for (Fibre& fibre : block.fibres) {
    // nobody knows more of a thread than itself
    all.at[fibre.thread] = fibre.clock.at[fibre.thread]++;
    all.at.back() = std::max(all.at.back(), fibre.clock.at.back());
  }
  for (Fibre& fibre : block.fibres) {
    const Time own = fibre.clock.at[fibre.thread];
    fibre.clock = all;
    fibre.clock.at[fibre.thread] = own;
  }
}

void sync_block() {
  const void* place = __builtin_return_address(0);
  Block& block = *current->block;
  if (block.finished)
    fail("barrier", name_of(*current) + " reaches __syncthreads after other threads have returned",
         place);
  if (++block.at_barrier < machine.launch.threads) return block_on("__syncthreads", place);
  block.at_barrier = 0;
  merge_clocks(block);
  for (Fibre& fibre : block.fibres)
    if (&fibre != current) make_ready(fibre);
  preempt();
}

// What a thread does between its arrival and its wait is ordered before nobody's code behind this
// barrier.
void grid_arrive() {
  const void* place = __builtin_return_address(0);
  if (!machine.launch.cooperative)
    fail("barrier", "a barrier of the grid in a launch that is not cooperative", place);
  preempt();
  Fibre& fibre = *current;
  Grid& grid = machine.grid;
  if (fibre.arrived)
    fail("barrier", name_of(fibre) + " arrives twice at the grid's barrier without a wait", place);
  if (fibre.arrivals >= grid.fewest)
    fail("barrier",
         name_of(fibre) + " reaches the grid's barrier after other threads have returned", place);
  if (grid.gathering.empty())
    grid.gathering.assign(machine.launch.blocks, Clock{std::vector<Time>(fibre.clock.at.size())});
  release(grid.gathering[fibre.block->index]);
  fibre.arrived = true;
  ++fibre.arrivals;
  if (++grid.arrived < machine.launch.blocks * machine.launch.threads) return;
  grid.arrived = 0;
  ++grid.passed;
  for (Clock& clock : grid.gathering) clock.at.back() = grid.passed;
  grid.published[grid.passed & 1] = grid.gathering;
  for (Fibre* waiting : grid.waiting) make_ready(*waiting);
  grid.waiting.clear();
}

void grid_wait() {
  const void* place = __builtin_return_address(0);
  preempt();
  Fibre& fibre = *current;
  Grid& grid = machine.grid;
  if (!fibre.arrived)
    fail("barrier", name_of(fibre) + " waits at the grid's barrier without having arrived", place);
  if (grid.passed < fibre.arrivals) {
    grid.waiting.push_back(&fibre);
    block_on("grid.barrier_wait", place);
  }
  fibre.arrived = false;
  acquire(grid.published[grid.passed & 1][fibre.block->index]);
}

// Lanes of a warp meet: each brings a value and an argument; the last one to come serves them all
// by `finish`.
template <typename Finish>
static void meet(const char* operation, unsigned mask, uint64_t value, uint64_t argument,
                 const void* place, Finish finish) {
  Block& block = *current->block;
  const unsigned warp = current->thread / 32, first = warp * 32, me = current->thread % 32;
  const unsigned lanes = std::min(32u, machine.launch.threads - first);
  if (lanes < 32) mask &= (1u << lanes) - 1;
  if (!(mask >> me & 1))
    fail("warp", name_of(*current) + " calls " + operation + " without being in its mask", place);
  auto& meetings = block.meetings[warp];
  auto meeting = std::find_if(meetings.begin(), meetings.end(),
                              [&](const Rendezvous& r) { return (r.mask & mask) != 0; });
  if (meeting == meetings.end()) {
    for (unsigned lane = 0; lane < lanes; ++lane)
      if ((mask >> lane & 1) && block.fibres[first + lane].state == State::kFinished)
        fail("warp",
             name_of(*current) + " calls " + operation + " with lane " + std::to_string(lane) +
                 ", which has returned",
             place);
    meeting = meetings.insert(meetings.end(), Rendezvous{operation, mask, 0, {}, {}});
  }
  if (meeting->mask != mask || strcmp(meeting->operation, operation))
    fail("warp",
         name_of(*current) + " calls " + operation + " while other lanes of its warp wait in " +
             meeting->operation,
         place);
  meeting->arrived |= 1u << me;
  meeting->value[me] = value;
  meeting->argument[me] = argument;
  if (meeting->arrived != mask) return block_on(operation, place);
  const Rendezvous done = *meeting;
  meetings.erase(meeting);
  finish(done, &block.fibres[first]);
  for (unsigned lane = 0; lane < lanes; ++lane)
    if ((mask >> lane & 1) && lane != me) make_ready(block.fibres[first + lane]);
  preempt();
}

void sync_warp() {
  meet("__syncwarp", ~0u, 0, 0, __builtin_return_address(0), [](const Rendezvous& r, Fibre* lanes) {
    Clock all = current->clock;
    for (unsigned i = 0; i < 32; ++i)
      if (r.mask >> i & 1) all.join(lanes[i].clock);
    for (unsigned i = 0; i < 32; ++i) {
      if (!(r.mask >> i & 1)) continue;
      const Time own = lanes[i].clock.at[lanes[i].thread] + 1;
      lanes[i].clock = all;
      lanes[i].clock.at[lanes[i].thread] = own;
    }
  });
}

uint64_t shuffle(unsigned mask, uint64_t value, unsigned from_lane) {
  const void* place = __builtin_return_address(0);
  meet("__shfl_sync", mask, value, from_lane, place, [place](const Rendezvous& r, Fibre* lanes) {
    for (unsigned i = 0; i < 32; ++i) {
      if (!(r.mask >> i & 1)) continue;
      if (!(r.mask >> (r.argument[i] & 31) & 1))
        fail("warp",
             name_of(lanes[i]) + " shuffles from lane " + std::to_string(r.argument[i]) +
                 ", which is not in the mask",
             place);
      lanes[i].result = r.value[r.argument[i] & 31];
    }
  });
  return current->result;
}

unsigned lane() { return current->thread % 32; }
unsigned char* shared_memory() { return current->block->shared; }

// ---- fibres and blocks

constexpr size_t kStackBytes = 64 * 1024, kGuardBytes = 4096;

// Stacks and shared memory are mapped once and kept, each behind an unmapped page.
static char* mapping(std::vector<char*>& pool, size_t index, size_t bytes) {
  while (pool.size() <= index) {
    char* memory = static_cast<char*>(mmap(nullptr, bytes + kGuardBytes, PROT_NONE,
                                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (memory == MAP_FAILED || mprotect(memory + kGuardBytes, bytes, PROT_READ | PROT_WRITE) != 0)
      abort();
    pool.push_back(memory + kGuardBytes);
  }
  return pool[index];
}

unsigned char* shared_of(unsigned slot) {
  static std::vector<char*> pool;
  return reinterpret_cast<unsigned char*>(mapping(pool, slot, kSharedRoom));
}

static void fibre_main() {
  body(body_arguments);
  Fibre& fibre = *current;
  Block& block = *fibre.block;
  if (!fibre.copies.empty())
    fail("barrier", name_of(fibre) + " returns with copies that no wait has awaited", nullptr);
  if (block.at_barrier)
    fail("barrier", name_of(fibre) + " returns while other threads wait at __syncthreads", nullptr);
  Grid& grid = machine.grid;
  grid.fewest = std::min(grid.fewest, fibre.arrivals);
  if (grid.arrived > 0 && grid.fewest <= grid.passed)
    fail("barrier", name_of(fibre) + " returns while other threads are at the grid's barrier",
         nullptr);
  fibre.state = State::kFinished;
  machine.naps_since_event = 0;
  // which cleans up, then runs the others
  if (++block.finished == machine.launch.threads) leave_to_host();
  run(next_fibre());
}

static void start_block(unsigned slot, unsigned index) {
  static std::vector<char*> stacks;
  const Launch& launch = machine.launch;
  machine.slots[slot] = std::make_unique<Block>();
  Block& block = *machine.slots[slot];
  block.index = index;
  block.slot = slot;
  block.shared = shared_of(slot);
  poison(block.shared, launch.shared_bytes);
  block.cells.assign((launch.shared_bytes + kCellBytes - 1) / kCellBytes, Cell{});
  block.meetings.resize((launch.threads + 31) / 32);
  block.fibres.resize(launch.threads);
  for (unsigned thread = 0; thread < launch.threads; ++thread) {
    Fibre& fibre = block.fibres[thread];
    fibre.block = &block;
    fibre.thread = thread;
    fibre.clock.at.assign(launch.threads + 1, 0);
    fibre.clock.at[thread] = 1;
    char* low = mapping(stacks, slot * launch.threads + thread, kStackBytes);
    // Staggered, or the hot ends of all stacks would compete for the same lines of the cache.
    auto** top = reinterpret_cast<void**>(low + kStackBytes - 64 * (1 + thread % 32));
    *--top = nullptr;
    void** stack = top - kSavedWords - (kReturnWord == kSavedWords ? 1 : 0);
    memset(stack, 0, kSavedWords * sizeof(void*));
    stack[kReturnWord] = reinterpret_cast<void*>(fibre_main);
    fibre.stack_pointer = stack;
    fibre.stack_low = uintptr_t(low);
    fibre.stack_high = uintptr_t(low) + kStackBytes;
    make_ready(fibre);
  }
}

static void finish_block(Block& block) {
  --blocks_left;
  const unsigned slot = block.slot;
  machine.slots[slot].reset();
  if (next_block < block_order.size()) start_block(slot, block_order[next_block++]);
}

// ---- launches

// at a time: each has a stack of its own, and the host counts mappings
constexpr unsigned kMaxThreads = 24 * 1024;

// by the system, of each block
static int reserved_bytes() { return machine.device.capability < 80 ? 0 : 1024; }

// Blocks of the launch that are resident at once. Registers, which nobody counts here, are enough
// for 1152 threads of a multiprocessor, as a kernel with 56 of them leaves room for.
static unsigned resident_blocks(const Launch& launch) {
  const Device& device = machine.device;
  const unsigned bytes = unsigned(launch.shared_bytes + 127) / 128 * 128 + reserved_bytes(),
                 warps = (launch.threads + 31) / 32;
  const unsigned by_shared = unsigned(device.shared_bytes + reserved_bytes()) / std::max(bytes, 1u);
  return unsigned(device.usable) * std::max(1u, std::min(by_shared, 36 / warps));
}

int launch(const Launch& launch, void (*launch_body)(const void*), const void* arguments,
           size_t argument_bytes) {
  const Device& device = machine.device;
  const auto limit = shared_limits.find(launch.kernel);
  if (launch.blocks == 0 || launch.threads == 0 || launch.threads > 1024) return 9;
  if (launch.shared_bytes > size_t(limit == shared_limits.end()
                                       ? std::min(device.shared_bytes, 48 * 1024)
                                       : limit->second))
    return 1;
  unsigned resident = resident_blocks(launch);
  if (launch.cooperative && launch.blocks > resident) {
    if (device.usable == device.multiprocessors)
      record("host",
             "a cooperative launch of " + std::to_string(launch.blocks) + " blocks, room for " +
                 std::to_string(resident) + " on the device as it says it is",
             nullptr);
    return 720;
  }
  if (!error.empty()) return 719;
  ++launches;
  if (launch.blocks >= kMaxBlocks)
    record("limit", "more blocks than the emulator can number", nullptr);
  resident = std::min({resident, launch.blocks, kMaxThreads / launch.threads});
  if (launch.cooperative && launch.blocks > resident)
    record("limit", "more resident threads than the emulator has stacks for", nullptr);

  machine.launch = launch;
  machine.arguments_begin = uintptr_t(arguments);
  machine.arguments_end = uintptr_t(arguments) + argument_bytes;
  machine.random = {seed * 0x9e3779b97f4a7c15ull + launches};
  machine.slots.clear();
  machine.slots.resize(resident);
  machine.grid = Grid{};
  machine.stores.clear();
  machine.reads.clear();
  machine.naps_since_event = 0;
  for (Range& range : ranges()) reset_cells(range);
  ready.clear();
  napping.clear();
  sequence = 0;
  Random& random = machine.random;
  shuffle_window = random.below(2) ? 64 : 1 << 20;
  victim = {int(random.below(launch.blocks)), int(random.below((launch.threads + 31) / 32)), -1};
  switch (random.below(5)) {
    case 0:
      victim.block = -1;
      break;
    case 1:
      victim.warp = -1;
      break;
    case 2:
      victim.lane = int(random.below(32));
      break;
    case 3:
      victim.lane = int(random.below(32)), victim.warp = 0;  // the warp with most to do alone
  }
  block_order.resize(launch.blocks);
  for (unsigned i = 0; i < launch.blocks; ++i) block_order[i] = i;
  if (policy != kRoundRobin)
    for (size_t i = launch.blocks; i > 1; --i)
      std::swap(block_order[i - 1], block_order[random.below(i)]);
  next_block = resident;
  blocks_left = launch.blocks;
  body = launch_body;
  body_arguments = arguments;
  blockDim = dim3(launch.threads);
  gridDim = dim3(launch.blocks);
  for (unsigned slot = 0; slot < resident; ++slot) start_block(slot, block_order[slot]);
  while (blocks_left > 0 && error.empty()) {
    try {
      run(next_fibre());
      for (auto& block : machine.slots)
        if (block && block->finished == launch.threads) finish_block(*block);
    } catch (const Failed&) {
    }
  }
  machine.slots.clear();
  while (!machine.stores.empty()) show(0);
  return error.empty() ? 0 : 719;
}

int attribute(int which, int* value) {
  const Device& device = machine.device;
  const std::map<int, int> values = {{16, device.multiprocessors},
                                     {75, device.capability / 10},
                                     {76, device.capability % 10},
                                     {97, device.shared_bytes},
                                     {111, reserved_bytes()}};
  const auto found = values.find(which);
  if (found == values.end()) return 801;
  *value = found->second;
  return 0;
}

int set_shared_limit(const void* kernel, int bytes) {
  if (bytes > machine.device.shared_bytes) return 1;
  if (bytes < machine.device.shared_bytes)
    record("host",
           "a kernel's limit of shared memory below the device's: a launch by another thread may "
           "need more",
           nullptr);
  shared_limits[kernel] = bytes;
  return 0;
}

int capability() { return machine.device.capability; }

int keep_error(int error) { return error ? last_error = error : 0; }
int take_error() { return std::exchange(last_error, 0); }

// ---- what emulate.py calls, through ctypes

static bool in_call;

// The line of the CUDA text that was compiled to the code at `place`, "[library+0xoffset]"; "" if
// nobody knows.
static std::string line_of(const std::string& place) {
  const size_t plus = place.rfind('+');
  // A return address: the call is just before it. With -i, innermost first; the first in the text
  // is the place.
  const std::string before = std::to_string(std::stoull(place.substr(plus + 3), nullptr, 16) - 1);
  const std::string command = "addr2line -i -e '" + place.substr(1, plus - 1) + "' $(printf %x " +
                              before + ") 2> /dev/null";
  FILE* const found = popen(command.c_str(), "r");
  char text[4096];
  std::string line;
  while (found && fgets(text, sizeof text, found)) {
    const std::string at = text;
    const size_t name = at.find("-cuda.cpp:");
    if (name == std::string::npos || !line.empty()) continue;
    const int number = atoi(at.c_str() + name + strlen("-cuda.cpp:"));
    std::ifstream source(at.substr(0, name) + "-cuda.cpp");
    for (int i = 0; i < number; ++i) std::getline(source, line);
    line = "line " + std::to_string(number) + " `" + line.substr(line.find_first_not_of(' ')) + "`";
  }
  if (found) pclose(found);
  return line;
}

static std::string with_lines(std::string text) {
  for (size_t from = text.find("[/"); from != std::string::npos; from = text.find("[/", from + 1)) {
    const size_t bytes = text.find(']', from) - from + 1;
    const std::string line = line_of(text.substr(from, bytes));
    if (!line.empty()) text.replace(from, bytes, line);
  }
  return text;
}

extern "C" {
void emulator_set_device(int multiprocessors, int shared_bytes, int capability, int usable) {
  machine.device = {multiprocessors, shared_bytes, capability, usable};
  shared_limits.clear();
}

void emulator_set_schedule(uint64_t new_seed, int new_policy) {
  seed = new_seed;
  policy = Policy(new_policy);
  launches = 0;
}

// A call of the operator: kernels may touch the ranges exposed for it and what it allocates.
void emulator_begin() {
  ranges().clear();
  error.clear();
  in_call = true;
}

void emulator_expose(uintptr_t address, size_t bytes, int writable, int fresh, const char* name) {
  if (!in_call || bytes == 0) return;
  Range range{address, address + bytes, writable != 0, fresh != 0, name, {}};
  auto& all = ranges();
  all.insert(std::upper_bound(all.begin(), all.end(), range,
                              [](const Range& a, const Range& b) { return a.begin < b.begin; }),
             std::move(range));
}

int emulator_in_call() { return in_call; }

// Memory that the operator frees before it returns: a kernel that still runs on a GPU may use it no
// more than others.
void emulator_conceal(uintptr_t address) {
  auto& all = ranges();
  all.erase(
      std::remove_if(all.begin(), all.end(), [&](const Range& r) { return r.begin == address; }),
      all.end());
}

const char* emulator_end() {
  in_call = false;
  ranges().clear();
  if (take_error())
    record("host", "the launch leaves an error, which a later call of someone else would raise",
           nullptr);
  error = with_lines(error);
  return error.c_str();
}
}

}  // namespace emulator
