// The derivative of an emended linear layer for eager mode: what consequentialism/autograd/linear.py does, without
// Python between the steps. There stands the meaning of every branch; tests hold the two to the same bits.
#include "autograd.h"

#include <ATen/FuncTorchTLS.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_unsafe_view.h>
#include <ATen/ops/addr.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/mv.h>
#include <ATen/record_function.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/accumulate.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable_info.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/library.h>

#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <vector>

#include "checks.h"
#include "cpu/emended_input.h"
#include "cpu/weight_grad.h"
#include "guards.h"

namespace consequentialism {

namespace {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using torch::dynamo::autograd::CompiledNodeArgs;
using torch::dynamo::autograd::SwapSavedVariables;

using torch::autograd::isFwGradDefined;
using GramType = std::optional<at::ScalarType>;

std::string_view name_of(Form form) {
  return form == Form::kDual ? "dual" : "primal";
}

std::string_view name_of(Scale scale) {
  return scale == Scale::kNlms ? "nlms" : scale == Scale::kRaw ? "raw" : "gradient";
}

std::string_view damping_mode_of(const LinearPlan& plan) {
  return plan.relative ? "relative" : "absolute";
}

// Whether the dispatcher would call nothing but the CPU's kernel for these tensors, within a PlainKernelGuard: no mode,
// transform or subclass would see the call, and no profiler.
template <typename... Tensors>
bool is_plain_cpu(const Tensors&... tensors) {
  static const c10::DispatchKeySet plain =
      c10::DispatchKeySet({c10::DispatchKey::CPU, c10::DispatchKey::ADInplaceOrView}) |
      c10::getAutogradRelatedKeySetFromBackend(c10::BackendComponent::CPUBit) |
      c10::getAutocastRelatedKeySetFromBackend(c10::BackendComponent::CPUBit);
  return (((tensors.key_set() | plain) == plain) && ...) && !at::hasCallbacks() &&
         c10::impl::tls_local_dispatch_key_set().included_ == c10::default_included_set;
}

// The ops of one kind each, by the dispatcher, or the kernel itself where nothing but the kernel would see the call.

at::Tensor gram_inverse(const at::Tensor& x, bool bias, const LinearPlan& plan) {
  const auto mode = damping_mode_of(plan);
  if (is_plain_cpu(x)) {
    return cpu::gram_inverse(
        x, bias, name_of(plan.form), plan.damping, mode, name_of(plan.scale), plan.gram_dtype, plan.narrow_up_to);
  }
  using Call = at::Tensor(
      const at::Tensor&, bool, std::string_view, double, std::string_view, std::string_view, GramType, double);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("consequentialism::gram_inverse", "").typed<Call>();
  return op.call(
      x, bias, name_of(plan.form), plan.damping, mode, name_of(plan.scale), plan.gram_dtype, plan.narrow_up_to);
}

std::tuple<at::Tensor, at::Tensor> emended_input(const at::Tensor& x, bool bias, const LinearPlan& plan) {
  using Call = std::tuple<at::Tensor, at::Tensor>(
      const at::Tensor&, bool, std::string_view, double, std::string_view, std::string_view, GramType, double);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("consequentialism::emended_input", "").typed<Call>();
  return op.call(
      x, bias, name_of(plan.form), plan.damping, damping_mode_of(plan), name_of(plan.scale), plan.gram_dtype,
      plan.narrow_up_to);
}

std::tuple<at::Tensor, at::Tensor> weight_grad(const at::Tensor& dy, const at::Tensor& rows, const at::Tensor& column) {
  using Call = std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&, const at::Tensor&);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("consequentialism::weight_grad", "").typed<Call>();
  return op.call(dy, rows, column);
}

// The same with a column of ones, or none.
std::tuple<at::Tensor, at::Tensor> weight_grad(
    const at::Tensor& dy, const at::Tensor& rows, bool bias, at::ScalarType column_type) {
  if (is_plain_cpu(dy, rows)) return cpu::weight_grad_of_ones(dy, rows, bias, column_type);
  return weight_grad(dy, rows, rows.new_ones({bias ? rows.size(0) : 0}, column_type));
}

std::tuple<at::Tensor, at::Tensor> fused_weight_grad(
    const at::Tensor& x, const at::Tensor& dy, bool bias, const LinearPlan& plan) {
  using Call = std::tuple<at::Tensor, at::Tensor>(
      const at::Tensor&, const at::Tensor&, bool, double, std::string_view, std::string_view, GramType, double);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("consequentialism::fused_weight_grad", "").typed<Call>();
  return op.call(  // only a Gram in its own type is fused
      x, dy, bias, plan.damping, damping_mode_of(plan), name_of(plan.scale), std::nullopt, 0);
}

constexpr const char* kSecondDerivative =  // consequentialism/_torch.py says the same
    "consequentialism: trying to differentiate twice an emended gradient, which is @once_differentiable: it has no "
    "derivative. consequentialism.revert(model) gives back torch's own layers, whose gradients have one";

Side parse_side(std::string_view applied_to) {
  if (applied_to == "input") return Side::kInput;
  if (applied_to == "gradient") return Side::kGradient;
  TORCH_CHECK_VALUE(applied_to == "fused", "applied_to must be 'input', 'gradient' or 'fused', got '", applied_to, "'");
  return Side::kFused;
}

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
  const int64_t inputs = x.size(1);
  if (!primal) return weight_grad(at::mm(inverse, dy), x, needs_bias, inverse.scalar_type());
  const bool has_bias = inverse.size(0) > inputs;
  const auto [plain, plain_bias] = weight_grad(dy, x, has_bias, inverse.scalar_type());
  if (!has_bias) return {at::mm(plain, inverse), at::Tensor()};
  const at::Tensor border = inverse.select(0, inputs).narrow(0, 0, inputs);
  const at::Tensor square = inverse.narrow(0, 0, inputs).narrow(1, 0, inputs);
  at::Tensor dw = at::addr(at::mm(plain, square), plain_bias, border);
  if (!needs_bias) return {dw, at::Tensor()};
  return {dw, at::mv(plain, border).add_(at::mul(plain_bias, inverse.select(0, inputs).select(0, inputs)))};
}

