#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mv.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "../checks.h"
#include "../guards.h"
#include "factor.h"
#include "input_gram.h"

namespace consequentialism::cpu {

namespace {

struct Inverse {
  at::Tensor inverse;  // [n, n], float32 or float64
  at::Tensor x;        // [N, I], in the same type and in a layout that BLAS reads
};

// Gram and factor in one go; in float64 where float32 is not enough.
Inverse invert_input(
    const at::Tensor& input, bool bias, std::string_view form, double damping, std::string_view damping_mode,
    std::string_view scale) {
  const FactorArguments arguments = factor_arguments_of(input, bias, damping, damping_mode, scale);
  const bool primal = parse_form(form) == Form::kPrimal;
  const at::Tensor x = computable(input);
  if (x.scalar_type() == at::kFloat) {
    // An absolute damping shows its condition with the Gram.
    if (!arguments.relative || arguments.float32_is_enough()) {
      at::Tensor gram = lower_input_gram(x, bias, primal);
      if (try_factor_float32_(gram, arguments)) return {gram, x};
    }
  }
  const at::Tensor wide = x.to(at::kDouble);
  return {factor_lower(lower_input_gram(wide, bias, primal), arguments), wide};
}

}  // namespace

at::Tensor input_inverse(
    const at::Tensor& x, bool bias, std::string_view form, double damping, std::string_view damping_mode,
    std::string_view scale) {
  const PlainKernelGuard guard;
  const at::Tensor inverse = invert_input(x, bias, form, damping, damping_mode, scale).inverse;
  return inverse.to(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}

std::tuple<at::Tensor, at::Tensor> emended_input(
    const at::Tensor& x, bool bias, std::string_view form, double damping, std::string_view damping_mode,
    std::string_view scale) {
  const PlainKernelGuard guard;
  const auto [inverse, rows] = invert_input(x, bias, form, damping, damping_mode, scale);
  const int64_t inputs = x.size(1);
  at::Tensor emended;
  at::Tensor column = at::empty({0}, inverse.options());
  if (parse_form(form) == Form::kDual) {
    emended = at::mm(inverse, rows);
    if (bias) column = inverse.sum(1);
  } else {
    const at::Tensor square = inverse.narrow(0, 0, inputs).narrow(1, 0, inputs);
    emended = at::mm(rows, square);
    if (bias) {
      const at::Tensor border = inverse.select(0, inputs);
      emended.add_(border.narrow(0, 0, inputs));
      column = at::mv(rows, border.narrow(0, 0, inputs)).add_(border.select(0, inputs));
    }
  }
  const auto dtype = x.scalar_type();
  const auto wide = dtype == at::kDouble ? at::kDouble : at::kFloat;
  return {emended.to(dtype == at::kHalf ? at::kFloat : dtype), column.to(wide)};
}

}  // namespace consequentialism::cpu

TORCH_LIBRARY_IMPL(consequentialism, CPU, m) {
  m.impl("input_inverse", consequentialism::cpu::input_inverse);
  m.impl("emended_input", consequentialism::cpu::emended_input);
}
