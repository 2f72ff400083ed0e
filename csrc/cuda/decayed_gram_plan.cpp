#include "../block_spans.h"
#include "decayed_gram.h"

namespace consequentialism::cuda {

namespace {

// With the largest block, without the bias's one, which no tile counts.
GramShape gram_shape(const DecayedGramShape& shape) {
  const int64_t inputs = block_order(shape.inputs, shape.blocks, false);
  bool aligned = shape.aligned;
  for (int64_t i = 1; i < shape.blocks; ++i) {
    aligned &= block_begin(shape.inputs, shape.blocks, i) * static_cast<int64_t>(shape.element_bytes) % 16 == 0;
  }
  return {shape.rows, inputs, shape.bias, true, shape.element_bytes, shape.sum_bytes, shape.blocks, aligned};
}

}  // namespace

GramPlan plan_decayed_gram_with(const DecayedGramShape& shape, int tile, int64_t splits, bool clustered) {
  return plan_gram_with(gram_shape(shape), tile, splits, clustered);
}

GramPlan plan_decayed_gram(const DecayedGramShape& shape, const Limits& limits) {
  return plan_gram(gram_shape(shape), limits);
}

}  // namespace consequentialism::cuda
