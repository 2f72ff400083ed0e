// The inverse of a matrix whose factor U lies in global memory: V = U^-1 by strips of its columns, then V V^T by its
// tiles. A strip or a tile is one block's, which needs nothing of the others: as many run at once as there is room for.
// The sums and their order are those of damped_inverse.cuh.
#pragma once

#include "damped_inverse.cuh"
#include "factored_inverse.h"

namespace consequentialism::cuda {

// kTiles tiles, one below the other, times a strip: what a lane has of the sums. It reads 8 x 8 elements of float32
// with 16 loads of 16 bytes for each 4 lines, and no two lanes meet in a bank; float64 is left to tensor cores.
template <class T, int kTiles>
struct StripSums {
  static constexpr bool kFloat = sizeof(T) == 4;
  static constexpr int kRowsOfTile = kFloat ? 2 : 4;
  static constexpr int kRows = kTiles * kRowsOfTile;
  static constexpr int kColumns = kFloat ? 8 : 4;

  static __device__ __forceinline__ int row(int lane, int q) { return kFloat ? lane / 2 + 16 * q : lane / 4 + 8 * q; }
  static __device__ __forceinline__ int column(int lane, int p) {
    return kFloat ? lane % 2 * 8 + p : lane % 4 * 2 + p % 2 + p / 2 * 8;
  }

  T values[kRows][kColumns] = {};

  // step(pack, q, p) for each 16 bytes of a strip: a lane's elements [q][p], [q][p + 1], ...
  template <class Step>
  static __device__ __forceinline__ void for_each_pack(T* strip, int lane, const Step& step) {
#pragma unroll
    for (int q = 0; q < kRowsOfTile; ++q) {
#pragma unroll
      for (int p = 0; p < kColumns; p += TileTraits<T>::kPack)
        step(strip + row(lane, q) * kStrip + column(lane, p), q, p);
    }
  }

  // The sums of the first tile <- strip.
  __device__ __forceinline__ void load(T* strip, int lane) {
    for_each_pack(strip, lane, [&](T* pack, int q, int p) {
      T own[TileTraits<T>::kPack];
      load_pack(pack, own);
#pragma unroll
      for (int e = 0; e < TileTraits<T>::kPack; ++e) values[q][p + e] = own[e];
    });
  }

  // strip <- the sums of tile kOwn.
  template <int kOwn>
  __device__ __forceinline__ void store(T* strip, int lane) const {
    for_each_pack(strip, lane, [&](T* pack, int q, int p) {
      T own[TileTraits<T>::kPack];
#pragma unroll
      for (int e = 0; e < TileTraits<T>::kPack; ++e) own[e] = values[kOwn * kRowsOfTile + q][p + e];
      store_pack(pack, own);
    });
  }

  // sums -= A B, of kDepth columns of A, whose rows are kStride apart, and as many rows of the strip B.
  template <int kDepth, int kStride>
  __device__ __forceinline__ void subtract_product(const T* a, const T* b, int lane) {
    if constexpr (kFloat) {
#pragma unroll
      for (int k = 0; k < kDepth; k += 4) {
        T left[kRows][4], right[4][8];
#pragma unroll
        for (int q = 0; q < kRows; ++q) load_pack(a + row(lane, q) * kStride + k, left[q]);
#pragma unroll
        for (int kk = 0; kk < 4; ++kk) {
#pragma unroll
          for (int p = 0; p < 8; p += 4) {
            T own[4];
            load_pack(b + (k + kk) * kStrip + column(lane, p), own);
#pragma unroll
            for (int e = 0; e < 4; ++e) right[kk][p + e] = own[e];
          }
        }
#pragma unroll
        for (int kk = 0; kk < 4; ++kk) {
#pragma unroll
          for (int q = 0; q < kRows; ++q) {
#pragma unroll
            for (int p = 0; p < 8; ++p) values[q][p] = fma(-left[q][kk], right[kk][p], values[q][p]);
          }
        }
      }
    } else {
#pragma unroll 1
      for (int k = 0; k < kDepth; k += 8) {  // the lines of two instructions, as tile_product shares them out
        const int line = k + lane % 4 * 2;
        T right[2][2];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          right[0][n] = b[line * kStrip + 8 * n + lane / 4], right[1][n] = b[(line + 1) * kStrip + 8 * n + lane / 4];
        }
#pragma unroll
        for (int q = 0; q < kRows; ++q) {
          T left[2];
          load_pack(a + row(lane, q) * kStride + line, left);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int n = 0; n < 2; ++n) {
              T pair[2] = {values[q][2 * n], values[q][2 * n + 1]};
              mma_m8n8k4_f64(pair, -left[half], right[half][n]);
              values[q][2 * n] = pair[0], values[q][2 * n + 1] = pair[1];
            }
          }
        }
      }
    }
  }
};

