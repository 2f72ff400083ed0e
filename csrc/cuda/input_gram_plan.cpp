#include <algorithm>

#include "input_gram.h"
#include "matrix_tiles.h"

namespace consequentialism::cuda {

namespace {

constexpr int64_t kMinStages = 4;  // of a split: less does not pay for the second launch

// Of a split: with more, a second launch is taken to cost less than what a full cluster has too few blocks for.
// Predicted: a stage is some 300 cycles, a launch with its partial Grams 2,500 to 3,500.
constexpr int64_t kMaxStagesOfCluster = 12;

// Processors of a group, from which a cluster's all come, as Hopper has them. Where a chip's groups are smaller, which
// resident_blocks shows, more clusters are counted than run at once: that costs time, no result.
constexpr int64_t kGroup = 16;

// Predicted cycles: of a stage of a processor's tile (small tiles: of each of those that share a processor), and of a
// second launch with its partial Grams, or of a chain's sums added to one.
constexpr int64_t kSmallStageCycles = 213, kLargeStageCycles = 853, kWarpgroupStageCycles = 1170;
constexpr int64_t kLaunchCycles = 5000, kChainCycles = 8700;

// Without inputs there is still the bias: one tile, or an empty sum.
int64_t tiles_of(const GramShape& shape, int tile) {
  if (tile == kWarpgroupTile) {  // two rows of tiles to a column of them, but for a last half
    const int64_t rows = std::max<int64_t>(1, ceil_div(gram_outer(shape), kWarpgroupRows)), columns = ceil_div(rows, 2);
    return columns * (columns + 1) - rows % 2;
  }
  const int64_t along = std::max<int64_t>(1, ceil_div(gram_outer(shape), tile));
  return along * (along + 1) / 2;
}

// The most blocks of a cluster, each of which may need a processor of its own.
int64_t most_in_cluster(int64_t splits, const Limits& limits) {
  return std::max<int64_t>(1, std::min({splits, kMaxGramCluster, static_cast<int64_t>(limits.resident_blocks)}));
}

// Of how many splits in place of `splits` a cluster makes one launch, 1 if none. All clusters must run at once.
int64_t splits_in_cluster(int64_t tiles, int64_t splits, int64_t stages, int resident, const Limits& limits) {
  int64_t most = most_in_cluster(splits, limits);
  while (most > 1 && limits.processors * (kGroup * resident / most) / kGroup < tiles) --most;
  return most == splits || ceil_div(stages, most) <= kMaxStagesOfCluster ? most : 1;
}

// Of the whole device.
int64_t predicted_cycles(const GramShape& shape, const GramPlan& plan, const Limits& limits) {
  const bool warpgroups = plan.tile == kWarpgroupTile;
  const int64_t stages = plan.depth / (warpgroups ? kWarpgroupDepth : stage_depth(shape.element_bytes));
  const int64_t stage = warpgroups                ? kWarpgroupStageCycles
                        : plan.tile == kLargeTile ? kLargeStageCycles
                                                  : kSmallStageCycles;
  const int64_t chains = warpgroups ? ceil_div(plan.depth, kWarpgroupChain) - 1 : 0;
  const int64_t each = stages * stage + chains * kChainCycles;
  return ceil_div(plan.blocks * shape.grams, limits.processors) * each + (plan.whole() ? 0 : kLaunchCycles);
}

bool serves_warpgroups(const GramShape& shape, const Limits& limits) {
  return limits.warpgroups && shape.aligned && shape.element_bytes == 2 && shape.sum_bytes == 4 &&
         limits.shared_bytes >= kWarpgroupSharedBytes;
}

// The best of what a wave of blocks can be cut into, in clusters or not.
GramPlan plan_warpgroups(const GramShape& shape, const Limits& limits) {
  const int64_t tiles = tiles_of(shape, kWarpgroupTile);
  const int64_t most = std::max<int64_t>(1, gram_inner(shape) / (kMinStages * kWarpgroupDepth));
  const int64_t splits = std::clamp<int64_t>(limits.processors / tiles, 1, most);
  const GramPlan plan = plan_gram_with(shape, kWarpgroupTile, splits, false);
  int64_t clustered = most_in_cluster(splits, limits);
  while (clustered > 1 && limits.processors * (kGroup / clustered) / kGroup < tiles) --clustered;
  const GramPlan cluster = plan_gram_with(shape, kWarpgroupTile, clustered, true);
  return predicted_cycles(shape, cluster, limits) <= predicted_cycles(shape, plan, limits) ? cluster : plan;
}

}  // namespace

int64_t gram_order(const GramShape& shape) {
  return shape.primal ? shape.inputs + shape.bias : shape.rows;
}

int64_t gram_outer(const GramShape& shape) {
  return shape.primal ? shape.inputs : shape.rows;
}

int64_t gram_inner(const GramShape& shape) {
  return shape.primal ? shape.rows : shape.inputs;
}

GramPlan plan_gram_with(const GramShape& shape, int tile, int64_t splits, bool clustered) {
  const int64_t order = gram_order(shape), inner = std::max<int64_t>(1, gram_inner(shape));
  const int stage = stage_depth(shape.element_bytes);
  const bool pairs = shape.element_bytes == 2 && shape.sum_bytes == 4;
  const Major major = shape.primal ? Major::kOuter : Major::kInner;
  GramPlan plan{};
  plan.tile = tile;
  plan.depth = ceil_div(ceil_div(inner, std::max<int64_t>(splits, 1)), stage) * stage;
  plan.splits = ceil_div(inner, plan.depth);
  plan.blocks = tiles_of(shape, tile) * plan.splits;
  const bool warpgroups = tile == kWarpgroupTile;
  const bool one_chain = !warpgroups || plan.depth <= kWarpgroupChain;
  plan.shared_bytes = warpgroups ? kWarpgroupSharedBytes
                                 : 2 * kProductStages * operand_bytes(tile, stage, shape.element_bytes, pairs, major);
  plan.cluster = clustered && one_chain && plan.splits <= kMaxGramCluster ? static_cast<unsigned>(plan.splits) : 1;
  if (plan.splits != plan.cluster || !one_chain) {
    const int64_t reduced = ceil_div(order, kReduceTile);
    plan.reduce_blocks = reduced * (reduced + 1) / 2;
    plan.workspace_bytes = static_cast<size_t>(plan.splits * shape.grams * order * order) * shape.sum_bytes;
  }
  return plan;
}

GramPlan plan_gram_by(const GramShape& shape, const Limits& device, GramVariant variant) {
  Limits limits = device;  // a Gram's share
  limits.processors = static_cast<int>(std::max<int64_t>(1, device.processors / shape.grams));
  if (variant == GramVariant::kWarpgroups) {
    return serves_warpgroups(shape, limits) ? plan_warpgroups(shape, limits) : GramPlan{};
  }
  const int64_t depth = stage_depth(shape.element_bytes);
  const int64_t most_splits = std::max<int64_t>(1, gram_inner(shape) / (kMinStages * depth));
  // As many blocks as the chip holds at once: a wave and a little more would take as long as two.
  const auto with = [&](int tile) {
    const int resident = resident_of_tile(tile, shape.sum_bytes);
    const int64_t tiles = tiles_of(shape, tile), stages = ceil_div(gram_inner(shape), depth);
    const int64_t splits = std::clamp<int64_t>(limits.processors * resident / tiles, 1, most_splits);
    const int64_t clustered = splits_in_cluster(tiles, splits, stages, resident, limits);
    return plan_gram_with(shape, tile, clustered > 1 ? clustered : splits, clustered > 1);
  };
  // Large tiles read half as much, where there is enough work for all of the chip.
  const bool fills = tiles_of(shape, kLargeTile) * most_splits >= limits.processors;
  if (shape.sum_bytes == 4 && gram_outer(shape) > kLargeTile && fills) {
    const GramPlan plan = with(kLargeTile);
    if (plan.shared_bytes <= limits.shared_bytes) return plan;
  }
  const GramPlan plan = with(kSmallTile);
  return plan.shared_bytes <= limits.shared_bytes ? plan : GramPlan{};
}

GramPlan plan_gram(const GramShape& shape, const Limits& limits) {
  const GramPlan warps = plan_gram_by(shape, limits, GramVariant::kWarps);
  const GramPlan warpgroups = plan_gram_by(shape, limits, GramVariant::kWarpgroups);
  const auto cycles = [&](const GramPlan& plan) { return predicted_cycles(shape, plan, limits); };
  return warpgroups.tile != 0 && 10 * cycles(warpgroups) < 9 * cycles(warps) ? warpgroups : warps;  // clearly less
}

}  // namespace consequentialism::cuda