// What a forward keeps for its backward; undefined where the plan does not need it.
struct Kept {
  at::Tensor x, weight, inverse, emended, column;
};

// Which gradients are wanted.
struct Wanted {
  bool x, weight, bias;
};

Kept keep(const at::Tensor& x, const at::Tensor& weight, bool has_bias, bool needs_bias, const LinearPlan& plan) {
  Kept kept;
  if (x.requires_grad()) kept.weight = weight;
  if (plan.side == Side::kFused) {
    kept.x = x;
    return kept;
  }
  const at::Tensor rows = as_rows(x);
  const bool needs_weight = weight.requires_grad();
  if (plan.side == Side::kGradient) {
    kept.inverse = gram_inverse(rows, has_bias, plan);
    if (in_range(kept.inverse)) {
      if (needs_weight) {
        kept.x = x;
      } else {
        kept.column = emended_ones(kept.inverse, rows, plan.form == Form::kPrimal);
        kept.inverse = at::Tensor();
      }
      return kept;
    }
    kept.inverse = at::Tensor();
  }
  std::tie(kept.emended, kept.column) = emended_input(rows, has_bias, plan);
  if (!needs_weight) kept.emended = at::Tensor();
  if (!needs_bias) kept.column = at::Tensor();
  return kept;
}

std::tuple<at::Tensor, at::Tensor> weight_grads(
    const Kept& kept, const at::Tensor& dy, bool has_bias, const LinearPlan& plan, const Wanted& wanted) {
  const bool primal = plan.form == Form::kPrimal;
  if (kept.inverse.defined() && wanted.weight) {
    return grads_by_inverse(kept.inverse, as_rows(kept.x), dy, primal, wanted.bias);
  }
  if (kept.inverse.defined()) {
    const at::Tensor ones = emended_ones(kept.inverse, as_rows(kept.x), primal);
    return weight_grad(dy, ones.unsqueeze(1), ones);
  }
  if (kept.x.defined()) return fused_weight_grad(as_rows(kept.x), dy, has_bias, plan);
  const at::Tensor column = wanted.bias ? kept.column : at::Tensor();
  if (!wanted.weight) return weight_grad(dy, column.unsqueeze(1), column);
  return weight_grad(dy, kept.emended, column.defined() ? column : kept.emended.new_empty({0}));
}

// The gradients, whose own differentiation is an error, with respect to the sources too; see the decorator of that
// name in autograd.py.
variable_list once_differentiable(variable_list gradients, const variable_list& sources) {
  const size_t count = gradients.size();
  for (at::Tensor& gradient : gradients) {
    if (gradient.defined()) gradient = gradient.detach().requires_grad_();
  }
  gradients.insert(gradients.end(), sources.begin(), sources.end());
  torch::autograd::DelayedError error(kSecondDerivative, static_cast<int64_t>(gradients.size()));
  gradients = error.apply(std::move(gradients));
  gradients.resize(count);
  return gradients;
}

