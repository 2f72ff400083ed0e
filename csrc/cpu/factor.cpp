#include "factor.h"

#include <ATen/Dispatch.h>
#include <ATen/native/BatchLinearAlgebra.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/diag.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <limits>

#include "guards.h"
#include "input_gram.h"

// One binary for every x86 processor: the loader picks the widest instruction set that is there.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define CONSEQUENTIALISM_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define CONSEQUENTIALISM_INLINE inline __attribute__((always_inline))
#else
#define CONSEQUENTIALISM_CLONES
#define CONSEQUENTIALISM_INLINE inline
#endif

namespace consequentialism::cpu {

namespace {

constexpr int64_t kLeaf = 64;        // order up to which LAPACK's own factor is used
constexpr int64_t kInverseTile = 64;  // rows of a panel of M^T M
constexpr int kRetries = 3;
constexpr double kMinFloat32Trace = 1e-30;  // below, squares of float32 inputs underflow

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

double ridge_of(const FactorArguments& arguments, double trace) {
  return arguments.relative ? arguments.damping * trace / static_cast<double>(arguments.rank)
                            : arguments.damping;
}

double multiplier_of(const FactorArguments& arguments, double c) {
  switch (arguments.scale) {
    case Scale::kNlms:
      return static_cast<double>(arguments.rows);
    case Scale::kRaw:
      return 1;
    default:
      return c;
  }
}

// inverse <- L^-1 for the lower triangular L, both row-major and strided; inverse's upper triangle is kept.
// Row i is (e_i - sum_k L[i, k] inverse[k]) / L[i, i]: contiguous updates that the compiler vectorises.
template <typename scalar_t>
CONSEQUENTIALISM_INLINE void invert_triangle_body(
    const scalar_t* lower, scalar_t* inverse, int64_t n, int64_t stride_lower, int64_t stride) {
  for (int64_t i = 0; i < n; ++i) {
    scalar_t* row = inverse + i * stride;
    std::fill(row, row + i, scalar_t(0));
    for (int64_t k = 0; k < i; ++k) {
      const scalar_t entry = lower[i * stride_lower + k];
      const scalar_t* above = inverse + k * stride;
      for (int64_t j = 0; j <= k; ++j) row[j] -= entry * above[j];
    }
    const scalar_t reciprocal = scalar_t(1) / lower[i * stride_lower + i];
    for (int64_t j = 0; j < i; ++j) row[j] *= reciprocal;
    row[i] = reciprocal;
  }
}

CONSEQUENTIALISM_CLONES void invert_triangle(
    const float* lower, float* inverse, int64_t n, int64_t stride_lower, int64_t stride) {
  invert_triangle_body(lower, inverse, n, stride_lower, stride);
}

CONSEQUENTIALISM_CLONES void invert_triangle(
    const double* lower, double* inverse, int64_t n, int64_t stride_lower, int64_t stride) {
  invert_triangle_body(lower, inverse, n, stride_lower, stride);
}

// inverse <- L^-1 where L L^T is a's lower triangle; a is overwritten. The recursion puts all but the
// leaves into matrix products. inverse's strict upper triangle must be zero and stays so. False where a
// pivot breaks down.
template <typename scalar_t>
bool invert_factor_(const at::Tensor& a, const at::Tensor& inverse) {
  const int64_t n = a.size(0);
  if (n <= kLeaf) {
    int info = 0;
    // Row-major lower is LAPACK's column-major upper.
    at::native::lapackCholesky<scalar_t>(
        'U', static_cast<int>(n), a.mutable_data_ptr<scalar_t>(), static_cast<int>(a.stride(0)), &info);
    if (info != 0) return false;
    for (int64_t i = 0; i < n; ++i) {
      // A NaN passes some LAPACKs' pivot test.
      if (!std::isfinite(a.const_data_ptr<scalar_t>()[i * a.stride(0) + i])) return false;
    }
    invert_triangle(
        a.const_data_ptr<scalar_t>(), inverse.mutable_data_ptr<scalar_t>(), n, a.stride(0), inverse.stride(0));
    return true;
  }
  const int64_t half = (n / 2 + kLeaf - 1) / kLeaf * kLeaf;
  const int64_t rest = n - half;
  const at::Tensor a11 = a.narrow(0, 0, half).narrow(1, 0, half);
  at::Tensor a21 = a.narrow(0, half, rest).narrow(1, 0, half);
  const at::Tensor a22 = a.narrow(0, half, rest).narrow(1, half, rest);
  const at::Tensor m11 = inverse.narrow(0, 0, half).narrow(1, 0, half);
  at::Tensor m21 = inverse.narrow(0, half, rest).narrow(1, 0, half);
  const at::Tensor m22 = inverse.narrow(0, half, rest).narrow(1, half, rest);
  if (!invert_factor_<scalar_t>(a11, m11)) return false;
  at::mm_out(m21, a21, m11.t());         // L21
  lower_gram_(a22, m21, 1, -1);          // A22 - L21 L21^T
  if (!invert_factor_<scalar_t>(a22, m22)) return false;
  at::mm_out(a21, m21, m11);             // L21 M11
  at::addmm_out(m21, m21, m22, a21, 0, -1);  // -M22 L21 M11
  return true;
}

// a <- multiplier * a^-1, symmetric, from a's lower triangle. False, with a destroyed, on a breakdown.
bool invert_(const at::Tensor& a, double multiplier) {
  const int64_t n = a.size(0);
  at::Tensor inverse = at::zeros({n, n}, a.options());
  bool works = false;
  AT_DISPATCH_FLOATING_TYPES(
      a.scalar_type(), "invert_factor", [&] { works = invert_factor_<scalar_t>(a, inverse); });
  if (!works) return false;
  // P = M^T M by panels of rows; M is zero above its diagonal, so panel i needs only the rows from i on.
  for (int64_t begin = 0; begin < n; begin += kInverseTile) {
    const int64_t rows = std::min(kInverseTile, n - begin);
    const at::Tensor below = inverse.narrow(0, begin, n - begin);
    at::Tensor out = a.narrow(0, begin, rows).narrow(1, 0, begin + rows);
    at::mm_out(out, below.narrow(1, begin, rows).t(), below.narrow(1, 0, begin + rows));
  }
  mirror_lower_(a, multiplier);
  return true;
}

}  // namespace

at::Tensor factor_lower(const at::Tensor& gram, const FactorArguments& arguments) {
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
    inverse.diagonal().add_(c * growth);
    if (invert_(inverse, multiplier)) return inverse;
    if (attempt == 0) ++breakdown_count;
  }
  return at::diag(gram.diagonal().add(c).reciprocal_().mul_(multiplier));
}

bool try_factor_float32_(const at::Tensor& gram, const FactorArguments& arguments) {
  const double trace = trace_of(gram);
  // Also false for NaN.
  if (!(trace > kMinFloat32Trace && trace < std::numeric_limits<float>::max())) return false;
  const double c = ridge_of(arguments, trace);
  if (!(c > kMinFloat32Trace && trace <= kMaxFloat32Condition * c)) return false;
  gram.diagonal().add_(c);
  return invert_(gram, multiplier_of(arguments, c));
}

int64_t breakdowns() { return breakdown_count.load(); }

at::Tensor factor(
    const at::Tensor& gram, double damping, std::string_view damping_mode, std::string_view scale, int64_t rank,
    int64_t rows) {
  check_gram(gram);
  check_damping(damping);
  TORCH_CHECK_VALUE(rank >= 1, "rank must be at least 1, got ", rank);
  const FactorArguments arguments{damping, parse_relative(damping_mode), parse_scale(scale), rank, rows};
  const PlainKernelGuard guard;
  return factor_lower(gram.contiguous(), arguments);
}

}  // namespace consequentialism::cpu

TORCH_LIBRARY_IMPL(consequentialism, CPU, m) { m.impl("factor", consequentialism::cpu::factor); }
