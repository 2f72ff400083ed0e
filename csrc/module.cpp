// The Python module `consequentialism._C`: what was built, and the counter of broken-down factors.
// Importing it registers the ops.
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <string>

#include "build_info.h"
#include "cpu/damped_inverse.h"
#include "linear_forward.h"
#include "step_tensors.h"
#ifdef CONSEQUENTIALISM_CUDA_VERSION
#include "cuda/damped_inverse_binding.h"
#endif

namespace {

std::string compiler() {
#if defined(__clang__)
  return std::string("clang ") + __clang_version__;
#elif defined(__GNUC__)
  return std::string("gcc ") + __VERSION__;
#elif defined(_MSC_VER)
  return "msvc " + std::to_string(_MSC_VER);
#else
  return "unknown";
#endif
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["version"] = CONSEQUENTIALISM_VERSION;
  info["torch"] = CONSEQUENTIALISM_TORCH_VERSION;
  info["compiler"] = compiler();
#ifdef CONSEQUENTIALISM_CUDA_VERSION
  info["cuda"] = CONSEQUENTIALISM_CUDA_VERSION;
#else
  info["cuda"] = pybind11::none();
#endif
  info["architectures"] = CONSEQUENTIALISM_CUDA_ARCHITECTURES;
  return info;
}

int64_t breakdowns() {
  int64_t sum = consequentialism::cpu::breakdowns();
#ifdef CONSEQUENTIALISM_CUDA_VERSION
  sum += consequentialism::cuda::breakdowns();
#endif
  return sum;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled kernels of consequentialism: importing it registers torch.ops.consequentialism.*";
  m.def("build_info", &build_info, "Version, torch, compiler, CUDA version and architectures.");
  m.def("breakdowns", &breakdowns, "How many factors of this process broke down and were retried with more damping.");
  m.def(
      "linear_forward", torch::wrap_pybind_function(&consequentialism::linear_forward),
      "The usual forward of an emended linear layer, or None.");
  m.def("set_planner", &consequentialism::set_planner, "The function that plans a call of linear_forward.");
  m.def(
      "step_tensors", torch::wrap_pybind_function(&consequentialism::step_tensors),
      "What a compiled step takes of each parameter, its gradient and its state, or None.");
}
