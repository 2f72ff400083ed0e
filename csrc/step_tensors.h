#pragma once

#include <torch/csrc/utils/pybind.h>

namespace consequentialism {

// What a compiled step takes of each parameter: itself, its gradient, and what its entry of an optimizer's state has
// under these keys, as a tuple; None where one of them is missing or not what such a step serves: tensors of torch's
// own classes on the host, in float32 or float64 as the parameter and without gaps. A "step" may be of any type.
pybind11::list step_tensors(const pybind11::list& parameters, const pybind11::dict& state, const pybind11::tuple& keys);

}  // namespace consequentialism
