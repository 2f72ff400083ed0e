#pragma once

#include <ATen/core/Tensor.h>

namespace consequentialism::cpu {

// matrix [O, I] <- roughly U V^T of matrix = U D V^T, by Newton and Schulz's quintic iteration
// x <- (a + b x x^T + c (x x^T)^2) x from x = matrix / |matrix|, as orthogonalised of consequentialism/optim/steps.py.
// It has an entry at least and is contiguous.
void orthogonalise_(const at::Tensor& matrix, at::ArrayRef<double> coefficients, int64_t steps, double epsilon);

}  // namespace consequentialism::cpu
