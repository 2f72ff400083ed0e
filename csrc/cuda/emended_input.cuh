// The emended input: the symmetric inverse P times x, and times the bias's column of ones, in one product.
#pragma once

#include "matrix.cuh"

namespace consequentialism::cuda {

// How T times a P of type G is multiplied. kTerms is 1 (TF32) or 2 (3xTF32) for float32 in float32. bfloat16 meets P in
// three terms of bfloat16, which keep 24 bits, or with a kTerms of 2 in two; float16, whose range is too small for P,
// is exact in TF32 and meets P in two terms of that.
template <class T, class G, int kTerms>
struct EmendTypes {
  static constexpr bool kDouble = std::is_same_v<G, double>;
  static constexpr bool kBfloat16 = std::is_same_v<T, bfloat16> && !kDouble;
  static constexpr bool kFloat = std::is_same_v<T, float> && !kDouble;
  using Mma = std::conditional_t<kDouble, DoubleMma, std::conditional_t<kBfloat16, HalfMma<bfloat16>, Tf32Mma>>;
  static constexpr int kTermsX = kFloat ? kTerms : 1;
  static constexpr int kTermsP = kDouble ? 1 : kBfloat16 ? (kTerms == 2 ? 2 : 3) : kFloat ? kTerms : 2;
  static_assert(kTerms == 1 || (kTerms == 2 && (kFloat || kBfloat16)));
};

// dual: y [N, I], A = P, B = x^T; primal: A = x, B = P.
template <class T, class G, bool kPrimal, int kTile, int kTerms>
struct EmendTraits {
  using Types = EmendTypes<T, G, kTerms>;
  using Mma = typename Types::Mma;
  static constexpr int kThreads = threads_of_tile(kTile);
  static constexpr int kResident = resident_of_tile(kTile, sizeof(G));
  static constexpr int kDepth = stage_depth(sizeof(G));
  using Inverse = StagedOperand<Mma, G, Major::kInner, kTile, kDepth, kThreads>;
  using Input = StagedOperand<Mma, T, kPrimal ? Major::kInner : Major::kOuter, kTile, kDepth, kThreads>;
  // Where P costs more to split than x, a warp takes fewer of its elements.
  static constexpr bool kUneven = Types::kTermsP > Types::kTermsX;
  static constexpr int kWarps = kThreads / static_cast<int>(kWarpSize);
  static constexpr int kWarpsP = kTile == kLargeTile ? 4 : kUneven ? 4 : 2;
  static constexpr int kWarpsX = kWarps / kWarpsP;
  using P = std::conditional_t<
      kPrimal, Product<Mma, Input, Types::kTermsX, Inverse, Types::kTermsP, kTile, kTile, kWarpsX, kWarpsP, kDepth>,
      Product<Mma, Inverse, Types::kTermsP, Input, Types::kTermsX, kTile, kTile, kWarpsP, kWarpsX, kDepth>>;
  static_assert(P::kThreads == kThreads);
};

template <class Y, class S>
__device__ __forceinline__ Y emended(S value) {
  if constexpr (std::is_same_v<Y, double>) {
    return value;
  } else {
    return from_float<Y>(static_cast<float>(value));
  }
}

template <class Y>
struct alignas(2 * sizeof(Y)) Pair {
  Y left, right;
};

// y[row, column], y[row, column + 1] where they are in [rows, columns]. `even`: pairs are aligned in memory.
template <class Y, class S>
__device__ __forceinline__ void write_pair(
    Y* y, int64_t row, int64_t column, int64_t rows, int64_t columns, bool even, S left, S right) {
  if (row >= rows || column >= columns) return;
  Y* to = y + row * columns + column;
  if (even) {
    *reinterpret_cast<Pair<Y>*>(to) = {emended<Y>(left), emended<Y>(right)};
  } else {
    to[0] = emended<Y>(left);
    if (column + 1 < columns) to[1] = emended<Y>(right);
  }
}

// Columns [first, first + P::kTileN) of P x, by one block, for a P [n, n] that lies in shared memory: zeros up to
// [P::kTileM, a multiple of P::kDepth], n <= P::kTileM. step(row, column, left, right) gets two neighbours of the tile
// at a time, vector_step(row, value) the row sums of P where sums is set. shared has P::kSharedBytes, aside from P.
template <class P, class Step, class VectorStep>
__device__ __forceinline__ void block_apply(
    const typename P::A& inverse, int n, const typename P::B& x, bool sums_wanted, unsigned char* shared,
    const Step& step, const VectorStep& vector_step) {
  BlockSums<P> sums;
  block_product<P>(sums, inverse, x, false, 0, n, shared, Ones{sums_wanted});
  for_each_pair<P>(sums, step);
  if (sums_wanted) for_each_of_vector<P>(sums, vector_step);
}

// What block_apply takes for x of type T and P of its sums' type. The warps are as those of the Gram's tiles.
template <class T, int kTileM, int kTileN, int kTerms>
struct ApplyTraits {
  using G = Accumulator<T>;
  using Types = EmendTypes<T, G, kTerms>;
  using Mma = typename Types::Mma;
  static constexpr int kThreads = threads_of_tile(kTileM);
  static constexpr int kDepth = stage_depth(sizeof(G));
  using Inverse = ResidentOperand<G, Major::kInner>;
  using Input = StagedOperand<Mma, T, Major::kOuter, kTileN, kDepth, kThreads>;
  using P = Product<Mma, Inverse, Types::kTermsP, Input, Types::kTermsX, kTileM, kTileN, 4, kThreads / 128, kDepth>;
  // Elements from row to row of P, so that no bank is met twice.
  static constexpr int kStride = padded_line(kTileM, sizeof(G), Mma::kPairs, Major::kInner);
};

}  // namespace consequentialism::cuda
