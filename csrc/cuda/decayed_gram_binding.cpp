// The op `decayed_gram` on CUDA: checks, allocation, launch. Nothing here waits for the device.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../coordinates_checks.h"
#include "../guards.h"
#include "decayed_gram_launcher.h"
#include "device.h"

namespace consequentialism::cuda {

at::Tensor decayed_gram(const at::Tensor& given, const at::Tensor& input, bool bias, double memory, double beta) {
  check_decayed_gram(given, input, bias, memory, beta);
  const PlainKernelGuard plain;
  const c10::cuda::CUDAGuard device(input.device());
  const at::Tensor before = given.contiguous(), x = with_contiguous_rows(input);
  if (x.size(0) == 0 || before.numel() == 0) return memory == 0 ? at::zeros_like(before) : before.mul(memory);
  const at::Tensor gram = at::empty(before.sizes(), before.options());
  const DecayedGramShape shape{
      x.size(0), x.size(1), before.size(0), bias, x.dtype().itemsize(), before.dtype().itemsize(), has_aligned_rows(x)};
  const GramPlan plan = plan_decayed_gram(shape, limits_of_current_device());
  const at::Tensor workspace = at::empty({static_cast<int64_t>(plan.workspace_bytes)}, x.options().dtype(at::kByte));
  dispatch_element(x.scalar_type(), [&](auto native, auto element) {
    using T = decltype(native);
    using G = Accumulator<T>;
    C10_CUDA_CHECK((launch_decayed_gram<T, G>(
        before.const_data_ptr<G>(), reinterpret_cast<const T*>(x.const_data_ptr<decltype(element)>()), shape,
        row_stride_of(x), memory, beta, tf32_allowed(x), gram.mutable_data_ptr<G>(), plan, workspace.mutable_data_ptr(),
        c10::cuda::getCurrentCUDAStream())));
  });
  return gram;
}

}  // namespace consequentialism::cuda

TORCH_LIBRARY_IMPL(consequentialism, CUDA, m) {
  m.impl("decayed_gram", consequentialism::cuda::decayed_gram);
}
