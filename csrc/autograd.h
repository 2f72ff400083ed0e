#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

namespace consequentialism {

// y = x W^T + b of checked arguments, with the emended gradients of W and b: the op of that name.
at::Tensor emended_linear(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias, std::string_view form,
    std::string_view applied_to, double damping, std::string_view damping_mode, std::string_view scale,
    std::optional<at::ScalarType> gram_dtype, double narrow_up_to);

}  // namespace consequentialism
