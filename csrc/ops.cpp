// Schemas and the Python module; no arithmetic.
//
// Shapes: x [N, I], gram and inverse [n, n], leading dimensions a batch, with n = N (form "dual") or I plus the bias's
// one (form "primal"), emended input [N, I], its column for the bias [N] (empty without a bias). A convolution's x is
// [B, C, *spatial], its Gram [groups, n, n] of unfolded patches. Ops whose names end in _ change their first argument;
// the others are pure.
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "build_info.h"

TORCH_LIBRARY(consequentialism, m) {
  m.def("input_gram(Tensor x, bool bias, str form) -> Tensor");
  m.def("input_gram.by(Tensor x, bool bias, str form, str variant) -> Tensor");
  m.def(
      "damped_inverse(Tensor gram, float damping, str damping_mode, str scale, SymInt rank, SymInt rows) "
      "-> Tensor");
  m.def(
      "damped_inverse.by(Tensor gram, float damping, str damping_mode, str scale, SymInt rank, SymInt rows, "
      "str variant) -> Tensor");
  m.def(
      "gram_inverse(Tensor x, bool bias, str form, float damping, str damping_mode, str scale, "
      "ScalarType? gram_dtype=None, float narrow_up_to=0) -> Tensor");
  m.def(
      "emended_input(Tensor x, bool bias, str form, float damping, str damping_mode, str scale, "
      "ScalarType? gram_dtype=None, float narrow_up_to=0) -> (Tensor, Tensor)");
  m.def(
      "conv_gram(Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation, int groups, bool bias, "
      "int patch_bytes, ScalarType dtype, str method) -> Tensor");
  m.def("weight_grad(Tensor dy, Tensor rows, Tensor column) -> (Tensor, Tensor)");
  m.def(
      "emended_linear(Tensor x, Tensor weight, Tensor? bias, str form, str applied_to, float damping, "
      "str damping_mode, str scale, ScalarType? gram_dtype=None, float narrow_up_to=0) -> Tensor");
  m.def(
      "fused_weight_grad(Tensor x, Tensor dy, bool bias, float damping, str damping_mode, str scale, "
      "ScalarType? gram_dtype=None, float narrow_up_to=0) -> (Tensor, Tensor)");
  m.def(
      "fused_weight_grad.by(Tensor x, Tensor dy, bool bias, float damping, str damping_mode, str scale, str variant) "
      "-> (Tensor, Tensor)");
  // Of steps in emended coordinates: gram [n, b, b], matrix [..., n, n], rows and weight [B, O, n], root [B, n, n].
  m.def("decayed_gram(Tensor gram, Tensor x, bool bias, float memory, float beta) -> Tensor");
  m.def("inverse_root(Tensor matrix, int root, float[] coefficients) -> Tensor");
  m.def("root_product(Tensor rows, Tensor root) -> Tensor");
  m.def("add_root_product_(Tensor(a!) weight, Tensor rows, Tensor root, float alpha) -> ()");
  // Whole steps in emended coordinates: csrc/cpu/coordinate_step.cpp says what the lists hold.
  m.def(
      "sgd_step_(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] buffers, Tensor[] roots, "
      "Tensor[] output_roots, int[] kinds, int[] members, float[] kept, float[] coupled, float[] rates, "
      "float momentum, float dampening, bool nesterov) -> ()");
  m.def(
      "rmsprop_step_(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] squares, Tensor(c!)[] buffers, "
      "Tensor(d!)[] counts, Tensor[] roots, Tensor[] output_roots, int[] kinds, int[] members, float[] kept, "
      "float[] coupled, float[] rates, float alpha, float momentum, float epsilon) -> ()");
  m.def(
      "adam_step_(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] means, Tensor(c!)[] squares, "
      "Tensor(d!)[] counts, Tensor[] roots, Tensor[] output_roots, int[] kinds, int[] members, float[] kept, "
      "float[] coupled, float[] rates, float beta1, float beta2, float epsilon) -> ()");
  m.def(
      "muon_step_(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] buffers, Tensor[] roots, "
      "Tensor[] output_roots, int[] kinds, int[] members, float[] kept, float[] coupled, float[] rates, "
      "float momentum, bool nesterov, float[] coefficients, int steps, float epsilon, int parts) -> ()");
}

// The derivative belongs to emended_linear and to the autograd Functions in Python; differentiating one of the others
// is an error.
TORCH_LIBRARY_IMPL(consequentialism, Autograd, m) {
  m.impl("input_gram", torch::autograd::autogradNotImplementedFallback());
  m.impl("damped_inverse", torch::autograd::autogradNotImplementedFallback());
  m.impl("gram_inverse", torch::autograd::autogradNotImplementedFallback());
  m.impl("emended_input", torch::autograd::autogradNotImplementedFallback());
  m.impl("conv_gram", torch::autograd::autogradNotImplementedFallback());
  m.impl("weight_grad", torch::autograd::autogradNotImplementedFallback());
  m.impl("fused_weight_grad", torch::autograd::autogradNotImplementedFallback());
  m.impl("decayed_gram", torch::autograd::autogradNotImplementedFallback());
  m.impl("inverse_root", torch::autograd::autogradNotImplementedFallback());
  m.impl("root_product", torch::autograd::autogradNotImplementedFallback());
  m.impl("add_root_product_", torch::autograd::autogradNotImplementedFallback());
  m.impl("sgd_step_", torch::autograd::autogradNotImplementedFallback());
  m.impl("rmsprop_step_", torch::autograd::autogradNotImplementedFallback());
  m.impl("adam_step_", torch::autograd::autogradNotImplementedFallback());
  m.impl("muon_step_", torch::autograd::autogradNotImplementedFallback());
}
