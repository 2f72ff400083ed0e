// The derivative of an emended linear layer for eager mode: what consequentialism/autograd/linear.py does, without
// Python between the steps. There stands the meaning of every branch; tests hold the two to the same bits.
#include "autograd.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_unsafe_view.h>
#include <ATen/ops/addr.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/mv.h>
#include <c10/util/accumulate.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <tuple>

#include "checks.h"
#include "guards.h"

namespace consequentialism {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using SavedData = decltype(AutogradContext::saved_data);

using GramType = std::optional<at::ScalarType>;

at::Tensor gram_inverse(
    const at::Tensor& x, bool bias, std::string_view form, double damping, std::string_view mode,
    std::string_view scale, GramType gram_dtype, double narrow_up_to) {
  using Call = at::Tensor(
      const at::Tensor&, bool, std::string_view, double, std::string_view, std::string_view, GramType, double);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("consequentialism::gram_inverse", "").typed<Call>();
  return op.call(x, bias, form, damping, mode, scale, gram_dtype, narrow_up_to);
}

std::tuple<at::Tensor, at::Tensor> emended_input(
    const at::Tensor& x, bool bias, std::string_view form, double damping, std::string_view mode,
    std::string_view scale, GramType gram_dtype, double narrow_up_to) {
  using Call = std::tuple<at::Tensor, at::Tensor>(
      const at::Tensor&, bool, std::string_view, double, std::string_view, std::string_view, GramType, double);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("consequentialism::emended_input", "").typed<Call>();
  return op.call(x, bias, form, damping, mode, scale, gram_dtype, narrow_up_to);
}

std::tuple<at::Tensor, at::Tensor> weight_grad(const at::Tensor& dy, const at::Tensor& rows, const at::Tensor& column) {
  using Call = std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&, const at::Tensor&);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("consequentialism::weight_grad", "").typed<Call>();
  return op.call(dy, rows, column);
}

std::tuple<at::Tensor, at::Tensor> fused_weight_grad(
    const at::Tensor& x, const at::Tensor& dy, bool bias, double damping, std::string_view mode,
    std::string_view scale) {
  using Call = std::tuple<at::Tensor, at::Tensor>(
      const at::Tensor&, const at::Tensor&, bool, double, std::string_view, std::string_view, GramType, double);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("consequentialism::fused_weight_grad", "").typed<Call>();
  return op.call(x, dy, bias, damping, mode, scale, std::nullopt, 0);  // only a Gram in its own type is fused
}

constexpr const char* kSecondDerivative =  // consequentialism/_torch.py says the same
    "consequentialism: trying to differentiate twice an emended gradient, which is @once_differentiable: it has no "
    "derivative. consequentialism.revert(model) gives back torch's own layers, whose gradients have one";

// Products with an inverse, of the size of 1 / x^2, may leave the type's range where the emended input, of 1 / x, does
// not. Its diagonal tells, for it is positive definite; only a CPU's can be looked at.
constexpr double kLargestInverseFloat = 1e25;
constexpr double kLargestInverseDouble = 1e200;

template <typename scalar_t>
bool diagonal_in_range(const at::Tensor& inverse, double largest) {
  const scalar_t* data = inverse.const_data_ptr<scalar_t>();
  const int64_t step = inverse.stride(0) + inverse.stride(1);
  for (int64_t i = 0; i < inverse.size(0); ++i) {
    const double entry = data[i * step];
    if (!(entry > 1 / largest && entry < largest)) return false;
  }
  return true;
}

bool in_range(const at::Tensor& inverse) {
  if (inverse.key_set().has(c10::DispatchKey::Python) || inverse.key_set().has(c10::DispatchKey::Functionalize)) {
    return true;
  }
  if (!inverse.device().is_cpu() || !inverse.has_storage()) return true;
  return inverse.scalar_type() == at::kDouble ? diagonal_in_range<double>(inverse, kLargestInverseDouble)
                                              : diagonal_in_range<float>(inverse, kLargestInverseFloat);
}

// Where the inverse is applied; kFused leaves everything to one op in backward.
enum class Side { kInput, kGradient, kFused };

