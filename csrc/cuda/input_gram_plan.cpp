#include <algorithm>

#include "input_gram.h"
#include "matrix_tiles.h"

namespace consequentialism::cuda {

namespace {

constexpr int64_t kMinStages = 4;  // of a split: less does not pay for the second launch

// Without inputs there is still the bias: one tile, or an empty sum.
int64_t tiles_of(const GramShape& shape, int tile) {
  const int64_t along = std::max<int64_t>(1, ceil_div(gram_outer(shape), tile));
  return along * (along + 1) / 2;
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

GramPlan plan_gram_with(const GramShape& shape, int tile, int64_t splits) {
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
  if (plan.splits > 1) {
    const int64_t reduced = ceil_div(order, kReduceTile);
    plan.reduce_blocks = reduced * (reduced + 1) / 2;
    plan.workspace_bytes = static_cast<size_t>(plan.splits * order * order) * shape.sum_bytes;
  }
  return plan;
}

GramPlan plan_gram(const GramShape& shape, const Limits& limits) {
  const int64_t depth = stage_depth(shape.element_bytes);
  const int64_t most_splits = std::max<int64_t>(1, gram_inner(shape) / (kMinStages * depth));
  // As many blocks as the chip holds at once: a wave and a little more would take as long as two.
  const auto with = [&](int tile) {
    const int64_t splits = limits.processors * resident_of_tile(tile, shape.sum_bytes) / tiles_of(shape, tile);
    return plan_gram_with(shape, tile, std::clamp<int64_t>(splits, 1, most_splits));
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
