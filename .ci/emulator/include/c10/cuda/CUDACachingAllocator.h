// Stand-in: the emulated device's memory is the CPU's, see runtime/tensors.cpp.
#pragma once
#include <c10/core/Allocator.h>

namespace c10::cuda::CUDACachingAllocator {
inline Allocator* get() { return GetAllocator(DeviceType::CPU); }
}  // namespace c10::cuda::CUDACachingAllocator
