// The ops `root_product` and `add_root_product_` on CUDA: checks, allocation, launch. Nothing waits for the device.
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../coordinates_checks.h"
#include "../guards.h"
#include "device.h"
#include "root_product_launcher.h"

namespace consequentialism::cuda {

namespace {

bool rows_are_contiguous(const at::Tensor& matrices) {
  return matrices.stride(2) == 1 || matrices.size(2) <= 1;
}

MatrixStrides strides_of(const at::Tensor& matrices) {
  return {matrices.stride(1), matrices.stride(0)};
}

// out <- alpha rows S, plus out where it adds; out's rows are contiguous, its type is the root's or the rows'.
void multiply(const at::Tensor& out, const at::Tensor& given, const at::Tensor& root, double alpha, bool adds) {
  if (out.numel() == 0) return;
  const bool wide = root.scalar_type() == at::kDouble;
  at::Tensor rows = wide || given.scalar_type() == at::kDouble ? given.to(root.scalar_type()) : given;
  if (!rows_are_contiguous(rows)) rows = rows.contiguous();
  const at::Tensor s = rows_are_contiguous(root) ? root : root.contiguous();
  const RootProductShape shape{rows.size(0),         rows.size(1),
                               rows.size(2),         rows.dtype().itemsize(),
                               s.dtype().itemsize(), rows.scalar_type() == at::kBFloat16};
  const RootProductPlan plan = plan_root_product(shape, limits_of_current_device());
  const ProductOutput to{out.mutable_data_ptr(), strides_of(out), out.scalar_type() != s.scalar_type(), adds};
  dispatch_element(rows.scalar_type(), [&](auto native, auto element) {
    using T = decltype(native);
    using G = Accumulator<T>;
    C10_CUDA_CHECK((launch_root_product<T, G>(
        reinterpret_cast<const T*>(rows.const_data_ptr<decltype(element)>()), strides_of(rows), s.const_data_ptr<G>(),
        strides_of(s), shape, alpha, to, plan, c10::cuda::getCurrentCUDAStream())));
  });
}

}  // namespace

at::Tensor root_product(const at::Tensor& rows, const at::Tensor& root) {
  check_root_product(rows, root);
  const PlainKernelGuard plain;
  const c10::cuda::CUDAGuard device(rows.device());
  const at::Tensor product = at::empty(rows.sizes(), root.options());
  multiply(product, rows, root, 1, false);
  return product;
}

void add_root_product_(const at::Tensor& weight, const at::Tensor& rows, const at::Tensor& root, double alpha) {
  check_add_root_product(weight, rows, root);
  const PlainKernelGuard plain;
  const c10::cuda::CUDAGuard device(rows.device());
  const auto own = weight.scalar_type(), wide = root.scalar_type();
  const bool takes = own == wide || (own == rows.scalar_type() && own != at::kDouble && wide == at::kFloat);
  if (takes && rows_are_contiguous(weight)) {
    multiply(weight, rows, root, alpha, true);
    return;
  }
  const at::Tensor whole = weight.to(root.scalar_type()).contiguous();
  multiply(whole, rows, root, alpha, true);
  weight.copy_(whole);
}

}  // namespace consequentialism::cuda

TORCH_LIBRARY_IMPL(consequentialism, CUDA, m) {
  m.impl("root_product", consequentialism::cuda::root_product);
  m.impl("add_root_product_", consequentialism::cuda::add_root_product_);
}
