// The CPU allocator of torch while an operator runs: fresh memory is poisoned, known to the
// detectors by its own name and kept apart from its neighbours, as scratch memory and outputs of a
// GPU come with unknown content.
#include <c10/core/Allocator.h>

#include <cstdlib>
#include <string>

#include "machine.h"

extern "C" {
int emulator_in_call();
void emulator_expose(uintptr_t address, size_t bytes, int writable, int fresh, const char* name);
void emulator_conceal(uintptr_t address);
}

namespace {

constexpr size_t kGap = 4096;

void release(void* memory) {
  emulator_conceal(uintptr_t(memory));
  std::free(static_cast<char*>(memory) - kGap);
}

struct Allocator final : c10::Allocator {
  c10::Allocator* usual = c10::GetAllocator(c10::DeviceType::CPU);
  int count = 0;

  c10::DataPtr allocate(size_t bytes) override {
    if (!emulator_in_call()) return usual->allocate(bytes);
    char* memory =
        static_cast<char*>(std::aligned_alloc(kGap, (bytes + 3 * kGap - 1) / kGap * kGap));
    TORCH_CHECK(memory != nullptr, "the emulator is out of memory");
    memory += kGap;
    emulator::poison(memory, bytes);
    const std::string name =
        "memory of " + std::to_string(bytes) + " bytes that the operator allocated";
    emulator_expose(uintptr_t(memory), bytes, 1, 1, name.c_str());
    return {memory, memory, &release, c10::Device(c10::DeviceType::CPU)};
  }
  // of what other libraries allocate
  c10::DeleterFnPtr raw_deleter() const override { return usual->raw_deleter(); }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

}  // namespace

extern "C" void emulator_watch_allocations() {
  static Allocator allocator;
  c10::SetAllocator(c10::DeviceType::CPU, &allocator);
}
