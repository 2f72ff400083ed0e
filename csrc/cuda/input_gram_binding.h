// The Gram as other ops take it.
#pragma once

#include <ATen/core/Tensor.h>

#include "../checks.h"

namespace consequentialism::cuda {

// The Gram in dtype, float32 or float64; x has contiguous rows, on the current device.
at::Tensor gram_of(const at::Tensor& x, bool bias, Form form, at::ScalarType dtype);

}  // namespace consequentialism::cuda
