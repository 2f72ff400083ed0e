// The Gram of steps in emended coordinates: symmetric rank-k of the diagonal blocks, decay and scale in the epilogue.
#include "../block_spans.h"
#include "decayed_gram_launcher.h"
#include "gram_launch.cuh"

namespace consequentialism::cuda {

namespace {

// The columns of x [rows, inputs], a diagonal block each; with a bias the last one has its ones too.
template <class T>
struct ColumnBlocks {
  using Element = T;
  using Sum = Accumulator<T>;
  template <int kTile, int kTerms>
  using Traits = GramTraits<T, Sum, true, kTile, kTerms>;

  MatrixView<T> x;
  int64_t inputs;
  bool bias;

  __device__ __forceinline__ MatrixSource<T, Sum, true> of(unsigned block, unsigned blocks) const {
    const int64_t first = block_begin(inputs, blocks, block);
    const int64_t size = block_begin(inputs, blocks, block + 1) - first;
    return {{x.data + first, x.stride, x.unit}, size, bias && block == blocks - 1};
  }
};

// gram [blocks, order, order] <- memory * before + beta * the sums.
template <class G>
struct DecayedEntries {
  static constexpr bool kGathered = false;

  G* gram;
  const G* before;
  int64_t order, stride, used;
  int64_t inputs;
  bool bias;
  G memory, beta;

  __device__ __forceinline__ DecayedEntries of(unsigned block, unsigned blocks) const {
    DecayedEntries own = *this;
    own.gram += block * order * order;
    if (before != nullptr) own.before += block * order * order;
    own.used =
        block_begin(inputs, blocks, block + 1) - block_begin(inputs, blocks, block) + (bias && block == blocks - 1);
    return own;
  }
  __device__ __forceinline__ int64_t place(int64_t i) const { return i; }
  __device__ __forceinline__ G value(int64_t at, G sum) const {
    return memory == G(0) ? beta * sum : memory * before[at] + beta * sum;
  }
};

}  // namespace

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

#define CONSEQUENTIALISM_INSTANTIATE(T, G)                                                                    \
  template cudaError_t launch_decayed_gram<T, G>(                                                             \
      const G*, const T*, const DecayedGramShape&, int64_t, double, double, bool, G*, const GramPlan&, void*, \
      cudaStream_t);
CONSEQUENTIALISM_INSTANTIATE(float, float)
CONSEQUENTIALISM_INSTANTIATE(bfloat16, float)
CONSEQUENTIALISM_INSTANTIATE(float16, float)
CONSEQUENTIALISM_INSTANTIATE(double, double)
#undef CONSEQUENTIALISM_INSTANTIATE

}  // namespace consequentialism::cuda
