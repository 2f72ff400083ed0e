// The forward of an emended linear layer from Python's call to autograd's: a layer of a few rows costs what surrounds
// its arithmetic. What Python decides for a call depends on its options, sizes and types alone and is remembered here;
// whatever else could change the answer (modes, transforms, autocast, subclasses, recorders) or is an error leads back
// to Python.
#include "linear_forward.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/accumulate.h>
#include <c10/util/hash.h>
#include <torch/csrc/autograd/python_variable.h>

#include <optional>
#include <string_view>
#include <tuple>
#include <unordered_map>

#include "autograd.h"

namespace consequentialism {

namespace {

namespace py = pybind11;

// Options are immutable, and kept alive by the entry: their address stands for their values.
using Call = std::tuple<PyObject*, int64_t, int64_t, int64_t, at::ScalarType, at::Device, bool, bool>;

struct Entry {
  py::object options;
  std::optional<LinearPlan> plan;
};

constexpr size_t kMostEntries = 4096;  // a damping that changes at every step makes as many

// Neither is ever destroyed: the interpreter is gone before statics are. The interpreter's lock guards both.
std::unordered_map<Call, Entry, c10::hash<Call>>& known_plans() {
  static auto* const plans = new std::unordered_map<Call, Entry, c10::hash<Call>>();
  return *plans;
}

py::object& planner() {
  static auto* const function = new py::object();
  return *function;
}

std::optional<LinearPlan> plan_of(const py::object& told) {
  if (told.is_none()) return std::nullopt;
  const auto plan = told.cast<py::tuple>();
  std::optional<at::ScalarType> gram_dtype;
  if (!plan[5].is_none()) gram_dtype = plan[5].cast<at::ScalarType>();
  return parse_plan(
      plan[0].cast<std::string_view>(), plan[1].cast<std::string_view>(), plan[2].cast<double>(),
      plan[3].cast<std::string_view>(), plan[4].cast<std::string_view>(), gram_dtype, plan[6].cast<double>());
}

// None for options that are not for long: they would be kept alive.
std::optional<LinearPlan> known_plan(
    const at::Tensor& x, int64_t rows, int64_t outputs, bool has_bias, bool needs_weight, const py::object& options) {
  const Call call{options.ptr(), rows, x.size(-1), outputs, x.scalar_type(), x.device(), has_bias, needs_weight};
  auto& plans = known_plans();
  const auto found = plans.find(call);
  if (found != plans.end()) return found->second.plan;
  if (!options.attr("samples").is_none() || !options.attr("process_group").is_none()) return std::nullopt;
  std::optional<LinearPlan> plan = plan_of(planner()(x, has_bias, outputs, options, needs_weight));
  if (plans.size() >= kMostEntries) plans.clear();
  return plans.emplace(call, Entry{options, std::move(plan)}).first->second.plan;
}

// An attribute's name, made once.
PyObject* name_of(const char* text) {
  return PyUnicode_InternFromString(text);
}

// A dictionary's value, null where there is none.
PyObject* value_of(PyObject* dictionary, PyObject* name) {
  PyObject* const value = PyDict_GetItemWithError(dictionary, name);
  if (value == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return value;
}

// Nothing records, traces, transforms or casts but autograd.
bool is_usual_mode() {
  const auto keys = c10::impl::tls_local_dispatch_key_set();
  return at::GradMode::is_enabled() && keys.included_ == c10::default_included_set &&
         keys.excluded_ == c10::default_excluded_set && !at::impl::torch_function_mode_enabled();
}

bool is_usual(const at::Tensor& tensor, const at::Tensor& x) {
  const auto dtype = tensor.scalar_type();
  return (dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf || dtype == at::kBFloat16) &&
         dtype == x.scalar_type() && tensor.device() == x.device() && tensor.layout() == at::kStrided &&
         !tensor.is_nested() && !at::isTensorSubclassLike(tensor) && !tensor._fw_grad(0).defined();
}

// The tensor that a Python object is, no subclass of it; null where it is something else.
const at::Tensor* tensor_in(PyObject* object) {
  return object != nullptr && THPVariable_CheckExact(object) ? &THPVariable_Unpack(object) : nullptr;
}

}  // namespace

void set_planner(py::object function) {
  planner() = std::move(function);
}

py::object linear_forward(py::handle layer, py::handle input) {
  static PyObject* const parameters_name = name_of("_parameters");
  static PyObject* const options_name = name_of("options");
  static PyObject* const watched_name = name_of("watched");
  static PyObject* const recorder_name = name_of("recorder");
  static PyObject* const forward_name = name_of("emended_forward");
  static PyObject* const weight_name = name_of("weight_name");
  static PyObject* const bias_name = name_of("bias_name");
  static PyObject* const transposed_name = name_of("weight_transposed");
  const at::Tensor* const input_tensor = tensor_in(input.ptr());
  if (input_tensor == nullptr || !is_usual_mode()) return py::none();
  const auto own = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(layer.ptr(), nullptr));
  if (!own) throw py::error_already_set();
  const auto cls = py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(Py_TYPE(layer.ptr())));
  const py::object name_of_weight = cls.attr(weight_name);
  const py::object name_of_bias = cls.attr(bias_name);
  const bool transposed = py::object(cls.attr(transposed_name)).ptr() == Py_True;
  // What an instance has of its own hides the class's and its parameters.
  for (PyObject* const name : {watched_name, recorder_name, forward_name, name_of_weight.ptr(), name_of_bias.ptr()}) {
    if (value_of(own.ptr(), name) != nullptr) return py::none();
  }
  PyObject* const parameters = value_of(own.ptr(), parameters_name);
  PyObject* const options_now = value_of(own.ptr(), options_name);
  if (parameters == nullptr || !PyDict_CheckExact(parameters) || options_now == nullptr) return py::none();
  PyObject* const bias_object = value_of(parameters, name_of_bias.ptr());
  const at::Tensor* const weight_tensor = tensor_in(value_of(parameters, name_of_weight.ptr()));
  const at::Tensor* const bias_tensor = tensor_in(bias_object);
  const bool has_bias = bias_object != Py_None;
  if (weight_tensor == nullptr || (has_bias && bias_tensor == nullptr)) return py::none();
  // Copies: while Python plans, or others run, someone may replace a parameter.
  const at::Tensor x = *input_tensor;
  const at::Tensor weight = *weight_tensor;
  const auto bias = has_bias ? std::optional(*bias_tensor) : std::nullopt;
  const auto options = py::reinterpret_borrow<py::object>(options_now);
  const bool needs_weight = weight.requires_grad();
  if (!needs_weight && !(has_bias && bias->requires_grad())) return py::none();
  if (!is_usual(x, x) || !is_usual(weight, x) || (has_bias && !is_usual(*bias, x))) return py::none();
  if (x.dim() == 0 || weight.dim() != 2 || weight.size(transposed ? 0 : 1) != x.size(-1)) return py::none();
  const int64_t outputs = weight.size(transposed ? 1 : 0);
  if (has_bias && (bias->dim() != 1 || bias->size(0) != outputs)) return py::none();
  const auto sizes = x.sizes();
  const int64_t rows = c10::multiply_integers(sizes.begin(), sizes.end() - 1);
  if (rows == 0) return py::none();
  const std::optional<LinearPlan> plan = known_plan(x, rows, outputs, has_bias, needs_weight, options);
  if (!plan) return py::none();
  at::Tensor y;
  {
    const py::gil_scoped_release others_run;
    y = emended_linear(x, transposed ? weight.t() : weight, bias, *plan);
  }
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(y));
}

}  // namespace consequentialism
