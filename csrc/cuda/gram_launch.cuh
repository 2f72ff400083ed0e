// What every op that computes Grams launches: the upper triangle's tiles, each by one block or by a cluster that shares
// its sum; with more splits than a cluster has blocks, partial Grams and a second kernel that adds them. All in a fixed
// order.
//
// An op gives a Source, what its products are of, and Entries, where the result stands and what becomes of a sum:
//   Source::Element, Sum     of the products' operands, and of their sums
//   Source::Traits<kTile, kTerms>
//   Source::of(i, count)     the source of Gram i of the grid's `count`: outer, ones, operand<Operand>(first)
//   Entries::of(i, count)    its entries: gram, stride, order (of the products, the bias's one included), used (from
//                            which on they are zero), place(i) (where i stands, -1: nowhere), value(at, sum)
//   Entries::kGathered       whether that is long enough to be done in one loop rather than unrolled
#pragma once

#include "input_gram.cuh"
#include "input_gram.h"
#include "warpgroup_gram_launcher.h"

namespace consequentialism::cuda {

constexpr int kReduceRows = 8;  // of threads

// The rows of a matrix (dual), or its columns (primal).
template <class T, class G, bool kPrimal>
struct MatrixSource {
  using Element = T;
  using Sum = G;
  template <int kTile, int kTerms>
  using Traits = GramTraits<T, G, kPrimal, kTile, kTerms>;

  MatrixView<T> x;
  int64_t outer;
  bool ones;  // also the border of x1^T x1

  __device__ __forceinline__ MatrixSource of(unsigned, unsigned) const { return *this; }
  template <class Operand>
  __device__ __forceinline__ Operand operand(int64_t first) const {
    return {x, first, outer};
  }
};

// How the grid is cut.
struct GramGrid {
  unsigned tiles;   // of one split
  int64_t depth;    // of a split
  bool accumulate;  // onto the partial Grams
};

// An entry of a split's partial Gram, in its upper triangle; or, where partial is null, of the result, which is
// symmetric to the bit: an entry is summed once.
template <class G, class Entries>
struct GramWriter {
  static constexpr bool kGathered = Entries::kGathered;

  Entries entries;
  G* partial;
  bool accumulate;

  __device__ __forceinline__ void operator()(int64_t row, int64_t column, G sum) const {
    if (partial != nullptr) {
      G& entry = partial[row * entries.order + column];
      entry = accumulate ? entry + sum : sum;
      return;
    }
    const int64_t from = entries.place(row), to = entries.place(column);
    if (from < 0 || to < 0) return;
    const int64_t at = from * entries.stride + to;
    const G value = entries.value(at, sum);
    entries.gram[at] = value;
    if (row != column) entries.gram[to * entries.stride + from] = value;
  }

