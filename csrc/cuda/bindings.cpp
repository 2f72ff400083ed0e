// The CUDA ops: checks, allocation, launches. Nothing here waits for the device, so all of it can be captured in a
// graph.
#include "bindings.h"

#include <ATen/core/List.h>
#include <ATen/ops/cholesky_solve.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/full.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/linalg_cholesky_ex.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <map>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../checks.h"
#include "../guards.h"
#include "../inverse_arguments.h"
#include "device.h"
#include "launchers.h"
#include "matrix_launchers.h"

namespace consequentialism::cuda {

namespace {

// Matrices of one order, as many in a launch as it takes.
template <class T>
void run_damped_inverse(
    c10::ArrayRef<InverseItem<T>> items, int64_t n, const InversePlan& plan, const at::TensorOptions& options) {
  const auto bytes = static_cast<int64_t>(plan.workspace_bytes);
  for (size_t first = 0; first < items.size(); first += kMaxInverseItems) {
    const auto some = items.slice(first, std::min<size_t>(kMaxInverseItems, items.size() - first));
    const auto count = static_cast<int>(some.size());
    const at::Tensor workspace = at::empty({count * bytes}, options.dtype(at::kByte));
    C10_CUDA_CHECK(
        launch_damped_inverse<T>(
            some.data(), count, n, plan, workspace.mutable_data_ptr(), breakdown_counter(),
            c10::cuda::getCurrentCUDAStream()));
  }
}

// By cuSOLVER, for orders above the kernel's. A broken-down factor is done again by the kernel, which else returns at
// once.
template <class T>
at::Tensor stock_inverse(
    const at::Tensor& gram, const InverseArguments& arguments, InverseItem<T> item, const Limits& limits) {
  const int64_t n = gram.size(0);
  const at::Tensor trace = gram.diagonal().sum();
  const at::Tensor c = arguments.relative ? trace.mul(arguments.damping / static_cast<double>(arguments.rank))
                                          : at::full({}, arguments.damping, gram.options());
  at::Tensor damped = gram.clone();
  damped.diagonal().add_(c);
  const auto [lower, info] = at::linalg_cholesky_ex(damped);
  // Not cholesky_inverse, which waits for the device to look for errors.
  at::Tensor inverse = at::cholesky_solve(at::eye(n, gram.options()), lower);
  inverse.mul_(item.factor);
  if (item.scaled_by_c) inverse.mul_(c);
  const at::Tensor broken = info.ne(0).logical_or(lower.diagonal().isfinite().logical_not().any());
  const at::Tensor retry = broken.logical_and(trace.ne(0)).logical_and(trace.isfinite()).to(at::kInt);
  const InversePlan plan = plan_damped_inverse_retry(n, sizeof(T), limits);
  TORCH_CHECK_VALUE(plan.team != InverseTeam::kNone, "gram must have at most ", kMaxRetryOrder, " rows, got ", n);
  item.inverse = inverse.mutable_data_ptr<T>();
  item.only_if = retry.const_data_ptr<int>();
  run_damped_inverse<T>(item, n, plan, gram.options());
  inverse = at::where(trace.eq(0), at::zeros_like(inverse), inverse);
  return at::where(trace.isfinite(), inverse, at::full_like(inverse, std::numeric_limits<double>::quiet_NaN()));
}

template <class T>
InverseItem<T> inverse_item(const at::Tensor& gram, const at::Tensor& inverse, const InverseArguments& arguments) {
  InverseItem<T> item{};
  item.gram = gram.const_data_ptr<T>();
  item.inverse = inverse.mutable_data_ptr<T>();
  item.damping = arguments.damping;
  item.rank = static_cast<double>(arguments.rank);
  item.factor = arguments.scale == Scale::kNlms ? static_cast<double>(arguments.rows) : 1;
  item.relative = arguments.relative;
  item.scaled_by_c = arguments.scale == Scale::kGradient;
  return item;
}

// scale * (gram + c I)^-1 of Grams of one type, those of one order by one launch; the other Grams are left alone.
template <class T>
void invert_grams(
    c10::ArrayRef<at::Tensor> grams, c10::ArrayRef<InverseArguments> arguments, std::vector<at::Tensor>& inverses) {
  const Limits limits = limits_of_current_device();
  std::map<int64_t, std::vector<InverseItem<T>>> by_order;
  for (size_t i = 0; i < grams.size(); ++i) {
    const int64_t n = grams[i].size(0);
    if (grams[i].scalar_type() != c10::CppTypeToScalarType<T>::value || n == 0) continue;
    const InverseItem<T> item = inverse_item<T>(grams[i], inverses[i], arguments[i]);
    if (plan_damped_inverse(n, sizeof(T), limits).team == InverseTeam::kNone) {
      inverses[i] = stock_inverse<T>(grams[i], arguments[i], item, limits);
    } else {
      by_order[n].push_back(item);
    }
  }
  for (const auto& [n, items] : by_order) {
    run_damped_inverse<T>(items, n, plan_damped_inverse(n, sizeof(T), limits), grams[0].options());
  }
}

std::vector<at::Tensor> inverses_of(c10::ArrayRef<at::Tensor> grams, c10::ArrayRef<InverseArguments> arguments) {
  std::vector<at::Tensor> inverses;
  for (const at::Tensor& gram : grams) inverses.push_back(at::empty(gram.sizes(), gram.options()));
  invert_grams<float>(grams, arguments, inverses);
  invert_grams<double>(grams, arguments, inverses);
  return inverses;
}

// The Gram in dtype, float32 or float64; x has contiguous rows.
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
              data, x.size(0), x.size(1), row_stride_of(x), bias, primal, tf32_allowed(), entries, plan,
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

// In float64 where float32 is not enough, known from the arguments alone: looking at the Gram would wait for it.
at::Tensor gram_to_invert(const at::Tensor& x, bool bias, Form form, const InverseArguments& arguments) {
  const bool narrow = arguments.float32_is_enough() && x.scalar_type() != at::kDouble;
  return gram_of(x, bias, form, narrow ? at::kFloat : at::kDouble);
}

at::Tensor invert_input(const at::Tensor& x, bool bias, Form form, const InverseArguments& arguments) {
  return inverses_of(gram_to_invert(x, bias, form, arguments), arguments)[0];
}

}  // namespace

int64_t breakdowns() {
  int64_t sum = 0;
  for (size_t device = 0; device < breakdown_counters.size(); ++device) {
    const unsigned* address = breakdown_counters[device].load();
    if (address == nullptr) continue;
    const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
    unsigned count = 0;
    C10_CUDA_CHECK(cudaMemcpy(&count, address, sizeof(count), cudaMemcpyDeviceToHost));
    sum += count;
  }
  return sum;
}

at::Tensor input_gram(const at::Tensor& x, bool bias, std::string_view form) {
  check_x(x);
  const Form parsed = parse_form(form);
  const PlainKernelGuard plain;
  const c10::cuda::CUDAGuard device(x.device());
  return gram_of(with_contiguous_rows(x), bias, parsed, wide_type(x.scalar_type()));
}

at::Tensor damped_inverse(
    const at::Tensor& gram, double damping, std::string_view damping_mode, std::string_view scale, int64_t rank,
    int64_t rows) {
  check_gram(gram);
  const InverseArguments arguments = inverse_arguments(damping, damping_mode, scale, rank, rows);
  const PlainKernelGuard plain;
  const c10::cuda::CUDAGuard device(gram.device());
  return inverses_of(gram.contiguous(), arguments)[0];
}

at::Tensor gram_inverse(
    const at::Tensor& x, bool bias, std::string_view form, double damping, std::string_view damping_mode,
    std::string_view scale) {
  const InverseArguments arguments = inverse_arguments_of(x, bias, damping, damping_mode, scale);
  const Form parsed = parse_form(form);
  const PlainKernelGuard plain;
  const c10::cuda::CUDAGuard device(x.device());
  return invert_input(with_contiguous_rows(x), bias, parsed, arguments).to(wide_type(x.scalar_type()));
}

namespace {

// The emended input and its column; x has contiguous rows.
std::tuple<at::Tensor, at::Tensor> apply_inverse(const at::Tensor& inverse, const at::Tensor& x, bool bias, Form form) {
  const bool primal = form == Form::kPrimal;
  const auto dtype = x.scalar_type();
  const bool wide = inverse.scalar_type() == at::kDouble;
  const at::Tensor emended = at::empty(x.sizes(), x.options().dtype(dtype == at::kHalf ? at::kFloat : dtype));
  const at::Tensor column = at::empty({bias ? x.size(0) : 0}, x.options().dtype(wide_type(dtype)));
  if (x.size(0) == 0 || x.size(1) + bias == 0) return {emended, column};
  const EmendShape shape{x.size(0),
                         x.size(1),
                         bias,
                         primal,
                         x.dtype().itemsize(),
                         inverse.dtype().itemsize(),
                         dtype == at::kBFloat16 && !wide};
  const EmendPlan plan = plan_emend(shape, limits_of_current_device());
  dispatch_element(dtype, [&](auto native, auto element) {
    using T = decltype(native);
    const auto* data = reinterpret_cast<const T*>(x.const_data_ptr<decltype(element)>());
    const auto run = [&](const auto* entries) {
      C10_CUDA_CHECK(
          launch_emended_input<T>(
              entries, data, x.size(0), x.size(1), row_stride_of(x), bias, primal, tf32_allowed(),
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

std::tuple<at::Tensor, at::Tensor> emended_input(
    const at::Tensor& input, bool bias, std::string_view form, double damping, std::string_view damping_mode,
    std::string_view scale) {
  const InverseArguments arguments = inverse_arguments_of(input, bias, damping, damping_mode, scale);
  const Form parsed = parse_form(form);
  const PlainKernelGuard plain;
  const c10::cuda::CUDAGuard device(input.device());
  const at::Tensor x = with_contiguous_rows(input);
  return apply_inverse(invert_input(x, bias, parsed, arguments), x, bias, parsed);
}

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> emended_inputs(
    at::TensorList inputs, const c10::List<bool>& biases, const c10::List<std::string>& forms,
    const c10::List<bool>& applied, double damping, std::string_view damping_mode, std::string_view scale) {
  check_lists(inputs.size(), biases.size(), forms.size(), applied.size());
  std::vector<InverseArguments> arguments;
  std::vector<Form> parsed;
  for (size_t i = 0; i < inputs.size(); ++i) {
    arguments.push_back(inverse_arguments_of(inputs[i], biases.get(i), damping, damping_mode, scale));
    parsed.push_back(parse_form(forms.get(i)));
    TORCH_CHECK_VALUE(
        inputs[i].device() == inputs[0].device(), "xs must be on one device, got ", inputs[0].device(), " and ",
        inputs[i].device());
  }
  const PlainKernelGuard plain;
  const c10::cuda::CUDAGuard device(inputs[0].device());
  std::vector<at::Tensor> xs, grams, kept, columns;
  for (size_t i = 0; i < inputs.size(); ++i) {
    xs.push_back(with_contiguous_rows(inputs[i]));
    grams.push_back(gram_to_invert(xs[i], biases.get(i), parsed[i], arguments[i]));
  }
  const std::vector<at::Tensor> inverses = inverses_of(grams, arguments);
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (applied.get(i)) {
      auto [emended, column] = apply_inverse(inverses[i], xs[i], biases.get(i), parsed[i]);
      kept.push_back(emended);
      columns.push_back(column);
    } else {
      kept.push_back(inverses[i].to(wide_type(xs[i].scalar_type())));
      columns.push_back(at::empty({0}, kept[i].options()));
    }
  }
  return {kept, columns};
}

namespace {

template <class T, class Scalar>
void bias_grad_and_poison(const at::Tensor& dy, const at::Tensor& column, const at::Tensor& dw, const at::Tensor& db) {
  const int64_t outputs = dy.size(1);
  const bool has_column = column.size(0) > 0;
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const at::Tensor broken = at::empty({broken_flags(outputs)}, dy.options().dtype(at::kInt));
  auto* db_data = has_column ? reinterpret_cast<T*>(db.mutable_data_ptr<Scalar>()) : nullptr;
  const auto* column_data = has_column ? column.const_data_ptr<Accumulator<T>>() : nullptr;
  C10_CUDA_CHECK(
      launch_bias_grad<T>(
          reinterpret_cast<const T*>(dy.const_data_ptr<Scalar>()), dy.size(0), outputs, dy.stride(0), column_data,
          db_data, broken.mutable_data_ptr<int>(), stream));
  C10_CUDA_CHECK(
      launch_poison<T>(
          reinterpret_cast<T*>(dw.mutable_data_ptr<Scalar>()), dw.numel(), db_data, outputs,
          broken.const_data_ptr<int>(), limits_of_current_device().processors, stream));
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> weight_grad(const at::Tensor& dy, const at::Tensor& rows, const at::Tensor& column) {
  check_weight_grad(dy, rows, column);
  const PlainKernelGuard plain;
  const c10::cuda::CUDAGuard device(dy.device());
  const at::Tensor dw = at::mm(dy.to(rows.scalar_type()).t(), rows).to(dy.scalar_type());
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
  m.impl("input_gram", consequentialism::cuda::input_gram);
  m.impl("damped_inverse", consequentialism::cuda::damped_inverse);
  m.impl("gram_inverse", consequentialism::cuda::gram_inverse);
  m.impl("emended_input", consequentialism::cuda::emended_input);
  m.impl("emended_inputs", consequentialism::cuda::emended_inputs);
  m.impl("weight_grad", consequentialism::cuda::weight_grad);
}
