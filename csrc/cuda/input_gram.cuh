// The input Gram, x x^T or x^T x: the upper triangle in tiles, mirrored.
#pragma once

#include "matrix.cuh"

namespace consequentialism::cuda {

// How T is multiplied and summed: G is float or double, kTerms is 1 or, for float32 in float32, 2 (3xTF32).
template <class T, class G>
using GramMma = std::conditional_t<
    std::is_same_v<G, double>, DoubleMma, std::conditional_t<std::is_same_v<T, float>, Tf32Mma, HalfMma<T>>>;

template <class T, class G, bool kPrimal, int kTile, int kTerms>
struct GramTraits {
  static_assert(kTerms == 1 || std::is_same_v<GramMma<T, G>, Tf32Mma>);
  static constexpr int kThreads = threads_of_tile(kTile);
  static constexpr int kResident = resident_of_tile(kTile, sizeof(G));
  static constexpr int kDepth = stage_depth(sizeof(T));
  static constexpr Major kMajor = kPrimal ? Major::kOuter : Major::kInner;
  using Operand = StagedOperand<GramMma<T, G>, T, kMajor, kTile, kDepth, kThreads>;
  using P =
      Product<GramMma<T, G>, Operand, kTerms, Operand, kTerms, kTile, kTile, 2, kTile == kLargeTile ? 4 : 2, kDepth>;
  static_assert(P::kThreads == kThreads);
};

// Of index = 0, 1, ... in the order (0, 0), (0, 1), (1, 1), (0, 2), ...
struct UpperTile {
  int row, column;
};

__device__ __forceinline__ UpperTile upper_tile(unsigned index) {
  int column = static_cast<int>((sqrtf(8 * static_cast<float>(index) + 1) - 1) / 2);
  const auto first = [](int c) { return static_cast<unsigned>(c) * static_cast<unsigned>(c + 1) / 2; };
  while (first(column) > index) --column;
  while (first(column + 1) <= index) ++column;
  return {static_cast<int>(index - first(column)), column};
}

// write(row, column, sum) for this thread's share of the sums of a tile, of its first two arguments' rows and columns,
// in the upper triangle and below outer; where the vector is wanted, its sums go to column `outer`.
template <class P, class Write>
__device__ __forceinline__ void write_tile(
    const BlockSums<P>& sums, int64_t first_row, int64_t first_column, int64_t outer, bool vector, const Write& write) {
  for_each_pair<P>(sums, [&](int r, int c, auto left, auto right) {
    const int64_t row = first_row + r, column = first_column + c;
    if (row <= column && column < outer) write(row, column, left);
    if (row <= column + 1 && column + 1 < outer) write(row, column + 1, right);
  });
  if (!vector) return;
  for_each_of_vector<P>(sums, [&](int r, auto value) {
    if (first_row + r < outer) write(first_row + r, outer, value);
  });
}

// The same of the sums of a cluster's blocks, added in their order: each block adds and writes a part of the tile,
// which it reads from shared memory, entry by entry in one loop. shared is that of the product.
template <class P, class Write>
__device__ __forceinline__ void write_tile_of_cluster(
    const BlockSums<P>& sums, int64_t first_row, int64_t first_column, int64_t outer, bool vector,
    unsigned char* shared, const Write& write) {
  using Sum = typename P::Sum;
  constexpr int kStride = P::kTileN + 1;  // the vector's sums in the last column
  static_assert(P::kTileM * kStride * sizeof(Sum) <= P::kSharedBytes);
  const int blocks = static_cast<int>(cluster_size()), rank = static_cast<int>(cluster_block_rank());
  Sum* own = reinterpret_cast<Sum*>(shared);
  __syncthreads();
  for_each_pair<P>(sums, [&](int row, int column, Sum left, Sum right) {
    own[row * kStride + column] = left;
    own[row * kStride + column + 1] = right;
  });
  if (vector) for_each_of_vector<P>(sums, [&](int row, Sum value) { own[row * kStride + P::kTileN] = value; });
  cluster_sync();
  const auto add = [&](int place) {
    Sum sum = 0;
#pragma unroll 4
    for (int block = 0; block < blocks; ++block) sum += cluster_map(own, static_cast<unsigned>(block))[place];
    return sum;
  };
  const int first = rank * P::kThreads + static_cast<int>(threadIdx.x), step = blocks * P::kThreads;
#pragma unroll 1
  for (int i = first; i < P::kTileM * P::kTileN; i += step) {
    const int64_t row = first_row + i / P::kTileN, column = first_column + i % P::kTileN;
    if (row <= column && column < outer) write(row, column, add(i / P::kTileN * kStride + i % P::kTileN));
  }
  for (int i = first; vector && i < P::kTileM && first_row + i < outer; i += step) {
    write(first_row + i, outer, add(i * kStride + P::kTileN));
  }
  cluster_sync();
}

// One tile of the Gram's upper triangle by one block, over inner in [begin, end), or by a cluster, whose blocks have a
// range each. Where the source has ones, also the border of x1^T x1, which is the last column, but for the corner.
template <class Traits, class Source, class Write>
__device__ __forceinline__ void gram_tile(
    const Source& source, UpperTile tile, int64_t begin, int64_t end, unsigned char* shared, const Write& write) {
  using P = typename Traits::P;
  using Operand = typename Traits::Operand;
  const bool diagonal = tile.row == tile.column, vector = source.ones && diagonal;
  const int64_t first_row = static_cast<int64_t>(tile.row) * P::kTileM;
  const int64_t first_column = static_cast<int64_t>(tile.column) * P::kTileN;
  BlockSums<P> sums;
  block_product<P>(
      sums, source.template operand<Operand>(first_row), source.template operand<Operand>(first_column), diagonal,
      begin, end, shared, std::conditional_t<P::A::kMajor == Major::kOuter, Ones, NoVector>{vector});
  if (!Write::kGathered && cluster_size() == 1) {
    write_tile<P>(sums, first_row, first_column, source.outer, vector, write);
  } else {
    write_tile_of_cluster<P>(sums, first_row, first_column, source.outer, vector, shared, write);
  }
}

// The whole dual Gram of x [n, ...], n <= P::kTileM, by one block, over inner in [begin, end), into shared memory:
// gram [kTileM, stride], zero from n on. shared has P::kSharedBytes, and gram may lie in it.
template <class Traits, class T, class G>
__device__ __forceinline__ void block_gram(
    const MatrixView<T>& x, int n, int64_t begin, int64_t end, G shift, unsigned char* shared, G* gram, int stride) {
  using P = typename Traits::P;
  using Operand = typename Traits::Operand;
  BlockSums<P> sums;
  const Operand operand{x, 0, n};
  block_product<P>(sums, operand, operand, true, begin, end, shared, NoVector{});
  __syncthreads();
  for_each_pair<P>(sums, [&](int row, int column, G left, G right) {
    const auto write = [&](int c, G value) {
      if (row > c) return;
      gram[row * stride + c] = gram[c * stride + row] = c < n ? value + shift : G(0);
    };
    write(column, left);
    write(column + 1, right);
  });
  __syncthreads();
}

}  // namespace consequentialism::cuda
