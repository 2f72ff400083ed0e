#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include "../coordinates_checks.h"
#include "../guards.h"
#include "input_gram.h"

namespace consequentialism::cpu {

at::Tensor decayed_gram(const at::Tensor& gram, const at::Tensor& input, bool bias, double memory, double beta) {
  check_decayed_gram(gram, input, bias, memory, beta);
  const PlainKernelGuard guard;
  const at::Tensor x = computable(input);
  at::Tensor fresh =
      memory == 0 ? at::zeros_like(gram, at::MemoryFormat::Contiguous) : gram.clone(at::MemoryFormat::Contiguous);
  const int64_t blocks = gram.size(0);
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t begin = block_begin(x.size(1), blocks, i);
    const int64_t size = block_begin(x.size(1), blocks, i + 1) - begin;
    const at::Tensor part = x.narrow(1, begin, size);
    const at::Tensor whole = fresh.select(0, i);
    lower_gram_(whole.narrow(0, 0, size).narrow(1, 0, size), part.t(), memory, beta);
    if (bias && i == blocks - 1) {
      whole.select(0, size).narrow(0, 0, size).mul_(memory).add_(part.sum(0), beta);
      whole.select(0, size).select(0, size).mul_(memory).add_(beta * static_cast<double>(x.size(0)));
    }
    mirror_lower_(whole);
  }
  return fresh;
}

}  // namespace consequentialism::cpu

TORCH_LIBRARY_IMPL(consequentialism, CPU, m) {
  m.impl("decayed_gram", consequentialism::cpu::decayed_gram);
}
