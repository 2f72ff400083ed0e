#include "damped_inverse.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/diag.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <limits>

#include "../guards.h"
#include "input_gram.h"
#include "tile_inverse.h"

namespace consequentialism::cpu {

namespace {

constexpr int64_t kLeaf = 128;  // order at which the recursion ends, a multiple of kLeafStep
constexpr int64_t kLeafStep = 64;
constexpr int64_t kSmallWorkspace = 2048;  // scalars on the stack: for orders up to 32
constexpr int64_t kInversePanel = 128;     // rows of a panel of S S^T
constexpr int kRetries = 3;
constexpr double kMinFloat32Trace = 1e-30;  // below, squares of float32 inputs underflow
constexpr double kMaxFloat32Ridge = 1e30;   // above, the inverse does

std::atomic<int64_t> breakdown_count{0};

double trace_of(const at::Tensor& gram) {
  double trace = 0;
  AT_DISPATCH_FLOATING_TYPES(gram.scalar_type(), "trace", [&] {
    const scalar_t* data = gram.const_data_ptr<scalar_t>();
    const int64_t n = gram.size(0);
    for (int64_t i = 0; i < n; ++i) trace += static_cast<double>(data[i * n + i]);
  });
  return trace;
}

void add_to_diagonal_(const at::Tensor& square, double c) {
  AT_DISPATCH_FLOATING_TYPES(square.scalar_type(), "add_to_diagonal", [&] {
    scalar_t* data = square.mutable_data_ptr<scalar_t>();
    const int64_t n = square.size(0);
    for (int64_t i = 0; i < n; ++i) data[i * n + i] += static_cast<scalar_t>(c);
  });
}

at::Tensor block(const at::Tensor& a, int64_t row, int64_t rows, int64_t column, int64_t columns) {
  return a.narrow(0, row, rows).narrow(1, column, columns);
}

double ridge_of(const InverseArguments& arguments, double trace) {
  return arguments.relative ? arguments.damping * trace / static_cast<double>(arguments.rank) : arguments.damping;
}

double multiplier_of(const InverseArguments& arguments, double c) {
  switch (arguments.scale) {
    case Scale::kNlms:
      return static_cast<double>(arguments.rows) * arguments.excess;
    case Scale::kRaw:
      return arguments.excess;
    default:
      return c;
  }
}

// s <- S = R^-1, lower triangular, where R^T R is a's lower triangle (see tile_inverse.h); a is overwritten. The
// recursion puts all but the leaves into matrix products. s must be zero. False where a pivot breaks down.
template <typename scalar_t>
bool invert_factor_(const at::Tensor& a, const at::Tensor& s, scalar_t* workspace) {
  const int64_t n = a.size(0);
  if (n <= kLeaf) {
    return tile_factor(
        a.const_data_ptr<scalar_t>(), a.stride(0), s.mutable_data_ptr<scalar_t>(), s.stride(0), n, workspace);
  }
  const int64_t first = (n / 2 + kLeafStep - 1) / kLeafStep * kLeafStep;
  const int64_t rest = n - first;
  const at::Tensor a11 = block(a, 0, first, 0, first);
  const at::Tensor s11 = block(s, 0, first, 0, first);
  at::Tensor s21 = block(s, first, rest, 0, first);
  const at::Tensor s22 = block(s, first, rest, first, rest);
  if (!invert_factor_<scalar_t>(block(a, first, rest, first, rest), s22, workspace)) return false;
  const at::Tensor r21 = at::mm(s22.t(), block(a, first, rest, 0, first));
  lower_gram_(a11, r21.t(), 1, -1);
  if (!invert_factor_<scalar_t>(a11, s11, workspace)) return false;
  at::addmm_out(s21, s21, s22, at::mm(r21, s11), 0, -1);
  return true;
}

// a <- multiplier * a^-1, symmetric, from a's lower triangle. False, with a possibly destroyed, on a breakdown.
template <typename scalar_t>
bool invert_(at::Tensor a, double multiplier) {
  const int64_t n = a.size(0);
  const int64_t size = tile_workspace(n <= kWholeInTiles ? n : kLeaf);
  alignas(64) scalar_t few[kSmallWorkspace];
  const at::Tensor many = size <= kSmallWorkspace ? at::Tensor() : at::empty({size}, a.options());
  scalar_t* space = many.defined() ? many.mutable_data_ptr<scalar_t>() : few;
  if (n <= kWholeInTiles) {
    return tile_inverse(a.mutable_data_ptr<scalar_t>(), n, static_cast<scalar_t>(multiplier), space);
  }
  const at::Tensor s = at::zeros({n, n}, a.options());
  if (!invert_factor_<scalar_t>(a, s, space)) return false;
  // S S^T by panels of rows; S is zero above its diagonal, so a panel needs only the columns up to its own last.
  for (int64_t begin = 0; begin < n; begin += kInversePanel) {
    const int64_t rows = std::min(kInversePanel, n - begin);
    const at::Tensor left = s.narrow(1, 0, begin + rows);
    at::Tensor out = a.narrow(0, begin, rows);
    at::addmm_out(out, out, left.narrow(0, begin, rows), left.t(), 0, multiplier);
  }
  return true;
}

bool invert_(const at::Tensor& a, double multiplier) {
  return a.scalar_type() == at::kDouble ? invert_<double>(a, multiplier) : invert_<float>(a, multiplier);
}

}  // namespace

at::Tensor lower_damped_inverse(const at::Tensor& gram, const InverseArguments& asked_for) {
  const InverseArguments arguments = limited(asked_for, gram.scalar_type());
  const double trace = trace_of(gram);
  if (!std::isfinite(trace)) {
    return at::full_like(gram, std::numeric_limits<double>::quiet_NaN());
  }
  if (trace == 0) return at::zeros_like(gram);
  const double c = ridge_of(arguments, trace);
  const double multiplier = multiplier_of(arguments, c);
  double growth = 1;
  for (int attempt = 0; attempt <= kRetries; ++attempt, growth *= 10) {
    at::Tensor inverse = gram.clone();
    add_to_diagonal_(inverse, c * growth);
    if (invert_(inverse, multiplier)) return inverse;
    if (attempt == 0) ++breakdown_count;
  }
  return at::diag(gram.diagonal().add(c).reciprocal_().mul_(multiplier));
}

bool try_damped_inverse_float32_(const at::Tensor& gram, const InverseArguments& asked_for) {
  const InverseArguments arguments = limited(asked_for, at::kFloat);
  const double trace = trace_of(gram);
  // Also false for NaN.
  if (!(trace > kMinFloat32Trace && trace < std::numeric_limits<float>::max())) return false;
  const double c = ridge_of(arguments, trace);
  if (!(c > kMinFloat32Trace && c < kMaxFloat32Ridge)) return false;
  if (arguments.gram_dtype != at::kFloat && !(trace <= arguments.narrow_up_to * c)) return false;
  add_to_diagonal_(gram, c);
  return invert_(gram, multiplier_of(arguments, c));
}

int64_t breakdowns() {
  return breakdown_count.load();
}

at::Tensor damped_inverse(
    const at::Tensor& gram, double damping, std::string_view damping_mode, std::string_view scale, int64_t rank,
    int64_t rows) {
  check_gram(gram);
  const InverseArguments arguments = inverse_arguments(damping, damping_mode, scale, rank, rows);
  const PlainKernelGuard guard;
  if (gram.dim() == 2) return lower_damped_inverse(gram.contiguous(), arguments);
  const at::Tensor all = at::empty(gram.sizes(), gram.options());
  if (all.numel() == 0) return all;
  const at::Tensor grams = gram.contiguous().flatten(0, -3), inverses = all.flatten(0, -3);  // [count, n, n]
  at::parallel_for(0, grams.size(0), 1, [&](int64_t begin, int64_t end) {
    const PlainKernelGuard inner;
    for (int64_t g = begin; g < end; ++g)
      inverses.select(0, g).copy_(lower_damped_inverse(grams.select(0, g), arguments));
  });
  return all;
}

}  // namespace consequentialism::cpu

TORCH_LIBRARY_IMPL(consequentialism, CPU, m) {
  m.impl("damped_inverse", consequentialism::cpu::damped_inverse);
}