  // The same in two steps, where every index has its place: the entry above the diagonal, whose value it returns, and,
  // of the result alone, the one below.
  __device__ __forceinline__ G upper(int64_t row, int64_t column, G sum) const {
    if (partial != nullptr) {
      (*this)(row, column, sum);
      return sum;
    }
    const int64_t at = row * entries.stride + column;
    return entries.gram[at] = entries.value(at, sum);
  }
  __device__ __forceinline__ void lower(int64_t row, int64_t column, G value) const {
    entries.gram[column * entries.stride + row] = value;
  }
};

// What no tile has of a Gram, by one block: the corner of x1^T x1, of `rows`, and zeros from entries.used on.
template <int kThreads, class Source, class Entries, class Write>
__device__ __forceinline__ void write_rest(
    const Source& source, const Entries& entries, bool whole, int64_t rows, const Write& write) {
  const int thread = static_cast<int>(threadIdx.x);
  if (source.ones && thread == 0) write(source.outer, source.outer, static_cast<typename Source::Sum>(rows));
  for (int64_t last = entries.used; whole && last < entries.order; ++last) {
    for (int64_t i = thread; i < entries.order; i += kThreads) {
      entries.gram[last * entries.stride + i] = entries.gram[i * entries.stride + last] = 0;
    }
  }
}

// Block x is of a cluster, which is of a tile of one or more splits; block y of a Gram. partial [splits, Grams, order,
// order], or null where each tile's sum is one block's or one cluster's.
template <class Traits, class Source, class Entries>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kResident) gram_kernel(
    const Source sources, int64_t inner, const GramGrid grid, const Entries all,
    typename Source::Sum* __restrict__ partial) {
  using G = typename Source::Sum;
  const unsigned cluster = blockIdx.x / cluster_size();
  const int64_t split = static_cast<int64_t>(cluster / grid.tiles) * cluster_size() + cluster_block_rank();
  const UpperTile tile = upper_tile(cluster % grid.tiles);
  const int64_t begin = min(split * grid.depth, inner), end = min(begin + grid.depth, inner);
  const auto source = sources.of(blockIdx.y, gridDim.y);
  const Entries entries = all.of(blockIdx.y, gridDim.y);
  const bool whole = partial == nullptr;
  const int64_t offset = (split * gridDim.y + blockIdx.y) * entries.order * entries.order;
  const GramWriter<G, Entries> write{entries, whole ? nullptr : partial + offset, grid.accumulate};
  gram_tile<Traits>(source, tile, begin, end, dynamic_shared<unsigned char>(), write);
  if (tile.column != 0 || (whole && cluster_block_rank() != 0)) return;
  write_rest<Traits::kThreads>(source, entries, whole, whole ? inner : end - begin, write);
}

// The Grams from the sums of the upper triangles of partial [splits, Grams, order, order], mirrored.
template <class Entries, class G>
__global__ void __launch_bounds__(kReduceTile* kReduceRows)
    reduce_gram_kernel(const G* __restrict__ partial, int64_t splits, const Entries all) {
  constexpr int kStride = kReduceTile + 1;
  G* values = dynamic_shared<G>();  // [32][33]
  const Entries entries = all.of(blockIdx.y, gridDim.y);
  const UpperTile tile = upper_tile(blockIdx.x);
  const int lane = static_cast<int>(threadIdx.x) % kReduceTile;
  const int group = static_cast<int>(threadIdx.x) / kReduceTile;
  const int64_t first_row = static_cast<int64_t>(tile.row) * kReduceTile;
  const int64_t first_column = static_cast<int64_t>(tile.column) * kReduceTile;
  const int64_t each = entries.order * entries.order;
#pragma unroll
  for (int r = group; r < kReduceTile; r += kReduceRows) {
    const int64_t row = first_row + r, column = first_column + lane;
    if (row > column || column >= entries.order) continue;
    const int64_t from = entries.place(row), to = entries.place(column);
    if (from < 0 || to < 0) continue;
    const int64_t at = from * entries.stride + to;
    G value = 0;
    if (column < entries.used) {
      const G* part = partial + blockIdx.y * each + row * entries.order + column;
      G sum = 0;
#pragma unroll 4
      for (int64_t s = 0; s < splits; ++s) sum += part[s * gridDim.y * each];
      value = entries.value(at, sum);
    }
    values[r * kStride + lane] = value;
    entries.gram[at] = value;
  }
  __syncthreads();
#pragma unroll
  for (int r = group; r < kReduceTile; r += kReduceRows) {
    const int64_t row = first_column + r, column = first_row + lane;
    if (column >= row || row >= entries.order) continue;
    const int64_t from = entries.place(row), to = entries.place(column);
    if (from >= 0 && to >= 0) entries.gram[from * entries.stride + to] = values[lane * kStride + r];
  }
}

