// `fused_weight_grad` where nothing is fused: by the ops for its parts, on any device.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <optional>
#include <string_view>
#include <tuple>

namespace consequentialism {

// x [N, I] and dy [N, O], N above 0.
inline std::tuple<at::Tensor, at::Tensor> separate_weight_grad(
    const at::Tensor& x, const at::Tensor& dy, bool bias, double damping, std::string_view damping_mode,
    std::string_view scale, std::optional<at::ScalarType> gram_dtype, double narrow_up_to) {
  using Pair = std::tuple<at::Tensor, at::Tensor>;
  using Emend = Pair(
      const at::Tensor&, bool, std::string_view, double, std::string_view, std::string_view,
      std::optional<at::ScalarType>, double);
  using Multiply = Pair(const at::Tensor&, const at::Tensor&, const at::Tensor&);
  auto& ops = c10::Dispatcher::singleton();
  static const auto emend = ops.findSchemaOrThrow("consequentialism::emended_input", "").typed<Emend>();
  static const auto multiply = ops.findSchemaOrThrow("consequentialism::weight_grad", "").typed<Multiply>();
  const std::string_view form = x.size(0) <= x.size(1) + bias ? "dual" : "primal";
  const auto [emended, column] = emend.call(x, bias, form, damping, damping_mode, scale, gram_dtype, narrow_up_to);
  return multiply.call(dy, emended, column);
}

}  // namespace consequentialism
