// What tests/test_cuda_weight_grad.py calls.
#include "weight_grad_launcher.h"

using namespace consequentialism::cuda;

namespace {

constexpr int kProcessors = 3;

// dy begins `offset` elements into its buffer. plan: the vector, the strips, their sets, the splits, the partial sums.
template <class T>
int plan_of(const T* dy, int64_t* plan, int64_t rows, int64_t outputs, int64_t stride, int64_t offset) {
  const BiasPlan made = plan_bias_grad(dy + offset, rows, outputs, stride, kProcessors);
  const int64_t all[] = {made.vector, made.along, made.sets(), made.splits, made.partials(outputs)};
  for (int i = 0; i < 5; ++i) plan[i] = all[i];
  return 0;
}

template <class T>
int bias_grad(
    const T* dy, const Accumulator<T>* column, Accumulator<T>* partial, unsigned* counters, T* dw, T* db, int64_t rows,
    int64_t outputs, int64_t stride, int64_t offset, int64_t count) {
  dy += offset;
  const BiasPlan plan = plan_bias_grad(dy, rows, outputs, stride, kProcessors);
  return launch_bias_grad(dy, rows, outputs, stride, column, dw, count, db, partial, counters, plan, nullptr);
}

}  // namespace

#define CONSEQUENTIALISM_CALLS(name, T)                                                                     \
  extern "C" int call_plan_bias_grad_##name(                                                                \
      const T* dy, int64_t* plan, int64_t rows, int64_t outputs, int64_t stride, int64_t offset) {          \
    return plan_of(dy, plan, rows, outputs, stride, offset);                                                \
  }                                                                                                         \
  extern "C" int call_bias_grad_##name(                                                                     \
      const T* dy, const Accumulator<T>* column, Accumulator<T>* partial, unsigned* counters, T* dw, T* db, \
      int64_t rows, int64_t outputs, int64_t stride, int64_t offset, int64_t count) {                       \
    return bias_grad(dy, column, partial, counters, dw, db, rows, outputs, stride, offset, count);          \
  }

CONSEQUENTIALISM_CALLS(float, float)
CONSEQUENTIALISM_CALLS(double, double)
CONSEQUENTIALISM_CALLS(bfloat16, bfloat16)
CONSEQUENTIALISM_CALLS(float16, float16)

// y, narrowed, product and dw begin `offset` elements into their buffers.
extern "C" int call_plan_pass(const float* wide, const float16* narrow, int64_t* plan, int64_t count, int64_t offset) {
  const PassPlan made = plan_pass(wide + offset, narrow + offset, count, kProcessors);
  plan[0] = made.vector;
  plan[1] = made.blocks;
  return 0;
}

extern "C" int call_narrow(
    const float* y, float* largest, float16* narrowed, float* unit, int64_t count, int64_t offset) {
  const PassPlan plan = plan_pass(y + offset, narrowed + offset, count, kProcessors);
  return launch_narrow(y + offset, count, largest, narrowed + offset, unit, plan, nullptr);
}

extern "C" int call_widen(const float* product, const float* unit, float16* dw, int64_t count, int64_t offset) {
  const PassPlan plan = plan_pass(product + offset, dw + offset, count, kProcessors);
  return launch_widen(product + offset, count, unit, dw + offset, plan, nullptr);
}

extern "C" int call_outputs_at_once(int64_t* outputs, int64_t inputs) {
  *outputs = outputs_at_once(inputs);
  return 0;
}
