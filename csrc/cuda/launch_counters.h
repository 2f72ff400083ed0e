// Counters by which the blocks of one launch meet, and which of a device's a launch takes. Plain C++.
#pragma once

#include <cstdint>
#include <mutex>
#include <unordered_map>

#include "types.h"

namespace consequentialism::cuda {

constexpr int kLaunchCounters = 32;  // of a launch, a line of the cache
constexpr int kFirstTicket = 1;     // before it the grid's barrier, of which a bit turns over; tickets are left at zero
constexpr int kStreamSlots = 1024;  // one for each stream that launches

// The current device's own counters, kStreamSlots times kLaunchCounters. Zero when the process begins.
cudaError_t launch_counters_address(unsigned** address);

class StreamSlots {
 public:
  // *slot: the stream's, whose launches follow one another; -1 where the launch needs counters of its own: once all
  // slots are taken, and in a capture, since a graph may run beside anything, and for a captured stream there may be
  // many. A stream is known by its id, for its handle may be another's: that of a stream which was destroyed while its
  // launches ran is given out again, and all threads' default streams have one.
  cudaError_t of(cudaStream_t stream, bool captured, int64_t* slot) {
    *slot = -1;
    if (captured) return cudaSuccess;
    unsigned long long id = 0;
    if (const cudaError_t error = cudaStreamGetId(stream, &id); error != cudaSuccess) return error;
    const std::lock_guard guard(lock_);
    const auto known = of_stream_.find(id);
    if (known != of_stream_.end()) {
      *slot = known->second;
    } else if (const auto fresh = static_cast<int64_t>(of_stream_.size()); fresh < kStreamSlots) {
      of_stream_.emplace(id, fresh);
      *slot = fresh;
    }
    return cudaSuccess;
  }

 private:
  std::mutex lock_;
  std::unordered_map<unsigned long long, int64_t> of_stream_;
};

}  // namespace consequentialism::cuda
