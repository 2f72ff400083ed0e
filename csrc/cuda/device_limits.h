// What the host logic needs to know of a device.
#pragma once

#include <cstddef>

namespace consequentialism::cuda {

struct Limits {
  size_t shared_bytes;  // a block may ask for
  int processors;
  bool clusters;  // thread block clusters, sm_90
};

constexpr Limits kHopper{232448, 132, true};
constexpr Limits kAmpere{166912, 108, false};

}  // namespace consequentialism::cuda
