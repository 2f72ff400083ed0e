// What the Grams' ops give to `launch_gram`: sources and entries, also for the products of warpgroups.
#pragma once

#include "../block_spans.h"
#include "gram_launch.cuh"

namespace consequentialism::cuda {

// gram [order, order], shift added to each entry.
template <class G>
struct InputEntries {
  static constexpr bool kGathered = false;

  G* gram;
  int64_t order, stride, used;
  G shift;

  __device__ __forceinline__ InputEntries of(unsigned, unsigned) const { return *this; }
  __device__ __forceinline__ int64_t place(int64_t i) const { return i; }
  __device__ __forceinline__ G value(int64_t, G sum) const { return sum + shift; }
};

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

}  // namespace consequentialism::cuda
