// What a damped inverse is asked for, the same on every device.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string_view>

#include "checks.h"

namespace consequentialism {

// (G + c I)^-1 times the scale's multiplier; what `damped_inverse` returns.
struct InverseArguments {
  double damping;
  bool relative;
  Scale scale;
  int64_t rank;  // min(N, I), what a relative damping is relative to
  int64_t rows;  // N, the multiplier of Scale::kNlms
  // The type of the Gram of x and its inverse, float32 or float64, as precision.py decides. Where that is float64, a
  // device whose Gram can be looked at may take float32 if trace(G) / c, which bounds the condition, is at most this.
  at::ScalarType gram_dtype = at::kFloat;
  double narrow_up_to = 0;
  double excess = 1;  // by which the inverse is too large where the damping has been limited
};

// A damping whose ridge stays in the range of a Gram's type: `limited_damping` in reference.py, with the same numbers.
inline InverseArguments limited(InverseArguments arguments, at::ScalarType dtype) {
  constexpr double kLargestDamping = 0x1p80;
  if (!arguments.relative || arguments.damping <= kLargestDamping) return arguments;
  const double limit = dtype == at::kDouble ? 0x1p80 : 0x1p40;
  arguments.excess = limit / arguments.damping;
  arguments.damping = limit;
  return arguments;
}

inline InverseArguments inverse_arguments(
    double damping, std::string_view damping_mode, std::string_view scale, int64_t rank, int64_t rows) {
  check_damping(damping);
  TORCH_CHECK_VALUE(rank >= 1, "rank must be at least 1, got ", rank);
  return {damping, parse_relative(damping_mode), parse_scale(scale), rank, rows};
}

// For the Gram of x [N, I], in the type that is given or, without one, in that of sums over x.
inline InverseArguments inverse_arguments_of(
    const at::Tensor& x, bool bias, double damping, std::string_view damping_mode, std::string_view scale,
    std::optional<at::ScalarType> gram_dtype, double narrow_up_to) {
  check_x(x);
  const at::ScalarType least = wide_type(x.scalar_type());
  const at::ScalarType chosen = gram_dtype.value_or(least);
  TORCH_CHECK_TYPE(
      chosen == at::kDouble || chosen == least, "gram_dtype must be float64, or float32 for an x that is not, got ",
      chosen, " for x ", x.scalar_type());
  const int64_t rank = std::max<int64_t>(1, std::min(x.size(0), x.size(1) + bias));
  InverseArguments arguments = inverse_arguments(damping, damping_mode, scale, rank, x.size(0));
  arguments.gram_dtype = chosen;
  arguments.narrow_up_to = narrow_up_to;
  return arguments;
}

}  // namespace consequentialism
