// What tests/test_cuda_fused_weight_grad.py calls.
#include <cstring>

#include "element_types.h"
#include "fused_weight_grad_launcher.h"
#include "launch_counters.h"

using namespace consequentialism::cuda;
using namespace consequentialism::cuda::shim;

namespace {

FusedShape fused_shape(int64_t rows, int64_t inputs, int64_t outputs, bool bias, int64_t type) {
  return {rows, inputs, outputs, bias, bytes_of(type), type == 2};
}

// variant 0: as planned.
FusedPlan fused_plan(const FusedShape& shape, const Limits& limits, int64_t variant, int64_t splits) {
  if (variant == 0) return plan_fused(shape, limits);
  return plan_fused_with(shape, limits, static_cast<FusedVariant>(variant), splits);
}

template <class T>
int fused(
    const void* x, const void* dy, void* dw, void* db, void* workspace, unsigned* counters, unsigned* breakdowns,
    int64_t offset, const FusedShape& shape, int64_t x_stride, int64_t dy_stride, bool tf32, double damping,
    double rank, double factor, bool relative, bool scaled_by_c, const FusedPlan& plan) {
  FusedArguments<T> arguments{
      static_cast<const T*>(x) + offset,
      static_cast<const T*>(dy) + offset,
      static_cast<T*>(dw),
      static_cast<T*>(db),
      x_stride,
      dy_stride,
      shape.rows,
      shape.inputs,
      shape.outputs,
      tf32,
      {}};
  arguments.inverse.damping = damping;
  arguments.inverse.rank = rank;
  arguments.inverse.factor = factor;
  arguments.inverse.relative = relative;
  arguments.inverse.scaled_by_c = scaled_by_c;
  return launch_fused_weight_grad<T>(arguments, plan, workspace, counters, breakdowns, nullptr);
}

}  // namespace

// x and dy begin `offset` elements into their buffers.
extern "C" int call_fused(
    const void* x, const void* dy, void* dw, void* db, void* workspace, unsigned* counters, unsigned* breakdowns,
    int64_t type, int64_t offset, int64_t rows, int64_t inputs, int64_t outputs, int64_t x_stride, int64_t dy_stride,
    bool tf32, double damping, double rank, double factor, bool relative, bool scaled_by_c, int64_t processors,
    int64_t variant, int64_t splits) {
  const FusedShape shape = fused_shape(rows, inputs, outputs, db != nullptr, type);
  const FusedPlan plan = fused_plan(shape, {kHopper.shared_bytes, static_cast<int>(processors), true}, variant, splits);
  const auto call = type == 0 ? fused<double> : type == 1 ? fused<float> : type == 2 ? fused<bfloat16> : fused<float16>;
  return call(
      x, dy, dw, db, workspace, counters, breakdowns, offset, shape, x_stride, dy_stride, tf32, damping, rank, factor,
      relative, scaled_by_c, plan);
}

// shapes [count, 3] are N, I and O; plans [count, 9]; a reason has at most 63 letters.
extern "C" int call_fused_plans(
    const int64_t* shapes, int64_t* plans, char* reasons, int64_t count, bool bias, int64_t type, int64_t shared_limit,
    int64_t processors, int64_t variant, int64_t splits) {
  const Limits limits{static_cast<size_t>(shared_limit), static_cast<int>(processors), true};
  for (int64_t i = 0; i < count; ++i) {
    const FusedShape shape = fused_shape(shapes[3 * i], shapes[3 * i + 1], shapes[3 * i + 2], bias, type);
    const FusedPlan plan = fused_plan(shape, limits, variant, splits);
    const int64_t values[] = {
        static_cast<int64_t>(plan.variant),
        plan.tile,
        plan.slices,
        plan.groups,
        plan.group_tiles,
        plan.splits,
        plan.depth,
        static_cast<int64_t>(plan.shared_bytes),
        static_cast<int64_t>(plan.workspace_bytes)};
    for (int64_t j = 0; j < 9; ++j) plans[9 * i + j] = values[j];
    std::memset(reasons + 64 * i, 0, 64);
    if (plan.reason != nullptr) std::strncpy(reasons + 64 * i, plan.reason, 63);
  }
  return 0;
}

extern "C" void shim_destroy_streams();

// Captured launches first, each on a stream of its own, then a launch on each of `streams` streams, and one more; in
// between they are destroyed and made anew, if they are to be.
extern "C" int call_stream_slots(int64_t* slots, int64_t captures, int64_t streams, bool destroyed) {
  StreamSlots all;
  const auto stream = [](int64_t i) { return reinterpret_cast<cudaStream_t>(static_cast<uintptr_t>(i)); };
  for (int64_t i = 0; i < captures; ++i) {
    if (all.of(stream(i), true) >= 0) return cudaErrorInvalidValue;
  }
  for (int64_t launch = 0; launch < 2 * streams; ++launch) {
    if (destroyed && launch == streams) shim_destroy_streams();
    slots[launch] = all.of(stream(launch % streams), false);
  }
  return 0;
}
