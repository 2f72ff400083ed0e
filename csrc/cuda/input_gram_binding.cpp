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

at::Tensor gram_of(const at::Tensor& x, bool bias, Form form, at::ScalarType dtype) {
  const bool primal = form == Form::kPrimal;
  const GramShape shape{
      x.size(0), x.size(1), bias, primal, x.dtype().itemsize(), dtype == at::kDouble ? sizeof(double) : sizeof(float)};
  const int64_t n = gram_order(shape);
  if (n == 0 || x.size(0) == 0) return at::zeros({n, n}, x.options().dtype(dtype));
  const at::Tensor gram = at::empty({n, n}, x.options().dtype(dtype));
  const GramPlan plan = plan_gram(shape, limits_of_current_device());
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

at::Tensor input_gram(const at::Tensor& x, bool bias, std::string_view form) {
  check_x(x);
  const Form parsed = parse_form(form);
  const PlainKernelGuard plain;
  const c10::cuda::CUDAGuard device(x.device());
  return gram_of(with_contiguous_rows(x), bias, parsed, wide_type(x.scalar_type()));
}

}  // namespace consequentialism::cuda

TORCH_LIBRARY_IMPL(consequentialism, CUDA, m) {
  m.impl("input_gram", consequentialism::cuda::input_gram);
}
