#include "emended_input.h"
#include "matrix_tiles.h"
#include "root_product.h"

namespace consequentialism::cuda {

namespace {

// The rows meet the root as an input meets the inverse of the primal form.
RootProductPlan of_input(const EmendPlan& plan) {
  return {plan.tile, plan.blocks, plan.shared_bytes};
}

EmendShape as_input(const RootProductShape& shape) {
  return {shape.rows, shape.order, false, true, shape.element_bytes, shape.root_bytes, shape.splits_halves};
}

}  // namespace

RootProductPlan plan_root_product_with(const RootProductShape& shape, int tile) {
  return of_input(plan_emend_with(as_input(shape), tile));
}

RootProductPlan plan_root_product(const RootProductShape& shape, const Limits& limits) {
  const RootProductPlan large = plan_root_product_with(shape, kLargeTile);
  const bool fills = large.blocks * shape.batch >= limits.processors;
  const bool has_large = shape.root_bytes == 4 && (shape.element_bytes == 4 || shape.splits_halves);
  if (has_large && fills && large.shared_bytes <= limits.shared_bytes) return large;
  const RootProductPlan small = plan_root_product_with(shape, kSmallTile);
  return small.shared_bytes <= limits.shared_bytes ? small : RootProductPlan{};
}

}  // namespace consequentialism::cuda
