#include "input_gram.cuh"
#include "input_gram_launcher.h"

namespace consequentialism::cuda {

namespace {

constexpr int kReduceRows = 8;  // of threads

// Block b is split b / tiles of tile b % tiles.
template <class Traits, class T, class G, bool kPrimal>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kResident) input_gram_kernel(
    const MatrixView<T> x, int64_t outer, int64_t inner, bool bias, unsigned tiles, int64_t depth, bool whole,
    G* __restrict__ out) {
  const unsigned split = blockIdx.x / tiles;
  const UpperTile tile = upper_tile(blockIdx.x % tiles);
  const bool ones = kPrimal && bias;
  const int64_t order = outer + ones;
  const int64_t begin = split * depth, end = min(begin + depth, inner);
  const GramWriter<G> write{out + (whole ? 0 : split * order * order), order, whole};
  const G shift = whole && !kPrimal && bias ? 1 : 0;
  gram_tile<Traits>(x, outer, tile, begin, end, ones, shift, dynamic_shared<unsigned char>(), write);
  if (ones && tile.column == 0 && threadIdx.x == 0) write(outer, outer, static_cast<G>(end - begin));
}

// gram <- the sum of the upper triangles of partial [splits, order, order], plus shift, mirrored.
template <class G>
__global__ void __launch_bounds__(kReduceTile* kReduceRows)
    reduce_gram_kernel(const G* __restrict__ partial, int64_t splits, int64_t order, G shift, G* __restrict__ gram) {
  constexpr int kStride = kReduceTile + 1;
  G* sums = dynamic_shared<G>();  // [32][33]
  const UpperTile tile = upper_tile(blockIdx.x);
  const int lane = static_cast<int>(threadIdx.x) % kReduceTile;
  const int group = static_cast<int>(threadIdx.x) / kReduceTile;
  const int64_t first_row = static_cast<int64_t>(tile.row) * kReduceTile;
  const int64_t first_column = static_cast<int64_t>(tile.column) * kReduceTile;
#pragma unroll
  for (int r = group; r < kReduceTile; r += kReduceRows) {
    const int64_t row = first_row + r, column = first_column + lane;
    if (row > column || column >= order) continue;
    const G* from = partial + row * order + column;
    G sum = 0;
#pragma unroll 4
    for (int64_t s = 0; s < splits; ++s) sum += from[s * order * order];
    sum += shift;
    sums[r * kStride + lane] = sum;
    gram[row * order + column] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int r = group; r < kReduceTile; r += kReduceRows) {
    const int64_t row = first_column + r, column = first_row + lane;
    if (column < row && row < order) gram[row * order + column] = sums[lane * kStride + r];
  }
}

template <class T, class G, bool kPrimal, int kTile, int kTerms>
cudaError_t launch_tiles(
    const MatrixView<T>& x, int64_t outer, int64_t inner, bool bias, const GramPlan& plan, G* out,
    cudaStream_t stream) {
  using Traits = GramTraits<T, G, kPrimal, kTile, kTerms>;
  if (plan.shared_bytes != Traits::P::kSharedBytes || plan.depth % Traits::kDepth != 0) return cudaErrorInvalidValue;
  LaunchShape shape{};
  shape.grid = dim3(static_cast<unsigned>(plan.blocks));
  shape.block = dim3(Traits::kThreads);
  shape.shared_bytes = plan.shared_bytes;
  shape.stream = stream;
  return launch(
      input_gram_kernel<Traits, T, G, kPrimal>, shape, x, outer, inner, bias,
      static_cast<unsigned>(plan.blocks / plan.splits), plan.depth, plan.splits == 1, out);
}

template <class T, class G, bool kPrimal, int kTerms>
cudaError_t launch_tiles(
    const MatrixView<T>& x, int64_t outer, int64_t inner, bool bias, const GramPlan& plan, G* out,
    cudaStream_t stream) {
  if constexpr (std::is_same_v<G, float>) {
    if (plan.tile == kLargeTile) {
      return launch_tiles<T, G, kPrimal, kLargeTile, kTerms>(x, outer, inner, bias, plan, out, stream);
    }
  }
  if (plan.tile != kSmallTile) return cudaErrorInvalidValue;
  return launch_tiles<T, G, kPrimal, kSmallTile, kTerms>(x, outer, inner, bias, plan, out, stream);
}

template <class T, class G, int kTerms>
cudaError_t launch_tiles(
    const MatrixView<T>& x, int64_t outer, int64_t inner, bool bias, bool primal, const GramPlan& plan, G* out,
    cudaStream_t stream) {
  return primal ? launch_tiles<T, G, true, kTerms>(x, outer, inner, bias, plan, out, stream)
                : launch_tiles<T, G, false, kTerms>(x, outer, inner, bias, plan, out, stream);
}

}  // namespace

template <class T, class G>
cudaError_t launch_input_gram(
    const T* x, int64_t rows, int64_t inputs, int64_t row_stride, bool bias, bool primal, bool tf32, G* gram,
    const GramPlan& plan, void* workspace, cudaStream_t stream) {
  if (rows == 0 || plan.tile == 0) return cudaErrorInvalidValue;
  if (plan.blocks > kMaxGrid || plan.reduce_blocks > kMaxGrid) return cudaErrorInvalidValue;
  const GramShape shape{rows, inputs, bias, primal, sizeof(T), sizeof(G)};
  const MatrixView<T> view = view_of(x, row_stride);
  const bool whole = plan.splits == 1;
  G* out = whole ? gram : static_cast<G*>(workspace);
  const int64_t outer = gram_outer(shape), inner = gram_inner(shape), order = gram_order(shape);
  cudaError_t error;
  if constexpr (std::is_same_v<GramMma<T, G>, Tf32Mma>) {
    error = tf32 ? launch_tiles<T, G, 1>(view, outer, inner, bias, primal, plan, out, stream)
                 : launch_tiles<T, G, 2>(view, outer, inner, bias, primal, plan, out, stream);
  } else {
    error = launch_tiles<T, G, 1>(view, outer, inner, bias, primal, plan, out, stream);
  }
  if (error != cudaSuccess || whole) return error;
  LaunchShape reduce{};
  reduce.grid = dim3(static_cast<unsigned>(plan.reduce_blocks));
  reduce.block = dim3(kReduceTile * kReduceRows);
  reduce.shared_bytes = kReduceTile * (kReduceTile + 1) * sizeof(G);
  reduce.stream = stream;
  return launch(
      reduce_gram_kernel<G>, reduce, static_cast<const G*>(out), plan.splits, order, G(!primal && bias ? 1 : 0), gram);
}

#define CONSEQUENTIALISM_INSTANTIATE(T, G)      \
  template cudaError_t launch_input_gram<T, G>( \
      const T*, int64_t, int64_t, int64_t, bool, bool, bool, G*, const GramPlan&, void*, cudaStream_t);
CONSEQUENTIALISM_INSTANTIATE(float, float)
CONSEQUENTIALISM_INSTANTIATE(bfloat16, float)
CONSEQUENTIALISM_INSTANTIATE(float16, float)
CONSEQUENTIALISM_INSTANTIATE(double, double)
CONSEQUENTIALISM_INSTANTIATE(float, double)
CONSEQUENTIALISM_INSTANTIATE(bfloat16, double)
CONSEQUENTIALISM_INSTANTIATE(float16, double)
#undef CONSEQUENTIALISM_INSTANTIATE

}  // namespace consequentialism::cuda
