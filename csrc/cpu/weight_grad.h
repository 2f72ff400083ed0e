#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace consequentialism::cpu {

// The op weight_grad, bit for bit, with a column of ones of this type, or with none where there is no bias.
std::tuple<at::Tensor, at::Tensor> weight_grad_of_ones(
    const at::Tensor& dy, const at::Tensor& rows, bool bias, at::ScalarType column_type);

}  // namespace consequentialism::cpu
