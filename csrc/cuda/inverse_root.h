// Host side of the inverse root: how its launches are chosen. Plain C++.
#pragma once

#include <cstddef>
#include <cstdint>

#include "device_limits.h"

namespace consequentialism::cuda {

struct InverseRootShape {
  int64_t batch;
  int64_t order;
  size_t element_bytes;  // 4 or 8
};

// Each product of all matrices is one launch, a block for each tile of the upper triangle.
struct InverseRootPlan {
  int tile;        // 0 where the device has not enough shared memory
  int64_t blocks;  // of one matrix
  int64_t stride;  // elements from row to row in the workspace, so that rows are aligned
  size_t shared_bytes;
  size_t workspace_bytes;
};

InverseRootPlan plan_inverse_root(const InverseRootShape& shape, const Limits& limits);

// With this tile: 64 or 128; 64 for float64.
InverseRootPlan plan_inverse_root_with(const InverseRootShape& shape, int tile);

}  // namespace consequentialism::cuda
