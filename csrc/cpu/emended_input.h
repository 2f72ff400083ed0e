#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

namespace consequentialism::cpu {

// The op of that name.
at::Tensor gram_inverse(
    const at::Tensor& x, bool bias, std::string_view form, double damping, std::string_view damping_mode,
    std::string_view scale, std::optional<at::ScalarType> gram_dtype, double narrow_up_to);

}  // namespace consequentialism::cpu
