// Host side of the Gram kernels: how a launch is chosen. Plain C++.
#pragma once

#include <cstddef>
#include <cstdint>

#include "device_limits.h"

namespace consequentialism::cuda {

constexpr int kReduceTile = 32;         // of the kernel that adds the splits
constexpr int64_t kMaxGrams = 65535;    // of one launch
constexpr int64_t kMaxGramCluster = 8;  // blocks that every chip with clusters takes

// The largest of the Grams of one launch.
struct GramShape {
  int64_t rows;
  int64_t inputs;
  bool bias;
  bool primal;
  size_t element_bytes;  // of x
  size_t sum_bytes;      // of the Gram
  int64_t grams = 1;     // along the grid's y
  bool aligned = false;  // every row that a Gram is of begins at a multiple of 16 bytes
};

// order: of the result; outer, inner: what the product's tiles and sums run over.
int64_t gram_order(const GramShape& shape);
int64_t gram_outer(const GramShape& shape);
int64_t gram_inner(const GramShape& shape);

// The upper triangle's tiles, each by `splits` blocks that take `depth` of the inner index. Where a cluster has as many
// blocks they add up in it. Else, with more splits than one, each writes its own matrix into the workspace, and a
// second kernel adds them: a launch, but on the whole chip and in one order, and nothing has to be zero before or
// after.
struct GramPlan {
  int tile;          // its columns; 0 where the device has not enough shared memory
  unsigned cluster;  // blocks; 1 or the splits
  int64_t splits;
  int64_t depth;
  int64_t blocks;
  int64_t reduce_blocks;  // 0 where no second kernel is needed
  size_t shared_bytes;
  size_t workspace_bytes;

  bool whole() const { return reduce_blocks == 0; }  // no partial matrices
};

GramPlan plan_gram(const GramShape& shape, const Limits& limits);

// By products of warps, or of warpgroups; of no tile where they do not serve.
enum class GramVariant { kWarps, kWarpgroups };
GramPlan plan_gram_by(const GramShape& shape, const Limits& limits, GramVariant variant);

// With this tile (64; 128 where sums are float32; kWarpgroupTile where elements have 16 bits too and rows are aligned)
// and about so many splits, in a cluster where that is wanted.
GramPlan plan_gram_with(const GramShape& shape, int tile, int64_t splits, bool clustered);

}  // namespace consequentialism::cuda
