#include "factor.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
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

constexpr int64_t kLeaf = 64;           // order up to which LAPACK's own factor is used
constexpr int64_t kSerial = 128;        // order up to which one thread is faster
constexpr int64_t kInversePanel = 128;  // rows of a panel of M^T M
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

double ridge_of(const FactorArguments& arguments, double trace) {
  return arguments.relative ? arguments.damping * trace / static_cast<double>(arguments.rank) : arguments.damping;
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

// inverse <- L^-1 for the lower triangular L, both row-major and strided; inverse's upper triangle must be zero
// and stays so. Row i is (e_i - sum_k L[i, k] inverse[k]) / L[i, i]: contiguous updates, four k at a time, up to a
// multiple of the vector width, because what lies beyond the diagonal is zero.
template <typename scalar_t>
CONSEQUENTIALISM_INLINE void invert_triangle_body(
    const scalar_t* lower, scalar_t* inverse, int64_t n, int64_t stride_lower, int64_t stride) {
  constexpr int64_t kVector = 16;
  for (int64_t i = 0; i < n; ++i) {
    scalar_t* row = inverse + i * stride;
    const scalar_t* entries = lower + i * stride_lower;
    const int64_t width = std::min(n, (i + kVector) / kVector * kVector);
    int64_t k = 0;
    for (; k + 4 <= i; k += 4) {
      const scalar_t* above = inverse + k * stride;
      for (int64_t j = 0; j < width; ++j) {
        row[j] -= entries[k] * above[j] + entries[k + 1] * above[stride + j] + entries[k + 2] * above[2 * stride + j] +
                  entries[k + 3] * above[3 * stride + j];
      }
    }
    for (; k < i; ++k) {
      for (int64_t j = 0; j < width; ++j) row[j] -= entries[k] * inverse[k * stride + j];
    }
    const scalar_t reciprocal = scalar_t(1) / entries[i];
    for (int64_t j = 0; j < width; ++j) row[j] *= reciprocal;
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
// leaves into matrix products. inverse must be zero. False where a pivot breaks down.
template <typename scalar_t>
bool invert_factor_(const at::Tensor& a, const at::Tensor& inverse) {
  const int64_t n = a.size(0);
  if (n <= kLeaf) {
    scalar_t* lower = a.mutable_data_ptr<scalar_t>();
    const int64_t stride = a.stride(0);
    int info = 0;
    // Row-major lower is LAPACK's column-major upper.
    at::native::lapackCholesky<scalar_t>('U', static_cast<int>(n), lower, static_cast<int>(stride), &info);
    if (info != 0) return false;
    for (int64_t i = 0; i < n; ++i) {
      if (!std::isfinite(lower[i * stride + i])) return false;  // a NaN passes some LAPACKs' pivot test
    }
    invert_triangle(lower, inverse.mutable_data_ptr<scalar_t>(), n, stride, inverse.stride(0));
    return true;
  }
  const int64_t half = (n / 2 + kLeaf - 1) / kLeaf * kLeaf;
  const int64_t rest = n - half;
  const at::Tensor a11 = block(a, 0, half, 0, half);
  at::Tensor a21 = block(a, half, rest, 0, half);
  const at::Tensor a22 = block(a, half, rest, half, rest);
  const at::Tensor m11 = block(inverse, 0, half, 0, half);
  at::Tensor m21 = block(inverse, half, rest, 0, half);
  const at::Tensor m22 = block(inverse, half, rest, half, rest);
  if (!invert_factor_<scalar_t>(a11, m11)) return false;
  at::mm_out(m21, a21, m11.t());  // L21
  lower_gram_(a22, m21, 1, -1);   // A22 - L21 L21^T
  if (!invert_factor_<scalar_t>(a22, m22)) return false;
  at::mm_out(a21, m21, m11);                 // L21 M11
  at::addmm_out(m21, m21, m22, a21, 0, -1);  // -M22 L21 M11
  return true;
}

// Runs work with BLAS on one thread: inside a parallel region it starts none. Threads cost more than they
// bring where the matrices are small and just written by another core.
template <typename Work>
void on_one_thread(const Work& work) {
  at::parallel_for(0, std::max(at::get_num_threads(), 1), 1, [&](int64_t first, int64_t) {
    if (first != 0) return;
    const PlainKernelGuard guard;
    work();
  });
}

// a <- multiplier * a^-1, symmetric, from a's lower triangle. False, with a destroyed, on a breakdown.
bool invert_(at::Tensor a, double multiplier) {
  const int64_t n = a.size(0);
  at::Tensor inverse = at::zeros({n, n}, a.options());
  bool works = false;
  auto work = [&] {
    AT_DISPATCH_FLOATING_TYPES(a.scalar_type(), "invert_factor", [&] { works = invert_factor_<scalar_t>(a, inverse); });
  };
  if (n <= kSerial) {
    on_one_thread(work);
  } else {
    work();
  }
  if (!works) return false;
  // P = M^T M by panels of rows; M is zero above its diagonal, so panel i needs only M's rows from i on.
  for (int64_t begin = 0; begin < n; begin += kInversePanel) {
    const int64_t rows = std::min(kInversePanel, n - begin);
    const at::Tensor below = inverse.narrow(0, begin, n - begin);
    at::Tensor out = a.narrow(0, begin, rows);
    at::addmm_out(out, out, below.narrow(1, begin, rows).t(), below, 0, multiplier);
  }
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
    add_to_diagonal_(inverse, c * growth);
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
  add_to_diagonal_(gram, c);
  return invert_(gram, multiplier_of(arguments, c));
}

int64_t breakdowns() {
  return breakdown_count.load();
}

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

TORCH_LIBRARY_IMPL(consequentialism, CPU, m) {
  m.impl("factor", consequentialism::cpu::factor);
}
