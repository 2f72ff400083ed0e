// A convolution as the tests give it.
#pragma once

#include "../../csrc/conv_geometry.h"

namespace consequentialism::cuda::shim {

// numbers: batch, channels, groups, then size, kernel, stride, padding, dilation, of three dimensions each.
inline ConvGeometry geometry_of(const int64_t* numbers) {
  ConvGeometry g{};
  g.batch = numbers[0];
  g.channels = numbers[1];
  g.groups = numbers[2];
  std::array<int64_t, 3>* const all[] = {&g.size, &g.kernel, &g.stride, &g.padding, &g.dilation};
  for (int i = 0; i < 15; ++i) (*all[i / 3])[static_cast<size_t>(i % 3)] = numbers[3 + i];
  for (size_t i = 0; i < 3; ++i) {
    g.positions[i] = (g.padded()[i] - g.dilation[i] * (g.kernel[i] - 1) - 1) / g.stride[i] + 1;
  }
  return g;
}

}  // namespace consequentialism::cuda::shim
