// What a compiled step takes of each parameter, looked at anew in every step: in Python that took a third of the step.
#include "step_tensors.h"

#include <torch/csrc/autograd/python_variable.h>

namespace consequentialism {

namespace {

namespace py = pybind11;

// The object's tensor; null where it is no tensor of torch's own classes, on the host and without gaps.
const at::Tensor* dense_in(PyObject* object) {
  if (object == nullptr || !THPVariable_CheckExact(object)) return nullptr;
  const at::Tensor& tensor = THPVariable_Unpack(object);
  const bool dense = tensor.layout() == at::kStrided && tensor.device().is_cpu() && tensor.is_contiguous();
  return dense ? &tensor : nullptr;
}

// A dictionary's value, null where there is none; a default dictionary makes none.
PyObject* value_of(PyObject* dictionary, PyObject* key) {
  PyObject* const value = PyDict_GetItemWithError(dictionary, key);
  if (value == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return value;
}

py::object tensors_of(PyObject* parameter, PyObject* states, PyObject* keys) {
  const at::Tensor* const own = dense_in(parameter);
  if (own == nullptr) return py::none();
  const auto dtype = own->scalar_type();
  if (dtype != at::kFloat && dtype != at::kDouble) return py::none();
  const auto gradient = py::reinterpret_steal<py::object>(THPVariable_Wrap(own->grad()));
  const at::Tensor* const slope = dense_in(gradient.ptr());
  if (slope == nullptr || slope->scalar_type() != dtype) return py::none();
  const Py_ssize_t count = PyTuple_GET_SIZE(keys);
  PyObject* const state = count == 0 ? states : value_of(states, parameter);  // without keys nothing is read of it
  if (state == nullptr || !PyDict_Check(state)) return py::none();
  py::tuple found(count + 2);
  found[0] = py::handle(parameter);
  found[1] = gradient;
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* const key = PyTuple_GET_ITEM(keys, i);
    PyObject* const value = value_of(state, key);
    const at::Tensor* const tensor = dense_in(value);
    if (tensor == nullptr) return py::none();
    const bool counts = PyUnicode_CompareWithASCIIString(key, "step") == 0;  // in any type that the kernels count in
    if (counts ? !tensor->is_floating_point() : tensor->scalar_type() != dtype) return py::none();
    found[i + 2] = py::handle(value);
  }
  return found;
}

}  // namespace

py::list step_tensors(const py::list& parameters, const py::dict& state, const py::tuple& keys) {
  py::list found;
  for (const py::handle parameter : parameters) found.append(tensors_of(parameter.ptr(), state.ptr(), keys.ptr()));
  return found;
}

}  // namespace consequentialism
