#pragma once

#include <torch/csrc/utils/pybind.h>

namespace consequentialism {

// The forward of an emended linear layer where nothing is unusual, without Python but for a new shape's plan; None
// elsewhere, for `functional.linear` to serve.
pybind11::object linear_forward(pybind11::handle layer, pybind11::handle input);

// The function of Python that plans: (x, has_bias, outputs, options, needs_weight) to the last arguments of
// emended_linear, or to None where that op does not serve the call.
void set_planner(pybind11::object function);

}  // namespace consequentialism
