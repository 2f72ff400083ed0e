#include "conv_gram.h"

#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../checks.h"
#include "../guards.h"
#include "input_gram.h"

namespace consequentialism::cpu {

namespace {

ConvGeometry geometry_of(
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

}  // namespace

at::Tensor conv_gram(
    const at::Tensor& x, at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, int64_t groups, bool bias, int64_t patch_bytes, at::ScalarType dtype,
    std::string_view method) {
  const ConvGeometry geometry = geometry_of(x, kernel, stride, padding, dilation, groups);
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble, "dtype must be float32 or float64, got ", dtype);
  TORCH_CHECK_VALUE(patch_bytes >= 1, "patch_bytes must be at least 1, got ", patch_bytes);
  const bool displaced = parse_displaced(method);
  const bool unit_stride = geometry.stride[0] == 1 && geometry.stride[1] == 1 && geometry.stride[2] == 1;
  TORCH_CHECK_VALUE(!displaced || unit_stride, "method='displaced' needs a stride of 1, got stride ", stride);
  const PlainKernelGuard guard;
  const int64_t n = geometry.inputs() + bias;
  const at::Tensor gram = at::zeros({groups, n, n}, x.options().dtype(dtype).memory_format(c10::nullopt));
  if (gram.numel() == 0 || geometry.batch == 0) return gram;
  const auto [depth, height, width] = geometry.size;
  const at::Tensor five = x.reshape({geometry.batch, geometry.channels, depth, height, width});
  (displaced ? conv_gram_displaced_ : conv_gram_direct_)(gram, five, geometry, bias, patch_bytes);
  if (bias) gram.select(1, n - 1).select(1, n - 1).fill_(geometry.lines() * geometry.positions[2]);
  for (int64_t g = 0; g < groups; ++g) mirror_lower_(gram.select(0, g));
  return gram;
}

}  // namespace consequentialism::cpu

TORCH_LIBRARY_IMPL(consequentialism, CPU, m) {
  m.impl("conv_gram", consequentialism::cpu::conv_gram);
}
