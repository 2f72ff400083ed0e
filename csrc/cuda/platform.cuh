// What kernels are written against: CUDA, or, with CONSEQUENTIALISM_HOST_SHIM, g++ and tools/cuda_shim, where the
// threads of a block are fibers. Kernels and their launchers use nothing of CUDA that is not named here or in shim.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <set>
#include <tuple>
#include <utility>

#include "types.h"

#ifndef CONSEQUENTIALISM_HOST_SHIM
#include <cooperative_groups.h>
#endif

namespace consequentialism::cuda {

constexpr unsigned kWarpSize = 32;
constexpr unsigned kFullWarp = 0xFFFFFFFFu;
constexpr size_t kMaxSharedBytes = 232448;  // of a block, sm_90; 166912 on sm_80
constexpr unsigned kMaxCluster = 16;        // above 8 not every chip takes it

#ifndef CONSEQUENTIALISM_HOST_SHIM
// To the nearest TF32, ties away from zero, in the upper 19 bits of the register.
__device__ __forceinline__ uint32_t float_to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

// Of a normal number whose reciprocal is normal: off by 2^-23 of it in float32, by 2^-19 in float64.
__device__ __forceinline__ float approximate_reciprocal(float value) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}
__device__ __forceinline__ double approximate_reciprocal(double value) {
  double result;
  asm("rcp.approx.ftz.f64 %0, %1;" : "=d"(result) : "d"(value));
  return result;
}

// 1 / sqrt of a normal positive number, off by 2^-22.9 of it.
__device__ __forceinline__ float approximate_reciprocal_root(float value) {
  float result;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}
#endif

// The block's dynamic shared memory, aligned to 128 bytes.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
#ifdef CONSEQUENTIALISM_HOST_SHIM
  return reinterpret_cast<T*>(shim::shared_memory());
#else
  extern __shared__ __align__(128) unsigned char consequentialism_shared[];
  return reinterpret_cast<T*>(consequentialism_shared);
#endif
}

// Whether this is the block's first warp. On sm_90 it is told by a shuffle: the compiler then knows it to be the same
// in all lanes and makes no second copy of what follows for diverged warps, which halves the spills of the fused
// kernels. Below, the same costs them spills that they do not have without.
__device__ __forceinline__ bool is_first_warp(int warp) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return __shfl_sync(kFullWarp, warp, 0) == 0;
#else
  return warp == 0;
#endif
}

// Clusters lie along x. Below sm_90, and in a launch without one, a cluster is one block.
#ifndef CONSEQUENTIALISM_HOST_SHIM
__device__ __forceinline__ unsigned cluster_block_rank() {
#if __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().block_rank();
#else
  return 0;
#endif
}

__device__ __forceinline__ unsigned cluster_size() {
#if __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().num_blocks();
#else
  return 1;
#endif
}

// Every thread of every block of the cluster; shared memory written before is seen after. Needed before the first use
// of another block's shared memory, which is not there until that block runs, and after the last, which must not exit.
__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().sync();
#else
  __syncthreads();
#endif
}

// A barrier `id`, 1 to 15, of so many threads of a block, all of their warps. Those that wait see what the others wrote
// before they came, and those that arrive go on. __syncthreads is barrier 0.
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_barrier_wait(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Where own_shared's offset lies in the shared memory of the cluster's block `rank`.
template <class T>
__device__ __forceinline__ T* cluster_map(T* own_shared, unsigned rank) {
#if __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().map_shared_rank(own_shared, rank);
#else
  if (rank != 0) __trap();
  return own_shared;
#endif
}
#endif

// All threads of all `blocks` of a cooperative launch. The counter is zero before its first use and is left ready for
// the next barrier and the next launch: each block adds 1, the first one 2^31 - (blocks - 1), so that the low bits
// come back to zero and the highest bit turns over when the last one has arrived. A launch that dies spoils it.
__device__ __forceinline__ void grid_barrier(unsigned* counter, unsigned blocks) {
  constexpr unsigned kGeneration = 0x80000000u;
  __syncthreads();
  if (threadIdx.x == 0 && threadIdx.y == 0 && threadIdx.z == 0) {
    const bool first = blockIdx.x == 0 && blockIdx.y == 0 && blockIdx.z == 0;
    __threadfence();
    const unsigned before = atomicAdd(counter, first ? kGeneration - (blocks - 1) : 1u);
#ifdef CONSEQUENTIALISM_HOST_SHIM
    shim::wait_for_change("grid_barrier", counter, kGeneration, before);
#else
    unsigned now;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                   : "=r"(now)
                   : "l"(__cvta_generic_to_global(counter))
                   : "memory");
    } while (((before ^ now) & kGeneration) == 0);
#endif
    __threadfence();
  }
  __syncthreads();
}

