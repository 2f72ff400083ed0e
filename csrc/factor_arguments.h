// What a factor is asked for, the same on every device.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string_view>

#include "checks.h"

namespace consequentialism {

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

  // A relative damping tells the condition before the Gram is there.
  bool float32_is_enough() const { return relative && static_cast<double>(rank) <= kMaxFloat32Condition * damping; }
};

inline FactorArguments factor_arguments(
    double damping, std::string_view damping_mode, std::string_view scale, int64_t rank, int64_t rows) {
  check_damping(damping);
  TORCH_CHECK_VALUE(rank >= 1, "rank must be at least 1, got ", rank);
  return {damping, parse_relative(damping_mode), parse_scale(scale), rank, rows};
}

// For the Gram of x [N, I].
inline FactorArguments factor_arguments_of(
    const at::Tensor& x, bool bias, double damping, std::string_view damping_mode, std::string_view scale) {
  check_x(x);
  const int64_t rank = std::max<int64_t>(1, std::min(x.size(0), x.size(1) + bias));
  return factor_arguments(damping, damping_mode, scale, rank, x.size(0));
}

}  // namespace consequentialism
