// The op `input_gram` on CUDA: checks, allocation, launch. Nothing here waits for the device.
#include "input_gram_binding.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <string_view>
#include <type_traits>

#include "../guards.h"
#include "device.h"
#include "input_gram_launcher.h"

namespace consequentialism::cuda {

namespace {

// Of x with contiguous rows, on the current device, as plan_of(shape, limits) says.
template <class PlanOf>
at::Tensor gram_as(const at::Tensor& x, bool bias, Form form, at::ScalarType dtype, const PlanOf& plan_of) {
  const bool primal = form == Form::kPrimal;
  GramShape shape{
      x.size(0), x.size(1), bias, primal, x.dtype().itemsize(), dtype == at::kDouble ? sizeof(double) : sizeof(float)};
  shape.aligned = has_aligned_rows(x);
  const int64_t n = gram_order(shape);
  if (n == 0 || x.size(0) == 0) return at::zeros({n, n}, x.options().dtype(dtype));
  const GramPlan plan = plan_of(shape, limits_of_current_device());
  const at::Tensor gram = at::empty({n, n}, x.options().dtype(dtype));
  const at::Tensor workspace = at::empty({static_cast<int64_t>(plan.workspace_bytes)}, x.options().dtype(at::kByte));
  dispatch_element(x.scalar_type(), [&](auto native, auto element) {
    using T = decltype(native);
    const auto* data = reinterpret_cast<const T*>(x.const_data_ptr<decltype(element)>());
    const auto run = [&](auto* entries) {
      C10_CUDA_CHECK(
          launch_input_gram<T>(
              data, x.size(0), x.size(1), row_stride_of(x), bias, primal, tf32_allowed(x), entries, plan,
              workspace.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream()));
    };
    if (dtype == at::kDouble) {
      run(gram.mutable_data_ptr<double>());
    } else if constexpr (!std::is_same_v<T, double>) {
      run(gram.mutable_data_ptr<float>());
    }
  });
  return gram;
}

}  // namespace

at::Tensor gram_of(const at::Tensor& x, bool bias, Form form, at::ScalarType dtype) {
  return gram_as(x, bias, form, dtype, plan_gram);
}

at::Tensor input_gram(const at::Tensor& x, bool bias, std::string_view form) {
  check_x(x);
  const Form parsed = parse_form(form);
  const PlainKernelGuard plain;
  const c10::cuda::CUDAGuard device(x.device());
  return gram_of(with_contiguous_rows(x), bias, parsed, wide_type(x.scalar_type()));
}

// By the variant that is named, or not at all: for tests and benchmarks.
at::Tensor input_gram_by(const at::Tensor& x, bool bias, std::string_view form, std::string_view variant) {
  check_x(x);
  const Form parsed = parse_form(form);
  TORCH_CHECK_VALUE(
      variant == "warps" || variant == "warpgroups", "variant must be 'warps' or 'warpgroups', got '", variant, "'");
  const auto named = variant == "warps" ? GramVariant::kWarps : GramVariant::kWarpgroups;
  const PlainKernelGuard plain;
  const c10::cuda::CUDAGuard device(x.device());
  return gram_as(
      with_contiguous_rows(x), bias, parsed, wide_type(x.scalar_type()),
      [&](const GramShape& shape, const Limits& limits) {
        const GramPlan plan = plan_gram_by(shape, limits, named);
        TORCH_CHECK(
            plan.tile != 0 || named == GramVariant::kWarps,
            "variant 'warpgroups' is for float16 and bfloat16 with rows aligned to 16 bytes, on devices of compute "
            "capability 9.0, in a build for them; got ",
            x.scalar_type(), limits.warpgroups ? "" : " on a device or in a build that has none");
        return plan;
      });
}

}  // namespace consequentialism::cuda

TORCH_LIBRARY_IMPL(consequentialism, CUDA, m) {
  m.impl("input_gram", consequentialism::cuda::input_gram);
  m.impl("input_gram.by", consequentialism::cuda::input_gram_by);
}
