#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "../inverse_arguments.h"

namespace consequentialism::cpu {

constexpr int64_t kWholeInTiles = 320;  // order up to which one thread in the cache is faster than BLAS on all

// The symmetric inverse [n, n] from gram's lower triangle, which is kept. Zero where the trace is zero, NaN
// where it is not finite; a factor that breaks down is retried with 10, 100 and 1000 times the ridge, then
// the diagonal stands in.
at::Tensor lower_damped_inverse(const at::Tensor& gram, const InverseArguments& arguments);

// The same, overwriting gram (float32, lower triangle) with the result. False, with gram destroyed, where
// float32 is not enough: an ill-conditioned or out-of-range Gram, or a broken-down factor.
bool try_damped_inverse_float32_(const at::Tensor& gram, const InverseArguments& arguments);

// Factors that were retried with more damping since the process began.
int64_t breakdowns();

}  // namespace consequentialism::cpu