// Gradients of x, weight and, where there is one, bias.
variable_list gradients_of(
    const at::Tensor& dy, const Kept& kept, bool has_bias, const LinearPlan& plan, const Wanted& wanted) {
  const bool twice = at::GradMode::is_enabled();  // even where dy has no history: dx has a factor W
  variable_list result(has_bias ? 3 : 2);
  {
    const at::NoGradGuard no_grad;
    const PlainKernelGuard plain;
    if (wanted.x) result[0] = at::matmul(dy, kept.weight);
    if (wanted.weight || wanted.bias) {
      auto [dw, db] = weight_grads(kept, as_rows(dy), has_bias, plan, wanted);
      if (wanted.weight) result[1] = std::move(dw);
      // An empty column stands for no bias in `weight_grad`, so that nothing comes of no rows.
      if (wanted.bias) result[2] = db.size(0) == 0 ? dy.new_zeros({dy.size(-1)}) : std::move(db);
    }
  }
  return twice ? once_differentiable(std::move(result), {dy, kept.x, kept.weight}) : result;
}

// A node of the graph with typed members: torch's `Function` keeps maps and sets that cost a small layer as much as its
// arithmetic. What it keeps are saved variables, as any node's: hooks on them, a second backward and changes in place
// behave as torch's.
class EmendedLinearBackward : public torch::autograd::Node {
 public:
  LinearPlan plan;
  bool has_bias = false;

  void save(const Kept& kept) {
    x_ = SavedVariable(kept.x, false);
    weight_ = SavedVariable(kept.weight, false);
    inverse_ = SavedVariable(kept.inverse, false);
    emended_ = SavedVariable(kept.emended, false);
    column_ = SavedVariable(kept.column, false);
  }

  std::string name() const override { return "consequentialism::EmendedLinearBackward"; }

  variable_list apply(variable_list&& gradients) override {
    return gradients_of(
        gradients[0].defined() ? gradients[0] : input_metadata(0).zeros_like(), kept(), has_bias, plan, wanted());
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    x_.reset_data();
    weight_.reset_data();
    inverse_.reset_data();
    emended_.reset_data();
    column_.reset_data();
  }

  void compiled_args(CompiledNodeArgs& args) const override {
    for (const SavedVariable* saved : {&x_, &weight_, &inverse_, &emended_, &column_}) args.collect(*saved, false);
    for (const bool setting : {has_bias, plan.relative}) args.collect(setting);
    for (const auto setting : {static_cast<int64_t>(plan.form), static_cast<int64_t>(plan.side)}) args.collect(setting);
    args.collect(static_cast<int64_t>(plan.scale));
    for (const double setting : {plan.damping, plan.narrow_up_to}) args.collect(setting);
    args.collect(plan.gram_dtype);
    args.collect(input_metadata(0));
  }

  // Compiled autograd calls `apply_packed` in its graph, as it does a C++ `Function` that is not traced.
  variable_list apply_with_saved(const variable_list& gradients, SwapSavedVariables& saved) override {
    namespace compiled = torch::dynamo::autograd;
    for (SavedVariable* one : {&x_, &weight_, &inverse_, &emended_, &column_}) saved.before(*one);
    saved.before(mutable_input_metadata(0));
    const Kept tensors = kept();
    std::vector<at::IValue> arguments = settings();
    const auto [x, weight, bias] = wanted();
    for (const bool one : {x, weight, bias}) arguments.emplace_back(one);
    for (const at::Tensor& one : {tensors.x, tensors.weight, tensors.inverse, tensors.emended, tensors.column}) {
      arguments.emplace_back(one);
    }
    std::vector<at::TypePtr> schema;
    for (const at::IValue& one : arguments) schema.push_back(one.isTensor() ? at::TensorType::get() : one.type());
    arguments.push_back(PackedOutput::pack(output()));
    schema.push_back(PackedOutput::packed_type());
    const auto& python = compiled::getPyCompilerInterface();
    const std::string function = python->bind_function(
        saved.get_py_compiler(), name(), apply_packed, schema, /*is_custom_function=*/true, /*is_traceable=*/false);
    using Metadata = std::vector<std::optional<torch::autograd::InputMetadata>>;
    const auto outputs = compiled::IValuePacker<Metadata>::pack(compiled::get_input_metadata(next_edges()));
    variable_list result =
        python->call_function(saved.get_py_compiler(), "apply_functional", function, gradients, arguments, outputs);
    for (SavedVariable* one : {&x_, &weight_, &inverse_, &emended_, &column_}) saved.after(*one);
    saved.after(mutable_input_metadata(0));
    return result;
  }

 private:
  using PackedOutput = torch::dynamo::autograd::IValuePacker<torch::autograd::VariableInfo>;

  torch::autograd::VariableInfo output() const {
    const torch::autograd::InputMetadata& metadata = input_metadata(0);
    torch::autograd::VariableInfo info;
    info.layout = metadata.layout();
    info.device = metadata.device();
    info.scalar_type = c10::typeMetaToScalarType(metadata.dtype());
    info.size = metadata.shape_as_dim_vector().vec();
    info.requires_grad = false;
    info.is_empty = false;
    return info;
  }

