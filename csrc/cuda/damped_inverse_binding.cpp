// The op `damped_inverse` on CUDA: checks, allocation, launches. Nothing but `breakdowns` waits for the device.
#include "damped_inverse_binding.h"

#include <ATen/ops/cholesky_solve.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/full.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/linalg_cholesky_ex.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <map>
#include <string_view>

#include "../guards.h"
#include "damped_inverse_launcher.h"
#include "device.h"

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
  item.inverse_stride = static_cast<int>(n);
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
  item.inverse_stride = static_cast<int>(inverse.stride(0));
  item.damping = arguments.damping;
  item.rank = static_cast<double>(arguments.rank);
  item.factor = arguments.scale == Scale::kNlms ? static_cast<double>(arguments.rows) : 1;
  item.relative = arguments.relative;
  item.scaled_by_c = arguments.scale == Scale::kGradient;
  return item;
}

// scale * (gram + c I)^-1 of Grams of one type, those of one order together, by `team` where one is named; the other
// Grams are left alone.
template <class T>
void invert_grams(
    c10::ArrayRef<at::Tensor> grams, c10::ArrayRef<InverseArguments> arguments, InverseTeam team,
    std::vector<at::Tensor>& inverses) {
  const Limits limits = limits_of_current_device();
  std::map<int64_t, std::vector<InverseItem<T>>> by_order;
  for (size_t i = 0; i < grams.size(); ++i) {
    const int64_t n = grams[i].size(0);
    if (grams[i].scalar_type() != c10::CppTypeToScalarType<T>::value || n == 0) continue;
    const InverseItem<T> item = inverse_item<T>(grams[i], inverses[i], arguments[i]);
    if (team == InverseTeam::kNone && plan_damped_inverse(n, 1, sizeof(T), limits).team == InverseTeam::kNone) {
      inverses[i] = stock_inverse<T>(grams[i], arguments[i], item, limits);
    } else {
      by_order[n].push_back(item);
    }
  }
  for (const auto& [n, items] : by_order) {
    const auto count = static_cast<int64_t>(items.size());
    const InversePlan plan = team == InverseTeam::kNone ? plan_damped_inverse(n, count, sizeof(T), limits)
                                                        : plan_damped_inverse_by(n, sizeof(T), limits, team);
    TORCH_CHECK_VALUE(
        plan.team != InverseTeam::kNone, "variant '", team == InverseTeam::kBlock ? "block" : "cluster",
        "' has no room on this device for a gram of ", n, " rows in ", grams[0].scalar_type());
    run_damped_inverse<T>(items, n, plan, grams[0].options());
  }
}

// Into `inverses`, or, by stock operations, in place of one of them.
void invert_all(
    c10::ArrayRef<at::Tensor> grams, c10::ArrayRef<InverseArguments> arguments, InverseTeam team,
    std::vector<at::Tensor>& inverses) {
  invert_grams<float>(grams, arguments, team, inverses);
  invert_grams<double>(grams, arguments, team, inverses);
}

// As the op; `team` is kNone for the plan's.
at::Tensor inverse_by_team(const at::Tensor& gram, const InverseArguments& arguments, InverseTeam team) {
  const PlainKernelGuard plain;
  const c10::cuda::CUDAGuard device(gram.device());
  const at::Tensor all = at::empty(gram.sizes(), gram.options());
  if (all.numel() == 0) return all;
  const int64_t n = gram.size(-1);
  const std::vector<at::Tensor> grams = gram.contiguous().view({-1, n, n}).unbind();
  const std::vector<at::Tensor> places = all.view({-1, n, n}).unbind();
  std::vector<at::Tensor> inverses = places;
  invert_all(grams, std::vector<InverseArguments>(grams.size(), arguments), team, inverses);
  for (size_t i = 0; i < places.size(); ++i) {
    if (!inverses[i].is_same(places[i])) places[i].copy_(inverses[i]);  // by stock operations
  }
  return all;
}

}  // namespace

std::vector<at::Tensor> inverses_of(
    c10::ArrayRef<at::Tensor> grams, c10::ArrayRef<InverseArguments> arguments, bool padded) {
  std::vector<at::Tensor> inverses;
  for (const at::Tensor& gram : grams) {
    const int64_t n = gram.size(0), pack = padded ? 16 / static_cast<int64_t>(gram.dtype().itemsize()) : 1;
    const int64_t stride = (n + pack - 1) / pack * pack;
    const at::Tensor rows = at::empty({n, stride}, gram.options());
    inverses.push_back(stride == n ? rows : rows.narrow(1, 0, n));
  }
  invert_all(grams, arguments, InverseTeam::kNone, inverses);
  return inverses;
}

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

at::Tensor damped_inverse(
    const at::Tensor& gram, double damping, std::string_view damping_mode, std::string_view scale, int64_t rank,
    int64_t rows) {
  check_gram(gram);
  return inverse_by_team(gram, inverse_arguments(damping, damping_mode, scale, rank, rows), InverseTeam::kNone);
}

// By one block or by a cluster that keeps its tiles in shared memory, or not at all: for tests and benchmarks.
at::Tensor damped_inverse_by(
    const at::Tensor& gram, double damping, std::string_view damping_mode, std::string_view scale, int64_t rank,
    int64_t rows, std::string_view variant) {
  check_gram(gram);
  const InverseArguments arguments = inverse_arguments(damping, damping_mode, scale, rank, rows);
  TORCH_CHECK_VALUE(
      variant == "block" || variant == "cluster", "variant must be 'block' or 'cluster', got '", variant, "'");
  return inverse_by_team(gram, arguments, variant == "block" ? InverseTeam::kBlock : InverseTeam::kResident);
}

}  // namespace consequentialism::cuda

TORCH_LIBRARY_IMPL(consequentialism, CUDA, m) {
  m.impl("damped_inverse", consequentialism::cuda::damped_inverse);
  m.impl("damped_inverse.by", consequentialism::cuda::damped_inverse_by);
}
