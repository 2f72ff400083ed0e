// CUDA's language on the host, as far as platform.cuh promises it. Threads are fibers, run one at a time, in an order
// that the seed chooses; see scheduler.cpp. Not thread-safe in itself: a lock lets one launch run at a time.
#pragma once

#include <math.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)
// __shared__ is missing on purpose: shared memory is dynamic_shared<T>().

// Vectors and shapes.
struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
constexpr int2 make_int2(int x, int y) {
  return {x, y};
}
constexpr int4 make_int4(int x, int y, int z, int w) {
  return {x, y, z, w};
}
constexpr uint2 make_uint2(unsigned x, unsigned y) {
  return {x, y};
}
constexpr uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}
constexpr float2 make_float2(float x, float y) {
  return {x, y};
}
constexpr float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}
constexpr double2 make_double2(double x, double y) {
  return {x, y};
}

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

// Runtime, with CUDA's numbers.
using cudaStream_t = struct CUstream_st*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorIllegalAddress = 700,
  cudaErrorLaunchTimeout = 702,
  cudaErrorMisalignedAddress = 716,
  cudaErrorLaunchFailure = 719,
  cudaErrorCooperativeLaunchTooLarge = 720,
  cudaErrorNotSupported = 801,
  cudaErrorInvalidClusterSize = 912,
};
const char* cudaGetErrorString(cudaError_t error);
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long* id);
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributeNonPortableClusterSizeAllowed,
};
enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
};
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);

// What a process asks once of a kernel: the same of all, as python_calls.cpp sets it.
struct cudaFuncAttributes {
  int ptxVersion;
};
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel);
cudaError_t cudaOccupancyMaxActiveClusters(int* count, const void* kernel, const cudaLaunchConfig_t* config);

namespace consequentialism::cuda {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

inline uint16_t to_bits(bfloat16 value) {
  return value.bits;
}
inline uint16_t to_bits(float16 value) {
  return value.bits;
}
float to_float(bfloat16 value);
float to_float(float16 value);
bfloat16 to_bfloat16(float value);
float16 to_float16(float value);
uint32_t float_to_tf32(float value);
float approximate_reciprocal(float value);
double approximate_reciprocal(double value);
float approximate_reciprocal_root(float value);

namespace shim {

using Where = std::source_location;

cudaError_t run(
    const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, unsigned cluster, bool cooperative,
    void (*invoke)(void*), void* context);
unsigned char* shared_memory();

// Ends the launch with this error, from within a kernel.
[[noreturn]] void fail(cudaError_t error, const char* format, ...) __attribute__((format(printf, 2, 3)));

void block_barrier(const Where& where);
void wait_for_change(
    const char* name, const unsigned* address, unsigned mask, unsigned before, Where where = Where::current());

// Waits for the lanes of mask, then calls combine once with every lane's payload, null where a lane takes no part.
// Lanes meet if name and mask agree; an `aligned` instruction must also stand in the same place for all.
using Combine = void (*)(void* const* payloads);
void warp_collective(const char* name, uint32_t mask, bool aligned, void* payload, Combine combine, const Where& where);

unsigned lane();
void check_shared(const char* name, const void* address, size_t bytes, size_t alignment);
void copy_async(void* shared, const void* global, int valid_bytes);
void copy_async_commit();
void copy_async_wait(unsigned pending);

struct ShuffleCall {
  uint64_t value;
  unsigned source;
  uint64_t result;
};
void shuffle(const char* name, uint32_t mask, ShuffleCall* call, const Where& where);

template <class T>
T shuffle(const char* name, uint32_t mask, T value, unsigned source, const Where& where) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned> || std::is_floating_point_v<T>);
  ShuffleCall call{0, source, 0};
  std::memcpy(&call.value, &value, sizeof(T));
  shuffle(name, mask, &call, where);
  std::memcpy(&value, &call.result, sizeof(T));
  return value;
}

uint32_t ballot(const char* name, uint32_t mask, bool predicate, const Where& where);

}  // namespace shim

unsigned cluster_block_rank();
unsigned cluster_size();
void cluster_sync(shim::Where where = shim::Where::current());
void named_barrier_arrive(int id, int threads, shim::Where where = shim::Where::current());
void named_barrier_wait(int id, int threads, shim::Where where = shim::Where::current());
namespace shim {
void* cluster_map(void* own_shared, unsigned rank);
}
template <class T>
T* cluster_map(T* own_shared, unsigned rank) {
  return static_cast<T*>(shim::cluster_map(const_cast<std::remove_cv_t<T>*>(own_shared), rank));
}

}  // namespace consequentialism::cuda

