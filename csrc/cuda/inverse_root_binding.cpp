// The op `inverse_root` on CUDA: checks, allocation, launches. Nothing here waits for the device.
#include <ATen/ops/empty.h>
#include <ATen/ops/eye.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>

#include "../coordinates_checks.h"
#include "../guards.h"
#include "device.h"
#include "inverse_root_launcher.h"

namespace consequentialism::cuda {

namespace {

constexpr int64_t kMostTogether = 64;  // matrices of a launch: the workspace holds seven times as many

template <class G>
void run_inverse_root(
    const at::Tensor& matrix, const at::Tensor& result, int64_t root, c10::ArrayRef<double> coefficients) {
  const int64_t n = matrix.size(-1), count = matrix.numel() / (n * n);
  const Limits limits = limits_of_current_device();
  for (int64_t first = 0; first < count; first += kMostTogether) {
    const InverseRootShape shape{std::min(kMostTogether, count - first), n, sizeof(G)};
    const InverseRootPlan plan = plan_inverse_root(shape, limits);
    const auto bytes = static_cast<int64_t>(plan.workspace_bytes);
    const at::Tensor workspace = at::empty({bytes}, matrix.options().dtype(at::kByte));
    C10_CUDA_CHECK(
        launch_inverse_root<G>(
            matrix.const_data_ptr<G>() + first * n * n, shape, root, coefficients.data(),
            static_cast<int64_t>(coefficients.size()) / 3, result.mutable_data_ptr<G>() + first * n * n, plan,
            workspace.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream()));
  }
}

}  // namespace

at::Tensor inverse_root(const at::Tensor& given, int64_t root, c10::ArrayRef<double> coefficients) {
  check_inverse_root(given, root, coefficients);
  const PlainKernelGuard plain;
  const c10::cuda::CUDAGuard device(given.device());
  const at::Tensor matrix = given.contiguous(), result = at::empty(given.sizes(), given.options());
  if (result.numel() == 0) return result;
  if (coefficients.empty()) return result.copy_(at::eye(given.size(-1), given.options()));
  if (matrix.scalar_type() == at::kDouble) {
    run_inverse_root<double>(matrix, result, root, coefficients);
  } else {
    run_inverse_root<float>(matrix, result, root, coefficients);
  }
  return result;
}

}  // namespace consequentialism::cuda

TORCH_LIBRARY_IMPL(consequentialism, CUDA, m) {
  m.impl("inverse_root", consequentialism::cuda::inverse_root);
}
