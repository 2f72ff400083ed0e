#include "conv_gram.h"

#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../conv_checks.h"
#include "../guards.h"
#include "input_gram.h"

namespace consequentialism::cpu {

at::Tensor conv_gram(
    const at::Tensor& x, at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, int64_t groups, bool bias, int64_t patch_bytes, at::ScalarType dtype,
    std::string_view method) {
  const ConvGeometry geometry = geometry_of(x, kernel, stride, padding, dilation, groups);
  const bool displaced = check_conv_gram(geometry, stride, patch_bytes, dtype, method);
  const PlainKernelGuard guard;
  const int64_t n = geometry.inputs() + bias;
  const at::Tensor gram = at::zeros({groups, n, n}, x.options().dtype(dtype).memory_format(c10::nullopt));
  if (x.numel() > 0) {  // else there is padding alone, if anything: zeros but for the bias's count
    const auto [depth, height, width] = geometry.size;
    const at::Tensor five = x.reshape({geometry.batch, geometry.channels, depth, height, width});
    (displaced ? conv_gram_displaced_ : conv_gram_direct_)(gram, five, geometry, bias, patch_bytes);
  }
  if (bias) gram.select(1, n - 1).select(1, n - 1).fill_(geometry.lines() * geometry.positions[2]);
  for (int64_t g = 0; g < groups; ++g) mirror_lower_(gram.select(0, g));
  return gram;
}

}  // namespace consequentialism::cpu

TORCH_LIBRARY_IMPL(consequentialism, CPU, m) {
  m.impl("conv_gram", consequentialism::cpu::conv_gram);
}
