// The factor of damped_inverse.cuh, the same sums in the same order, by a cluster whose blocks keep the tiles that they
// work on in their shared memory.
//
// The blocks form a grid: tile (i, j) is worked on by the block of row i mod rows and column j mod columns, and by no
// other. A row of U that is finished goes to global memory, that is to L2. Of a step a block needs
// the finished tiles of its own rows and of its own columns, which it fetches once for all its warps: with 16 blocks
// each tile is read by 7, for which L2 has more bandwidth than the 4 blocks that have a row would have between them.
//
// Each step has one barrier of the cluster: every block of a row of the grid factors that row's tile on the diagonal
// for itself, and solves its part of the row at once.
#pragma once

#include "damped_inverse.cuh"

namespace consequentialism::cuda {

template <class T>
class ResidentTiles {
 public:
  // finished has the upper triangle and two tiles more, in global memory.
  __device__ __forceinline__
  ResidentTiles(const Team<InverseTeam::kCluster>& team, int along, const ResidentShape& shape, T* shared, T* finished)
      : team_(team),
        along_(along),
        rows_(shape.rows),
        columns_(shape.columns),
        row_(static_cast<int>(cluster_block_rank()) % shape.rows),
        column_(static_cast<int>(cluster_block_rank()) / shape.rows),
        warp_(static_cast<int>(threadIdx.x / kWarpSize)),
        warps_(static_cast<int>(blockDim.x / kWarpSize)),
        lane_(static_cast<int>(threadIdx.x % kWarpSize)),
        shared_(shared),
        finished_(finished),
        room_(shape.room),
        own_(own_before(along)) {}

  // The tiles <- unit * (gram + ridge I).
  __device__ void load(const T* gram, int n, int stride, T ridge, T unit) const {
    int index = 0;
    for (int j = column_; j < along_; j += columns_) {
      for (int i = row_; i <= j; i += rows_, ++index) {
        if (index % warps_ != warp_) continue;
        T* tile = i == j && i < 2 ? pending(i) : home(i, j);
        load_tile(tile, gram, i, j, n, stride, ridge, unit, lane_);
      }
    }
    team_.sync();
  }

  // The finished tiles <- U. Returns early where a pivot breaks down; state->broken is then 1 + the tile it is in.
  __device__ void factor(InverseState<T>* state) const {
    for (int next = 0; next < along_; ++next) {
      const int k = next - 1;  // the last row that is finished
      if (k >= 0) {
        // What lies beyond comes from a block that is a step ahead, and is for the step after this.
        if (state->broken != 0 && state->broken <= next) return;
        for (int i = next_of(next, row_, rows_); i < along_; i += rows_) stage(row_tile(i), at(k, i), i / rows_);
        for (int j = next_of(next, column_, columns_); j < along_; j += columns_) {
          stage(column_tile(j), at(k, j), j / columns_);
        }
      }
      const bool own_row = row_ == next % rows_;
      if (own_row) stage(diagonal(), pending(next), warps_ - 1);
      finish_stages();
      if (!own_row) {
        if (k >= 0) update_rows(k, next, along_, warp_, warps_);
      } else {
        const int solved = count_of(along_, column_, columns_) - count_of(next + 1, column_, columns_);
        const int own = warp_ - 1, others = warps_ - 1;
        const FactorRows rows(min(solved, others));
        if (is_first_warp(warp_)) {
          factor_diagonal(next, rows, state);
        } else {
          if (k >= 0) {
            if (own >= others - kDiagonalHelpers) update_diagonal(diagonal(), row_tile(next), others - own, lane_);
            update_rows(k, next, next + 1, own, others);  // first, each tile by the warp that will solve it
            update_rows(k, next + 1, along_, (own + others - solved % others) % others, others);
            __syncwarp();
          }
          solve_row(next, rows);
        }
      }
      team_.sync();
    }
  }

 private:
  static constexpr int kElements = TileTraits<T>::kElements;
  static constexpr int kStride = TileTraits<T>::kStride;
  static constexpr bool kPairs = sizeof(T) == 4;
  static constexpr int kPairsFrom = 14;                   // rows of tiles that are left
  static constexpr int kUnroll = sizeof(T) == 4 ? 9 : 1;  // of copies: otherwise ptxas takes registers until it spills

  // How many of 0, 1, ..., below - 1 are own mod count.
  static __device__ __forceinline__ int count_of(int below, int own, int count) {
    return (below - own + count - 1) / count;
  }

  // The first from `first` on that is own mod count.
  static __device__ __forceinline__ int next_of(int first, int own, int count) {
    return own + count_of(first, own, count) * count;
  }

  // This block's tiles in columns 0, 1, ..., j - 1.
  __device__ __forceinline__ int own_before(int j) const {
    const int columns = count_of(j, column_, columns_);
    return columns_ / rows_ * (columns * (columns - 1) / 2) + columns * count_of(column_ + 1, row_, rows_);
  }

  // What a block has in shared memory: of a finished row the tiles of its rows and of its columns, a tile on the
  // diagonal, and its own tiles, or the last of them.
  __device__ __forceinline__ T* row_tile(int i) const { return shared_ + i / rows_ * kElements; }
  __device__ __forceinline__ T* column_tile(int j) const {
    return shared_ + (count_of(along_, 0, rows_) + j / columns_) * kElements;
  }
  __device__ __forceinline__ T* diagonal() const {
    return shared_ + (count_of(along_, 0, rows_) + count_of(along_, 0, columns_)) * kElements;
  }

