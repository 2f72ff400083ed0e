// The op `conv_gram` on CUDA: checks, allocation, launches. Nothing here waits for the device.
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <string_view>
#include <type_traits>
#include <vector>

#include "../conv_checks.h"
#include "../guards.h"
#include "conv_gram_displaced_launcher.h"
#include "conv_gram_launcher.h"
#include "device.h"

namespace consequentialism::cuda {

namespace {

// x [B, C, D, H, W], B >= 1, of a type that From in launch_conv_gram can be. From displaced products where they are
// wanted and have a plan, else from patches.
at::Tensor gram_of_images(
    const at::Tensor& x, const ConvGeometry& geometry, bool bias, int64_t patch_bytes, at::ScalarType dtype,
    bool displaced) {
  const bool wide = dtype == at::kDouble;
  const int64_t n = geometry.inputs() + bias;
  const at::Tensor gram = at::empty({geometry.groups, n, n}, x.options().dtype(dtype).memory_format(c10::nullopt));
  const size_t element_bytes = wide ? sizeof(double) : x.dtype().itemsize();
  const size_t sum_bytes = wide ? sizeof(double) : sizeof(float);
  const Limits limits = limits_of_current_device();
  DisplacedPlan by_products{};
  if (displaced) by_products = plan_conv_gram_displaced(geometry, element_bytes, sum_bytes, patch_bytes, limits);
  ConvGramPlan by_patches{};
  if (by_products.tile == 0) {
    by_patches = plan_conv_gram(geometry, bias, element_bytes, sum_bytes, patch_bytes, limits);
  }
  const auto room = [&](size_t products_need, size_t patches_need) {
    const auto bytes = static_cast<int64_t>(by_products.tile == 0 ? patches_need : products_need);
    return at::empty({bytes}, gram.options().dtype(at::kByte));
  };
  const at::Tensor padded = room(by_products.padded_bytes, by_patches.padded_bytes);
  const at::Tensor workspace = room(by_products.workspace_bytes, by_patches.gram.workspace_bytes);
  const std::array<int64_t, 5> strides{x.stride(0), x.stride(1), x.stride(2), x.stride(3), x.stride(4)};
  dispatch_element(x.scalar_type(), [&](auto native, auto element) {
    using From = decltype(native);
    const auto* data = reinterpret_cast<const From*>(x.const_data_ptr<decltype(element)>());
    const auto run = [&](auto to) {
      using T = decltype(to);
      auto* const sums = gram.mutable_data_ptr<Accumulator<T>>();
      auto* const copy = reinterpret_cast<T*>(padded.mutable_data_ptr());
      void* const partial = workspace.mutable_data_ptr();
      const bool tf32 = tf32_allowed(x);
      const auto stream = c10::cuda::getCurrentCUDAStream();
      C10_CUDA_CHECK(
          (by_products.tile == 0
               ? launch_conv_gram<From, T>(data, strides, geometry, bias, tf32, sums, by_patches, copy, partial, stream)
               : launch_conv_gram_displaced<From, T>(
                     data, strides, geometry, bias, tf32, sums, by_products, copy, partial, stream)));
    };
    if (wide) {
      run(double{});
    } else if constexpr (!std::is_same_v<From, double>) {
      run(From{});
    }
  });
  return gram;
}

}  // namespace

at::Tensor conv_gram(
    const at::Tensor& x, at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, int64_t groups, bool bias, int64_t patch_bytes, at::ScalarType dtype,
    std::string_view method) {
  ConvGeometry geometry = geometry_of(x, kernel, stride, padding, dilation, groups);
  const bool displaced = check_conv_gram(geometry, stride, patch_bytes, dtype, method);
  const PlainKernelGuard plain;
  const c10::cuda::CUDAGuard device(x.device());
  const int64_t n = geometry.inputs() + bias;
  if (n == 0 || geometry.batch == 0)
    return at::zeros({groups, n, n}, x.options().dtype(dtype).memory_format(c10::nullopt));
  at::Tensor images = x;
  while (images.dim() < 5) images = images.unsqueeze(2);
  const auto type = x.scalar_type();
  const bool half = type == at::kHalf || type == at::kBFloat16;
  if (!half && type != at::kFloat && !(type == at::kDouble && dtype == at::kDouble)) images = images.to(dtype);
  if (groups <= kMaxGrams) return gram_of_images(images, geometry, bias, patch_bytes, dtype, displaced);
  std::vector<at::Tensor> grams;
  const int64_t channels = geometry.group_channels();
  for (int64_t first = 0; first < groups; first += kMaxGrams) {
    geometry.groups = std::min(kMaxGrams, groups - first);
    geometry.channels = geometry.groups * channels;
    grams.push_back(gram_of_images(
        images.narrow(1, first * channels, geometry.channels), geometry, bias, patch_bytes, dtype, displaced));
  }
  return at::cat(grams);
}

}  // namespace consequentialism::cuda

TORCH_LIBRARY_IMPL(consequentialism, CUDA, m) {
  m.impl("conv_gram", consequentialism::cuda::conv_gram);
}
