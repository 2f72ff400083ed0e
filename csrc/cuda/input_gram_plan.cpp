#include <algorithm>

#include "input_gram.h"
#include "matrix_tiles.h"

namespace consequentialism::cuda {

namespace {

constexpr int64_t kMinStages = 4;  // of a split: less does not pay for the second launch

// Of a split: with more, a second launch is taken to cost less than what a full cluster has too few blocks for.
// Predicted: a stage is some 300 cycles, a launch with its partial Grams 2,500 to 3,500.
constexpr int64_t kMaxStagesOfCluster = 12;

// A cluster's processors are of one group, which has at least so many.
constexpr int64_t kGroup = 16;

// Without inputs there is still the bias: one tile, or an empty sum.
int64_t tiles_of(const GramShape& shape, int tile) {
  const int64_t along = std::max<int64_t>(1, ceil_div(gram_outer(shape), tile));
  return along * (along + 1) / 2;
}

// Of how many splits in place of `splits` a cluster makes one launch, 1 if none. All clusters must run at once.
int64_t splits_in_cluster(int64_t tiles, int64_t splits, int64_t stages, int resident, const Limits& limits) {
  if (!limits.clusters) return 1;
  int64_t most = std::min(splits, kMaxGramCluster);
  while (most > 1 && limits.processors * (kGroup * resident / most) / kGroup < tiles) --most;
  return most == splits || ceil_div(stages, most) <= kMaxStagesOfCluster ? most : 1;
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
  plan.shared_bytes = 2 * kProductStages * operand_bytes(tile, stage, shape.element_bytes, pairs, major);
  plan.cluster = clustered && plan.splits <= kMaxGramCluster ? static_cast<unsigned>(plan.splits) : 1;
  if (!plan.whole()) {
    const int64_t reduced = ceil_div(order, kReduceTile);
    plan.reduce_blocks = reduced * (reduced + 1) / 2;
    plan.workspace_bytes = static_cast<size_t>(plan.splits * shape.grams * order * order) * shape.sum_bytes;
  }
  return plan;
}

GramPlan plan_gram(const GramShape& shape, const Limits& device) {
  Limits limits = device;  // a Gram's share
  limits.processors = static_cast<int>(std::max<int64_t>(1, device.processors / shape.grams));
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

}  // namespace consequentialism::cuda