// Barriers, warp collectives, atomics.
#define CONSEQUENTIALISM_WHERE \
  ::consequentialism::cuda::shim::Where where = ::consequentialism::cuda::shim::Where::current()

inline void __syncthreads(CONSEQUENTIALISM_WHERE) {
  consequentialism::cuda::shim::block_barrier(where);
}
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, CONSEQUENTIALISM_WHERE) {
  consequentialism::cuda::shim::warp_collective("__syncwarp", mask, false, nullptr, [](void* const*) {}, where);
}
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, CONSEQUENTIALISM_WHERE) {
  return consequentialism::cuda::shim::shuffle("__shfl_sync", mask, value, source & 31, where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, CONSEQUENTIALISM_WHERE) {
  const unsigned lane = consequentialism::cuda::shim::lane();
  return consequentialism::cuda::shim::shuffle(
      "__shfl_up_sync", mask, value, delta > lane ? lane : lane - delta, where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, CONSEQUENTIALISM_WHERE) {
  const unsigned lane = consequentialism::cuda::shim::lane();
  const unsigned source = delta > 31 - lane ? lane : lane + delta;
  return consequentialism::cuda::shim::shuffle("__shfl_down_sync", mask, value, source, where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int flips, CONSEQUENTIALISM_WHERE) {
  const unsigned source = (consequentialism::cuda::shim::lane() ^ static_cast<unsigned>(flips)) & 31;
  return consequentialism::cuda::shim::shuffle("__shfl_xor_sync", mask, value, source, where);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, CONSEQUENTIALISM_WHERE) {
  return consequentialism::cuda::shim::ballot("__ballot_sync", mask, predicate != 0, where);
}
inline int __any_sync(unsigned mask, int predicate, CONSEQUENTIALISM_WHERE) {
  return consequentialism::cuda::shim::ballot("__any_sync", mask, predicate != 0, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CONSEQUENTIALISM_WHERE) {
  return consequentialism::cuda::shim::ballot("__all_sync", mask, predicate != 0, where) == mask;
}

#undef CONSEQUENTIALISM_WHERE

template <class T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned> || std::is_same_v<T, unsigned long long>);
  const T before = *address;
  using Wrapping = std::make_unsigned_t<T>;
  *address = static_cast<T>(static_cast<Wrapping>(before) + static_cast<Wrapping>(value));
  return before;
}
inline unsigned atomicOr(unsigned* address, unsigned value) {
  const unsigned before = *address;
  *address = before | value;
  return before;
}

template <class T>
T __ldg(const T* address) {
  return *address;
}
[[noreturn]] inline void __trap() {
  consequentialism::cuda::shim::fail(cudaErrorLaunchFailure, "__trap()");
}

// Mathematics that <math.h> lacks.
template <class T>
constexpr T min(T a, T b) {
  static_assert(std::is_arithmetic_v<T>);
  if constexpr (std::is_floating_point_v<T>) {
    return fmin(a, b);
  } else {
    return b < a ? b : a;
  }
}
template <class T>
constexpr T max(T a, T b) {
  static_assert(std::is_arithmetic_v<T>);
  if constexpr (std::is_floating_point_v<T>) {
    return fmax(a, b);
  } else {
    return a < b ? b : a;
  }
}
inline float rsqrtf(float x) {
  return static_cast<float>(1 / sqrt(static_cast<double>(x)));
}
inline double rsqrt(double x) {
  return 1 / sqrt(x);
}
inline unsigned __float_as_uint(float x) {
  return __builtin_bit_cast(unsigned, x);
}
inline float __uint_as_float(unsigned x) {
  return __builtin_bit_cast(float, x);
}
inline int __float_as_int(float x) {
  return __builtin_bit_cast(int, x);
}
inline float __int_as_float(int x) {
  return __builtin_bit_cast(float, x);
}
inline long long __double_as_longlong(double x) {
  return __builtin_bit_cast(long long, x);
}
inline double __longlong_as_double(long long x) {
  return __builtin_bit_cast(double, x);
}
inline int __popc(unsigned x) {
  return __builtin_popcount(x);
}
inline int __ffs(int x) {
  return __builtin_ffs(x);
}
inline int __clz(int x) {
  return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x));
}