  __device__ __forceinline__ T* at(int i, int j) const { return finished_ + tile_index(i, j) * kElements; }

  // A tile on the diagonal but for the last row's share of it, for all blocks that factor it.
  __device__ __forceinline__ T* pending(int k) const { return finished_ + tile_index(k % 2, along_) * kElements; }

  // Where the own tile (i, j) lies while it is worked on. The first columns, which are worked on least, lie where
  // they will be finished, if shared memory has no room for them.
  __device__ __forceinline__ T* home(int i, int j) const {
    const int left = own_ - own_before(j) - i / rows_;  // and this one
    return left <= room_ ? diagonal() + left * kElements : at(i, j);
  }

  // A tile, by the warp whose turn it is. `finish_stages` waits for all that a block has asked for.
  __device__ __forceinline__ void stage(T* to, const T* from, int turn) const {
    constexpr int kPack = TileTraits<T>::kPack;
    if (turn % warps_ != warp_) return;
#pragma unroll kUnroll
    for (int e = lane_ * kPack; e < kElements; e += static_cast<int>(kWarpSize) * kPack) {
      copy_async_16(to + e, from + e, 16);
    }
  }

  __device__ __forceinline__ void finish_stages() const {
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
  }

  __device__ __forceinline__ void copy(T* to, const T* from) const {
#pragma unroll 8
    for (int e = lane_; e < kElements; e += static_cast<int>(kWarpSize)) to[e] = from[e];
    __syncwarp();
  }

  // As subtract_product of A^T B, of one tile or of two that share b, whose a lie behind one another. A tile is read
  // and written 16 bytes at once: one element at a time four or eight lanes would meet in a bank.
  template <int kTiles>
  __device__ __forceinline__ void subtract(T* const (&tiles)[kTiles], const T* a, const T* b) const {
    constexpr int kPack = TileTraits<T>::kPack;
    T sums[4 * kTiles][8];
    for_each_pack(tiles, [&](T* pack, int q, int p) {
      T values[kPack];
      load_pack(pack, values);
#pragma unroll
      for (int e = 0; e < kPack; ++e) sums[q][p + e] = values[e];
    });
    tile_product<Inner::kRows, Inner::kRows, Sum::kSubtractUp>(sums, a, b, lane_);
    for_each_pack(tiles, [&](T* pack, int q, int p) {
      T values[kPack];
#pragma unroll
      for (int e = 0; e < kPack; ++e) values[e] = sums[q][p + e];
      store_pack(pack, values);
    });
  }

  template <int kTiles, class Step>
  __device__ __forceinline__ void for_each_pack(T* const (&tiles)[kTiles], const Step& step) const {
#pragma unroll
    for (int q = 0; q < 4 * kTiles; ++q) {
#pragma unroll
      for (int p = 0; p < 8; p += TileTraits<T>::kPack) {
        step(&fragment_element<Inner::kRows>(tiles[q / 4], lane_, q % 4, p), q, p);
      }
    }
  }

  __device__ __forceinline__ void factor_diagonal(int next, const FactorRows& rows, InverseState<T>* state) const {
    T* tile = diagonal();
    if (next > 0) update_diagonal(tile, row_tile(next), 0, lane_);
    const bool works = factor_tile(tile, lane_, [&](int group) { rows.publish(group); });
    if (!works && lane_ == 0) state->broken = 1 + next;
    if (column_ == next % columns_) scale_factor(tile, at(next, next), lane_);
  }

  // The own tiles of row `next` of U but for the one on the diagonal, by all warps but the first.
  __device__ __forceinline__ void solve_row(int next, const FactorRows& rows) const {
    const int own = warp_ - 1, others = warps_ - 1;
    int index = 0;
    for (int j = next_of(next + 1, column_, columns_); j < along_; j += columns_, ++index) {
      if (index % others != own) continue;
      substitute_forward(
          diagonal(), home(next, j), at(next, j), lane_, [&](int group) { rows.await(group, index == own); });
    }
  }

  // The own tiles of the rows from `first` to `end`, but for the one on the diagonal of row k + 1. By twos of a column,
  // which read two thirds as much, where there are enough of them for all warps.
  __device__ __forceinline__ void update_rows(int k, int first, int end, int own, int others) const {
    const bool pairs = kPairs && along_ - k >= kPairsFrom;
    int index = 0;
    for (int j = next_of(k + 2, column_, columns_); j < along_; j += columns_) {
      const int below = min(j + 1, end);
      for (int i = next_of(first, row_, rows_); i < below; ++index) {
        const bool pair = pairs && i + rows_ < below;
        if (index % others == own) update(k, i, j, pair);
        i += pair ? 2 * rows_ : rows_;
      }
    }
  }

  // Tile (i, j), and the next own one of the column.
  __device__ __forceinline__ void update(int k, int i, int j, bool pair) const {
    if constexpr (kPairs) {
      if (pair) return subtract<2>({home(i, j), home(i + rows_, j)}, row_tile(i), column_tile(j));
    }
    T* tile = home(i, j);
    subtract<1>({tile}, row_tile(i), column_tile(j));
    if (i == j && i == k + 2) {
      __syncwarp();
      copy(pending(i), tile);
    }
  }

  Team<InverseTeam::kCluster> team_;
  int along_;
  int rows_, columns_;  // of the grid of blocks
  int row_, column_;    // this block's place in it
  int warp_, warps_;    // of this block
  int lane_;
  T* shared_;
  T* finished_;
  int room_;  // own tiles in shared memory
  int own_;
};

}  // namespace consequentialism::cuda
