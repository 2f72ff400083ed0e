#include <algorithm>
#include <limits>

#include "conv_gram_displaced.h"
#include "matrix_tiles.h"

namespace consequentialism::cuda {

namespace {

constexpr int64_t kMostElements = std::numeric_limits<int32_t>::max();  // offsets are 32 bits
constexpr int64_t kMostWorkspace = int64_t{64} << 20;                   // or twice the Gram

Displacements displacements_of(const ConvGeometry& g, int tile) {
  Displacements own{};
  for (int i = 0; i < 3; ++i) {
    if (g.kernel[static_cast<size_t>(i)] > 1) own.along = i;
  }
  const auto last = static_cast<size_t>(own.along);
  own.sources = 2 * g.group_channels() <= tile && g.positions[last] > g.kernel[last] ? 2 : 1;
  int others = 0;  // displacements along the dimensions before
  for (int i = 0; i < 3; ++i) {
    const auto at = static_cast<size_t>(i);
    CellAxis& axis = own.axes[i];
    axis.kernel = static_cast<int>(g.kernel[at]);
    axis.positions = static_cast<int>(g.positions[at]);
    const auto padding = static_cast<int>(std::min(g.padding[at], g.kernel[at] - 1));
    const int ahead = i == own.along ? own.sources - 1 : 0;
    axis.first = padding - ahead;
    axis.end = axis.positions - ahead;
    axis.before = axis.kernel - 1 - axis.first;
    axis.behind = axis.kernel - 1 - padding + ahead;
    if (i < own.along) others = others * (2 * axis.kernel - 1) + axis.kernel - 1;
  }
  const int kernel = own.axes[own.along].kernel;
  own.of_none = own.sources == 1 ? kernel : (kernel + 1) / 2;
  own.of_each = own.sources == 1 ? 2 * kernel - 1 : kernel;
  own.targets = own.of_none + others * own.of_each;
  return own;
}

// rows(cell's rows in a sample) added up over all cells.
template <class Rows>
int64_t over_cells(const Displacements& own, const Rows& rows) {
  int64_t sum = 0;
  const auto& [d, h, w] = own.axes;
  for (int i = 0; i < d.cells(); ++i) {
    for (int j = 0; j < h.cells(); ++j) {
      for (int k = 0; k < w.cells(); ++k) sum += rows(int64_t{d.count(i)} * h.count(j) * w.count(k));
    }
  }
  return sum;
}

// The least depth with which all pieces, but for the small ones of corners, are on the chip at once.
int64_t depth_of(const Displacements& own, int64_t samples, int64_t most_pieces, int64_t stage) {
  const int64_t rows = over_cells(own, [&](int64_t each) { return samples * each; });
  for (int64_t pieces = most_pieces;; --pieces) {
    const int64_t depth = ceil_div(ceil_div(rows, pieces), stage) * stage;
    const int64_t large = over_cells(own, [&](int64_t each) {
      const int64_t own_rows = samples * each;
      return 4 * own_rows < depth ? 0 : ceil_div(own_rows, depth);
    });
    if (pieces == 1 || large <= most_pieces) return depth;
  }
}

}  // namespace

int64_t flat_offset(const PatchShape& padded, const int (&d)[3]) {
  return ((d[0] * padded.size[1] + d[1]) * padded.size[2] + d[2]) * padded.channels;
}

DisplacedPlan plan_conv_gram_displaced(
    const ConvGeometry& g, size_t element_bytes, size_t sum_bytes, int64_t patch_bytes, const Limits& limits) {
  const auto bytes = static_cast<int64_t>(element_bytes);
  const int tile = sum_bytes == 8 ? kSmallTile : kLargeTile;
  DisplacedPlan plan{};
  for (size_t i = 0; i < 3; ++i) {
    const bool fits = g.stride[i] == 1 && (g.dilation[i] == 1 || g.kernel[i] == 1) && g.positions[i] >= g.kernel[i];
    if (!fits || g.kernel[i] > 2 * kMostTargets || g.positions[i] > kMostElements) return plan;
  }
  if (g.taps() == 1 || g.group_channels() == 0) return plan;
  const Displacements own = displacements_of(g, tile);
  if (own.targets > kMostTargets) return plan;
  plan.displacements = own;
  plan.padded = patch_shape(g, {1, 2, g.positions[2]}, element_bytes);
  plan.padded.size[static_cast<size_t>(own.along)] += own.sources - 1;
  const int64_t channels = plan.padded.channels;
  int64_t behind = flat_offset(plan.padded, {own.along == 0, own.along == 1, own.along == 2});
  for (int target = 0; target < own.targets; ++target) {
    int d[3];
    own.target(target, d);
    behind = std::max(behind, flat_offset(plan.padded, d));
  }
  const int64_t room = std::min(patch_bytes / bytes, kMostElements) - behind;
  plan.padded.samples = std::min(room / (g.groups * plan.padded.sample_elements()), g.batch);
  if (plan.padded.samples < 1) return plan;
  plan.tiles_down = ceil_div(own.sources * channels, tile);
  plan.tiles_across = ceil_div(own.targets * channels, tile);
  const int64_t tiles = plan.tiles_down * plan.tiles_across * g.groups;
  const int resident = resident_of_tile(tile, sum_bytes);
  const int64_t most_pieces = std::max<int64_t>(1, limits.processors * resident / tiles);
  plan.depth = depth_of(own, plan.padded.samples, most_pieces, stage_depth(element_bytes));
  plan.pieces = over_cells(own, [&](int64_t rows) { return ceil_div(plan.padded.samples * rows, plan.depth); });
  const bool pairs = element_bytes == 2 && sum_bytes == 4;
  plan.shared_bytes =
      2 * kProductStages * operand_bytes(tile, stage_depth(element_bytes), element_bytes, pairs, Major::kOuter);
  const int64_t elements = g.groups * plan.padded.samples * plan.padded.sample_elements() + behind;
  plan.padded_bytes = static_cast<size_t>(elements * bytes);
  const int64_t sums = plan.pieces * g.groups * (own.sources * channels) * (own.targets * channels + 1) *
                       static_cast<int64_t>(sum_bytes);
  plan.workspace_bytes = static_cast<size_t>(sums);
  const int64_t gram = g.groups * g.inputs() * g.inputs() * static_cast<int64_t>(sum_bytes);
  const bool small = sums <= std::max(kMostWorkspace, 2 * gram) && plan.pieces * tiles / g.groups <= kMaxGrid;
  plan.tile = small && plan.shared_bytes <= limits.shared_bytes ? tile : 0;
  return plan;
}

}  // namespace consequentialism::cuda
