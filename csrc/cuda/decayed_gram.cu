// The Gram of steps in emended coordinates: symmetric rank-k of the diagonal blocks, decay and scale in the epilogue.
#include "../block_spans.h"
#include "decayed_gram_launcher.h"
#include "input_gram.cuh"

namespace consequentialism::cuda {

namespace {

constexpr int kReduceRows = 8;  // of threads

// What an entry of the result is made of.
template <class G>
struct Decay {
  const G* before;  // [blocks, order, order]
  G memory, beta;

  __device__ __forceinline__ G operator()(int64_t at, G sum) const {
    return memory == G(0) ? beta * sum : memory * before[at] + beta * sum;
  }
};

// gram [order, order], its upper triangle as it is, or all of it, decayed.
template <class G>
struct DecayedWriter {
  G* gram;
  int64_t order, offset;  // of this block in all of them
  bool whole;
  Decay<G> decay;

  __device__ __forceinline__ void operator()(int64_t row, int64_t column, G sum) const {
    const int64_t at = offset + row * order + column;
    const G value = whole ? decay(at, sum) : sum;
    gram[at] = value;
    if (whole && row != column) gram[offset + column * order + row] = value;
  }
};

// Block x is split x / tiles of tile x % tiles, of diagonal block y.
template <class Traits, class T, class G>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kResident) decayed_gram_kernel(
    const MatrixView<T> x, int64_t rows, int64_t inputs, bool bias, unsigned tiles, int64_t depth, int64_t order,
    bool whole, const Decay<G> decay, G* __restrict__ out) {
  const unsigned split = blockIdx.x / tiles, block = blockIdx.y, blocks = gridDim.y;
  const UpperTile tile = upper_tile(blockIdx.x % tiles);
  const int64_t first = block_begin(inputs, blocks, block);
  const int64_t size = block_begin(inputs, blocks, block + 1) - first;
  const bool ones = bias && block == blocks - 1;
  const int64_t begin = split * depth, end = min(begin + depth, rows);
  const int64_t offset = block * order * order;
  const DecayedWriter<G> write{out + (whole ? 0 : split * blocks * order * order), order, offset, whole, decay};
  const MatrixView<T> columns{x.data + first, x.stride, x.unit};
  gram_tile<Traits>(columns, size, tile, begin, end, ones, G(0), dynamic_shared<unsigned char>(), write);
  if (tile.column != 0) return;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  if (ones && thread == 0) write(size, size, static_cast<G>(end - begin));
  if (!whole) return;
  for (int64_t last = size + ones; last < order; ++last) {
    for (int64_t i = thread; i < order; i += threads) {
      out[offset + last * order + i] = out[offset + i * order + last] = 0;
    }
  }
}

// gram <- the sum of the upper triangles of partial [splits, blocks, order, order], decayed and mirrored.
template <class G>
__global__ void __launch_bounds__(kReduceTile* kReduceRows) reduce_decayed_gram_kernel(
    const G* __restrict__ partial, int64_t splits, int64_t inputs, bool bias, int64_t order, const Decay<G> decay,
    G* __restrict__ gram) {
  constexpr int kStride = kReduceTile + 1;
  G* sums = dynamic_shared<G>();  // [32][33]
  const unsigned block = blockIdx.y, blocks = gridDim.y;
  const UpperTile tile = upper_tile(blockIdx.x);
  const int lane = static_cast<int>(threadIdx.x) % kReduceTile;
  const int group = static_cast<int>(threadIdx.x) / kReduceTile;
  const int64_t first_row = static_cast<int64_t>(tile.row) * kReduceTile;
  const int64_t first_column = static_cast<int64_t>(tile.column) * kReduceTile;
  const int64_t begin = block_begin(inputs, blocks, block);
  const int64_t size = block_begin(inputs, blocks, block + 1) - begin + (bias && block == blocks - 1);
  const int64_t offset = block * order * order, stride = blocks * order * order;
#pragma unroll
  for (int r = group; r < kReduceTile; r += kReduceRows) {
    const int64_t row = first_row + r, column = first_column + lane;
    if (row > column || column >= order) continue;
    const int64_t at = offset + row * order + column;
    G value = 0;
    if (column < size) {
      G sum = 0;
#pragma unroll 4
      for (int64_t s = 0; s < splits; ++s) sum += partial[s * stride + at];
      value = decay(at, sum);
    }
    sums[r * kStride + lane] = value;
    gram[at] = value;
  }
  __syncthreads();
#pragma unroll
  for (int r = group; r < kReduceTile; r += kReduceRows) {
    const int64_t row = first_column + r, column = first_row + lane;
    if (column < row && row < order) gram[offset + row * order + column] = sums[lane * kStride + r];
  }
}

template <class T, class G, int kTile, int kTerms>
cudaError_t launch_tiles(
    const MatrixView<T>& x, const DecayedGramShape& shape, const Decay<G>& decay, const GramPlan& plan, G* out,
    cudaStream_t stream) {
  using Traits = GramTraits<T, G, true, kTile, kTerms>;
  if (plan.shared_bytes != Traits::P::kSharedBytes || plan.depth % Traits::kDepth != 0) return cudaErrorInvalidValue;
  LaunchShape launch_shape{};
  launch_shape.grid = dim3(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(shape.blocks));
  launch_shape.block = dim3(Traits::kThreads);
  launch_shape.shared_bytes = plan.shared_bytes;
  launch_shape.stream = stream;
  return launch(
      decayed_gram_kernel<Traits, T, G>, launch_shape, x, shape.rows, shape.inputs, shape.bias,
      static_cast<unsigned>(plan.blocks / plan.splits), plan.depth, block_order(shape.inputs, shape.blocks, shape.bias),
      plan.splits == 1, decay, out);
}

template <class T, class G, int kTerms>
cudaError_t launch_tiles(
    const MatrixView<T>& x, const DecayedGramShape& shape, const Decay<G>& decay, const GramPlan& plan, G* out,
    cudaStream_t stream) {
  if constexpr (std::is_same_v<G, float>) {
    if (plan.tile == kLargeTile) return launch_tiles<T, G, kLargeTile, kTerms>(x, shape, decay, plan, out, stream);
  }
  if (plan.tile != kSmallTile) return cudaErrorInvalidValue;
  return launch_tiles<T, G, kSmallTile, kTerms>(x, shape, decay, plan, out, stream);
}

}  // namespace

