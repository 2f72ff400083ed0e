// Host side of the kernel that computes a whole weight gradient in one launch: how it is launched, or why not. Plain
// C++.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "damped_inverse.h"
#include "device_limits.h"
#include "matrix_tiles.h"

namespace consequentialism::cuda {

struct FusedShape {
  int64_t rows;
  int64_t inputs;
  int64_t outputs;
  bool bias;
  size_t element_bytes;
  bool bfloat16;  // of the types with two bytes, this one
};

constexpr int kFusedInputs = 64;    // columns of the emended input that a block makes
constexpr int kFusedOutputs = 64;   // columns of dy that it takes at a time
constexpr int kFusedMaxRows = 128;  // 64 in float64, whose larger matrices do not fit
constexpr size_t kFusedStateBytes = 128;

// A block's shared memory. The Gram's stages come first, then the Gram lies where they were; its inverse takes its
// place; with it lie first the tiles of the factor, then the emended input, the bias's column and the stages of x and
// dy. Offsets and sizes in bytes.
struct FusedLayout {
  size_t gram_stages;
  size_t gram;
  size_t factor_tiles;
  size_t emended;
  size_t column;
  size_t apply_stages;
  size_t weight_stages;

  size_t gram_at;
  size_t inverse_end;  // where the factor's tiles and the emended input begin
  size_t column_at;
  size_t stages_at;
  size_t bytes;
};

constexpr size_t fused_sum_bytes(size_t element_bytes) {
  return element_bytes == 8 ? 8 : 4;
}

constexpr size_t fused_emended_bytes(size_t element_bytes, bool bfloat16) {
  return bfloat16 ? 2 : fused_sum_bytes(element_bytes);
}

// For up to `tile` rows, 64 or 128.
constexpr FusedLayout fused_layout(int tile, size_t element_bytes, bool bfloat16) {
  const size_t sum_bytes = fused_sum_bytes(element_bytes);
  const size_t emended_bytes = fused_emended_bytes(element_bytes, bfloat16);
  const int depth = stage_depth(sum_bytes), weight_depth = stage_depth(std::max(element_bytes, emended_bytes));
  const size_t rows = static_cast<size_t>(tile);
  const size_t along = rows / kInverseTile, factor_tiles = along * (along + 1) / 2 + 1;
  FusedLayout layout{};
  layout.gram_stages =
      2 * kProductStages *
      operand_bytes(tile, stage_depth(element_bytes), element_bytes, element_bytes == 2, Major::kInner);
  layout.gram = operand_bytes(tile, tile, sum_bytes, bfloat16, Major::kInner);
  layout.factor_tiles = factor_tiles * inverse_tile_bytes(sum_bytes);
  layout.emended = operand_bytes(kFusedInputs, tile, emended_bytes, bfloat16, Major::kOuter);
  layout.column = rows * sum_bytes;
  layout.apply_stages = kProductStages * operand_bytes(kFusedInputs, depth, element_bytes, bfloat16, Major::kOuter);
  layout.weight_stages =
      kProductStages * operand_bytes(kFusedOutputs, weight_depth, element_bytes, bfloat16, Major::kOuter);
  layout.gram_at = kFusedStateBytes;
  layout.inverse_end = layout.gram_at + layout.gram;
  layout.column_at = layout.inverse_end + layout.emended;
  layout.stages_at = layout.column_at + layout.column;
  layout.bytes = std::max({
      layout.gram_at + layout.gram_stages,
      layout.inverse_end + layout.factor_tiles,
      layout.stages_at + layout.apply_stages,
      layout.stages_at + layout.weight_stages,
  });
  return layout;
}

// kRecompute: each block computes the whole Gram. kCooperative: `splits` blocks compute a part of it each, over `depth`
// inputs, and all meet once; few parts, as every block then reads them all. Then each block inverts it, emends its
// slice of x and writes its part of dw: block slice + slices * group takes inputs [64 slice, +64) and the output tiles
// [group * group_tiles, +group_tiles).
enum class FusedVariant { kNone, kRecompute, kCooperative };

struct FusedPlan {
  FusedVariant variant;
  const char* reason;  // of kNone, else null
  bool may_recompute;  // where the device cannot hold all blocks at once, which the barrier of kCooperative needs
  int tile;            // rows of x, rounded up: 64 or 128
  int64_t slices;
  int64_t groups;
  int64_t group_tiles;
  int64_t splits;  // 1 where each block computes all
  int64_t depth;
  size_t shared_bytes;
  size_t workspace_bytes;  // of the parts of the Gram

  int64_t blocks() const { return slices * groups; }
};

FusedPlan plan_fused(const FusedShape& shape, const Limits& limits);

// Into how many parts the cooperative variant cuts the sum over the inputs, where there are so many blocks.
int64_t fused_splits(const FusedShape& shape);

// The same blocks, each of which computes the whole Gram.
FusedPlan recompute_instead(const FusedPlan& plan, const FusedShape& shape);

// With this variant, and about so many splits.
FusedPlan plan_fused_with(const FusedShape& shape, const Limits& limits, FusedVariant variant, int64_t splits);

}  // namespace consequentialism::cuda
