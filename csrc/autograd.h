#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string_view>

#include "checks.h"

namespace consequentialism {

// Where the inverse is applied; kFused leaves everything to one op in backward.
enum class Side { kInput, kGradient, kFused };

// How a call is emended: what the op takes beside its tensors, parsed.
struct LinearPlan {
  Form form = Form::kDual;
  Side side = Side::kInput;
  double damping = 1;
  bool relative = true;
  Scale scale = Scale::kNlms;
  std::optional<at::ScalarType> gram_dtype;
  double narrow_up_to = 0;
};

LinearPlan parse_plan(
    std::string_view form, std::string_view applied_to, double damping, std::string_view damping_mode,
    std::string_view scale, std::optional<at::ScalarType> gram_dtype, double narrow_up_to);

// y = x W^T + b of checked arguments, with the emended gradients of W and b.
at::Tensor emended_linear(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias, const LinearPlan& plan);

}  // namespace consequentialism
