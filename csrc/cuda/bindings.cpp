// The CUDA ops: checks, allocation, launches. Nothing here waits for the device, so all of it can be captured in a
// graph.
#include "bindings.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/add.h>
#include <ATen/ops/cholesky_solve.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/full.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/linalg_cholesky_ex.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/mv.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <limits>
#include <mutex>
#include <tuple>

#include "../checks.h"
#include "../guards.h"
#include "launchers.h"

namespace consequentialism::cuda {

namespace {

constexpr double kMaxFloat32Condition = 2e3;  // as on the CPU, csrc/cpu/factor.h

constexpr size_t kMaxDevices = 64;

// Of the current device; asked for once each.
Limits limits_of_current_device() {
  static std::array<Limits, kMaxDevices> known;
  static std::array<std::once_flag, kMaxDevices> asked;
  const int device = c10::cuda::current_device();
  std::call_once(asked.at(static_cast<size_t>(device)), [&] {
    int shared = 0, processors = 0, major = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    known[static_cast<size_t>(device)] = {static_cast<size_t>(shared), processors, major >= 9};
  });
  return known[static_cast<size_t>(device)];
}

// Addresses by device; breakdowns() reads those that have been used.
std::array<std::atomic<unsigned*>, kMaxDevices> breakdown_counters{};

unsigned* breakdown_counter() {
  std::atomic<unsigned*>& known = breakdown_counters.at(static_cast<size_t>(c10::cuda::current_device()));
  unsigned* address = known.load();
  if (address == nullptr) {
    C10_CUDA_CHECK(breakdown_counter_address(&address));
    known.store(address);
  }
  return address;
}

struct FactorArguments {
  double damping;
  bool relative;
  Scale scale;
  int64_t rank;  // min(N, I), what a relative damping is relative to
  int64_t rows;  // N, the multiplier of Scale::kNlms
};

template <class T>
void run_factor(const FactorItem<T>& item, int64_t n, const FactorPlan& plan, const at::TensorOptions& options) {
  const at::Tensor workspace = at::empty({static_cast<int64_t>(plan.workspace_bytes)}, options.dtype(at::kByte));
  C10_CUDA_CHECK(
      launch_factor<T>(
          &item, 1, n, plan, workspace.mutable_data_ptr(), breakdown_counter(), c10::cuda::getCurrentCUDAStream()));
}

// By cuSOLVER, for orders above the kernel's. A broken-down factor is done again by the kernel, which else returns at
// once.
template <class T>
at::Tensor stock_factor(
    const at::Tensor& unshifted, double shift, const FactorArguments& arguments, FactorItem<T> item,
    const Limits& limits) {
  const int64_t n = unshifted.size(0);
  const at::Tensor gram = shift == 0 ? unshifted : unshifted.add(shift);
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
  const FactorPlan plan = plan_factor_retry(n, sizeof(T), limits);
  TORCH_CHECK_VALUE(plan.team != FactorTeam::kNone, "gram must have at most ", kMaxRetryOrder, " rows, got ", n);
  item.inverse = inverse.mutable_data_ptr<T>();
  item.only_if = retry.const_data_ptr<int>();
  run_factor<T>(item, n, plan, gram.options());
  inverse = at::where(trace.eq(0), at::zeros_like(inverse), inverse);
  return at::where(trace.isfinite(), inverse, at::full_like(inverse, std::numeric_limits<double>::quiet_NaN()));
}

// scale * (gram + shift + c I)^-1.
at::Tensor inverse_of(const at::Tensor& gram, double shift, const FactorArguments& arguments) {
  const int64_t n = gram.size(0);
  at::Tensor inverse = at::empty({n, n}, gram.options());
  if (n == 0) return inverse;
  const Limits limits = limits_of_current_device();
  AT_DISPATCH_FLOATING_TYPES(gram.scalar_type(), "factor", [&] {
    FactorItem<scalar_t> item{};
    item.gram = gram.const_data_ptr<scalar_t>();
    item.inverse = inverse.mutable_data_ptr<scalar_t>();
    item.damping = arguments.damping;
    item.rank = static_cast<double>(arguments.rank);
    item.factor = arguments.scale == Scale::kNlms ? static_cast<double>(arguments.rows) : 1;
    item.shift = shift;
    item.relative = arguments.relative;
    item.scaled_by_c = arguments.scale == Scale::kGradient;
    const FactorPlan plan = plan_factor(n, sizeof(scalar_t), limits);
    if (plan.team == FactorTeam::kNone) {
      inverse = stock_factor<scalar_t>(gram, shift, arguments, item, limits);
    } else {
      run_factor<scalar_t>(item, n, plan, gram.options());
    }
  });
  return inverse;
}

// a b with float32 sums and a float32 result for half types.
at::Tensor wide_mm(const at::Tensor& a, const at::Tensor& b) {
  const auto dtype = a.scalar_type();
  return dtype == at::kHalf || dtype == at::kBFloat16 ? at::mm(a, b, at::kFloat) : at::mm(a, b);
}

struct Gram {
  at::Tensor entries;
  double shift;  // what is still to be added to each
};

Gram gram_of(const at::Tensor& x, bool bias, Form form) {
  if (form == Form::kDual) return {wide_mm(x, x.t()), bias ? 1.0 : 0.0};
  if (!bias) return {wide_mm(x.t(), x), 0};
  const int64_t inputs = x.size(1);
  const at::Tensor square = wide_mm(x.t(), x);
  at::Tensor gram = at::empty({inputs + 1, inputs + 1}, square.options());
  const at::Tensor sums = x.sum(0, false, square.scalar_type());
  gram.narrow(0, 0, inputs).narrow(1, 0, inputs).copy_(square);
  gram.select(0, inputs).narrow(0, 0, inputs).copy_(sums);
  gram.select(1, inputs).narrow(0, 0, inputs).copy_(sums);
  gram.select(0, inputs).select(0, inputs).fill_(x.size(0));
  return {gram, 0};
}

// In float64 where float32 is not enough, known from the arguments alone: looking at the Gram would wait for it.
struct Inverse {
  at::Tensor inverse;
  at::Tensor x;  // in the type that was computed in
};

Inverse invert_input(
    const at::Tensor& x, bool bias, Form form, double damping, std::string_view damping_mode, std::string_view scale) {
  check_x(x);
  check_damping(damping);
  const int64_t rows = x.size(0);
  const FactorArguments arguments{
      damping, parse_relative(damping_mode), parse_scale(scale), std::max<int64_t>(1, std::min(rows, x.size(1) + bias)),
      rows};
  const bool enough = arguments.relative && static_cast<double>(arguments.rank) <= kMaxFloat32Condition * damping;
  const at::Tensor computed = enough ? x : x.to(at::kDouble);
  const Gram gram = gram_of(computed, bias, form);
  return {inverse_of(gram.entries, gram.shift, arguments), computed};
}

at::ScalarType wide_type(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
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
  Gram gram = gram_of(x, bias, parsed);
  if (gram.shift != 0) gram.entries.add_(gram.shift);
  return gram.entries;
}

at::Tensor factor(
    const at::Tensor& gram, double damping, std::string_view damping_mode, std::string_view scale, int64_t rank,
    int64_t rows) {
  check_gram(gram);
  check_damping(damping);
  TORCH_CHECK_VALUE(rank >= 1, "rank must be at least 1, got ", rank);
  const FactorArguments arguments{damping, parse_relative(damping_mode), parse_scale(scale), rank, rows};
  const PlainKernelGuard plain;
  const c10::cuda::CUDAGuard device(gram.device());
  return inverse_of(gram.contiguous(), 0, arguments);
}

at::Tensor input_inverse(
    const at::Tensor& x, bool bias, std::string_view form, double damping, std::string_view damping_mode,
    std::string_view scale) {
  const Form parsed = parse_form(form);
  const PlainKernelGuard plain;
  const c10::cuda::CUDAGuard device(x.device());
  return invert_input(x, bias, parsed, damping, damping_mode, scale).inverse.to(wide_type(x.scalar_type()));
}

std::tuple<at::Tensor, at::Tensor> emended_input(
    const at::Tensor& x, bool bias, std::string_view form, double damping, std::string_view damping_mode,
    std::string_view scale) {
  const Form parsed = parse_form(form);
  const PlainKernelGuard plain;
  const c10::cuda::CUDAGuard device(x.device());
  const auto [inverse, computed] = invert_input(x, bias, parsed, damping, damping_mode, scale);
  const at::Tensor wide = computed.to(inverse.scalar_type());
  const int64_t inputs = x.size(1);
  at::Tensor emended;
  at::Tensor column = at::empty({0}, inverse.options());
  if (parsed == Form::kDual) {
    emended = at::mm(inverse, wide);
    if (bias) column = inverse.sum(1);
  } else {
    emended = at::mm(wide, inverse.narrow(0, 0, inputs).narrow(1, 0, inputs));
    if (bias) {
      const at::Tensor border = inverse.select(0, inputs);
      emended.add_(border.narrow(0, 0, inputs));
      column = at::mv(wide, border.narrow(0, 0, inputs)).add_(border.select(0, inputs));
    }
  }
  const auto dtype = x.scalar_type();
  return {emended.to(dtype == at::kHalf ? at::kFloat : dtype), column.to(wide_type(dtype))};
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
  switch (dy.scalar_type()) {
    case at::kFloat:
      bias_grad_and_poison<float, float>(errors, ones, dw, db);
      break;
    case at::kDouble:
      bias_grad_and_poison<double, double>(errors, ones, dw, db);
      break;
    case at::kBFloat16:
      bias_grad_and_poison<bfloat16, at::BFloat16>(errors, ones, dw, db);
      break;
    default:
      bias_grad_and_poison<float16, at::Half>(errors, ones, dw, db);
  }
  return {dw, db};
}

}  // namespace consequentialism::cuda

TORCH_LIBRARY_IMPL(consequentialism, CUDA, m) {
  m.impl("input_gram", consequentialism::cuda::input_gram);
  m.impl("factor", consequentialism::cuda::factor);
  m.impl("input_inverse", consequentialism::cuda::input_inverse);
  m.impl("emended_input", consequentialism::cuda::emended_input);
  m.impl("weight_grad", consequentialism::cuda::weight_grad);
}
