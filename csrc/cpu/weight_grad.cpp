#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mv.h>
#include <ATen/ops/sum.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <tuple>

#include "../checks.h"
#include "../guards.h"

namespace consequentialism::cpu {

// dw = dy^T rows [O, I] and db = dy^T column [O] in dy's type; db is empty where column is. dy [N, O],
// rows [N, I], column [N]. One infinity or NaN in dy makes every entry NaN, never a finite number.
std::tuple<at::Tensor, at::Tensor> weight_grad(const at::Tensor& dy, const at::Tensor& rows, const at::Tensor& column) {
  check_weight_grad(dy, rows, column);
  const PlainKernelGuard guard;
  const at::Tensor errors = dy.to(rows.scalar_type());
  // Any number times an infinity or NaN is one again, so db shows those of dy where there is a column.
  at::Tensor db = at::empty({column.size(0) == 0 ? 0 : errors.size(1)}, column.options());
  if (column.size(0) > 0) at::mv_out(db, dy.to(column.scalar_type()).t(), column);
  const at::Tensor& witness = column.size(0) > 0 ? db : errors;
  // A sum may overflow though every term is finite, so only a sum that is not finite is looked into.
  if (!std::isfinite(witness.sum().item<double>()) && !at::isfinite(errors).all().item<bool>()) {
    const double nan = std::numeric_limits<double>::quiet_NaN();
    return {at::full({errors.size(1), rows.size(1)}, nan, dy.options()), at::full(db.sizes(), nan, dy.options())};
  }
  return {at::mm(errors.t(), rows).to(dy.scalar_type()), db.to(dy.scalar_type())};
}

}  // namespace consequentialism::cpu

TORCH_LIBRARY_IMPL(consequentialism, CPU, m) {
  m.impl("weight_grad", consequentialism::cpu::weight_grad);
}
