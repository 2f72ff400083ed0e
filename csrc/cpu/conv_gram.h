#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>

namespace consequentialism::cpu {

// A convolution over x [B, C, D, H, W]; one or two dimensions have leading ones.
struct ConvGeometry {
  std::array<int64_t, 3> size, kernel, stride, padding, dilation, positions;
  int64_t batch, channels, groups;

  std::array<int64_t, 3> padded() const {
    return {size[0] + 2 * padding[0], size[1] + 2 * padding[1], size[2] + 2 * padding[2]};
  }
  int64_t group_channels() const { return channels / groups; }
  int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
  int64_t inputs() const { return group_channels() * taps(); }           // I without the bias's
  int64_t lines() const { return batch * positions[0] * positions[1]; }  // each of positions[2] rows of x
};

// gram [groups, n, n] <- patches^T patches, lower triangles, from patches that are unfolded block by block.
void conv_gram_direct_(
    const at::Tensor& gram, const at::Tensor& x, const ConvGeometry& geometry, bool bias, int64_t patch_bytes);

// The same from products of x with itself, displaced, for a stride of 1: taps with the same displacement share one
// product, but for strips at the border.
void conv_gram_displaced_(
    const at::Tensor& gram, const at::Tensor& x, const ConvGeometry& geometry, bool bias, int64_t patch_bytes);

}  // namespace consequentialism::cpu
