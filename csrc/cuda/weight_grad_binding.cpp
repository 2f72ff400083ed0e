// The op `weight_grad` on CUDA: the product by cuBLAS, the bias and NaNs by kernels. Nothing here waits for the device.
#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "../checks.h"
#include "../guards.h"
#include "device.h"
#include "launch_counters_binding.h"
#include "weight_grad_launcher.h"

namespace consequentialism::cuda {

namespace {

template <class T, class Scalar>
void bias_grad_and_poison(const at::Tensor& dy, const at::Tensor& column, const at::Tensor& dw, const at::Tensor& db) {
  const int64_t outputs = dy.size(1);
  const bool has_column = column.size(0) > 0;
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const int processors = limits_of_current_device().processors;
  const auto* dy_data = reinterpret_cast<const T*>(dy.const_data_ptr<Scalar>());
  const BiasPlan plan = plan_bias_grad(dy_data, dy.size(0), outputs, dy.stride(0), processors);
  const Counters counters(stream, dy);
  const at::Tensor partial = at::empty({has_column ? plan.partials(outputs) : 0}, column.options());
  auto* db_data = has_column ? reinterpret_cast<T*>(db.mutable_data_ptr<Scalar>()) : nullptr;
  const auto* column_data = has_column ? column.const_data_ptr<Accumulator<T>>() : nullptr;
  C10_CUDA_CHECK(
      launch_bias_grad<T>(
          dy_data, dy.size(0), outputs, dy.stride(0), column_data, reinterpret_cast<T*>(dw.mutable_data_ptr<Scalar>()),
          dw.numel(), db_data, partial.mutable_data_ptr<Accumulator<T>>(), counters.address(), plan, stream));
}

// dy^T y of a float16 dy and a float32 y, whose range is wider: y is rounded to float16 in a unit that fits, so that
// the tensor cores multiply, and the float32 sums come out of the unit as they are rounded. No more than a part of them
// is there at once: less memory, and on a chip with 50 MB of L2 cache they stay in it on their way.
at::Tensor half_product(const at::Tensor& dy, const at::Tensor& rows) {
  const at::Tensor y = rows.contiguous();
  const int64_t inputs = y.size(1);
  const int processors = limits_of_current_device().processors;
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const at::Tensor narrowed = at::empty(y.sizes(), dy.options());
  auto* const narrowed_data = reinterpret_cast<float16*>(narrowed.mutable_data_ptr<at::Half>());
  const PassPlan pass = plan_pass(y.const_data_ptr(), narrowed_data, y.numel(), processors);
  const at::Tensor largest = at::empty({pass.blocks}, y.options());
  const at::Tensor unit = at::empty({1}, y.options());
  C10_CUDA_CHECK(launch_narrow(
      y.const_data_ptr<float>(), y.numel(), largest.mutable_data_ptr<float>(), narrowed_data,
      unit.mutable_data_ptr<float>(), pass, stream));
  at::Tensor dw = at::empty({dy.size(1), inputs}, dy.options());
  const int64_t most = outputs_at_once(inputs);
  for (int64_t first = 0; first < dy.size(1); first += most) {
    const int64_t outputs = std::min(most, dy.size(1) - first);
    const at::Tensor product = at::mm(dy.narrow(1, first, outputs).t(), narrowed, at::kFloat);
    auto* const to = reinterpret_cast<float16*>(dw.mutable_data_ptr<at::Half>()) + first * inputs;
    const PassPlan plan = plan_pass(product.const_data_ptr(), to, product.numel(), processors);
    C10_CUDA_CHECK(
        launch_widen(product.const_data_ptr<float>(), product.numel(), unit.const_data_ptr<float>(), to, plan, stream));
  }
  return dw;
}

at::Tensor product_of(const at::Tensor& dy, const at::Tensor& rows) {
  const bool in_unit = dy.scalar_type() == at::kHalf && rows.scalar_type() == at::kFloat;
  // cuBLAS with float16 sums, where they are allowed, returns no float32; and in the unit they would overflow.
  const bool float32_sums = !at::globalContext().allowFP16AccumulationCuBLAS();
  if (in_unit && float32_sums && rows.numel() > 0) return half_product(dy, rows);
  return at::mm(dy.to(rows.scalar_type()).t(), rows).to(dy.scalar_type());
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> weight_grad(const at::Tensor& dy, const at::Tensor& rows, const at::Tensor& column) {
  check_weight_grad(dy, rows, column);
  const PlainKernelGuard plain;
  const c10::cuda::CUDAGuard device(dy.device());
  const at::Tensor dw = product_of(dy, rows);
  const at::Tensor db = at::empty({column.size(0) == 0 ? 0 : dy.size(1)}, dy.options());
  if (dy.size(1) == 0) return {dw, db};
  const at::Tensor errors = dy.stride(1) == 1 || dy.size(1) == 1 ? dy : dy.contiguous();
  const at::Tensor ones = column.to(wide_type(dy.scalar_type())).contiguous();
  dispatch_element(dy.scalar_type(), [&](auto native, auto element) {
    bias_grad_and_poison<decltype(native), decltype(element)>(errors, ones, dw, db);
  });
  return {dw, db};
}

}  // namespace consequentialism::cuda

TORCH_LIBRARY_IMPL(consequentialism, CUDA, m) {
  m.impl("weight_grad", consequentialism::cuda::weight_grad);
}
