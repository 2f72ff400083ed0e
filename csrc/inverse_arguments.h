// What a damped inverse is asked for, the same on every device.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string_view>

#include "checks.h"

namespace consequentialism {

// Above these trace(G) / c, the largest the condition number can be, a float32 Gram has lost the digits that its
// inverse needs and the work is done in float64. reference.py knows the same numbers, and the reasons.
constexpr double kMaxFloat32Condition = 2e3;
constexpr double kMaxFloat32ConditionTall = 6e3;  // more rows than inputs
constexpr double kMaxFloat32ConditionHalf = 5e4;  // float16, bfloat16

inline double max_float32_condition(int64_t rows, int64_t rank, at::ScalarType dtype) {
  if (dtype == at::kHalf || dtype == at::kBFloat16) return kMaxFloat32ConditionHalf;
  return rows > rank ? kMaxFloat32ConditionTall : kMaxFloat32Condition;
}

// (G + c I)^-1 times the scale's multiplier; what `damped_inverse` returns.
struct InverseArguments {
  double damping;
  bool relative;
  Scale scale;
  int64_t rank;  // min(N, I), what a relative damping is relative to
  int64_t rows;  // N, the multiplier of Scale::kNlms
  double max_float32_condition = kMaxFloat32Condition;
  double excess = 1;  // by which the inverse is too large where the damping has been limited

  // A relative damping tells the condition before the Gram is there.
  bool float32_is_enough() const { return relative && static_cast<double>(rank) <= max_float32_condition * damping; }
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

// For the Gram of x [N, I].
inline InverseArguments inverse_arguments_of(
    const at::Tensor& x, bool bias, double damping, std::string_view damping_mode, std::string_view scale) {
  check_x(x);
  const int64_t rank = std::max<int64_t>(1, std::min(x.size(0), x.size(1) + bias));
  InverseArguments arguments = inverse_arguments(damping, damping_mode, scale, rank, x.size(0));
  arguments.max_float32_condition = max_float32_condition(x.size(0), rank, x.scalar_type());
  return arguments;
}

}  // namespace consequentialism
