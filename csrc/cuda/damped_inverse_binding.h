// Inverses as other ops take them, and the counter of broken-down factors.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "../inverse_arguments.h"

namespace consequentialism::cuda {

// scale * (gram + c I)^-1 of each Gram [n, n], float32 or float64 and contiguous, on the current device; those of one
// order and type together: by one launch, by three where a resident cluster makes the factors. Rows of an inverse are
// contiguous; where it is `padded` they begin at multiples of 16 bytes, which whoever reads it copies at a time, with
// anything between them.
std::vector<at::Tensor> inverses_of(
    c10::ArrayRef<at::Tensor> grams, c10::ArrayRef<InverseArguments> arguments, bool padded);

// Factors that were retried with more damping on any device since the process began. Waits for the devices.
int64_t breakdowns();

}  // namespace consequentialism::cuda
