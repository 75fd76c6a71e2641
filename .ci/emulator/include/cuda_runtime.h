// Stand-in for the CUDA runtime header: the part of it that the CUDA text of model_new.py uses.
// Anything else is a compile error on purpose: add it here together with its meaning in runtime/.
#pragma once
#include <cstddef>
// Also the copies that the compiler makes of its own accord go through the checks of
// runtime/memory.cpp.
extern "C" void* memcpy(void*, const void*, std::size_t) noexcept __asm__("emulated_memcpy");
extern "C" void* memmove(void*, const void*, std::size_t) noexcept __asm__("emulated_memcpy");
extern "C" void* memset(void*, int, std::size_t) noexcept __asm__("emulated_memset");

#include <cmath>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <utility>

#include "emulator.h"

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __maxnreg__(...)
#define __grid_constant__
#define __CUDA_ARCH_LIST__ 10 * emulator::capability()  // as if compiled for the pretended device

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

// Set at each switch of fibres. `const`, since a fibre never sees them change: the compiler may
// keep them.
extern "C" {
extern const uint3 threadIdx, blockIdx;
extern const dim3 blockDim, gridDim;
}

// ---- device functions

using std::isfinite;
using std::signbit;
__forceinline__ double rsqrt(double v) { return 1.0 / std::sqrt(v); }
template <typename T>
__forceinline__ T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
__forceinline__ T max(T a, T b) {
  return a < b ? b : a;
}
__forceinline__ float __uint_as_float(unsigned bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}
__forceinline__ unsigned __umulhi(unsigned a, unsigned b) {
  return unsigned((uint64_t(a) * b) >> 32);
}

__forceinline__ void __stcs(uint4* to, uint4 value) {
  emulator::store_aligned(to, &value, sizeof value);
}
__forceinline__ void __stwb(uint4* to, uint4 value) {
  emulator::store_aligned(to, &value, sizeof value);
}
__forceinline__ void atomicAdd(unsigned long long* to, unsigned long long value) {
  emulator::add_atomic(to, value);
}

__forceinline__ void __syncthreads() { emulator::sync_block(); }
__forceinline__ void __syncwarp() { emulator::sync_warp(); }

template <typename T>
__forceinline__ T __shfl_xor_sync(unsigned mask, T value, int bits) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t word = 0;
  __builtin_memcpy(&word, &value, sizeof(T));
  word = emulator::shuffle(mask, word, emulator::lane() ^ unsigned(bits));
  __builtin_memcpy(&value, &word, sizeof(T));
  return value;
}

// ---- host functions

typedef struct CUstream_st* cudaStream_t;
enum cudaError {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
  cudaErrorCooperativeLaunchTooLarge = 720,
  cudaErrorNotSupported = 801,
};
typedef cudaError cudaError_t;
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
  cudaDevAttrReservedSharedMemoryPerBlock = 111,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative = 2 };
union cudaLaunchAttributeValue {
  int cooperative;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  return cudaError_t(emulator::keep_error(emulator::attribute(which, value)));
}
inline cudaError_t cudaGetLastError() { return cudaError_t(emulator::take_error()); }
inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorLaunchFailure:
      return "unspecified launch failure";
    case cudaErrorCooperativeLaunchTooLarge:
      return "too many blocks in cooperative launch";
    case cudaErrorNotSupported:
      return "operation not supported";
  }
  return "unrecognized error code";
}

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int value) {
  return cudaError_t(emulator::keep_error(
      emulator::set_shared_limit(reinterpret_cast<const void*>(kernel), value)));
}

// The kernel's parameters are copied for each thread, as each GPU thread has its own.
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<std::decay_t<Parameters>...> arguments;
  } const call{kernel, {std::forward<Arguments>(arguments)...}};
  const auto run = [](const void* call) {
    std::apply(static_cast<const Call*>(call)->kernel, static_cast<const Call*>(call)->arguments);
  };
  emulator::Launch launch{config->gridDim.x, config->blockDim.x, config->dynamicSmemBytes, false,
                          reinterpret_cast<const void*>(kernel)};
  bool supported =
      config->gridDim.y * config->gridDim.z * config->blockDim.y * config->blockDim.z == 1;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    supported = supported && attribute.id == cudaLaunchAttributeCooperative;
    launch.cooperative = attribute.val.cooperative;
  }
  return cudaError_t(emulator::keep_error(
      supported ? emulator::launch(launch, run, &call, sizeof call) : cudaErrorNotSupported));
}