struct LaunchShape {
  dim3 grid;
  dim3 block;
  size_t shared_bytes = 0;
  cudaStream_t stream = nullptr;
  unsigned cluster = 1;
  bool cooperative = false;
};

namespace detail {

// Raises what a block of the kernel may ask for to the device's most, once for each kernel and device. With each
// launch's own size, a smaller launch on another host thread would lower it between a larger one's request and its
// launch.
inline cudaError_t allow_shared(const void* kernel, size_t bytes) {
  constexpr size_t kWithoutAsking = 48 * 1024;
  if (bytes <= kWithoutAsking) return cudaSuccess;
  static std::mutex lock;
  static std::set<std::pair<const void*, int>> allowed;
  int device, most;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const std::lock_guard guard(lock);
  if (allowed.contains({kernel, device})) return cudaSuccess;
  cudaError_t error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (error == cudaSuccess) allowed.emplace(kernel, device);
  return error;
}

// Asks for a cluster that not every chip takes.
inline cudaError_t allow_cluster(const void* kernel, unsigned cluster) {
  constexpr unsigned kWithoutAsking = 8;
  if (cluster <= kWithoutAsking) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
}

inline cudaError_t allow(const void* kernel, size_t shared_bytes, unsigned cluster) {
  const cudaError_t error = allow_shared(kernel, shared_bytes);
  return error == cudaSuccess ? allow_cluster(kernel, cluster) : error;
}

}  // namespace detail

// Whether an error of a query means that no chip of this kind takes such a cluster; others say nothing of the chip.
inline bool refuses_cluster(cudaError_t error) {
  return error == cudaErrorInvalidValue || error == cudaErrorInvalidConfiguration ||
         error == cudaErrorInvalidClusterSize || error == cudaErrorNotSupported;
}

// How many clusters of so many blocks of the kernel the current device has room for at once, 0 where for none.
inline cudaError_t clusters_at_once(
    int* count, const void* kernel, unsigned cluster, unsigned threads, size_t shared_bytes) {
  *count = 0;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(cluster);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.attrs = &attribute;
  config.numAttrs = 1;
  int active = 0;
  cudaError_t error = detail::allow(kernel, shared_bytes, cluster);
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&active, kernel, &config);
  if (refuses_cluster(error)) {
    cudaGetLastError();  // or the next check would take it for its own
    return cudaSuccess;
  }
  if (error == cudaSuccess) *count = active;
  return error;
}

#ifdef CONSEQUENTIALISM_HOST_SHIM

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), const LaunchShape& shape, A&&... args) {
  static_assert(sizeof...(P) == sizeof...(A));
  const void* address = reinterpret_cast<const void*>(kernel);
  const cudaError_t error = detail::allow(address, shape.shared_bytes, shape.cluster);
  if (error != cudaSuccess) return error;
  struct Call {
    void (*kernel)(P...);
    std::tuple<P...> args;
  } call{kernel, std::tuple<P...>(std::forward<A>(args)...)};
  const auto invoke = [](void* context) {
    const Call& call = *static_cast<const Call*>(context);
    std::apply(call.kernel, call.args);
  };
  return shim::run(
      address, shape.grid, shape.block, shape.shared_bytes, shape.cluster, shape.cooperative, invoke, &call);
}

#else

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), const LaunchShape& shape, A&&... args) {
  static_assert(sizeof...(P) == sizeof...(A));
  if (shape.grid.x == 0 || shape.grid.y == 0 || shape.grid.z == 0) return cudaSuccess;
  const void* address = reinterpret_cast<const void*>(kernel);
  const cudaError_t error = detail::allow(address, shape.shared_bytes, shape.cluster);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = shape.stream;
  config.attrs = attributes;
  if (shape.cluster != 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = shape.cluster;
    attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
  }
  if (shape.cooperative) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  std::tuple<P...> values(std::forward<A>(args)...);
  return std::apply(
      [&](P&... value) {
        void* pointers[] = {static_cast<void*>(&value)..., nullptr};
        return cudaLaunchKernelExC(&config, address, pointers);
      },
      values);
}

#endif

}  // namespace consequentialism::cuda
