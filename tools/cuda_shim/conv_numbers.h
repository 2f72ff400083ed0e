// A convolution as the tests give it. Types: 0 float64, 1 float32, 2 bfloat16, 3 float16.
#pragma once

#include <cstddef>

#include "../../csrc/conv_geometry.h"

namespace consequentialism::cuda::shim {

inline size_t bytes_of(int64_t type) {
  constexpr size_t kBytes[] = {8, 4, 2, 2};
  return kBytes[type];
}

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
