#include <algorithm>

#include "weight_grad.cuh"
#include "weight_grad_launcher.h"

namespace consequentialism::cuda {

namespace {

LaunchShape shape_of(const PassPlan& plan, size_t shared_bytes, cudaStream_t stream) {
  LaunchShape shape{};
  shape.grid = dim3(static_cast<unsigned>(plan.blocks));
  shape.block = dim3(kPassThreads);
  shape.shared_bytes = shared_bytes;
  shape.stream = stream;
  return shape;
}

}  // namespace

template <class T>
BiasPlan plan_bias_grad(const T* dy, int64_t rows, int64_t outputs, int64_t row_stride, int processors) {
  constexpr int kVector = 16 / sizeof(T);
  const bool aligned = reinterpret_cast<uintptr_t>(dy) % 16 == 0 && row_stride % kVector == 0 && outputs % kVector == 0;
  BiasPlan plan{};
  plan.vector = aligned ? kVector : 1;
  const int64_t columns = kBiasLanes * plan.vector;
  plan.along = (outputs + columns - 1) / columns;
  // Two blocks a processor, if there are the rows for them.
  const int64_t wanted = std::max<int64_t>(2 * processors / std::max<int64_t>(plan.along, 1), 1);
  plan.rows_each = std::max((rows + wanted - 1) / wanted, kBiasRowsLeast);
  plan.splits = static_cast<int>(std::max<int64_t>((rows + plan.rows_each - 1) / plan.rows_each, 1));
  return plan;
}

template <class T>
cudaError_t launch_bias_grad(
    const T* dy, int64_t rows, int64_t outputs, int64_t row_stride, const Accumulator<T>* column, T* dw, int64_t count,
    T* db, Accumulator<T>* partial, unsigned* counters, const BiasPlan& plan, cudaStream_t stream) {
  const int64_t strips = (plan.along + plan.sets() - 1) / std::max<int64_t>(plan.sets(), 1);  // of a set
  if (strips * plan.splits > kMostArrivals) return cudaErrorInvalidValue;
  LaunchShape shape{};
  shape.grid = dim3(static_cast<unsigned>(plan.along), static_cast<unsigned>(plan.splits));
  shape.block = dim3(kBiasThreads);
  shape.shared_bytes = kBiasGroups * kBiasLanes * plan.vector * sizeof(Accumulator<T>) + sizeof(int);
  shape.stream = stream;
  const auto kernel = plan.vector == 1 ? bias_grad_kernel<T, 1> : bias_grad_kernel<T, 16 / sizeof(T)>;
  return launch(
      kernel, shape, dy, rows, outputs, row_stride, plan.rows_each, column, dw, count, db, partial,
      static_cast<unsigned>(plan.sets()), counters + kFirstTicket);
}

PassPlan plan_pass(const void* wide, const void* narrow, int64_t count, int processors) {
  const bool aligned =
      reinterpret_cast<uintptr_t>(wide) % 16 == 0 && reinterpret_cast<uintptr_t>(narrow) % 8 == 0 && count % 4 == 0;
  PassPlan plan{};
  plan.vector = aligned ? kPassVector : 1;
  const int64_t each = static_cast<int64_t>(kPassThreads) * plan.vector;
  plan.blocks = static_cast<int>(std::min<int64_t>((count + each - 1) / each, 4 * processors));
  return plan;
}

cudaError_t launch_narrow(
    const float* y, int64_t count, float* largest, float16* narrowed, float* unit, const PassPlan& plan,
    cudaStream_t stream) {
  const LaunchShape shape = shape_of(plan, kPassThreads * sizeof(float), stream);
  const bool one = plan.vector == 1;
  const cudaError_t error = launch(one ? largest_kernel<1> : largest_kernel<kPassVector>, shape, y, count, largest);
  if (error != cudaSuccess) return error;
  return launch(
      one ? narrow_kernel<1> : narrow_kernel<kPassVector>, shape, y, count, largest, plan.blocks, narrowed, unit);
}

cudaError_t launch_widen(
    const float* product, int64_t count, const float* unit, float16* dw, const PassPlan& plan, cudaStream_t stream) {
  const auto kernel = plan.vector == 1 ? widen_kernel<1> : widen_kernel<kPassVector>;
  return launch(kernel, shape_of(plan, 0, stream), product, count, unit, dw);
}

#define CONSEQUENTIALISM_INSTANTIATE(T)                                                                        \
  template BiasPlan plan_bias_grad<T>(const T*, int64_t, int64_t, int64_t, int);                               \
  template cudaError_t launch_bias_grad<T>(                                                                    \
      const T*, int64_t, int64_t, int64_t, const Accumulator<T>*, T*, int64_t, T*, Accumulator<T>*, unsigned*, \
      const BiasPlan&, cudaStream_t);
CONSEQUENTIALISM_FOR_ELEMENTS(CONSEQUENTIALISM_INSTANTIATE)
#undef CONSEQUENTIALISM_INSTANTIATE

}  // namespace consequentialism::cuda