// strip and, in a tile, `to` <- the columns, each of which two lanes hold.
template <class T>
__device__ __forceinline__ void store_strip(const T (&column)[kTile], T* strip, T* to, int lane) {
  const int own = lane % kStrip;
  if (lane < kStrip) {
#pragma unroll
    for (int i = 0; i < kTile; ++i) strip[i * kStrip + own] = column[i];
  } else {
#pragma unroll
    for (int i = 0; i < kTile; ++i) to[i * TileTraits<T>::kStride + own] = column[i];
  }
}

// strip and, in a tile, `to` <- upper^-1 (pending - above known); fresh: where nothing is pending.
template <class T>
__device__ __forceinline__ void solve_strip(
    T* strip, T* pending, const T* above, const T* known, const T* upper, T* to, bool fresh, int lane) {
  StripSums<T, 1> sums;
  if (!fresh) sums.load(pending, lane);
  sums.template subtract_product<kTile, TileTraits<T>::kStride>(above, known, lane);
  sums.template store<0>(strip, lane);
  __syncwarp();
  const int own = lane % kStrip;
  T column[kTile];
#pragma unroll
  for (int i = 0; i < kTile; ++i) column[i] = strip[i * kStrip + own];
  substitute_backward(upper, column);
  __syncwarp();
  store_strip(column, strip, to, lane);
}

// Columns 16 half, ... of column j of V's tiles, by one block. From row j up: with V[k] known every row above takes its
// share of it. The next of them is the first warp's, which then solves it; of the others each keeps the sums of kGroup
// rows of tiles in registers from the beginning to the end, and reads U ahead of them for itself alone.
template <class T, int kLine>
class InverseStrip {
 public:
  __device__ __forceinline__ InverseStrip(int j, int half, const T* factor, T* inverse, T* shared)
      : j_(j),
        half_(half),
        warp_(static_cast<int>(threadIdx.x / kWarpSize)),
        lane_(static_cast<int>(threadIdx.x % kWarpSize)),
        factor_(factor),
        inverse_(inverse),
        shared_(shared) {}

  __device__ __forceinline__ void run() const {
    if (is_first_warp(warp_)) {
      solve_rows();
    } else {
      update_rows();
    }
  }

 private:
  static constexpr int kElements = TileTraits<T>::kElements;
  static constexpr int kStride = TileTraits<T>::kStride;
  static constexpr int kPack = TileTraits<T>::kPack;
  static constexpr int kStripElements = kTile * kStrip;
  static constexpr int kDepth = kLine / static_cast<int>(sizeof(T));  // columns of U in a stage
  static constexpr int kStageStride = padded_strip_line(kLine) / static_cast<int>(sizeof(T));
  static constexpr int kStageElements = kGroup * kTile * kStageStride;
  static constexpr int kSlices = kTile / kDepth;
  static_assert(kStripStages == 2 && kSlices % kStripStages == 0);

  // In shared memory, the even ones and the odd ones: what the first warp reads of U for row k - 1, V[k], and the sums
  // of row k but for the share of row k + 1.
  __device__ __forceinline__ T* above(int k) const { return shared_ + k % 2 * 2 * kElements; }
  __device__ __forceinline__ T* diagonal(int k) const { return above(k) + kElements; }
  __device__ __forceinline__ T* known(int k) const { return shared_ + 4 * kElements + k % 2 * kStripElements; }
  __device__ __forceinline__ T* pending(int k) const { return known(k) + 2 * kStripElements; }
  __device__ __forceinline__ T* stage(int slice) const {
    T* stages = shared_ + 4 * kElements + 4 * kStripElements;
    return stages + ((warp_ - 1) * kStripStages + slice % kStripStages) * kStageElements;
  }

  __device__ __forceinline__ const T* factor_at(int i, int k) const { return factor_ + tile_index(i, k) * kElements; }

  __device__ __forceinline__ int first_row() const { return (warp_ - 1) * kGroup; }
  // Of this warp's rows those that V[k] changes, but for row k - 1.
  __device__ __forceinline__ int own_rows(int k) const { return min(kGroup, k - 1 - first_row()); }

  // What `solve_rows` reads of U in step k.
  __device__ __forceinline__ void fetch_next(int k) const {
    if (k > 0) {
      copy(diagonal(k), factor_at(k - 1, k - 1));
      if (k <= j_) copy(above(k), factor_at(k - 1, k));
    }
    copy_async_commit();
  }

  __device__ __forceinline__ void copy(T* to, const T* from) const {
#pragma unroll 2
    for (int e = lane_ * kPack; e < kElements; e += static_cast<int>(kWarpSize) * kPack) {
      copy_async_16(to + e, from + e, 16);
    }
  }

  // Ends the step in which V[k - 1] became known. A named barrier, for warps come to it from two loops: in one loop the
  // first warp would hold the others' sums in registers that it needs.
  __device__ __forceinline__ void end_step() const { named_barrier_wait(1, static_cast<int>(blockDim.x)); }