Side parse_side(std::string_view applied_to) {
  if (applied_to == "input") return Side::kInput;
  if (applied_to == "gradient") return Side::kGradient;
  TORCH_CHECK_VALUE(applied_to == "fused", "applied_to must be 'input', 'gradient' or 'fused', got '", applied_to, "'");
  return Side::kFused;
}

// What forward keeps, in the order of saved variables; undefined where a plan does not need it.
enum Saved { kX, kWeight, kInverse, kEmended, kColumn };

at::Tensor as_rows(const at::Tensor& tensor) {
  if (tensor.dim() == 2) return tensor;
  const auto sizes = tensor.sizes();
  return tensor.reshape({c10::multiply_integers(sizes.begin(), sizes.end() - 1), sizes.back()});  // not -1 beside a 0
}

// The emended input's column for the bias alone, [N].
at::Tensor emended_ones(const at::Tensor& inverse, const at::Tensor& x, bool primal) {
  if (!primal) return inverse.sum(1);
  const at::Tensor border = inverse.select(0, -1);
  return at::mv(x.to(inverse.scalar_type()), border.narrow(0, 0, x.size(1))).add_(border.select(0, -1));
}

// dw [O, I] and db [O] of dy [N, O] by an inverse that is applied to the gradient's side.
std::tuple<at::Tensor, at::Tensor> grads_by_inverse(
    const at::Tensor& inverse, const at::Tensor& x, const at::Tensor& dy, bool primal, bool needs_bias) {
  const int64_t rows = x.size(0);
  const int64_t inputs = x.size(1);
  if (!primal) return weight_grad(at::mm(inverse, dy), x, inverse.new_ones({needs_bias ? rows : 0}));
  const bool has_bias = inverse.size(0) > inputs;
  const auto [plain, plain_bias] = weight_grad(dy, x, inverse.new_ones({has_bias ? rows : 0}));
  if (!has_bias) return {at::mm(plain, inverse), at::Tensor()};
  const at::Tensor border = inverse.select(0, inputs).narrow(0, 0, inputs);
  const at::Tensor square = inverse.narrow(0, 0, inputs).narrow(1, 0, inputs);
  at::Tensor dw = at::addr(at::mm(plain, square), plain_bias, border);
  if (!needs_bias) return {dw, at::Tensor()};
  return {dw, at::mv(plain, border).add_(at::mul(plain_bias, inverse.select(0, inputs).select(0, inputs)))};
}

