// Schemas and the Python module; no arithmetic.
//
// Shapes: x [N, I], gram and inverse [n, n] with n = N (form "dual") or I plus the bias's one (form
// "primal"), emended input [N, I], its column for the bias [N] (empty without a bias). A convolution's x is
// [B, C, *spatial], its Gram [groups, n, n] of unfolded patches. All ops are pure.
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "build_info.h"

TORCH_LIBRARY(consequentialism, m) {
  m.def("input_gram(Tensor x, bool bias, str form) -> Tensor");
  m.def(
      "factor(Tensor gram, float damping, str damping_mode, str scale, SymInt rank, SymInt rows) "
      "-> Tensor");
  m.def(
      "input_inverse(Tensor x, bool bias, str form, float damping, str damping_mode, str scale) "
      "-> Tensor");
  m.def(
      "emended_input(Tensor x, bool bias, str form, float damping, str damping_mode, str scale) "
      "-> (Tensor, Tensor)");
  m.def(
      "conv_gram(Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation, int groups, bool bias, "
      "int patch_bytes, ScalarType dtype, str method) -> Tensor");
  m.def("weight_grad(Tensor dy, Tensor rows, Tensor column) -> (Tensor, Tensor)");
}

// The derivative belongs to one autograd Function in Python; differentiating an op itself is an error.
TORCH_LIBRARY_IMPL(consequentialism, Autograd, m) {
  m.impl("input_gram", torch::autograd::autogradNotImplementedFallback());
  m.impl("factor", torch::autograd::autogradNotImplementedFallback());
  m.impl("input_inverse", torch::autograd::autogradNotImplementedFallback());
  m.impl("emended_input", torch::autograd::autogradNotImplementedFallback());
  m.impl("conv_gram", torch::autograd::autogradNotImplementedFallback());
  m.impl("weight_grad", torch::autograd::autogradNotImplementedFallback());
}
