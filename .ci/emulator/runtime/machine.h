// The state of the emulated GPU during one launch. All of its threads are fibres of one OS thread,
// so a seed repeats a run exactly and nothing here needs a lock.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "../include/emulator.h"

namespace emulator {

// ---- who has seen what (memory.cpp)

using Time = uint32_t;

// A vector clock over the threads of one block: up to which of its steps each is known to have
// come; then how many barriers of the grid are known to be complete. What that tells of other
// blocks, the Grid knows.
struct Clock {
  std::vector<Time> at;
  void join(const Clock& other) {
    for (size_t i = 0; i < at.size(); ++i) at[i] = at[i] < other.at[i] ? other.at[i] : at[i];
  }
};

// One step of one thread, packed: 1 valid, 1 atomic, 26 block, 12 thread, 24 time.
using Epoch = uint64_t;
constexpr Epoch kValid = 1ull << 63, kAtomic = 1ull << 62;
constexpr Epoch kBeforeLaunch = kValid;  // time 0: everyone has seen it
// a copy that its thread has not awaited yet: nobody has seen it
constexpr Time kNotYet = (1u << 24) - 1;
constexpr unsigned kMaxBlocks = 1u << 26;

// The history of two neighbouring bytes, the smallest element that a kernel handles.
struct Cell {
  Epoch write;  // the last one; 0: nobody has written
  Epoch read;   // the last one, or (not kValid) 1 + an index into `reads`: several, unordered
  uint32_t write_place, read_place;  // low half of the return address
};
constexpr unsigned kCellBytes = 2;

struct Range {  // a tensor or scratch memory
  uintptr_t begin, end;
  // fresh: allocated by the operator, so unwritten until the kernel (or the host) writes
  bool writable, fresh;
  std::string name;
  std::vector<Cell> cells;
};

// ---- threads

enum class State : uint8_t { kReady, kNapping, kBlocked, kFinished };

struct Block;
struct Fibre {
  void* stack_pointer;
  uintptr_t stack_low, stack_high;
  Block* block;
  unsigned thread;
  State state = State::kReady;
  const char* waits_for = "";  // when blocked: what, and at which place of the text
  const void* place = nullptr;
  const void* barrier = nullptr;
  unsigned parity = 0;
  uint64_t result = 0;  // what a shuffle brought
  Clock clock;
  struct Copy {
    unsigned char* to;
    const unsigned char* from;
  };
  std::vector<Copy> copies;    // of 16 bytes, that it has not awaited yet
  std::vector<size_t> groups;  // how many of them there were at each cp_async_commit_group
  unsigned arrivals = 0;       // at barriers of the grid
  bool arrived = false;        // ... and has not waited since
};

struct Rendezvous {  // of the lanes of one warp
  const char* operation;
  unsigned mask, arrived;
  uint64_t value[32], argument[32];
};

struct Mbarrier {
  unsigned arrivals, pending;  // per phase; still missing in this one
  uint64_t phase = 0;
  // what those who arrived in this phase, and up to the last one, had seen
  Clock gathering, completed;
  Epoch initialised;
  std::vector<Fibre*> waiting;
};

struct Grid {                        // its barrier
  unsigned arrived = 0, passed = 0;  // threads at this barrier; barriers before it
  unsigned fewest = ~0u;             // arrivals of a thread that has returned
  // What is known of each block to those who arrived so far; to those behind the last barrier and
  // behind the one before, from which some threads may not have come back.
  std::vector<Clock> gathering, published[2];
  std::vector<Fibre*> waiting;
};

struct Block {
  unsigned index, slot;
  unsigned char* shared;
  std::vector<Fibre> fibres;
  unsigned finished = 0, at_barrier = 0;
  std::vector<std::vector<Rendezvous>> meetings;    // per warp
  std::unordered_map<uint32_t, Mbarrier> barriers;  // by offset in shared memory
  uint32_t barriers_begin = ~0u, barriers_end = 0;
  std::vector<Cell> cells;  // of its shared memory
};

struct RelaxedStore {  // done, but not yet seen by those whom nothing has told
  unsigned char* to;
  unsigned char value[16];
  unsigned bytes;
  Epoch done;
};

// ---- the machine

struct Device {
  int multiprocessors = 3, shared_bytes = 16 * 1024, capability = 90;
  int usable = 3;  // multiprocessors that launches get: a green context, say, has a part of them
};

struct Random {  // splitmix64
  uint64_t state;
  uint64_t next() {
    uint64_t z = (state += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
  uint64_t below(uint64_t bound) { return next() % bound; }
};

struct Machine {
  Device device;
  Launch launch{};
  uintptr_t arguments_begin, arguments_end;   // of the kernel, which every thread copies
  std::vector<std::unique_ptr<Block>> slots;  // the resident blocks
  Grid grid;
  std::vector<RelaxedStore> stores;
  std::vector<std::vector<Epoch>> reads;
  Random random{0};
  uint64_t naps_since_event = 0;  // an event: something a polling thread may wait for
};
extern Machine machine;
extern Fibre* current;  // the running fibre; null on the host

// runtime.cpp
// the first is reported
void record(const char* detector, const std::string& what, const void* place);
[[noreturn]] void fail(const char* detector, const std::string& what, const void* place);
constexpr size_t kSharedRoom = 256 * 1024;
unsigned char* shared_of(unsigned slot);
std::string name_of(const Fibre& fibre);
std::string name_of(const void* place);
void make_ready(Fibre& fibre);
// until another fibre makes this one ready
void block_on(const char* waits_for, const void* place);
void preempt();                // another fibre may run here
void poll(const void* place);  // ... and must, if this one has looked at memory in vain for long
void show(size_t store);       // memory.cpp: machine.stores[store] becomes visible to all

// memory.cpp
enum class Access { kRead, kWrite };
void reset_cells(Range& range);
void access(const void* address, size_t bytes, Access kind, bool atomic, Epoch mark,
            const void* place);
void require_aligned(const void* address, size_t alignment, Access kind, const void* place);
Epoch now(const Fibre& fibre, bool atomic);
Epoch epoch(const Block& block, unsigned thread, Time time, bool atomic);
bool has_seen(const Fibre& fibre, Epoch epoch);
// copied bytes: somebody will have seen them, from now on
void track(const void* address, size_t bytes, Epoch mark);
void poison(void* address, size_t bytes);
std::vector<Range>& ranges();

// Acquire: what `source` knows, the running fibre knows. Release: the other way round; later steps
// of it are new.
void acquire(const Clock& source);
void release(Clock& target);

}  // namespace emulator
