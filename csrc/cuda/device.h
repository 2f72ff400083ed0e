// What the binding files share: the current device, and torch's tensors as the launchers take them.
#pragma once

#include <ATen/Context.h>
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>

#include <array>
#include <atomic>
#include <mutex>

#include "damped_inverse_launcher.h"
#include "device_limits.h"

namespace consequentialism::cuda {

constexpr size_t kMaxDevices = 64;

// Of the current device; asked for once each.
inline Limits limits_of_current_device() {
  static std::array<Limits, kMaxDevices> known;
  static std::array<std::once_flag, kMaxDevices> asked;
  const int device = c10::cuda::current_device();
  std::call_once(asked.at(static_cast<size_t>(device)), [&] {
    int shared = 0, processors = 0, major = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    known[static_cast<size_t>(device)] = {static_cast<size_t>(shared), processors, major >= 9};
  });
  return known[static_cast<size_t>(device)];
}

// Addresses by device; breakdowns() reads those that have been used.
inline std::array<std::atomic<unsigned*>, kMaxDevices> breakdown_counters{};

inline unsigned* breakdown_counter() {
  std::atomic<unsigned*>& known = breakdown_counters.at(static_cast<size_t>(c10::cuda::current_device()));
  unsigned* address = known.load();
  if (address == nullptr) {
    C10_CUDA_CHECK(breakdown_counter_address(&address));
    known.store(address);
  }
  return address;
}

inline at::ScalarType wide_type(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
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

// Whether float32 may be rounded to TF32, as torch's own setting for matrix products says.
inline bool tf32_allowed() {
  return at::globalContext().allowTF32CuBLAS();
}

// Rows that are contiguous, at any distance.
inline at::Tensor with_contiguous_rows(const at::Tensor& x) {
  const bool fits = (x.stride(1) == 1 || x.size(1) <= 1) && (x.size(0) <= 1 || x.stride(0) >= x.size(1));
  return fits ? x : x.contiguous();
}

inline int64_t row_stride_of(const at::Tensor& x) {
  return x.size(0) <= 1 ? x.size(1) : x.stride(0);
}

}  // namespace consequentialism::cuda
