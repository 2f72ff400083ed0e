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

// gram [order, order], its upper triangle only or all of it. All is symmetric to the bit: an entry is summed once.
template <class G>
struct GramWriter {
  G* gram;
  int64_t order;
  bool mirrored;

  __device__ __forceinline__ void operator()(int64_t row, int64_t column, G value) const {
    gram[row * order + column] = value;
    if (mirrored && row != column) gram[column * order + row] = value;
  }
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

// One tile of the Gram's upper triangle by one block, over inner in [begin, end). shift is added to each entry.
// ones: also the border of x1^T x1, which is the last column, but for the corner.
template <class Traits, class T, class G, class Write>
__device__ __forceinline__ void gram_tile(
    const MatrixView<T>& x, int64_t outer, UpperTile tile, int64_t begin, int64_t end, bool ones, G shift,
    unsigned char* shared, const Write& write) {
  using P = typename Traits::P;
  using Operand = typename Traits::Operand;
  const bool diagonal = tile.row == tile.column;
  const int64_t first_row = static_cast<int64_t>(tile.row) * P::kTileM;
  const int64_t first_column = static_cast<int64_t>(tile.column) * P::kTileN;
  BlockSums<P> sums;
  block_product<P>(
      sums, Operand{x, first_row, outer}, Operand{x, first_column, outer}, diagonal, begin, end, shared,
      std::conditional_t<P::A::kMajor == Major::kOuter, Ones, NoVector>{ones && diagonal});
  for_each_pair<P>(sums, [&](int r, int c, G left, G right) {
    const int64_t row = first_row + r, column = first_column + c;
    if (row <= column && column < outer) write(row, column, left + shift);
    if (row <= column + 1 && column + 1 < outer) write(row, column + 1, right + shift);
  });
  if (ones && diagonal) {
    for_each_of_vector<P>(sums, [&](int r, G value) {
      if (first_row + r < outer) write(first_row + r, outer, value);
    });
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
