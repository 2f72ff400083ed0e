#pragma once

#include <ATen/core/Tensor.h>

namespace consequentialism::cpu {

// gram <- beta * gram + alpha * a a^T, of which only the lower triangle is right afterwards; the tiles
// that the diagonal cuts write past it. a [n, k] and gram [n, n] may be strided views; gram's rows are
// contiguous.
void lower_gram_(const at::Tensor& gram, const at::Tensor& a, double beta, double alpha);

// The lower triangle of x x^T (dual) or x^T x (primal), [n, n], as if x [N, I] had a column of ones more
// when there is a bias. x is float32 or float64.
at::Tensor lower_input_gram(const at::Tensor& x, bool bias, bool primal);

// The upper triangle <- lower triangle^T.
void mirror_lower_(const at::Tensor& square);

// Half types in float32, and a layout that BLAS reads without a copy for each tile.
at::Tensor computable(const at::Tensor& x);

}  // namespace consequentialism::cpu
