// Host side of a convolution's Gram: what its kernel reads, and how a launch is chosen. Plain C++.
#pragma once

#include "../conv_geometry.h"
#include "input_gram.h"

namespace consequentialism::cuda {

// Padded samples, or a part of the positions of one, [groups, samples, D, H, W, C]: zeros around them, channels last
// and rounded up.
struct PatchShape {
  int64_t groups, samples;
  std::array<int64_t, 3> size, positions, kernel, stride, dilation;
  int64_t channels;       // of a group
  int64_t used_channels;  // the others are zero

  int64_t rows() const { return samples * positions[0] * positions[1] * positions[2]; }
  int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
  int64_t sample_elements() const { return size[0] * size[1] * size[2] * channels; }  // of a group
};

// Channels of a group that are copied: as many bytes as one copy to shared memory takes, 4, 8 or a multiple of 16.
int64_t copied_channels(int64_t channels, size_t element_bytes);

// How x is cut: pieces of so many samples, or, where already one does not fit, so many positions of a sample along its
// first dimension that has several.
struct ConvPieces {
  int64_t samples;
  int along;
  int64_t lines;
};

// The shape of a piece of so many samples and lines.
PatchShape patch_shape(const ConvGeometry& geometry, const ConvPieces& piece, size_t element_bytes);

struct ConvGramPlan {
  ConvPieces pieces;  // the largest; the last ones may be smaller
  GramPlan gram;      // of the largest, in the order of taps, then channels; it serves all
  size_t padded_bytes;
};

ConvGramPlan plan_conv_gram(
    const ConvGeometry& geometry, bool bias, size_t element_bytes, size_t sum_bytes, int64_t patch_bytes,
    const Limits& limits);

// With this tile and about so many splits, in a cluster where that is wanted.
ConvGramPlan plan_conv_gram_with(
    const ConvGeometry& geometry, bool bias, size_t element_bytes, size_t sum_bytes, int64_t patch_bytes, int tile,
    int64_t splits, bool clustered);

}  // namespace consequentialism::cuda
