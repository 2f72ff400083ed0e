// Host side of the kernel that applies an inverse: how a launch is chosen. Plain C++.
#pragma once

#include <cstddef>
#include <cstdint>

#include "device_limits.h"

namespace consequentialism::cuda {

struct EmendShape {
  int64_t rows;
  int64_t inputs;
  bool bias;
  bool primal;
  size_t element_bytes;  // of x
  size_t inverse_bytes;  // of an element of the inverse
  bool splits_halves;    // bfloat16 x with a float32 inverse
};

// One block for each tile of y.
struct EmendPlan {
  int tile;  // 0 where the device has not enough shared memory
  int64_t blocks;
  size_t shared_bytes;
};

EmendPlan plan_emend(const EmendShape& shape, const Limits& limits);

// With this tile: 64 or 128; 64 where the inverse is float64.
EmendPlan plan_emend_with(const EmendShape& shape, int tile);

}  // namespace consequentialism::cuda
