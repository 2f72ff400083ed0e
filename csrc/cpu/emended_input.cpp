#include "emended_input.h"

#include <ATen/ops/amax.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mv.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string_view>
#include <tuple>

#include "../checks.h"
#include "../guards.h"
#include "damped_inverse.h"
#include "input_gram.h"

namespace consequentialism::cpu {

namespace {

constexpr double kLeastDamping = std::numeric_limits<double>::min();

struct Inversion {
  InverseArguments arguments;
  bool bias;
  bool primal;
  at::Tensor x;        // [N, I], float32 or float64, in a layout that BLAS reads
  at::Tensor inverse;  // [n, n], in the same type; before, the Gram's lower triangle
  double unit = 1;     // a power of two: x has been divided by it, the inverse is that of its Gram
};

// Where float64 squares of x may leave their range, a power of two near its largest entry; else 1.
double unit_of(const at::Tensor& gram, const at::Tensor& x) {
  constexpr double kMinTrace = 1e-250;
  if (x.numel() == 0) return 1;
  const double trace = gram.diagonal().sum().item<double>();
  if (trace > kMinTrace && trace < 1 / kMinTrace) return 1;
  const double largest = at::amax(x.abs()).item<double>();
  return largest > 0 && std::isfinite(largest) ? std::exp2(std::ilogb(largest)) : 1;
}

// The Gram of x / unit, whose bias's column of ones is as small. A relative damping does not see the unit.
void measure_in_unit_(Inversion& item) {
  item.unit = unit_of(item.inverse, item.x);
  if (item.unit == 1) return;
  const double one = 1 / item.unit;
  const int64_t inputs = item.x.size(1);
  item.x = item.x.div(item.unit);
  if (item.primal) {
    item.inverse = lower_input_gram(item.x, item.bias, true);
    if (item.bias) {
      item.inverse.select(0, inputs).mul_(one);
      item.inverse.select(0, inputs).select(0, inputs).mul_(one);
    }
  } else {
    item.inverse = lower_input_gram(item.x, false, false).add_(item.bias ? one * one : 0);
  }
  if (!item.arguments.relative) item.arguments.damping = std::max(item.arguments.damping * one * one, kLeastDamping);
}

// From what was emended in the unit: as from x.
double out_of_unit(const Inversion& item) {
  return item.arguments.scale == Scale::kGradient ? item.unit : 1 / item.unit;
}

// The inverse of x's own Gram; out of range where that is.
at::Tensor inverse_of(const Inversion& item) {
  if (item.unit == 1 || item.arguments.scale == Scale::kGradient) return item.inverse;
  return item.inverse.div(item.unit).div_(item.unit);
}

Inversion inversion_of(
    const at::Tensor& x, bool bias, std::string_view form, double damping, std::string_view damping_mode,
    std::string_view scale, std::optional<at::ScalarType> gram_dtype, double narrow_up_to) {
  const InverseArguments arguments =
      inverse_arguments_of(x, bias, damping, damping_mode, scale, gram_dtype, narrow_up_to);
  return {arguments, bias, parse_form(form) == Form::kPrimal, computable(x), {}};
}

// The Gram and its inverse, in float64 where float32 is not enough.
void invert_(Inversion& item) {
  const InverseArguments& arguments = item.arguments;
  if (item.x.scalar_type() == at::kFloat && (arguments.gram_dtype == at::kFloat || arguments.narrow_up_to > 0)) {
    item.inverse = lower_input_gram(item.x, item.bias, item.primal);
    if (try_damped_inverse_float32_(item.inverse, arguments)) return;
  }
  item.x = item.x.to(at::kDouble);
  item.inverse = lower_input_gram(item.x, item.bias, item.primal);
  measure_in_unit_(item);
  item.inverse = lower_damped_inverse(item.inverse, arguments);
}

// The emended input and its column, for an x of this type.
std::tuple<at::Tensor, at::Tensor> apply(const Inversion& item, at::ScalarType dtype) {
  const at::Tensor& inverse = item.inverse;
  const at::Tensor& rows = item.x;
  const int64_t inputs = rows.size(1);
  at::Tensor emended;
  at::Tensor column = at::empty({0}, inverse.options());
  if (!item.primal) {
    emended = at::mm(inverse, rows);
    if (item.bias) column = inverse.sum(1);
  } else {
    const at::Tensor square = inverse.narrow(0, 0, inputs).narrow(1, 0, inputs);
    emended = at::mm(rows, square);
    if (item.bias) {
      const at::Tensor border = inverse.select(0, inputs);
      emended.add_(border.narrow(0, 0, inputs), 1 / item.unit);
      column = at::mv(rows, border.narrow(0, 0, inputs)).add_(border.select(0, inputs), 1 / item.unit);
    }
  }
  if (item.unit != 1) {
    if (item.bias) column = column.mul(out_of_unit(item));
    if (item.bias && !item.primal) column = column.div(item.unit);
    emended = emended.mul(out_of_unit(item));
  }
  return {emended.to(dtype == at::kHalf ? at::kFloat : dtype), column.to(wide_type(dtype))};
}

}  // namespace

at::Tensor gram_inverse(
    const at::Tensor& x, bool bias, std::string_view form, double damping, std::string_view damping_mode,
    std::string_view scale, std::optional<at::ScalarType> gram_dtype, double narrow_up_to) {
  const PlainKernelGuard guard;
  Inversion item = inversion_of(x, bias, form, damping, damping_mode, scale, gram_dtype, narrow_up_to);
  invert_(item);
  return inverse_of(item).to(wide_type(x.scalar_type()));
}

std::tuple<at::Tensor, at::Tensor> emended_input(
    const at::Tensor& x, bool bias, std::string_view form, double damping, std::string_view damping_mode,
    std::string_view scale, std::optional<at::ScalarType> gram_dtype, double narrow_up_to) {
  const PlainKernelGuard guard;
  Inversion item = inversion_of(x, bias, form, damping, damping_mode, scale, gram_dtype, narrow_up_to);
  invert_(item);
  return apply(item, x.scalar_type());
}

}  // namespace consequentialism::cpu

TORCH_LIBRARY_IMPL(consequentialism, CPU, m) {
  m.impl("gram_inverse", consequentialism::cpu::gram_inverse);
  m.impl("emended_input", consequentialism::cpu::emended_input);
}
