// Host side of the kernel that applies an inverse: how a launch is chosen. Plain C++.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

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
  // trace(G) / c, which the condition number of G + c I exceeds by no more than 1; infinite where nobody knows it.
  double condition = std::numeric_limits<double>::infinity();
};

// Up to this condition two bfloat16 terms of P do instead of three: 16 bits of it, of whose loss y then shows less than
// of its own rounding to bfloat16. On inputs of every kind in tests/cases.py y was off by at most 1.12 times as much.
constexpr double kTwoTermsCondition = 2048;

// One block for each tile of y.
struct EmendPlan {
  int tile;  // 0 where the device has not enough shared memory
  int64_t blocks;
  size_t shared_bytes;
  bool two_terms;  // of P for bfloat16
};

EmendPlan plan_emend(const EmendShape& shape, const Limits& limits);

// With this tile: 64 or 128; 64 where the inverse is float64.
EmendPlan plan_emend_with(const EmendShape& shape, int tile);

}  // namespace consequentialism::cuda
