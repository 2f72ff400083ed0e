#include "damped_inverse.h"

namespace consequentialism::cuda {

namespace {

// Of the packed upper triangle and one tile more.
size_t tile_bytes(int64_t along, size_t element_bytes) {
  return static_cast<size_t>(along * (along + 1) / 2 + 1) * inverse_tile_bytes(element_bytes);
}

}  // namespace

InversePlan plan_damped_inverse(int64_t n, size_t element_bytes, const Limits& limits) {
  if (n < 1 || n > kMaxInverseOrder) return {InverseTeam::kNone, 0, 0, 0, 0};
  const int64_t along = (n + kInverseTile - 1) / kInverseTile;
  const size_t bytes = kInverseStateBytes + tile_bytes(along, element_bytes);
  if (bytes > limits.shared_bytes) {
    if (!limits.clusters) return {InverseTeam::kNone, 0, 0, 0, 0};
    return {
        InverseTeam::kCluster, kInverseClusterThreads, kInverseClusterBlocks, inverse_tile_bytes(element_bytes), bytes};
  }
  // As many warps as the widest step has tiles, and registers for each.
  const int most_warps = inverse_block_threads(element_bytes) / 32;
  int warps = 1;
  while (warps < most_warps && warps < along * (along + 1) / 2) warps *= 2;
  return {InverseTeam::kBlock, warps * 32, 1, bytes, 0};
}

InversePlan plan_damped_inverse_retry(int64_t n, size_t element_bytes, const Limits& limits) {
  const InversePlan plan = plan_damped_inverse(n, element_bytes, limits);
  if (plan.team != InverseTeam::kNone || n < 1 || n > kMaxRetryOrder) return plan;
  const int blocks = limits.clusters ? kInverseClusterBlocks : 1;
  const int64_t along = (n + kInverseTile - 1) / kInverseTile;
  return {
      InverseTeam::kCluster, kInverseClusterThreads, blocks, inverse_tile_bytes(element_bytes),
      kInverseStateBytes + tile_bytes(along, element_bytes)};
}

}  // namespace consequentialism::cuda
