// Muon's polar factor, for wide matrices [n, m] several steps at a time: with p = a + b g + c g^2 of g = x x^T the next
// g is p g p, so products of order n give the factor p p' p'' of a few steps, by which x is multiplied once. All are
// polynomials in one symmetric matrix.
#include "orthogonalised.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <utility>

#include "input_gram.h"
#include "symmetric_product.h"

namespace consequentialism::cpu {

namespace {

constexpr int64_t kWide = 2;  // columns for each row from which on fewer products of n n m pay for more of n n n

// Rounding in g grows with each step that does not look at x: relative to float64, matrices with singular values down
// to 1e-8 err by 9e-6 one step at a time and by as much three at a time, by 4e-5 four and by 4e-4 five at a time.
constexpr int64_t kTogether = 3;

}  // namespace

void orthogonalise_(const at::Tensor& matrix, at::ArrayRef<double> coefficients, int64_t steps, double epsilon) {
  const bool tall = matrix.size(0) > matrix.size(1);
  at::Tensor x = tall ? matrix.t() : matrix;  // [n, m], n <= m
  const int64_t n = x.size(0), together = x.size(1) >= kWide * n ? kTogether : 1;
  x.div_(std::max(at::linalg_vector_norm(x).item<double>(), epsilon));
  at::Tensor next = at::empty_like(x), product = at::empty({n, n}, x.options());
  at::Tensor gram = at::empty_like(product), turn = at::empty_like(product), spare = at::empty_like(product);
  for (int64_t taken = 0; taken < steps; taken += together) {
    const int64_t count = std::min(together, steps - taken);
    lower_gram_(gram, x, 0, 1);
    mirror_lower_(gram);
    for (int64_t k = 0; k < count; ++k) {
      const at::Tensor p = k == 0 ? product : turn;
      symmetric_product(p, gram, gram, gram, coefficients[1], coefficients[2]);
      p.diagonal().add_(coefficients[0]);
      if (k + 1 < count) {
        symmetric_product(spare, gram, p, p, 0, 1);
        symmetric_product(gram, p, spare, p, 0, 1);
      }
      if (k > 0) {
        symmetric_product(spare, product, p, p, 0, 1);
        std::swap(product, spare);
      }
    }
    at::mm_out(next, product, x);
    std::swap(x, next);
  }
  const at::Tensor made = tall ? x.t() : x;
  if (made.const_data_ptr() != matrix.const_data_ptr()) matrix.copy_(made);
}

}  // namespace consequentialism::cpu
