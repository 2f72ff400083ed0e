// Checks of the ops of steps in emended coordinates, and how inputs are cut into blocks.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>

#include "block_spans.h"
#include "checks.h"

namespace consequentialism {

inline void check_decayed_gram(const at::Tensor& gram, const at::Tensor& x, bool bias, double memory, double beta) {
  check_x(x);
  TORCH_CHECK_VALUE(
      gram.dim() == 3 && gram.size(0) >= 1 && gram.size(1) == gram.size(2), "gram must have the shape [n, b, b], got ",
      gram.sizes());
  const auto wide = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  TORCH_CHECK_TYPE(
      gram.scalar_type() == wide, "gram must be ", wide, " for x of ", x.scalar_type(), ", got ", gram.scalar_type());
  TORCH_CHECK_VALUE(
      gram.device() == x.device(), "gram and x must be on the same device, got gram ", gram.device(), " and x ",
      x.device());
  const int64_t order = block_order(x.size(1), gram.size(0), bias);
  TORCH_CHECK_VALUE(
      gram.size(1) == order, "gram [n, b, b] must have b = ", order, " for ", gram.size(0), " blocks of x ", x.sizes(),
      bias ? " with a bias" : "", ", got ", gram.sizes());
  TORCH_CHECK_VALUE(std::isfinite(memory), "memory must be finite, got ", memory);
  TORCH_CHECK_VALUE(std::isfinite(beta), "beta must be finite, got ", beta);
}

inline void check_inverse_root(const at::Tensor& matrix, int64_t root, c10::ArrayRef<double> coefficients) {
  TORCH_CHECK_VALUE(
      matrix.dim() >= 2 && matrix.size(-2) == matrix.size(-1), "matrix must have the shape [..., n, n], got ",
      matrix.sizes());
  const auto dtype = matrix.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble, "matrix must be float32 or float64, got ", dtype);
  TORCH_CHECK_VALUE(root >= 2 && (root & (root - 1)) == 0, "root must be a power of 2 of at least 2, got ", root);
  TORCH_CHECK_VALUE(
      coefficients.size() % 3 == 0, "coefficients must be three for each step, got ", coefficients.size());
}

inline void check_root_product(const at::Tensor& rows, const at::Tensor& root) {
  TORCH_CHECK_VALUE(rows.dim() == 3, "rows must have the shape [B, O, n], got ", rows.sizes());
  TORCH_CHECK_VALUE(
      root.dim() == 3 && root.size(1) == root.size(2) && root.size(0) == rows.size(0) && root.size(1) == rows.size(2),
      "root must have the shape [B, n, n] for rows [B, O, n], got root ", root.sizes(), " and rows ", rows.sizes());
  const auto dtype = root.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble, "root must be float32 or float64, got ", dtype);
  TORCH_CHECK_TYPE(at::isFloatingType(rows.scalar_type()), "rows must be floating-point, got ", rows.scalar_type());
  TORCH_CHECK_VALUE(
      rows.device() == root.device(), "rows and root must be on the same device, got rows ", rows.device(),
      " and root ", root.device());
}

inline void check_add_root_product(const at::Tensor& weight, const at::Tensor& rows, const at::Tensor& root) {
  check_root_product(rows, root);
  TORCH_CHECK_VALUE(
      weight.sizes() == rows.sizes(), "weight and rows must have the same shape, got weight ", weight.sizes(),
      " and rows ", rows.sizes());
  TORCH_CHECK_TYPE(
      at::isFloatingType(weight.scalar_type()), "weight must be floating-point, got ", weight.scalar_type());
  TORCH_CHECK_VALUE(
      weight.device() == root.device(), "weight and root must be on the same device, got weight ", weight.device(),
      " and root ", root.device());
}

}  // namespace consequentialism
