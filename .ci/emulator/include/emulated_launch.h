// Between the C++ text and the CUDA text: each launch runs under the detectors, which know the
// call's tensors by name, and what they find is the launch's error. Included behind the C++ text,
// in which `fused_batch_norm_launch` is `emulated_launch`.
#pragma once
#undef fused_batch_norm_launch
#include <algorithm>

namespace emulator {
void poison(void* address, size_t bytes);
}

extern "C" {
const char* fused_batch_norm_launch(const FusedBatchNormCall* call,
                                    void* (*allocate)(size_t, void*), void* context, void* stream);
void emulator_begin();
void emulator_expose(uintptr_t address, size_t bytes, int writable, int fresh, const char* name);
const char* emulator_end();

const char* emulated_launch(const FusedBatchNormCall* call, void* (*allocate)(size_t, void*),
                            void* context, void* stream) {
  const size_t item = call->dtype == 3   ? 8
                      : call->dtype == 0 ? 4
                                         : 2,
               wide = std::max<size_t>(item, 4);
  const size_t elements = call->N * call->C * call->HW, saved = call->training ? call->C * wide : 0;
  const auto input = [](const void* memory, size_t bytes, bool writable, const char* name) {
    if (memory) emulator_expose(uintptr_t(memory), bytes, writable, 0, name);
  };
  const auto output = [](void* memory, size_t bytes, const char* name) {
    emulator::poison(memory, bytes);
    emulator_expose(uintptr_t(memory), bytes, 1, 1, name);
  };
  emulator_begin();
  // what shares a 16-byte vector with x's first may be read
  const size_t before = uintptr_t(call->x) % 16;
  input(static_cast<const char*>(call->x) - before, before + elements * item, false, "x");
  input(call->gamma, call->C * (call->affine_float ? 4 : item), false, "gamma");
  input(call->beta, call->C * (call->affine_float ? 4 : item), false, "beta");
  input(call->running_mean, call->C * (call->running_float ? 4 : item), call->training,
        "running_mean");
  input(call->running_var, call->C * (call->running_float ? 4 : item), call->training,
        "running_var");
  input(call->num_batches_tracked, 8, call->training, "num_batches_tracked");
  output(call->y, elements * item, "y");
  output(call->mean, saved, "mean");
  output(call->inv_std, saved, "inv_std");
  const char* error = fused_batch_norm_launch(call, allocate, context, stream);
  const char* found = emulator_end();
  return *found ? found : error;
}
}
