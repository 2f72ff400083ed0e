// The op `fused_weight_grad` on CUDA: one launch where the plan has one, else the ops for its parts.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "../checks.h"
#include "../guards.h"
#include "../inverse_arguments.h"
#include "../separate_weight_grad.h"
#include "device.h"
#include "fused_weight_grad_launcher.h"
#include "launch_counters_binding.h"

namespace consequentialism::cuda {

namespace {

FusedShape shape_of(const at::Tensor& x, const at::Tensor& dy, bool bias) {
  return {x.size(0), x.size(1), dy.size(1), bias, x.dtype().itemsize(), x.scalar_type() == at::kBFloat16};
}

std::tuple<at::Tensor, at::Tensor> run_fused(
    const at::Tensor& input, const at::Tensor& error, bool bias, const InverseArguments& options, const FusedPlan& plan,
    cudaStream_t stream) {
  const Counters counters(stream, input);
  const at::Tensor x = with_contiguous_rows(input), dy = with_contiguous_rows(error);
  const at::Tensor dw = at::empty({dy.size(1), x.size(1)}, x.options());
  const at::Tensor db = at::empty({bias ? dy.size(1) : 0}, x.options());
  const at::Tensor workspace = at::empty({static_cast<int64_t>(plan.workspace_bytes)}, x.options().dtype(at::kByte));
  dispatch_element(x.scalar_type(), [&](auto native, auto element) {
    using T = decltype(native);
    using Scalar = decltype(element);
    FusedArguments<T> arguments{};
    arguments.x = reinterpret_cast<const T*>(x.const_data_ptr<Scalar>());
    arguments.dy = reinterpret_cast<const T*>(dy.const_data_ptr<Scalar>());
    arguments.dw = reinterpret_cast<T*>(dw.mutable_data_ptr<Scalar>());
    arguments.db = bias ? reinterpret_cast<T*>(db.mutable_data_ptr<Scalar>()) : nullptr;
    arguments.x_stride = row_stride_of(x);
    arguments.dy_stride = row_stride_of(dy);
    arguments.rows = x.size(0);
    arguments.inputs = x.size(1);
    arguments.outputs = dy.size(1);
    arguments.tf32 = tf32_allowed(x);
    arguments.inverse.damping = options.damping;
    arguments.inverse.rank = static_cast<double>(options.rank);
    arguments.inverse.factor = options.scale == Scale::kNlms ? static_cast<double>(options.rows) : 1;
    arguments.inverse.relative = options.relative;
    arguments.inverse.scaled_by_c = options.scale == Scale::kGradient;
    C10_CUDA_CHECK(
        launch_fused_weight_grad<T>(
            arguments, plan, workspace.mutable_data_ptr(), counters.address(), breakdown_counter(), stream));
  });
  return {dw, db};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> fused_weight_grad(
    const at::Tensor& x, const at::Tensor& dy, bool bias, double damping, std::string_view damping_mode,
    std::string_view scale, std::optional<at::ScalarType> gram_dtype, double narrow_up_to) {
  const InverseArguments arguments =
      inverse_arguments_of(x, bias, damping, damping_mode, scale, gram_dtype, narrow_up_to);
  check_fused(x, dy);
  const PlainKernelGuard plain;
  const c10::cuda::CUDAGuard device(x.device());
  if (x.size(0) == 0) {
    return {at::zeros({dy.size(1), x.size(1)}, x.options()), at::zeros({bias ? dy.size(1) : 0}, x.options())};
  }
  if (arguments.gram_dtype == wide_type(x.scalar_type())) {  // a Gram wider than x is not fused
    const FusedPlan plan = plan_fused(shape_of(x, dy, bias), limits_of_current_device());
    if (plan.variant != FusedVariant::kNone) {
      return run_fused(x, dy, bias, arguments, plan, c10::cuda::getCurrentCUDAStream());
    }
  }
  return separate_weight_grad(x, dy, bias, damping, damping_mode, scale, gram_dtype, narrow_up_to);
}

// By the variant that is named, or not at all, with a Gram in the type of sums over x: for tests and benchmarks.
std::tuple<at::Tensor, at::Tensor> fused_weight_grad_by(
    const at::Tensor& x, const at::Tensor& dy, bool bias, double damping, std::string_view damping_mode,
    std::string_view scale, std::string_view variant) {
  const InverseArguments arguments = inverse_arguments_of(x, bias, damping, damping_mode, scale, std::nullopt, 0);
  check_fused(x, dy);
  TORCH_CHECK_VALUE(
      variant == "recompute" || variant == "cooperative", "variant must be 'recompute' or 'cooperative', got '",
      variant, "'");
  const PlainKernelGuard plain;
  const c10::cuda::CUDAGuard device(x.device());
  const FusedShape shape = shape_of(x, dy, bias);
  const Limits limits = limits_of_current_device();
  const FusedPlan plan = variant == "recompute"
                             ? plan_fused_with(shape, limits, FusedVariant::kRecompute, 1)
                             : plan_fused_with(shape, limits, FusedVariant::kCooperative, fused_splits(shape));
  TORCH_CHECK_VALUE(plan.reason == nullptr, "x ", x.sizes(), " and dy ", dy.sizes(), " are not fused: ", plan.reason);
  return run_fused(x, dy, bias, arguments, plan, c10::cuda::getCurrentCUDAStream());
}

}  // namespace consequentialism::cuda

TORCH_LIBRARY_IMPL(consequentialism, CUDA, m) {
  m.impl("fused_weight_grad", consequentialism::cuda::fused_weight_grad);
  m.impl("fused_weight_grad.by", consequentialism::cuda::fused_weight_grad_by);
}