class EmendedLinear : public torch::autograd::Function<EmendedLinear> {
 public:
  static at::Tensor forward(
      AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
      std::string_view form, std::string_view applied_to, double damping, std::string_view damping_mode,
      std::string_view scale, GramType gram_dtype, double narrow_up_to) {
    const Side side = parse_side(applied_to);
    at::Tensor y = at::linear(x, weight, bias);  // not below autograd: it takes other products there
    if (y.is_view()) y = at::_unsafe_view_symint(y, y.sym_sizes());  // a view could not be changed in place
    const PlainKernelGuard plain;
    const at::Tensor rows = as_rows(x);
    const bool has_bias = bias.has_value();
    const bool needs_weight = weight.requires_grad();
    const bool needs_bias = has_bias && bias->requires_grad();
    const bool primal = parse_form(form) == Form::kPrimal;
    at::Tensor inverse, emended, column;
    if (side == Side::kInput) {
      std::tie(emended, column) =
          emended_input(rows, has_bias, form, damping, damping_mode, scale, gram_dtype, narrow_up_to);
      if (!needs_weight) emended = at::Tensor();
      if (!needs_bias) column = at::Tensor();
    } else if (side == Side::kGradient) {
      inverse = gram_inverse(rows, has_bias, form, damping, damping_mode, scale, gram_dtype, narrow_up_to);
      if (!in_range(inverse)) {
        inverse = at::Tensor();
        std::tie(emended, column) =
            emended_input(rows, has_bias, form, damping, damping_mode, scale, gram_dtype, narrow_up_to);
        if (!needs_weight) emended = at::Tensor();
        if (!needs_bias) column = at::Tensor();
      } else if (!needs_weight) {
        column = emended_ones(inverse, rows, primal);
        inverse = at::Tensor();
      }
    }
    const bool keeps_x = inverse.defined() || side == Side::kFused;
    ctx->save_for_backward(
        {keeps_x ? x : at::Tensor(), x.requires_grad() ? weight : at::Tensor(), inverse, emended, column});
    ctx->saved_data["primal"] = primal;
    ctx->saved_data["bias"] = needs_bias;
    if (side == Side::kFused) {
      ctx->saved_data["has_bias"] = has_bias;
      ctx->saved_data["damping"] = damping;
      ctx->saved_data["damping_mode"] = std::string(damping_mode);
      ctx->saved_data["scale"] = std::string(scale);
    }
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const at::Tensor& dy = grads[0];
    const bool twice = at::GradMode::is_enabled();           // even where dy has no history: dx has a factor W
    const variable_list saved = ctx->get_saved_variables();  // a checkpoint runs its forward again in here
    variable_list result(10);
    {
      const at::NoGradGuard no_grad;
      const PlainKernelGuard plain;
      if (ctx->needs_input_grad(0)) result[0] = at::matmul(dy, saved[kWeight]);
      const bool needs_weight = ctx->needs_input_grad(1);
      const bool needs_bias = ctx->saved_data["bias"].toBool() && ctx->needs_input_grad(2);
      if (needs_weight || needs_bias) {
        auto [dw, db] = weight_grads(saved, as_rows(dy), ctx->saved_data, needs_weight, needs_bias);
        if (needs_weight) result[1] = dw;
        if (needs_bias) result[2] = db;
      }
    }
    return twice ? once_differentiable(std::move(result), {dy, saved[kX], saved[kWeight]}) : result;
  }

 private:
  static std::tuple<at::Tensor, at::Tensor> weight_grads(
      const variable_list& saved, const at::Tensor& dy, const SavedData& data, bool needs_weight, bool needs_bias) {
    if (saved[kInverse].defined() && needs_weight) {
      return grads_by_inverse(saved[kInverse], as_rows(saved[kX]), dy, data.at("primal").toBool(), needs_bias);
    }
    if (saved[kInverse].defined()) {
      const at::Tensor ones = emended_ones(saved[kInverse], as_rows(saved[kX]), data.at("primal").toBool());
      return weight_grad(dy, ones.unsqueeze(1), ones);
    }
    if (saved[kX].defined()) {
      return fused_weight_grad(
          as_rows(saved[kX]), dy, data.at("has_bias").toBool(), data.at("damping").toDouble(),
          data.at("damping_mode").toStringView(), data.at("scale").toStringView());
    }
    const at::Tensor column = needs_bias ? saved[kColumn] : at::Tensor();
    if (!needs_weight) return weight_grad(dy, column.unsqueeze(1), column);
    return weight_grad(dy, saved[kEmended], column.defined() ? column : saved[kEmended].new_empty({0}));
  }

  // The gradients, whose own differentiation is an error, with respect to the sources too; see the decorator of that
  // name in autograd.py.
  static variable_list once_differentiable(variable_list result, const variable_list& sources) {
    const size_t count = result.size();
    for (at::Tensor& gradient : result) {
      if (gradient.defined()) gradient = gradient.detach().requires_grad_();
    }
    result.insert(result.end(), sources.begin(), sources.end());
    torch::autograd::DelayedError error(kSecondDerivative, static_cast<int64_t>(result.size()));
    result = error.apply(std::move(result));
    result.resize(count);
    return result;
  }
};

}  // namespace

at::Tensor emended_linear(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias, std::string_view form,
    std::string_view applied_to, double damping, std::string_view damping_mode, std::string_view scale,
    GramType gram_dtype, double narrow_up_to) {
  return EmendedLinear::apply(
      x, weight, bias, form, applied_to, damping, damping_mode, scale, gram_dtype, narrow_up_to);
}

}  // namespace consequentialism

TORCH_LIBRARY_IMPL(consequentialism, CompositeImplicitAutograd, m) {
  m.impl("emended_linear", consequentialism::emended_linear);
}
