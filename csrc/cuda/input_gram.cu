#include "gram_entries.cuh"
#include "input_gram_launcher.h"

namespace consequentialism::cuda {

template <class T, class G>
cudaError_t launch_input_gram(
    const T* x, int64_t rows, int64_t inputs, int64_t row_stride, bool bias, bool primal, bool tf32, G* gram,
    const GramPlan& plan, void* workspace, cudaStream_t stream) {
  if (rows == 0) return cudaErrorInvalidValue;
  const GramShape shape{rows, inputs, bias, primal, sizeof(T), sizeof(G)};
  const MatrixView<T> view = view_of(x, row_stride);
  const int64_t outer = gram_outer(shape), inner = gram_inner(shape), order = gram_order(shape);
  const InputEntries<G> entries{gram, order, order, order, G(!primal && bias ? 1 : 0)};
  return primal ? launch_gram(
                      MatrixSource<T, G, true>{view, outer, bias}, inner, tf32, entries, 1, plan, workspace, stream)
                : launch_gram(
                      MatrixSource<T, G, false>{view, outer, false}, inner, tf32, entries, 1, plan, workspace, stream);
}

#define CONSEQUENTIALISM_INSTANTIATE(T, W)                   \
  template cudaError_t launch_input_gram<T, Accumulator<W>>( \
      const T*, int64_t, int64_t, int64_t, bool, bool, bool, Accumulator<W>*, const GramPlan&, void*, cudaStream_t);
CONSEQUENTIALISM_FOR_ELEMENTS_AND_WIDE(CONSEQUENTIALISM_INSTANTIATE)
#undef CONSEQUENTIALISM_INSTANTIATE

}  // namespace consequentialism::cuda
