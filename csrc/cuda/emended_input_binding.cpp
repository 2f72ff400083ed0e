// The ops `gram_inverse` and `emended_input` on CUDA: Gram, inverse and its application to x.
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <limits>
#include <optional>
#include <string_view>
#include <tuple>
#include <type_traits>

#include "../checks.h"
#include "../guards.h"
#include "../inverse_arguments.h"
#include "damped_inverse_binding.h"
#include "device.h"
#include "emended_input_launcher.h"
#include "input_gram_binding.h"

namespace consequentialism::cuda {

namespace {

// In the Gram's type as it is given: looking whether float32 will do would wait for the device.
at::Tensor invert_input(const at::Tensor& x, bool bias, Form form, const InverseArguments& arguments, bool padded) {
  return inverses_of(gram_of(x, bias, form, arguments.gram_dtype), arguments, padded)[0];
}

// trace(G) / c; infinite where only the Gram could tell it.
double largest_condition(const InverseArguments& arguments) {
  if (!arguments.relative) return std::numeric_limits<double>::infinity();
  return static_cast<double>(arguments.rank) / arguments.damping;
}

// The emended input and its column; x has contiguous rows, and the inverse is that of these arguments.
std::tuple<at::Tensor, at::Tensor> apply_inverse(
    const at::Tensor& inverse, const at::Tensor& x, bool bias, Form form, const InverseArguments& arguments) {
  const bool primal = form == Form::kPrimal;
  const auto dtype = x.scalar_type();
  const bool wide = inverse.scalar_type() == at::kDouble;
  const at::Tensor emended = at::empty(x.sizes(), x.options().dtype(dtype == at::kHalf ? at::kFloat : dtype));
  const at::Tensor column = at::empty({bias ? x.size(0) : 0}, x.options().dtype(wide_type(dtype)));
  if (x.size(0) == 0 || x.size(1) + bias == 0) return {emended, column};
  const EmendShape shape{
      x.size(0),
      x.size(1),
      bias,
      primal,
      x.dtype().itemsize(),
      inverse.dtype().itemsize(),
      dtype == at::kBFloat16 && !wide,
      largest_condition(arguments)};
  const EmendPlan plan = plan_emend(shape, limits_of_current_device());
  dispatch_element(dtype, [&](auto native, auto element) {
    using T = decltype(native);
    const auto* data = reinterpret_cast<const T*>(x.const_data_ptr<decltype(element)>());
    const auto run = [&](const auto* entries) {
      C10_CUDA_CHECK(
          launch_emended_input<T>(
              entries, inverse.stride(0), data, x.size(0), x.size(1), row_stride_of(x), bias, primal, tf32_allowed(x),
              static_cast<Emended<T>*>(emended.mutable_data_ptr()), column.mutable_data_ptr<Accumulator<T>>(), plan,
              c10::cuda::getCurrentCUDAStream()));
    };
    if (wide) {
      run(inverse.const_data_ptr<double>());
    } else if constexpr (!std::is_same_v<T, double>) {
      run(inverse.const_data_ptr<float>());
    }
  });
  return {emended, column};
}

}  // namespace

at::Tensor gram_inverse(
    const at::Tensor& x, bool bias, std::string_view form, double damping, std::string_view damping_mode,
    std::string_view scale, std::optional<at::ScalarType> gram_dtype, double narrow_up_to) {
  const InverseArguments arguments =
      inverse_arguments_of(x, bias, damping, damping_mode, scale, gram_dtype, narrow_up_to);
  const Form parsed = parse_form(form);
  const PlainKernelGuard plain;
  const c10::cuda::CUDAGuard device(x.device());
  return invert_input(with_contiguous_rows(x), bias, parsed, arguments, false).to(wide_type(x.scalar_type()));
}

std::tuple<at::Tensor, at::Tensor> emended_input(
    const at::Tensor& input, bool bias, std::string_view form, double damping, std::string_view damping_mode,
    std::string_view scale, std::optional<at::ScalarType> gram_dtype, double narrow_up_to) {
  const InverseArguments arguments =
      inverse_arguments_of(input, bias, damping, damping_mode, scale, gram_dtype, narrow_up_to);
  const Form parsed = parse_form(form);
  const PlainKernelGuard plain;
  const c10::cuda::CUDAGuard device(input.device());
  const at::Tensor x = with_contiguous_rows(input);
  return apply_inverse(invert_input(x, bias, parsed, arguments, true), x, bias, parsed, arguments);
}

}  // namespace consequentialism::cuda

TORCH_LIBRARY_IMPL(consequentialism, CUDA, m) {
  m.impl("gram_inverse", consequentialism::cuda::gram_inverse);
  m.impl("emended_input", consequentialism::cuda::emended_input);
}
