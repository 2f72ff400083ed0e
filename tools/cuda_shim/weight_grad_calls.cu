// What tests/test_cuda_weight_grad.py calls.
#include "weight_grad_launcher.h"

using namespace consequentialism::cuda;

#define CONSEQUENTIALISM_CALLS(name, T)                                                                               \
  extern "C" int call_bias_grad_##name(                                                                               \
      const T* dy, const Accumulator<T>* column, T* db, int* broken, int64_t rows, int64_t outputs, int64_t stride) { \
    return launch_bias_grad<T>(dy, rows, outputs, stride, column, db, broken, nullptr);                               \
  }                                                                                                                   \
  extern "C" int call_poison_##name(T* dw, T* db, const int* broken, int64_t count, int64_t outputs) {                \
    return launch_poison<T>(dw, count, db, outputs, broken, 3, nullptr);                                              \
  }

CONSEQUENTIALISM_CALLS(float, float)
CONSEQUENTIALISM_CALLS(double, double)
CONSEQUENTIALISM_CALLS(bfloat16, bfloat16)
CONSEQUENTIALISM_CALLS(float16, float16)
