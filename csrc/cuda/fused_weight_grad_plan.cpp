#include <cmath>

#include "fused_weight_grad.h"

namespace consequentialism::cuda {

namespace {

// Predictions that no GPU has confirmed: what one block reads from L2 in a microsecond, and the grid's barrier with the
// launch that needs it. They choose between the variants and nothing else; the benchmark measures both.
constexpr double kBytesPerMicrosecond = 40e3;
constexpr double kBarrierMicroseconds = 2;

int tile_of(const FusedShape& shape) {
  return shape.rows <= kSmallTile ? kSmallTile : kLargeTile;
}

const char* refusal(const FusedShape& shape, const Limits& limits) {
  if (shape.rows < 1 || shape.inputs < 1 || shape.outputs < 1) return "x or dy is empty";
  if (shape.rows > kFusedMaxRows) return "more rows than 128";
  if (shape.element_bytes == 8 && shape.rows > kSmallTile) return "more rows than 64 in float64";
  // The primal form is smaller then, and at little damping it is also more exact in float32.
  if (shape.rows > shape.inputs + shape.bias) return "more rows than inputs";
  if (ceil_div(shape.inputs, kFusedInputs) > limits.processors) return "more inputs than 64 a processor";
  const size_t bytes = fused_layout(tile_of(shape), shape.element_bytes, shape.bfloat16).bytes;
  return bytes > limits.shared_bytes ? "more shared memory than a block has" : nullptr;
}

// Of one part of the Gram, whose upper triangle is read.
double part_bytes(const FusedShape& shape) {
  const double rows = static_cast<double>(shape.rows);
  return rows * rows / 2 * static_cast<double>(fused_sum_bytes(shape.element_bytes));
}

// Until a block has the Gram: it reads its part of x, and then all parts.
double gram_microseconds(const FusedShape& shape, int64_t splits) {
  const double x_bytes =
      static_cast<double>(shape.rows) * static_cast<double>(shape.inputs) * static_cast<double>(shape.element_bytes);
  if (splits == 1) return x_bytes / kBytesPerMicrosecond;
  const double parts = static_cast<double>(splits);
  return (x_bytes / parts + parts * part_bytes(shape)) / kBytesPerMicrosecond + kBarrierMicroseconds;
}

}  // namespace

int64_t fused_splits(const FusedShape& shape) {
  // x_bytes / s + s * part_bytes is least at the root of their quotient.
  const double x_bytes =
      static_cast<double>(shape.rows) * static_cast<double>(shape.inputs) * static_cast<double>(shape.element_bytes);
  return std::max<int64_t>(1, std::lround(std::sqrt(x_bytes / part_bytes(shape))));
}

FusedPlan plan_fused_with(const FusedShape& shape, const Limits& limits, FusedVariant variant, int64_t splits) {
  FusedPlan plan{};
  plan.reason = refusal(shape, limits);
  if (plan.reason != nullptr || variant == FusedVariant::kNone) return plan;
  plan.variant = variant;
  plan.tile = tile_of(shape);
  plan.slices = ceil_div(shape.inputs, kFusedInputs);
  const int64_t tiles = ceil_div(shape.outputs, kFusedOutputs);
  plan.group_tiles = ceil_div(tiles, limits.processors / plan.slices);
  plan.groups = ceil_div(tiles, plan.group_tiles);
  const int64_t stage = stage_depth(shape.element_bytes);
  const int64_t most = variant == FusedVariant::kCooperative ? plan.blocks() : 1;
  plan.depth = ceil_div(ceil_div(shape.inputs, std::clamp<int64_t>(splits, 1, most)), stage) * stage;
  plan.splits = ceil_div(shape.inputs, plan.depth);
  plan.shared_bytes = fused_layout(plan.tile, shape.element_bytes, shape.bfloat16).bytes;
  if (variant == FusedVariant::kCooperative) {
    plan.workspace_bytes =
        static_cast<size_t>(plan.splits * plan.tile * plan.tile) * fused_sum_bytes(shape.element_bytes);
  }
  return plan;
}

FusedPlan plan_fused(const FusedShape& shape, const Limits& limits) {
  const FusedPlan recompute = plan_fused_with(shape, limits, FusedVariant::kRecompute, 1);
  if (recompute.variant == FusedVariant::kNone) return recompute;
  const FusedPlan cooperative = plan_fused_with(shape, limits, FusedVariant::kCooperative, fused_splits(shape));
  if (cooperative.splits == 1) return recompute;
  if (gram_microseconds(shape, cooperative.splits) >= gram_microseconds(shape, 1)) return recompute;
  FusedPlan plan = cooperative;
  plan.may_recompute = true;
  return plan;
}

FusedPlan recompute_instead(const FusedPlan& plan, const FusedShape& shape) {
  FusedPlan alone = plan;
  const int64_t stage = stage_depth(shape.element_bytes);
  alone.variant = FusedVariant::kRecompute;
  alone.may_recompute = false;
  alone.splits = 1;
  alone.depth = ceil_div(shape.inputs, stage) * stage;
  alone.workspace_bytes = 0;
  return alone;
}

}  // namespace consequentialism::cuda
