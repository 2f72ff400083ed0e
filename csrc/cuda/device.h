// What the binding files share: the current device, and torch's tensors as the launchers take them.
#pragma once

#include <ATen/Context.h>
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>

#include <array>
#include <atomic>
#include <mutex>

#include "../checks.h"
#include "damped_inverse_launcher.h"
#include "device_limits.h"
#include "launch_counters.h"
#include "warpgroup_gram_launcher.h"

namespace consequentialism::cuda {

constexpr size_t kMaxDevices = 64;

// Addresses on each device, null where no op has run; breakdowns() reads the others.
inline std::array<std::atomic<unsigned*>, kMaxDevices> breakdown_counters{};
inline std::array<std::atomic<unsigned*>, kMaxDevices> launch_counters{};

// Of the current device; asked for once each.
inline Limits limits_of_current_device() {
  static std::array<Limits, kMaxDevices> known;
  static std::array<std::once_flag, kMaxDevices> asked;
  const int device = c10::cuda::current_device();
  std::call_once(asked.at(static_cast<size_t>(device)), [&] {
    // What is asked for here may load a module, which a capture would forbid: all of it at once, and relaxed.
    const c10::cuda::CUDAStreamCaptureModeGuard relaxed(cudaStreamCaptureModeRelaxed);
    int shared = 0, processors = 0;
    bool clusters = false, warpgroups = false;
    int resident_blocks = 0, resident_clusters = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
    C10_CUDA_CHECK(clusters_run(&clusters, &resident_blocks, &resident_clusters));
    C10_CUDA_CHECK(warpgroups_run(&warpgroups));
    unsigned* address = nullptr;
    C10_CUDA_CHECK(launch_counters_address(&address));
    launch_counters[static_cast<size_t>(device)] = address;
    C10_CUDA_CHECK(breakdown_counter_address(&address));
    breakdown_counters[static_cast<size_t>(device)] = address;
    known[static_cast<size_t>(device)] = {
        static_cast<size_t>(shared), processors, clusters, warpgroups, resident_blocks, resident_clusters};
  });
  return known[static_cast<size_t>(device)];
}

// Of the current device; limits_of_current_device() has been called.
inline unsigned* breakdown_counter() {
  return breakdown_counters.at(static_cast<size_t>(c10::cuda::current_device()));
}
inline unsigned* first_launch_counter() {
  return launch_counters.at(static_cast<size_t>(c10::cuda::current_device()));
}

template <class Scalar>
struct Native {
  using Type = Scalar;
};
template <>
struct Native<at::BFloat16> {
  using Type = bfloat16;
};
template <>
struct Native<at::Half> {
  using Type = float16;
};

// work(x's element type of the kernels, torch's own).
template <class Work>
void dispatch_element(at::ScalarType dtype, const Work& work) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "consequentialism", [&] {
    work(typename Native<scalar_t>::Type{}, scalar_t{});
  });
}

// Whether x is float32 and may be rounded to TF32, as torch's own setting for matrix products says. This reader follows
// the old switches too (allow_tf32, set_float32_matmul_precision), whose own readers raise once the new one was used.
inline bool tf32_allowed(const at::Tensor& x) {
  if (x.scalar_type() != at::kFloat) return false;
  const auto precision = at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL);
  return precision == at::Float32Precision::TF32;
}

// Rows that are contiguous, at any distance.
inline at::Tensor with_contiguous_rows(const at::Tensor& x) {
  const bool fits = (x.stride(1) == 1 || x.size(1) <= 1) && (x.size(0) <= 1 || x.stride(0) >= x.size(1));
  return fits ? x : x.contiguous();
}

inline int64_t row_stride_of(const at::Tensor& x) {
  return x.size(0) <= 1 ? x.size(1) : x.stride(0);
}

// Whether each of its rows begins at a multiple of 16 bytes.
inline bool has_aligned_rows(const at::Tensor& x) {
  const auto address = reinterpret_cast<uintptr_t>(x.const_data_ptr());
  return address % 16 == 0 && row_stride_of(x) * static_cast<int64_t>(x.itemsize()) % 16 == 0;
}

}  // namespace consequentialism::cuda
