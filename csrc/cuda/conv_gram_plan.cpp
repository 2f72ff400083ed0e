#include <algorithm>
#include <limits>

#include "conv_gram.h"
#include "matrix_tiles.h"

namespace consequentialism::cuda {

namespace {

constexpr int64_t kCopyBytes = 16;  // the most that one copy to shared memory takes
constexpr int64_t kLeastCopyBytes = 4;
// Offsets within a piece are 32 bits.
constexpr int64_t kMostElements = std::numeric_limits<int32_t>::max();

int64_t reach(const ConvGeometry& g, int along, int64_t positions) {
  return (positions - 1) * g.stride[along] + g.dilation[along] * (g.kernel[along] - 1) + 1;
}

ConvPieces pieces_of(const ConvGeometry& g, size_t element_bytes, int64_t patch_bytes) {
  const int64_t channels = copied_channels(g.group_channels(), element_bytes);
  const int64_t budget = std::min(patch_bytes / static_cast<int64_t>(element_bytes), kMostElements);
  ConvPieces pieces{1, 2, 0};
  for (int i = 2; i >= 0; --i) {
    if (g.positions[i] > 1) pieces.along = i;
  }
  pieces.lines = g.positions[pieces.along];
  int64_t line = g.groups * channels;  // elements of what is one wide along the cut
  for (int i = 0; i < 3; ++i) line *= i == pieces.along ? 1 : reach(g, i, g.positions[i]);
  const int64_t sample = line * reach(g, pieces.along, pieces.lines);
  if (sample <= budget) {
    pieces.samples = std::min(budget / sample, g.batch);
  } else {
    const int64_t room = budget / line - reach(g, pieces.along, 1);
    pieces.lines = std::clamp<int64_t>(room / g.stride[pieces.along] + 1, 1, pieces.lines);
  }
  return pieces;
}

template <class Plan>
ConvGramPlan with(
    const ConvGeometry& g, bool bias, size_t element_bytes, size_t sum_bytes, int64_t patch_bytes, const Plan& plan) {
  const ConvPieces pieces = pieces_of(g, element_bytes, patch_bytes);
  const PatchShape shape = patch_shape(g, pieces, element_bytes);
  const GramShape gram{shape.rows(), shape.taps() * shape.channels, bias, true, element_bytes, sum_bytes, shape.groups};
  const auto padded = static_cast<size_t>(shape.groups * shape.samples * shape.sample_elements()) * element_bytes;
  return {pieces, plan(gram), padded};
}

}  // namespace

int64_t copied_channels(int64_t channels, size_t element_bytes) {
  const auto bytes = static_cast<int64_t>(element_bytes);
  int64_t copied = ceil_div(channels * bytes, kCopyBytes) * kCopyBytes;
  const int64_t least = std::max(kLeastCopyBytes, bytes);  // an element, even of no channels
  for (int64_t unit = kCopyBytes / 2; unit >= least && channels * bytes <= unit; unit /= 2) copied = unit;
  return copied / bytes;
}

PatchShape patch_shape(const ConvGeometry& g, const ConvPieces& piece, size_t element_bytes) {
  PatchShape shape{};
  shape.groups = g.groups;
  shape.samples = piece.samples;
  shape.positions = g.positions;
  shape.positions[static_cast<size_t>(piece.along)] = piece.lines;
  for (int i = 0; i < 3; ++i) shape.size[i] = reach(g, i, shape.positions[i]);
  shape.kernel = g.kernel;
  shape.stride = g.stride;
  shape.dilation = g.dilation;
  shape.channels = copied_channels(g.group_channels(), element_bytes);
  shape.used_channels = g.group_channels();
  return shape;
}

ConvGramPlan plan_conv_gram_with(
    const ConvGeometry& geometry, bool bias, size_t element_bytes, size_t sum_bytes, int64_t patch_bytes, int tile,
    int64_t splits, bool clustered) {
  return with(geometry, bias, element_bytes, sum_bytes, patch_bytes, [&](const GramShape& shape) {
    return plan_gram_with(shape, tile, splits, clustered);
  });
}

ConvGramPlan plan_conv_gram(
    const ConvGeometry& geometry, bool bias, size_t element_bytes, size_t sum_bytes, int64_t patch_bytes,
    const Limits& limits) {
  return with(geometry, bias, element_bytes, sum_bytes, patch_bytes, [&](const GramShape& shape) {
    return plan_gram(shape, limits);
  });
}

}  // namespace consequentialism::cuda
