// Shape, dtype and argument checks shared by every backend. TORCH_CHECK_VALUE raises ValueError in
// Python, TORCH_CHECK_TYPE TypeError.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <string_view>

namespace consequentialism {

// The type in which sums over tensors of a type are computed.
inline at::ScalarType wide_type(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

enum class Form { kDual, kPrimal };
enum class Scale { kNlms, kRaw, kGradient };

inline Form parse_form(std::string_view form) {
  if (form == "dual") return Form::kDual;
  TORCH_CHECK_VALUE(form == "primal", "form must be 'dual' or 'primal', got '", form, "'");
  return Form::kPrimal;
}

inline Scale parse_scale(std::string_view scale) {
  if (scale == "nlms") return Scale::kNlms;
  if (scale == "raw") return Scale::kRaw;
  TORCH_CHECK_VALUE(scale == "gradient", "scale must be 'nlms', 'raw' or 'gradient', got '", scale, "'");
  return Scale::kGradient;
}

inline bool parse_relative(std::string_view damping_mode) {
  if (damping_mode == "relative") return true;
  TORCH_CHECK_VALUE(
      damping_mode == "absolute", "damping_mode must be 'relative' or 'absolute', got '", damping_mode, "'");
  return false;
}

inline bool parse_displaced(std::string_view method) {
  if (method == "displaced") return true;
  TORCH_CHECK_VALUE(method == "direct", "method must be 'direct' or 'displaced', got '", method, "'");
  return false;
}

inline void check_damping(double damping) {
  TORCH_CHECK_VALUE(std::isfinite(damping) && damping > 0, "damping must be finite and above 0, got ", damping);
}

inline void check_x(const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() == 2, "x must have the shape [N, I], got ", x.sizes());
  const auto dtype = x.scalar_type();
  TORCH_CHECK_TYPE(
      dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf || dtype == at::kBFloat16,
      "x must be float16, bfloat16, float32 or float64, got ", dtype);
}

inline void check_gram(const at::Tensor& gram) {
  TORCH_CHECK_VALUE(
      gram.dim() >= 2 && gram.size(-2) == gram.size(-1), "gram must have the shape [..., n, n], got ", gram.sizes());
  const auto dtype = gram.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble, "gram must be float32 or float64, got ", dtype);
}

inline void check_weight_grad(const at::Tensor& dy, const at::Tensor& rows, const at::Tensor& column) {
  check_x(rows);
  TORCH_CHECK_VALUE(
      dy.dim() == 2 && dy.size(0) == rows.size(0), "dy [N, O] and rows [N, I] must have the same N, got dy ",
      dy.sizes(), " and rows ", rows.sizes());
  TORCH_CHECK_VALUE(
      column.dim() == 1 && (column.size(0) == 0 || column.size(0) == rows.size(0)),
      "column must have the shape [N] or [0], got column ", column.sizes(), " and rows ", rows.sizes());
}

inline void check_fused(const at::Tensor& x, const at::Tensor& dy) {
  check_x(x);
  TORCH_CHECK_VALUE(
      dy.device() == x.device(), "dy and x must be on the same device, got dy ", dy.device(), " and x ", x.device());
  TORCH_CHECK_VALUE(
      dy.dim() == 2 && dy.size(0) == x.size(0), "dy [N, O] and x [N, I] must have the same N, got dy ", dy.sizes(),
      " and x ", x.sizes());
  TORCH_CHECK_TYPE(
      dy.scalar_type() == x.scalar_type(), "dy and x must have the same type, got dy ", dy.scalar_type(), " and x ",
      x.scalar_type());
}

}  // namespace consequentialism
