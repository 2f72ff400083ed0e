// The weight gradient in one launch: Gram, inverse, emended slice of x, product with dy. See FusedPlan.
#pragma once

#include "arrivals.cuh"
#include "damped_inverse.cuh"
#include "emended_input.cuh"
#include "emended_input_launcher.h"
#include "fused_weight_grad_launcher.h"
#include "input_gram.cuh"
#include "launch_counters.h"

namespace consequentialism::cuda {

// kTile: rows of x, rounded up. kTerms as GramTraits has it.
template <class T, int kTile_, int kTerms>
struct FusedTraits {
  static constexpr int kTile = kTile_;
  using G = Accumulator<T>;
  using Y = Emended<T>;
  using Gram = GramTraits<T, G, false, kTile, kTerms>;
  using Apply = ApplyTraits<T, kTile, kFusedInputs, kTerms>;
  using Mma = typename Apply::Mma;
  static constexpr int kThreads = Gram::kThreads;

  // dw's tile: dy is exact in one term where it is a half type; y is rounded to bfloat16, once, or split as P is.
  static constexpr bool kBfloat16 = std::is_same_v<T, bfloat16>;
  static constexpr int kDepth = stage_depth(sizeof(T) > sizeof(Y) ? sizeof(T) : sizeof(Y));
  using Errors = StagedOperand<Mma, T, Major::kOuter, kFusedOutputs, kDepth, kThreads>;
  using Rows = ResidentOperand<Y, Major::kOuter>;
  using Weight = Product<
      Mma, Errors, Apply::Types::kTermsX, Rows, kBfloat16 ? 1 : Apply::Types::kTermsP, kFusedOutputs, kFusedInputs,
      kThreads / 64, 2, kDepth>;
  static constexpr int kStride = padded_line(kFusedInputs, sizeof(Y), Mma::kPairs, Major::kOuter);