template <class T, class G>
cudaError_t launch_decayed_gram(
    const G* before, const T* x, const DecayedGramShape& shape, int64_t row_stride, double memory, double beta,
    bool tf32, G* gram, const DecayedGramPlan& plan, void* workspace, cudaStream_t stream) {
  constexpr int64_t kMaxBlocks = 65535;  // along y
  const GramPlan& each = plan.each;
  if (shape.rows == 0 || each.tile == 0 || shape.blocks < 1 || shape.blocks > kMaxBlocks) return cudaErrorInvalidValue;
  if (each.blocks > kMaxGrid || each.reduce_blocks > kMaxGrid) return cudaErrorInvalidValue;
  MatrixView<T> view = view_of(x, row_stride);
  for (int64_t i = 1; i < shape.blocks; ++i) {  // every block's columns begin somewhere else
    while (block_begin(shape.inputs, shape.blocks, i) * static_cast<int64_t>(sizeof(T)) % view.unit != 0)
      view.unit /= 2;
  }
  const bool whole = each.splits == 1;
  const Decay<G> decay{before, static_cast<G>(memory), static_cast<G>(beta)};
  G* out = whole ? gram : static_cast<G*>(workspace);
  cudaError_t error;
  if constexpr (std::is_same_v<GramMma<T, G>, Tf32Mma>) {
    error = tf32 ? launch_tiles<T, G, 1>(view, shape, decay, each, out, stream)
                 : launch_tiles<T, G, 2>(view, shape, decay, each, out, stream);
  } else {
    error = launch_tiles<T, G, 1>(view, shape, decay, each, out, stream);
  }
  if (error != cudaSuccess || whole) return error;
  LaunchShape reduce{};
  reduce.grid = dim3(static_cast<unsigned>(each.reduce_blocks), static_cast<unsigned>(shape.blocks));
  reduce.block = dim3(kReduceTile * kReduceRows);
  reduce.shared_bytes = kReduceTile * (kReduceTile + 1) * sizeof(G);
  reduce.stream = stream;
  return launch(
      reduce_decayed_gram_kernel<G>, reduce, static_cast<const G*>(out), each.splits, shape.inputs, shape.bias,
      block_order(shape.inputs, shape.blocks, shape.bias), decay, gram);
}

#define CONSEQUENTIALISM_INSTANTIATE(T, G)                                                                           \
  template cudaError_t launch_decayed_gram<T, G>(                                                                    \
      const G*, const T*, const DecayedGramShape&, int64_t, double, double, bool, G*, const DecayedGramPlan&, void*, \
      cudaStream_t);
CONSEQUENTIALISM_INSTANTIATE(float, float)
CONSEQUENTIALISM_INSTANTIATE(bfloat16, float)
CONSEQUENTIALISM_INSTANTIATE(float16, float)
CONSEQUENTIALISM_INSTANTIATE(double, double)
#undef CONSEQUENTIALISM_INSTANTIATE

}  // namespace consequentialism::cuda
