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
  // The stream's slot, whose launches follow one another; -1 where the launch needs counters of its own, which are
  // always right: once all slots are taken, where the stream cannot be told from others, and in a capture, since a
  // graph may run beside anything, and for a captured stream there may be many. A stream is known by its id, for its
  // handle may be another's: that of a stream which was destroyed while its launches ran is given out again, and all
  // threads' default streams have one.
  int64_t of(cudaStream_t stream, bool captured) {
    if (captured) return -1;  // before its id is asked for: a capture takes no slot, and a call that fails may spoil it
    unsigned long long id = 0;
    if (cudaStreamGetId(stream, &id) != cudaSuccess) {
      cudaGetLastError();  // or the next check would take it for its own
      return -1;
    }
    const std::lock_guard guard(lock_);
    const auto known = of_stream_.find(id);
    if (known != of_stream_.end()) return known->second;
    const auto fresh = static_cast<int64_t>(of_stream_.size());
    if (fresh >= kStreamSlots) return -1;
    of_stream_.emplace(id, fresh);
    return fresh;
  }

 private:
  std::mutex lock_;
  std::unordered_map<unsigned long long, int64_t> of_stream_;
};

}  // namespace consequentialism::cuda
