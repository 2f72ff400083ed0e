#include <algorithm>

#include "damped_inverse.h"
#include "factored_inverse.h"

namespace consequentialism::cuda {

namespace {

// Below, the chain of pivots, which more blocks do not shorten, outweighs the products, and a chip has room for more
// clusters of 8. Of float64 their shared memory holds no more.
constexpr int64_t large_cluster_above(size_t element_bytes) {
  return element_bytes == 8 ? 384 : 448;
}

// Above, a cluster takes less than nine tenths of one block's time, by the sums of tools/inverse_budget.py. In float64,
// of which there are none, where a block has no room.
constexpr int64_t cluster_above(size_t element_bytes) {
  return element_bytes == 8 ? kMaxInverseOrder : 160;
}

int64_t tiles_along(int64_t n) {
  return (n + kInverseTile - 1) / kInverseTile;
}

// Of the packed upper triangle and `more`.
size_t tile_bytes(int64_t along, int more, size_t element_bytes) {
  return static_cast<size_t>(along * (along + 1) / 2 + more) * inverse_tile_bytes(element_bytes);
}

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace

InversePlan plan_resident_inverse(int64_t n, size_t element_bytes, size_t shared_bytes, int blocks) {
  const int64_t along = tiles_along(n), rows = blocks == kInverseLargeCluster ? 4 : 2, columns = blocks / rows;
  // Of a step a block's rows and columns, and a tile on the diagonal.
  const int64_t panels = ceil_div(along, rows) + ceil_div(along, columns) + 1;
  // The first row of the grid has the most.
  int64_t most_own = 0;
  for (int64_t column = 0; column < columns; ++column) {
    int64_t own = 0;
    for (int64_t j = column; j < along; j += columns) own += j / rows + 1;
    most_own = std::max(most_own, own);
  }
  const auto most = static_cast<int64_t>(shared_bytes / inverse_tile_bytes(element_bytes));
  const int line = strip_line(static_cast<int>(along), element_bytes, shared_bytes);
  if (most < panels || line == 0) return {};
  const int64_t tiles = std::min(most, panels + most_own);
  InversePlan plan;
  plan.team = InverseTeam::kResident;
  plan.threads = kInverseClusterThreads;
  plan.blocks = blocks;
  plan.shared_bytes = static_cast<size_t>(tiles) * inverse_tile_bytes(element_bytes);
  plan.workspace_bytes =
      kInverseStateBytes + tile_bytes(along, kMoreTiles, element_bytes) + tile_bytes(along, 0, element_bytes);
  plan.resident = {static_cast<int>(rows), static_cast<int>(columns), static_cast<int>(tiles - panels)};
  plan.strip_line = line;
  plan.tall_squares_from = tall_squares_from(static_cast<int>(along));
  return plan;
}

InversePlan plan_damped_inverse_by(int64_t n, size_t element_bytes, const Limits& limits, InverseTeam team) {
  if (n < 1 || n > kMaxInverseOrder) return {};
  const int64_t along = tiles_along(n);
  const size_t bytes = kInverseStateBytes + tile_bytes(along, 1, element_bytes);
  if (team == InverseTeam::kBlock && bytes <= limits.shared_bytes) {
    // As many warps as the widest step has tiles, and registers for each.
    const int most_warps = inverse_block_threads(element_bytes) / 32;
    int warps = 1;
    while (warps < most_warps && warps < along * (along + 1) / 2) warps *= 2;
    return {InverseTeam::kBlock, warps * 32, 1, bytes, 0, {}};
  }
  if (team == InverseTeam::kResident && limits.clusters && limits.resident_blocks >= kInverseClusterBlocks) {
    const bool large = n > large_cluster_above(element_bytes) && limits.resident_blocks >= kInverseLargeCluster;
    const int blocks = large ? kInverseLargeCluster : kInverseClusterBlocks;
    return plan_resident_inverse(n, element_bytes, limits.shared_bytes, blocks);
  }
  if (team == InverseTeam::kCluster && limits.clusters) {
    return {InverseTeam::kCluster,
            kInverseClusterThreads,
            kInverseClusterBlocks,
            inverse_tile_bytes(element_bytes),
            bytes,
            {}};
  }
  return {};
}

InversePlan plan_damped_inverse(int64_t n, int64_t count, size_t element_bytes, const Limits& limits) {
  const auto by = [&](InverseTeam team) { return plan_damped_inverse_by(n, element_bytes, limits, team); };
  const InversePlan block = by(InverseTeam::kBlock), resident = by(InverseTeam::kResident);
  if (block.team == InverseTeam::kNone) {
    return resident.team != InverseTeam::kNone ? resident : by(InverseTeam::kCluster);
  }
  // A cluster's time is that of all of them only where all run at once; either way the bits are the same. Where a block
  // has room a cluster is of kInverseClusterBlocks.
  const bool at_once = resident.team != InverseTeam::kNone && count <= limits.resident_clusters;
  return at_once && n > cluster_above(element_bytes) ? resident : block;
}

InversePlan plan_damped_inverse_retry(int64_t n, size_t element_bytes, const Limits& limits) {
  const InversePlan plan = plan_damped_inverse(n, 1, element_bytes, limits);
  if (plan.team != InverseTeam::kNone || n < 1 || n > kMaxRetryOrder) return plan;
  const int blocks = limits.clusters ? kInverseClusterBlocks : 1;
  return {
      InverseTeam::kCluster,
      kInverseClusterThreads,
      blocks,
      inverse_tile_bytes(element_bytes),
      kInverseStateBytes + tile_bytes(tiles_along(n), 1, element_bytes),
      {}};
}

}  // namespace consequentialism::cuda
