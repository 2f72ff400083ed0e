// The patches of a convolution as an operand: rows gathered from the padded image, never written.
#pragma once

#include "conv_gram.h"
#include "gram_launch.cuh"

namespace consequentialism::cuda {

// Division of n < 2^31 by a number that the host knows: T. Granlund, P. Montgomery, "Division by Invariant Integers
// using Multiplication", 1994.
struct Divisor {
  uint32_t number, factor;
  int shift;

  static Divisor of(int64_t number) {
    int log = 0;
    while ((int64_t{1} << log) < number) ++log;
    const int shift = 31 + log;
    const uint64_t factor = (uint64_t{1} << shift) / static_cast<uint64_t>(number) + 1;
    return {static_cast<uint32_t>(number), static_cast<uint32_t>(factor), shift};
  }
  __device__ __forceinline__ uint32_t divide(uint32_t n) const {
    return static_cast<uint32_t>((static_cast<uint64_t>(n) * factor) >> shift);
  }
};

// PatchShape as the kernel takes it; strides and offsets in elements.
template <class T>
struct PatchView {
  const T* data;
  int64_t group;            // from group to group
  int sample;               // from sample to sample
  int position[3], tap[3];  // from one to the next along D, H, W
  Divisor positions[3];
  int taps[3];
  int channels, used_channels;
  int unit;  // bytes of a copy

  // Of a position's first element.
  __device__ __forceinline__ int row(uint32_t n) const {
    int offset = 0;
#pragma unroll
    for (int i = 2; i >= 0; --i) {
      const uint32_t rest = positions[i].divide(n);
      offset += static_cast<int>(n - rest * positions[i].number) * position[i];
      n = rest;
    }
    return offset + static_cast<int>(n) * sample;
  }

  // From there to input j, in the order of taps, then channels.
  __device__ __forceinline__ int column(int j) const {
    const int k = j / channels;
    return k / (taps[2] * taps[1]) * tap[0] + k / taps[2] % taps[1] * tap[1] + k % taps[2] * tap[2] + j % channels;
  }
};

// As StagedOperand, of patches; its inner index is the position.
template <class Mma, class S, int kOuter, int kDepth, int kThreads, class View = PatchView<S>>
struct PatchOperand {
  using Stored = S;
  static constexpr Major kMajor = Major::kOuter;
  static constexpr int kStride = padded_line(kOuter, sizeof(S), Mma::kPairs, kMajor);
  static constexpr size_t kBytes = static_cast<size_t>(kDepth * kStride) * sizeof(S);
  static_assert(kBytes == operand_bytes(kOuter, kDepth, sizeof(S), Mma::kPairs, kMajor));

  View patches;
  int place;   // of this thread's copies in a line
  int offset;  // of them from a position's first element
  bool inside;

  __device__ __forceinline__ PatchOperand(const View& view, int64_t first, int64_t outer) : patches(view) {
    const int pack = patches.unit / static_cast<int>(sizeof(S));
    place = static_cast<int>(threadIdx.x) % (kOuter / pack) * pack;
    inside = first + place < outer;
    offset = inside ? patches.column(static_cast<int>(first) + place) : 0;
  }

  __device__ __forceinline__ void stage(unsigned char* buffer, int64_t inner, int64_t inner_end) const {
    S* tile = reinterpret_cast<S*>(buffer);
    if (patches.unit == 16) {
      copy<16>(tile, inner, inner_end);
    } else if (patches.unit == 8) {
      copy<8>(tile, inner, inner_end);
    } else if constexpr (sizeof(S) <= 4) {
      copy<4>(tile, inner, inner_end);
    }
  }
  __device__ __forceinline__ const S* tile(const unsigned char* buffer, int64_t) const {
    return reinterpret_cast<const S*>(buffer);
  }
  __device__ __forceinline__ int stride() const { return kStride; }

 private:
  template <int kBytesEach>
  __device__ __forceinline__ void copy(S* tile, int64_t inner, int64_t inner_end) const {
    constexpr int kPacks = kOuter * static_cast<int>(sizeof(S)) / kBytesEach;
    constexpr int kRows = kThreads / kPacks;
    static_assert(kThreads % kPacks == 0 && kDepth % kRows == 0);
    // Small copies, of few channels, are many.
    [[maybe_unused]] constexpr int kUnroll = kBytesEach == 16 ? 4 : 1;
    const int first = static_cast<int>(threadIdx.x) / kPacks;
#pragma unroll(kUnroll)
    for (int i = 0; i < kDepth / kRows; ++i) {
      const int r = first + i * kRows;
      const bool read = inside && inner + r < inner_end;
      const int at = patches.row(static_cast<uint32_t>(inner + r)) + offset;  // without a branch around it
      const S* source = patches.data + (read ? at : 0);
      copy_async<kBytesEach>(tile + r * kStride + place, source, read ? kBytesEach : 0);
    }
  }
};

template <class T, int kTile, int kTerms>
struct PatchTraits {
  using Mma = GramMma<T, Accumulator<T>>;
  static constexpr int kThreads = threads_of_tile(kTile);
  static constexpr int kResident = resident_of_tile(kTile, sizeof(Accumulator<T>));
  static constexpr int kDepth = stage_depth(sizeof(T));
  using Operand = PatchOperand<Mma, T, kTile, kDepth, kThreads>;
  using P = Product<Mma, Operand, kTerms, Operand, kTerms, kTile, kTile, 2, kTile == kLargeTile ? 4 : 2, kDepth>;
  static_assert(P::kThreads == kThreads);
};

template <class T>
struct PatchSource {
  using Element = T;
  using Sum = Accumulator<T>;
  template <int kTile, int kTerms>
  using Traits = PatchTraits<T, kTile, kTerms>;

  PatchView<T> patches;
  int64_t outer;
  bool ones;

  __device__ __forceinline__ PatchSource of(unsigned group, unsigned) const {
    PatchSource own = *this;
    own.patches.data += group * patches.group;
    return own;
  }
  template <class Operand>
  __device__ __forceinline__ Operand operand(int64_t first) const {
    return Operand(patches, first, outer);
  }
};

// gram [groups, I + bias, I + bias], the channel first; of products in the order of taps, then channels.
template <class G>
struct ConvEntries {
  static constexpr bool kGathered = true;

  G* gram;
  int64_t order, stride, used;
  int taps, channels, used_channels;
  bool accumulate;

  __device__ __forceinline__ ConvEntries of(unsigned group, unsigned) const {
    ConvEntries own = *this;
    own.gram += group * stride * stride;
    return own;
  }
  __device__ __forceinline__ int64_t place(int64_t i) const {
    const int index = static_cast<int>(i), tap = index / channels, channel = index % channels;
    if (tap == taps) return static_cast<int64_t>(taps) * used_channels;  // the bias's
    return channel < used_channels ? static_cast<int64_t>(channel) * taps + tap : -1;
  }
  __device__ __forceinline__ G value(int64_t at, G sum) const { return accumulate ? gram[at] + sum : sum; }
};

}  // namespace consequentialism::cuda
