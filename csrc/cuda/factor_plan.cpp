#include "factor.h"

namespace consequentialism::cuda {

namespace {

constexpr int64_t kTile = 32;
constexpr int kClusterBlocks = 8;  // what every chip with clusters takes
constexpr int kClusterWarps = 8;
constexpr size_t kStateBytes = 128;

}  // namespace

FactorPlan plan_factor(int64_t n, size_t element_bytes, const Limits& limits) {
  if (n < 1 || n > kMaxFactorOrder) return {FactorTeam::kNone, 0, 0, 0, 0};
  const int64_t along = (n + kTile - 1) / kTile;
  const size_t stride = kTile + 16 / element_bytes;
  const size_t tiles = static_cast<size_t>(along * (along + 1) / 2 + 1) * kTile * stride * element_bytes;
  // As many warps as the widest step has tiles, and registers for each.
  const int most_warps = element_bytes == 8 ? 8 : 16;
  int warps = 1;
  while (warps < most_warps && warps < along * (along + 1) / 2) warps *= 2;
  if (kStateBytes + tiles <= limits.shared_bytes) {
    return {FactorTeam::kBlock, warps * 32, 1, kStateBytes + tiles, 0};
  }
  if (!limits.clusters) return {FactorTeam::kNone, 0, 0, 0, 0};
  return {FactorTeam::kCluster, kClusterWarps * 32, kClusterBlocks, 0, kStateBytes + tiles};
}

}  // namespace consequentialism::cuda
