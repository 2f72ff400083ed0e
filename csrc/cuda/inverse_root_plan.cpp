#include "inverse_root.h"
#include "matrix_tiles.h"

namespace consequentialism::cuda {

namespace {

constexpr int64_t kMatrices = 7;  // T, and two each of its powers, M and X

}  // namespace

InverseRootPlan plan_inverse_root_with(const InverseRootShape& shape, int tile) {
  const int64_t along = ceil_div(shape.order, tile), aligned = 16 / static_cast<int64_t>(shape.element_bytes);
  InverseRootPlan plan{};
  plan.tile = tile;
  plan.blocks = along * (along + 1) / 2;
  plan.stride = ceil_div(shape.order, aligned) * aligned;
  plan.shared_bytes = 2 * kProductStages *
                      operand_bytes(tile, stage_depth(shape.element_bytes), shape.element_bytes, false, Major::kInner);
  plan.workspace_bytes = static_cast<size_t>(kMatrices * shape.batch * shape.order * plan.stride) * shape.element_bytes;
  return plan;
}

InverseRootPlan plan_inverse_root(const InverseRootShape& shape, const Limits& limits) {
  if (shape.element_bytes == 4 && shape.order > kLargeTile) {
    const InverseRootPlan plan = plan_inverse_root_with(shape, kLargeTile);
    // Large tiles read half as much, where there is enough work for all of the chip.
    if (plan.blocks * shape.batch >= limits.processors && plan.shared_bytes <= limits.shared_bytes) return plan;
  }
  const InverseRootPlan plan = plan_inverse_root_with(shape, kSmallTile);
  return plan.shared_bytes <= limits.shared_bytes ? plan : InverseRootPlan{};
}

}  // namespace consequentialism::cuda
