#pragma once

#include <ATen/core/Tensor.h>

namespace consequentialism::cpu {

// out [n, n] <- alpha a b + beta c, which is symmetric, as where all are polynomials in one symmetric matrix. out is
// none of them.
void symmetric_product(
    at::Tensor out, const at::Tensor& a, const at::Tensor& b, const at::Tensor& c, double beta, double alpha);

}  // namespace consequentialism::cpu
