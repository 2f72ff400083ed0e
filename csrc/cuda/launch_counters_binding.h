// Which counters a launch on the current stream takes.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>

#include <array>

#include "device.h"
#include "launch_counters.h"

namespace consequentialism::cuda {

// kLaunchCounters that no other launch uses at the same time. A graph may run beside anything: its launches have
// counters of their own in the graph's memory, which each replay sets to zero, and which go with the graph.
class Counters {
 public:
  // like: a tensor of the device.
  Counters(cudaStream_t stream, const at::Tensor& like) {
    const bool captured = c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
    if (const int64_t slot = slots().of(stream, captured); slot >= 0) {
      address_ = first_launch_counter() + kLaunchCounters * slot;
      return;
    }
    own_ = at::zeros({kLaunchCounters}, like.options().dtype(at::kInt));
    address_ = reinterpret_cast<unsigned*>(own_.mutable_data_ptr<int>());
  }
  unsigned* address() const { return address_; }

 private:
  // Of the current device.
  static StreamSlots& slots() {
    static std::array<StreamSlots, kMaxDevices> all;
    return all.at(static_cast<size_t>(c10::cuda::current_device()));
  }

  unsigned* address_ = nullptr;
  at::Tensor own_;
};

}  // namespace consequentialism::cuda
