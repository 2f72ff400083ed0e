#include <algorithm>

#include "weight_grad.cuh"
#include "weight_grad_launcher.h"

namespace consequentialism::cuda {

int64_t broken_flags(int64_t outputs) {
  return (outputs + kBiasColumns - 1) / kBiasColumns;
}

template <class T>
cudaError_t launch_bias_grad(
    const T* dy, int64_t rows, int64_t outputs, int64_t row_stride, const Accumulator<T>* column, T* db, int* broken,
    cudaStream_t stream) {
  LaunchShape shape{};
  shape.grid = dim3(static_cast<unsigned>(broken_flags(outputs)));
  shape.block = dim3(kBiasColumns * kBiasRows);
  shape.shared_bytes = kBiasRows * (kBiasColumns * sizeof(Accumulator<T>) + sizeof(int));
  shape.stream = stream;
  return launch(bias_grad_kernel<T>, shape, dy, rows, outputs, row_stride, column, db, broken);
}

template <class T>
cudaError_t launch_poison(
    T* dw, int64_t count, T* db, int64_t outputs, const int* broken, int processors, cudaStream_t stream) {
  const int64_t blocks = (std::max(count, outputs) + kPoisonThreads - 1) / kPoisonThreads;
  LaunchShape shape{};
  shape.grid = dim3(static_cast<unsigned>(std::min<int64_t>(blocks, 2 * processors)));
  shape.block = dim3(kPoisonThreads);
  shape.shared_bytes = sizeof(int);
  shape.stream = stream;
  return launch(poison_kernel<T>, shape, dw, count, db, outputs, broken, broken_flags(outputs));
}

#define CONSEQUENTIALISM_INSTANTIATE(T)                                                    \
  template cudaError_t launch_bias_grad<T>(                                                \
      const T*, int64_t, int64_t, int64_t, const Accumulator<T>*, T*, int*, cudaStream_t); \
  template cudaError_t launch_poison<T>(T*, int64_t, T*, int64_t, const int*, int, cudaStream_t);
CONSEQUENTIALISM_INSTANTIATE(float)
CONSEQUENTIALISM_INSTANTIATE(double)
CONSEQUENTIALISM_INSTANTIATE(bfloat16)
CONSEQUENTIALISM_INSTANTIATE(float16)
#undef CONSEQUENTIALISM_INSTANTIATE

}  // namespace consequentialism::cuda
