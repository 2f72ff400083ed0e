// What a convolution reads. Plain C++, for kernels too.
#pragma once

#include <array>
#include <cstdint>

namespace consequentialism {

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

}  // namespace consequentialism
