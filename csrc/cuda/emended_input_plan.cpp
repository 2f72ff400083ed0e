#include <algorithm>

#include "emended_input.h"
#include "matrix_tiles.h"

namespace consequentialism::cuda {

EmendPlan plan_emend_with(const EmendShape& shape, int tile) {
  const int depth = stage_depth(shape.inverse_bytes);
  const bool pairs = shape.splits_halves;
  const Major major = shape.primal ? Major::kInner : Major::kOuter;  // of x; the inverse is symmetric
  EmendPlan plan{};
  plan.tile = tile;
  // Without inputs there is still the bias's column.
  plan.blocks = ceil_div(shape.rows, tile) * std::max<int64_t>(1, ceil_div(shape.inputs, tile));
  plan.shared_bytes = kProductStages * (operand_bytes(tile, depth, shape.element_bytes, pairs, major) +
                                        operand_bytes(tile, depth, shape.inverse_bytes, pairs, Major::kInner));
  plan.two_terms = shape.splits_halves && shape.condition <= kTwoTermsCondition;
  return plan;
}

EmendPlan plan_emend(const EmendShape& shape, const Limits& limits) {
  const EmendPlan large = plan_emend_with(shape, kLargeTile);
  if (shape.inverse_bytes == 4 && large.blocks >= limits.processors && large.shared_bytes <= limits.shared_bytes) {
    return large;
  }
  const EmendPlan small = plan_emend_with(shape, kSmallTile);
  return small.shared_bytes <= limits.shared_bytes ? small : EmendPlan{};
}

}  // namespace consequentialism::cuda