  // Tiles of a column lie behind one another, and so do their rows.
  __device__ __forceinline__ void fetch_stage(int k, int slice) const {
    constexpr int kPacks = kDepth / kPack, kRows = static_cast<int>(kWarpSize) / kPacks;  // at once
    const int rows = own_rows(k) * kTile;
    const T* from = factor_at(first_row(), k) + slice * kDepth + lane_ % kPacks * kPack;
    T* to = stage(slice) + lane_ % kPacks * kPack;
#pragma unroll 4
    for (int row = lane_ / kPacks; row < rows; row += kRows) {
      copy_async_16(to + row * kStageStride, from + row * kStride, 16);
    }
    copy_async_commit();
  }

  // S[i] -= U[i, k] V[k] for this warp's rows; S[k - 2] is then handed to the first warp.
  __device__ __forceinline__ void update_rows() const {
    StripSums<T, kGroup> sums;
    fetch_stage(j_, 0);
    end_step();
    for (int k = j_; k > 0; --k) {
      if (own_rows(k) > 0) {
        for (int slice = 0; slice < kSlices; ++slice) {
          const bool last = slice + 1 == kSlices;
          fetch_stage(last ? k - 1 : k, last ? 0 : slice + 1);
          copy_async_wait<1>();
          __syncwarp();
          sums.template subtract_product<kDepth, kStageStride>(stage(slice), known(k) + slice * kDepth * kStrip, lane_);
          __syncwarp();
        }
        unroll<kGroup>([&](auto own) {
          if (first_row() + own == k - 2) sums.template store<own>(pending(k - 2), lane_);
        });
      }
      end_step();
    }
  }

  // V[k - 1] = U^-1 (S[k - 1] - U[k - 1, k] V[k]), where S[j] is an identity.
  __device__ __forceinline__ void solve_rows() const {
    fetch_next(j_ + 1);
    for (int k = j_ + 1; k > 0; --k) {  // V[k] is known, but for k = j + 1, which is nothing
      fetch_next(k - 1);
      copy_async_wait<1>();
      __syncwarp();
      T* to = inverse_ + tile_index(k - 1, j_) * kElements + kStrip * half_;
      if (k > j_) {
        T column[kTile];
#pragma unroll
        for (int i = 0; i < kTile; ++i) column[i] = T(i == kStrip * half_ + lane_ % kStrip);
        substitute_backward(diagonal(k), column);
        store_strip(column, known(j_), to, lane_);
      } else {
        solve_strip(known(k - 1), pending(k - 1), above(k), known(k), diagonal(k), to, k == j_, lane_);
      }
      end_step();
    }
  }

  int j_, half_;
  int warp_, lane_;
  const T* factor_;
  T* inverse_;
  T* shared_;
};

// How a block shares out kTiles tiles of column j of V V^T, one below the other.
template <class T, int kTiles>
struct SquareTraits {
  static constexpr int kWarps = sizeof(T) == 4 ? 2 : 1;  // each has so much of the columns
  static constexpr int kThreads = kWarps * static_cast<int>(kWarpSize);
  static constexpr int kColumns = 8 / kWarps;
  static constexpr int kOperands = kTiles + 1;
  static constexpr size_t kSharedBytes = 2 * kOperands * inverse_tile_bytes(sizeof(T));
};

// inverse <- multiplier * V V^T for the tiles from (i, j) down to the diagonal, at most kTiles, and their mirrors, by
// one block. `tiles` are V's, and the next column's are under way while one is multiplied.
template <class T, int kTiles>
__device__ __forceinline__ void multiply_column(
    int i, int j, int n, int stride, const T* tiles, T multiplier, T* inverse, T* shared) {
  using Traits = SquareTraits<T, kTiles>;
  constexpr int kElements = TileTraits<T>::kElements;
  constexpr int kPack = TileTraits<T>::kPack;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % static_cast<int>(kWarpSize);
  const int first = thread / static_cast<int>(kWarpSize) * (kTile / Traits::kWarps);  // of this warp's columns
  const int along = tiles_along(n), count = min(kTiles, j + 1 - i);
  const auto operands = [&](int k) { return shared + k % 2 * Traits::kOperands * kElements; };
  const auto copy = [&](T* to, const T* from, int elements) {
#pragma unroll 4
    for (int e = thread * kPack; e < elements; e += Traits::kThreads * kPack) copy_async_16(to + e, from + e, 16);
  };
  const auto fetch = [&](int k) {
    if (k >= j) {
      copy(operands(k), tiles + tile_index(i, k) * kElements, count * kElements);
      copy(operands(k) + kTiles * kElements, tiles + tile_index(j, k) * kElements, kElements);
    }
    copy_async_commit();
  };
  T sums[4 * kTiles][Traits::kColumns] = {};
  fetch(along - 1);
#pragma unroll 1
  for (int k = along - 1; k >= j; --k) {
    fetch(k - 1);
    copy_async_wait<1>();
    __syncthreads();
    const T* right = operands(k) + kTiles * kElements + first * TileTraits<T>::kStride;
    tile_product<Inner::kColumns, Inner::kColumns, Sum::kAddDown>(sums, operands(k), right, lane);
    __syncthreads();
  }
  store_inverse_tile(sums, i * kTile, j * kTile + first, n, stride, multiplier, inverse, lane);
}

}  // namespace consequentialism::cuda
