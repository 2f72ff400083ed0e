// The Gram of steps in emended coordinates: symmetric rank-k of the diagonal blocks, decay and scale in the epilogue.
#include "decayed_gram_launcher.h"
#include "gram_entries.cuh"

namespace consequentialism::cuda {

template <class T, class G>
cudaError_t launch_decayed_gram(
    const G* before, const T* x, const DecayedGramShape& shape, int64_t row_stride, double memory, double beta,
    bool tf32, G* gram, const GramPlan& plan, void* workspace, cudaStream_t stream) {
  if (shape.rows == 0 || shape.blocks < 1) return cudaErrorInvalidValue;
  MatrixView<T> view = view_of(x, row_stride);
  for (int64_t i = 1; i < shape.blocks; ++i) {  // every block's columns begin somewhere else
    while (block_begin(shape.inputs, shape.blocks, i) * static_cast<int64_t>(sizeof(T)) % view.unit != 0)
      view.unit /= 2;
  }
  const int64_t order = block_order(shape.inputs, shape.blocks, shape.bias);
  const DecayedEntries<G> entries{
      gram, before, order, order, order, shape.inputs, shape.bias, static_cast<G>(memory), static_cast<G>(beta)};
  return launch_gram(
      ColumnBlocks<T>{view, shape.inputs, shape.bias}, shape.rows, tf32, entries, shape.blocks, plan, workspace,
      stream);
}

#define CONSEQUENTIALISM_INSTANTIATE(T)                                                                         \
  template cudaError_t launch_decayed_gram<T, Accumulator<T>>(                                                  \
      const Accumulator<T>*, const T*, const DecayedGramShape&, int64_t, double, double, bool, Accumulator<T>*, \
      const GramPlan&, void*, cudaStream_t);
CONSEQUENTIALISM_FOR_ELEMENTS(CONSEQUENTIALISM_INSTANTIATE)
#undef CONSEQUENTIALISM_INSTANTIATE

}  // namespace consequentialism::cuda
