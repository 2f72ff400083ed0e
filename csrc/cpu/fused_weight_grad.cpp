#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "../checks.h"
#include "../guards.h"
#include "../separate_weight_grad.h"

namespace consequentialism::cpu {

// A CPU has no launches to save.
std::tuple<at::Tensor, at::Tensor> fused_weight_grad(
    const at::Tensor& x, const at::Tensor& dy, bool bias, double damping, std::string_view damping_mode,
    std::string_view scale, std::optional<at::ScalarType> gram_dtype, double narrow_up_to) {
  check_fused(x, dy);
  const PlainKernelGuard guard;
  if (x.size(0) == 0) {
    return {at::zeros({dy.size(1), x.size(1)}, dy.options()), at::zeros({bias ? dy.size(1) : 0}, dy.options())};
  }
  return separate_weight_grad(x, dy, bias, damping, damping_mode, scale, gram_dtype, narrow_up_to);
}

}  // namespace consequentialism::cpu

TORCH_LIBRARY_IMPL(consequentialism, CPU, m) {
  m.impl("fused_weight_grad", consequentialism::cpu::fused_weight_grad);
}
