#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "../checks.h"

namespace consequentialism::cpu {

// Above this trace(G) / c, the largest the condition number can be, a float32 Gram has lost the digits
// that its inverse needs and the work is done in float64. reference.py knows the same number.
constexpr double kMaxFloat32Condition = 2e3;

// (G + c I)^-1 times the scale's multiplier; what `factor` returns.
struct FactorArguments {
  double damping;
  bool relative;
  Scale scale;
  int64_t rank;  // min(N, I), what a relative damping is relative to
  int64_t rows;  // N, the multiplier of Scale::kNlms
};

// The symmetric inverse [n, n] from gram's lower triangle, which is kept. Zero where the trace is zero, NaN
// where it is not finite; a factor that breaks down is retried with 10, 100 and 1000 times the ridge, then
// the diagonal stands in.
at::Tensor factor_lower(const at::Tensor& gram, const FactorArguments& arguments);

// The same, overwriting gram (float32, lower triangle) with the result. False, with gram destroyed, where
// float32 is not enough: an ill-conditioned or out-of-range Gram, or a broken-down factor.
bool try_factor_float32_(const at::Tensor& gram, const FactorArguments& arguments);

// Factors that were retried with more damping since the process began.
int64_t breakdowns();

}  // namespace consequentialism::cpu