template <class G, class Entries>
cudaError_t launch_reduce_gram(
    const G* partial, const Entries& entries, int64_t grams, const GramPlan& plan, cudaStream_t stream) {
  LaunchShape shape{};
  shape.grid = dim3(static_cast<unsigned>(plan.reduce_blocks), static_cast<unsigned>(grams));
  shape.block = dim3(kReduceTile * kReduceRows);
  shape.shared_bytes = kReduceTile * (kReduceTile + 1) * sizeof(G);
  shape.stream = stream;
  return launch(reduce_gram_kernel<Entries, G>, shape, partial, plan.splits, entries);
}

template <class Traits, class Source, class Entries>
cudaError_t launch_gram_tiles(
    const Source& source, int64_t inner, const Entries& entries, int64_t grams, const GramPlan& plan,
    typename Source::Sum* partial, bool accumulate, cudaStream_t stream) {
  if (plan.shared_bytes != Traits::P::kSharedBytes || plan.depth % Traits::kDepth != 0) return cudaErrorInvalidValue;
  LaunchShape shape{};
  shape.grid = dim3(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(grams));
  shape.block = dim3(Traits::kThreads);
  shape.shared_bytes = plan.shared_bytes;
  shape.stream = stream;
  shape.cluster = plan.cluster;
  const GramGrid grid{static_cast<unsigned>(plan.blocks / plan.splits), plan.depth, accumulate};
  return launch(gram_kernel<Traits, Source, Entries>, shape, source, inner, grid, entries, partial);
}

template <int kTile, class Source, class Entries>
cudaError_t launch_gram_tiles(
    const Source& source, int64_t inner, bool tf32, const Entries& entries, int64_t grams, const GramPlan& plan,
    typename Source::Sum* partial, bool accumulate, cudaStream_t stream) {
  if constexpr (std::is_same_v<GramMma<typename Source::Element, typename Source::Sum>, Tf32Mma>) {
    if (!tf32) {
      return launch_gram_tiles<typename Source::template Traits<kTile, 2>>(
          source, inner, entries, grams, plan, partial, accumulate, stream);
    }
  }
  return launch_gram_tiles<typename Source::template Traits<kTile, 1>>(
      source, inner, entries, grams, plan, partial, accumulate, stream);
}

// The Grams' products: all that there is to do where the plan needs no partial Grams, and partial is null.
template <class Source, class Entries>
cudaError_t launch_gram_products(
    const Source& source, int64_t inner, bool tf32, const Entries& entries, int64_t grams, const GramPlan& plan,
    typename Source::Sum* partial, bool accumulate, cudaStream_t stream) {
  if (inner < 0 || grams < 1 || grams > kMaxGrams) return cudaErrorInvalidValue;
  if (plan.blocks > kMaxGrid || plan.reduce_blocks > kMaxGrid) return cudaErrorInvalidValue;
  if constexpr (kOfWarpgroups<Source>) {
    if (plan.tile == kWarpgroupTile && !accumulate) {
      return launch_warpgroup_gram(source, inner, entries, grams, plan, partial, stream);
    }
  }
  if constexpr (std::is_same_v<typename Source::Sum, float>) {
    if (plan.tile == kLargeTile) {
      return launch_gram_tiles<kLargeTile>(source, inner, tf32, entries, grams, plan, partial, accumulate, stream);
    }
  }
  if (plan.tile != kSmallTile) return cudaErrorInvalidValue;
  return launch_gram_tiles<kSmallTile>(source, inner, tf32, entries, grams, plan, partial, accumulate, stream);
}

// The Grams, in one launch or two.
template <class Source, class Entries>
cudaError_t launch_gram(
    const Source& source, int64_t inner, bool tf32, const Entries& entries, int64_t grams, const GramPlan& plan,
    void* workspace, cudaStream_t stream) {
  using G = typename Source::Sum;
  G* partial = plan.whole() ? nullptr : static_cast<G*>(workspace);
  const cudaError_t error = launch_gram_products(source, inner, tf32, entries, grams, plan, partial, false, stream);
  if (error != cudaSuccess || plan.whole()) return error;
  return launch_reduce_gram(static_cast<const G*>(partial), entries, grams, plan, stream);
}

}  // namespace consequentialism::cuda
