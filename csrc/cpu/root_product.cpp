#include <ATen/ops/bmm.h>
#include <torch/library.h>

#include "../coordinates_checks.h"
#include "../guards.h"

namespace consequentialism::cpu {

at::Tensor root_product(const at::Tensor& rows, const at::Tensor& root) {
  check_root_product(rows, root);
  const PlainKernelGuard guard;
  return at::bmm(rows.to(root.scalar_type()), root);
}

void add_root_product_(const at::Tensor& weight, const at::Tensor& rows, const at::Tensor& root, double alpha) {
  check_add_root_product(weight, rows, root);
  const PlainKernelGuard guard;
  const at::Tensor wide = rows.to(root.scalar_type());
  if (weight.scalar_type() == root.scalar_type()) {
    weight.baddbmm_(wide, root, 1, alpha);
  } else {
    weight.copy_(weight.to(root.scalar_type()).baddbmm_(wide, root, 1, alpha));
  }
}

}  // namespace consequentialism::cpu

TORCH_LIBRARY_IMPL(consequentialism, CPU, m) {
  m.impl("root_product", consequentialism::cpu::root_product);
  m.impl("add_root_product_", consequentialism::cpu::add_root_product_);
}
