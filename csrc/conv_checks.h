// The arguments of conv_gram, checked. TORCH_CHECK_VALUE raises ValueError in Python, TORCH_CHECK_TYPE TypeError.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <string_view>
#include <tuple>

#include "checks.h"
#include "conv_geometry.h"

namespace consequentialism {

inline ConvGeometry geometry_of(
    const at::Tensor& x, at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, int64_t groups) {
  const int64_t spatial = x.dim() - 2;
  TORCH_CHECK_VALUE(
      1 <= spatial && spatial <= 3, "x must have the shape [B, C, *spatial], 3 to 5 dimensions, got ", x.sizes());
  ConvGeometry g;
  for (auto* values : {&g.size, &g.kernel, &g.stride, &g.dilation, &g.positions}) values->fill(1);
  g.padding.fill(0);
  for (const auto& [name, values, least] :
       {std::tuple("kernel", kernel, 1), std::tuple("stride", stride, 1), std::tuple("padding", padding, 0),
        std::tuple("dilation", dilation, 1)}) {
    TORCH_CHECK_VALUE(
        static_cast<int64_t>(values.size()) == spatial, name, " must have ", spatial, " numbers for x ", x.sizes(),
        ", got ", values);
    for (const int64_t value : values) {
      TORCH_CHECK_VALUE(value >= least, name, " must be at least ", least, ", got ", values);
    }
  }
  g.batch = x.size(0);
  g.channels = x.size(1);
  g.groups = groups;
  TORCH_CHECK_VALUE(
      groups >= 1 && g.channels % groups == 0, "groups must divide x's channels, got groups ", groups, " and x ",
      x.sizes());
  for (int64_t i = 0; i < spatial; ++i) {
    const int64_t to = 3 - spatial + i;
    g.size[to] = x.size(2 + i);
    g.kernel[to] = kernel[i];
    g.stride[to] = stride[i];
    g.padding[to] = padding[i];
    g.dilation[to] = dilation[i];
    const int64_t room = g.size[to] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1;
    TORCH_CHECK_VALUE(room >= 0, "kernel ", kernel, " does not fit into x ", x.sizes(), " with padding ", padding);
    g.positions[to] = room / stride[i] + 1;
  }
  return g;
}

// Whether the displaced products are wanted.
inline bool check_conv_gram(
    const ConvGeometry& geometry, at::IntArrayRef stride, int64_t patch_bytes, at::ScalarType dtype,
    std::string_view method) {
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble, "dtype must be float32 or float64, got ", dtype);
  TORCH_CHECK_VALUE(patch_bytes >= 1, "patch_bytes must be at least 1, got ", patch_bytes);
  const bool displaced = parse_displaced(method);
  const bool unit_stride = geometry.stride[0] == 1 && geometry.stride[1] == 1 && geometry.stride[2] == 1;
  TORCH_CHECK_VALUE(!displaced || unit_stride, "method='displaced' needs a stride of 1, got stride ", stride);
  return displaced;
}

}  // namespace consequentialism
