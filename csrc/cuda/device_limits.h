// What the host logic needs to know of a device.
#pragma once

#include <cstddef>
#include <cstdint>

namespace consequentialism::cuda {

constexpr int64_t kMaxGrid = 0x7FFFFFFF;  // blocks along x

struct Limits {
  size_t shared_bytes;  // a block may ask for
  int processors;
  bool clusters;              // thread block clusters of kInverseClusterBlocks that take little of a processor, sm_90
  bool warpgroups = false;    // products of warpgroups, sm_90 with a build for sm_90a
  int resident_blocks = 0;    // of a cluster at most, 16, or 8 or fewer, each with a processor's whole shared memory
  int resident_clusters = 0;  // of kInverseClusterBlocks such blocks that run at once: each is within one group
};

constexpr Limits kHopper{232448, 132, true, false, 16, 16};
constexpr Limits kAmpere{166912, 108, false};

}  // namespace consequentialism::cuda