  Kept kept() {
    const std::lock_guard<std::mutex> lock(mutex_);  // against a release by another backward
    return {x_.unpack(), weight_.unpack(), inverse_.unpack(), emended_.unpack(), column_.unpack()};
  }

  Wanted wanted() const {
    return {task_should_compute_output(0), task_should_compute_output(1), has_bias && task_should_compute_output(2)};
  }

  std::vector<at::IValue> settings() const {
    return {
        has_bias,
        static_cast<int64_t>(plan.form),
        static_cast<int64_t>(plan.side),
        plan.damping,
        plan.relative,
        static_cast<int64_t>(plan.scale),
        plan.gram_dtype,
        plan.narrow_up_to};
  }

  // Of the settings, what is wanted, the tensors, and the output's shape: only when this runs is it known whether the
  // gradient is defined.
  static variable_list apply_packed(const variable_list& gradients, const std::vector<at::IValue>& arguments) {
    const auto is = [&](size_t place) { return arguments[place].toBool(); };
    const auto tensor = [&](size_t place) { return arguments[place].toTensor(); };
    const LinearPlan plan{static_cast<Form>(arguments[1].toInt()),
                          static_cast<Side>(arguments[2].toInt()),
                          arguments[3].toDouble(),
                          is(4),
                          static_cast<Scale>(arguments[5].toInt()),
                          arguments[6].toOptional<at::ScalarType>(),
                          arguments[7].toDouble()};
    const Kept kept{tensor(11), tensor(12), tensor(13), tensor(14), tensor(15)};
    at::OptionalDeviceGuard guard;
    const at::Tensor dy = gradients[0].defined() ? gradients[0] : PackedOutput::unpack(arguments[16]).zeros(guard);
    return gradients_of(dy, kept, is(0), plan, {is(8), is(9), is(10)});
  }

  SavedVariable x_, weight_, inverse_, emended_, column_;
};

// torch 2.11 counts its nodes' references outside of them, later ones inside.
template <typename T, typename Pointer = decltype(torch::autograd::Edge::function)>
auto make_node() {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>) {
    return std::shared_ptr<T>(new T(), [](T* node) { deleteNode(node); });  // torch's, found by T's base
  } else {
    return c10::make_intrusive<T>();
  }
}

// What torch's `Function` refuses too.
void check_transforms(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  if (const auto& functorch = at::functorch::functorchTLSAccessor()) functorch->checkSupportsCppAutogradFunction();
  TORCH_CHECK(
      !(isFwGradDefined(x) || isFwGradDefined(weight) || isFwGradDefined(bias)),
      "consequentialism::emended_linear has no forward-mode derivative");
}

}  // namespace

LinearPlan parse_plan(
    std::string_view form, std::string_view applied_to, double damping, std::string_view damping_mode,
    std::string_view scale, GramType gram_dtype, double narrow_up_to) {
  return {
      parse_form(form), parse_side(applied_to), damping, parse_relative(damping_mode), parse_scale(scale), gram_dtype,
      narrow_up_to};
}

at::Tensor emended_linear(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias, const LinearPlan& plan) {
  check_transforms(x, weight, bias);
  const bool has_bias = bias.has_value() && bias->defined();
  const bool needs_bias = has_bias && bias->requires_grad();
  const bool recorded = at::GradMode::is_enabled() && (x.requires_grad() || weight.requires_grad() || needs_bias);
  at::Tensor y;
  Kept kept;
  {
    const at::NoGradGuard no_grad;
    y = at::linear(x, weight, bias);  // not below autograd: it takes other products there
    if (y.is_view()) y = at::_unsafe_view_symint(y, y.sym_sizes());  // a view could not be changed in place
    if (!recorded) return y;
    const PlainKernelGuard plain;
    kept = keep(x, weight, has_bias, needs_bias, plan);
  }
  const auto node = make_node<EmendedLinearBackward>();
  node->plan = plan;
  node->has_bias = has_bias;
  node->set_next_edges(
      has_bias ? torch::autograd::collect_next_edges(x, weight, *bias)
               : torch::autograd::collect_next_edges(x, weight));
  torch::autograd::set_history(y, node);
  node->save(kept);
  return y;
}

namespace {

at::Tensor emended_linear_op(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias, std::string_view form,
    std::string_view applied_to, double damping, std::string_view damping_mode, std::string_view scale,
    GramType gram_dtype, double narrow_up_to) {
  return emended_linear(
      x, weight, bias, parse_plan(form, applied_to, damping, damping_mode, scale, gram_dtype, narrow_up_to));
}

}  // namespace

}  // namespace consequentialism

TORCH_LIBRARY_IMPL(consequentialism, CompositeImplicitAutograd, m) {
  m.impl("emended_linear", consequentialism::emended_linear_op);
}
