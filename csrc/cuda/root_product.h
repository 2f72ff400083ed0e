// Host side of products with a root: how a launch is chosen. Plain C++.
#pragma once

#include <cstddef>
#include <cstdint>

#include "device_limits.h"

namespace consequentialism::cuda {

struct RootProductShape {
  int64_t batch;
  int64_t rows;
  int64_t order;
  size_t element_bytes;  // of the rows
  size_t root_bytes;     // of an element of the root
  bool splits_halves;    // bfloat16 rows with a float32 root
};

// One block for each tile of the product.
struct RootProductPlan {
  int tile;        // 0 where the device has not enough shared memory
  int64_t blocks;  // of one product
  size_t shared_bytes;
};

RootProductPlan plan_root_product(const RootProductShape& shape, const Limits& limits);

// With this tile: 64 or 128; 64 where the root is float64 or the rows are float16, for which a large one would spill.
RootProductPlan plan_root_product_with(const RootProductShape& shape, int tile);

}  // namespace consequentialism::cuda
