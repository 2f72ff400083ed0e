#include <algorithm>

#include "../block_spans.h"
#include "decayed_gram.h"
#include "matrix_tiles.h"

namespace consequentialism::cuda {

namespace {

// The largest block, without the bias's one, which no tile counts.
GramShape one_block(const DecayedGramShape& shape) {
  const int64_t inputs = block_order(shape.inputs, shape.blocks, false);
  return {shape.rows, inputs, shape.bias, true, shape.element_bytes, shape.sum_bytes};
}

DecayedGramPlan for_all(const DecayedGramShape& shape, const GramPlan& each) {
  const int64_t order = block_order(shape.inputs, shape.blocks, shape.bias);
  DecayedGramPlan plan{each, 0};
  if (each.splits > 1) {
    plan.workspace_bytes = static_cast<size_t>(each.splits * shape.blocks * order * order) * shape.sum_bytes;
    plan.each.reduce_blocks = ceil_div(order, kReduceTile) * (ceil_div(order, kReduceTile) + 1) / 2;
  }
  return plan;
}

}  // namespace

DecayedGramPlan plan_decayed_gram_with(const DecayedGramShape& shape, int tile, int64_t splits) {
  return for_all(shape, plan_gram_with(one_block(shape), tile, splits));
}

DecayedGramPlan plan_decayed_gram(const DecayedGramShape& shape, const Limits& limits) {
  Limits share = limits;  // of the chip, that a block has
  share.processors = static_cast<int>(std::max<int64_t>(1, limits.processors / shape.blocks));
  return for_all(shape, plan_gram(one_block(shape), share));
}

}  // namespace consequentialism::cuda
