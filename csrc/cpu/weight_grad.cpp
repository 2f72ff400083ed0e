#include "weight_grad.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mv.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/sum.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

#include "../checks.h"
#include "../guards.h"

namespace consequentialism::cpu {

namespace {

constexpr int64_t kFewRows = 64;                   // up to which sums row by row are as accurate as BLAS's
constexpr int64_t kFewEntries = int64_t{1} << 12;  // up to which a loop costs less than a call of torch

at::Tensor in_type(const at::Tensor& tensor, at::ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : tensor.to(dtype);
}

// Whether a loop serves: float32 or float64, rows of at::Tensor's own order.
bool is_small(const at::Tensor& dy, at::ScalarType column_type) {
  const bool known = column_type == at::kFloat || column_type == at::kDouble;
  return known && dy.size(0) <= kFewRows && dy.numel() <= kFewEntries && dy.scalar_type() == column_type &&
         dy.is_contiguous();
}

// db [O] <- dy^T column, or dy^T 1 where column is null; dy [N, O].
template <typename scalar_t>
void add_rows(const scalar_t* dy, const scalar_t* column, int64_t rows, int64_t outputs, scalar_t* db) {
  std::fill_n(db, outputs, scalar_t(0));
  for (int64_t n = 0; n < rows; ++n) {
    const scalar_t factor = column == nullptr ? scalar_t(1) : column[n];
    for (int64_t o = 0; o < outputs; ++o) db[o] += factor * dy[n * outputs + o];
  }
}

// Whether the sum of all entries is finite, which it is not where one of them is not.
bool has_finite_sum(const at::Tensor& tensor) {
  if (tensor.numel() > kFewEntries || !tensor.is_contiguous()) return std::isfinite(tensor.sum().item<double>());
  double sum = 0;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, tensor.scalar_type(), "has_finite_sum", [&] {
    const scalar_t* data = tensor.const_data_ptr<scalar_t>();
    for (int64_t i = 0; i < tensor.numel(); ++i) sum += static_cast<double>(data[i]);
  });
  return std::isfinite(sum);
}

// dw = dy^T rows [O, I] and db [O] in dy's type, of which db is empty or has been computed.
std::tuple<at::Tensor, at::Tensor> with_product(const at::Tensor& dy, const at::Tensor& rows, const at::Tensor& db) {
  const at::Tensor errors = in_type(dy, rows.scalar_type());
  // Any number times an infinity or NaN is one again, so db shows those of dy where there is a column. A sum may
  // overflow though every term is finite, so only a sum that is not finite is looked into.
  if (!has_finite_sum(db.numel() > 0 ? db : errors) && !at::isfinite(errors).all().item<bool>()) {
    const double nan = std::numeric_limits<double>::quiet_NaN();
    return {at::full({errors.size(1), rows.size(1)}, nan, dy.options()), at::full(db.sizes(), nan, dy.options())};
  }
  return {in_type(at::mm(errors.t(), rows), dy.scalar_type()), in_type(db, dy.scalar_type())};
}

// dy^T column, column [N], or of ones; by the same operations in the same order.
at::Tensor column_gradient(const at::Tensor& dy, const at::Tensor* column, at::ScalarType column_type) {
  at::Tensor db = at::empty({dy.size(1)}, dy.options().dtype(column_type));
  if (is_small(dy, column_type) && (column == nullptr || column->is_contiguous())) {
    AT_DISPATCH_FLOATING_TYPES(column_type, "column_gradient", [&] {
      const scalar_t* factors = column == nullptr ? nullptr : column->const_data_ptr<scalar_t>();
      add_rows(dy.const_data_ptr<scalar_t>(), factors, dy.size(0), dy.size(1), db.mutable_data_ptr<scalar_t>());
    });
    return db;
  }
  const at::Tensor ones = column == nullptr ? at::ones({dy.size(0)}, db.options()) : *column;
  at::mv_out(db, in_type(dy, column_type).t(), ones);
  return db;
}

}  // namespace

// dw = dy^T rows [O, I] and db = dy^T column [O] in dy's type; db is empty where column is. dy [N, O],
// rows [N, I], column [N]. One infinity or NaN in dy makes every entry NaN, never a finite number.
std::tuple<at::Tensor, at::Tensor> weight_grad(const at::Tensor& dy, const at::Tensor& rows, const at::Tensor& column) {
  check_weight_grad(dy, rows, column);
  const PlainKernelGuard guard;
  const bool bias = column.size(0) > 0;
  return with_product(
      dy, rows, bias ? column_gradient(dy, &column, column.scalar_type()) : at::empty({0}, column.options()));
}

std::tuple<at::Tensor, at::Tensor> weight_grad_of_ones(
    const at::Tensor& dy, const at::Tensor& rows, bool bias, at::ScalarType column_type) {
  const PlainKernelGuard guard;
  return with_product(
      dy, rows,
      bias && dy.size(0) > 0 ? column_gradient(dy, nullptr, column_type)
                             : at::empty({0}, dy.options().dtype(column_type)));
}

}  // namespace consequentialism::cpu

TORCH_LIBRARY_IMPL(consequentialism, CPU, m) {
  m.impl("weight_grad", consequentialism::cpu::weight_grad);
}