  static constexpr FusedLayout kLayout = fused_layout(kTile, sizeof(T), kBfloat16);
  static_assert(Apply::kThreads == kThreads && Weight::kThreads == kThreads);
  static_assert(kThreads >= 4 * static_cast<int>(kWarpSize));  // of a factor of more than one tile
  static_assert(kLayout.gram_stages == Gram::P::kSharedBytes);
  static_assert(kLayout.gram == kTile * Apply::kStride * sizeof(G));
  static_assert(
      kLayout.factor_tiles ==
      (tile_index(0, kTile / 32) + 1) * static_cast<size_t>(TileTraits<G>::kElements) * sizeof(G));
  static_assert(kLayout.emended == kTile * kStride * sizeof(Y));
  static_assert(kLayout.apply_stages == Apply::P::kSharedBytes && kLayout.weight_stages == Weight::kSharedBytes);
  static_assert(kLayout.bytes <= kMaxSharedBytes && kFusedStateBytes >= sizeof(InverseState<G>) + sizeof(int));
};

// The emended column of ones, in shared memory, with zeros up to a full tile. As it is not rounded, unlike y, it may
// take more terms.
template <class G, int kTerms_>
struct SharedVector {
  static constexpr bool kExists = true;
  static constexpr int kTerms = kTerms_;
  bool wanted;
  const G* data;
  __device__ __forceinline__ G operator()(int64_t inner) const { return data[inner]; }
};

// gram [kTile, stride] in shared memory <- the sum of partial [splits, kTile, kTile] in the order of the splits, plus
// shift. The upper triangle, and zeros from n on.
template <int kTile, class G>
__device__ __forceinline__ void sum_partials(
    const G* partial, int64_t splits, int n, G shift, G* gram, int stride, int thread, int threads) {
  constexpr int kPack = TileTraits<G>::kPack;
  constexpr int kPacks = kTile / kPack;
#pragma unroll 4
  for (int i = thread; i < kTile * kPacks; i += threads) {
    const int row = i / kPacks, column = i % kPacks * kPack;
    G sums[kPack] = {};
    if (column + kPack > row && row < n && column < n) {
      for (int64_t s = 0; s < splits; ++s) {
        G values[kPack];
        load_pack(partial + (s * kTile + row) * kTile + column, values);
#pragma unroll
        for (int k = 0; k < kPack; ++k) sums[k] += values[k];
      }
#pragma unroll
      for (int k = 0; k < kPack; ++k) sums[k] = column + k < n ? sums[k] + shift : G(0);
    }
#pragma unroll
    for (int k = 0; k < kPack; ++k) gram[row * stride + column + k] = sums[k];
  }
}

template <class Traits, class T>
__global__ void __launch_bounds__(Traits::kThreads, 1) fused_weight_grad_kernel(
    const __grid_constant__ FusedArguments<T> arguments, const MatrixView<T> x, const MatrixView<T> dy, unsigned slices,
    int64_t group_tiles, unsigned splits, int64_t depth, bool even, Accumulator<T>* partial, unsigned* counters,
    unsigned* breakdowns) {
  using G = typename Traits::G;
  using Y = typename Traits::Y;
  using Weight = typename Traits::Weight;
  using ApplyP = typename Traits::Apply::P;
  using GramP = typename Traits::Gram::P;
  constexpr FusedLayout kLayout = Traits::kLayout;
  constexpr int kTile = Traits::kTile;
  constexpr int kGramStride = Traits::Apply::kStride;
  unsigned char* shared = dynamic_shared<unsigned char>();
  auto* state = reinterpret_cast<InverseState<G>*>(shared);
  G* gram = reinterpret_cast<G*>(shared + kLayout.gram_at);
  Y* y = reinterpret_cast<Y*>(shared + kLayout.inverse_end);
  G* column = reinterpret_cast<G*>(shared + kLayout.column_at);
  unsigned char* stages = shared + kLayout.stages_at;
  const int thread = static_cast<int>(threadIdx.x);
  const int n = static_cast<int>(arguments.rows);
  const int64_t inputs = arguments.inputs, outputs = arguments.outputs;
  const bool bias = arguments.db != nullptr;
  const G shift = bias ? 1 : 0;

  if (partial == nullptr) {
    block_gram<typename Traits::Gram>(x, n, 0, inputs, shift, shared + kLayout.gram_at, gram, kGramStride);
  } else {
    if (blockIdx.x < splits) {
      const int64_t begin = blockIdx.x * depth;
      const typename Traits::Gram::Operand operand{x, 0, n};
      G* own = partial + static_cast<int64_t>(blockIdx.x) * kTile * kTile;
      BlockSums<GramP> sums;
      block_product<GramP>(
          sums, operand, operand, true, begin, min(begin + depth, inputs), shared + kLayout.gram_at, NoVector{});
      for_each_pair<GramP>(sums, [&](int row, int c, G left, G right) {
        if (row <= c + 1) *reinterpret_cast<Pair<G>*>(own + row * kTile + c) = {left, right};
      });
    }
    grid_barrier(counters, gridDim.x);
    sum_partials<kTile>(static_cast<const G*>(partial), splits, n, shift, gram, kGramStride, thread, Traits::kThreads);
    __syncthreads();
  }

  InverseItem<G> item = arguments.inverse;
  item.gram = gram;
  item.inverse = gram;
  item.inverse_stride = kGramStride;
  G* tiles = reinterpret_cast<G*>(shared + kLayout.inverse_end);
  const Team<InverseTeam::kBlock> team(Traits::kThreads);
  invert_matrix(team, item, n, kGramStride, tiles, nullptr, state, [breakdowns] {
    if (blockIdx.x == 0) atomicAdd(breakdowns, 1u);
  });
  __syncthreads();

  const unsigned slice = blockIdx.x % slices;
  const int64_t first_input = static_cast<int64_t>(slice) * kFusedInputs;
  const bool with_bias = bias && slice == 0;
  block_apply<ApplyP>(
      typename ApplyP::A{gram, kGramStride}, n, typename ApplyP::B{x, first_input, inputs}, with_bias, stages,
      [&](int row, int c, G left, G right) {
        *reinterpret_cast<Pair<Y>*>(y + row * Traits::kStride + c) = {emended<Y>(left), emended<Y>(right)};
      },
      [&](int row, G value) { column[row] = value; });

  const int64_t begin = blockIdx.x / slices * group_tiles * kFusedOutputs;
  const int64_t end = min(begin + group_tiles * kFusedOutputs, outputs);
  bool suspicious = false;  // a sum is not finite
#pragma unroll 1
  for (int64_t first = begin; first < end; first += kFusedOutputs) {
    BlockSums<Weight> sums;
    block_product<Weight>(
        sums, typename Weight::A{dy, first, outputs}, typename Weight::B{y, Traits::kStride}, false, 0, n, stages,
        SharedVector<G, Traits::Apply::Types::kTermsP>{with_bias, column});
    for_each_pair<Weight>(sums, [&](int row, int c, G left, G right) {
      suspicious = suspicious || !isfinite(left) || !isfinite(right);
      write_pair(arguments.dw, first + row, first_input + c, outputs, inputs, even, left, right);
    });
    if (with_bias) {
      for_each_of_vector<Weight>(sums, [&](int row, G value) {
        if (first + row < outputs) arguments.db[first + row] = from_accumulator<T>(value);
      });
    }
  }

  // A dy that is not finite has left no sum in its row finite; a finite dy may have overflown, which is no reason.
  int* any = reinterpret_cast<int*>(state + 1);
  bool broken = false;
  if (block_any(suspicious, any)) {
    for (int row = 0; row < n; ++row) {
      for (int64_t i = begin + thread; i < end; i += Traits::kThreads) {
        broken = broken || !isfinite(to_accumulator(dy.data[row * dy.stride + i]));
      }
    }
    broken = block_any(broken, any);
  }
  if (!last_of_flagged(counters + kFirstTicket, gridDim.x, broken, any)) return;
  const T nan = from_accumulator<T>(G(NAN));
  for (int64_t i = thread; i < outputs * inputs; i += Traits::kThreads) arguments.dw[i] = nan;
  if (!bias) return;
  for (int64_t i = thread; i < outputs; i += Traits::kThreads) arguments.db[i] = nan;
}

}  // namespace consequentialism::cuda
