// The inverse of a symmetric positive definite matrix by a team of warps: A = U^T U, V = U^-1, A^-1 = V V^T.
//
// The upper triangle lies in tiles of 32 x 32, in shared memory for a team of one block, in global memory for a
// cluster. Indices are 32 bits: n is at most kMaxRetryOrder. V takes U's place and solves U V = I, not V U = I:
// the residual of the latter is what a product P x with few directions in x shows. The order of the sums depends on n
// and the team only, so results are the same from run to run.
#pragma once

#include <type_traits>

#include "damped_inverse.h"
#include "platform.cuh"
#include "tile.cuh"

namespace consequentialism::cuda {

constexpr int kInverseRetries = 3;

template <class T>
struct InverseState {
  T trace;
  T ridge;
  T multiplier;
  T unit;
  T growth;  // of the ridge in this attempt
  int attempt;
  int broken;
};

// Whether an attempt that came to its end left U: else invert_with_retries has filled the inverse.
template <class T>
__device__ __forceinline__ bool has_factor(const InverseState<T>& state) {
  return state.trace != 0 && isfinite(state.trace) && state.attempt <= kInverseRetries;
}

static_assert(kTile == kInverseTile && sizeof(InverseState<double>) <= kInverseStateBytes);
static_assert(TileTraits<float>::kElements * sizeof(float) == inverse_tile_bytes(sizeof(float)));
static_assert(TileTraits<double>::kElements * sizeof(double) == inverse_tile_bytes(sizeof(double)));

__host__ __device__ constexpr int tiles_along(int n) {
  return (n + kTile - 1) / kTile;
}

// Tile (i, j), i <= j, of the packed upper triangle.
__host__ __device__ constexpr int tile_index(int i, int j) {
  return j * (j + 1) / 2 + i;
}

// The warps that work on one matrix.
template <InverseTeam kTeam>
struct Team {
  int warp;    // of this thread, over all blocks
  int warps;   // of all blocks
  int thread;  // over all blocks
  int threads;

  // Of blocks of threads_each.
  __device__ __forceinline__ explicit Team(int threads_each) {
    const int block = kTeam == InverseTeam::kCluster ? static_cast<int>(cluster_block_rank()) : 0;
    const int blocks = kTeam == InverseTeam::kCluster ? static_cast<int>(cluster_size()) : 1;
    thread = block * threads_each + static_cast<int>(threadIdx.x);
    threads = blocks * threads_each;
    warp = thread / static_cast<int>(kWarpSize);
    warps = threads / static_cast<int>(kWarpSize);
  }

  __device__ __forceinline__ void sync() const {
    if constexpr (kTeam == InverseTeam::kCluster) {
      cluster_sync();
    } else {
      __syncthreads();
    }
  }
};

// The elements of a tile that a lane has of a product with A^T (kRows) or A (kColumns) on the left.
template <Inner kInnerA, class T>
__device__ __forceinline__ T& fragment_element(T* tile, int lane, int q, int p) {
  return tile[fragment_row<T, kInnerA>(lane, q) * TileTraits<T>::kStride + fragment_column<T, Inner::kRows>(lane, p)];
}

// tile -= A^T B (kRows) or A B (kColumns). One product after the other is taken from the tile, never their sum: where
// rows lean on one direction the first takes nearly all of it away, and what is left is small and rounds well.
template <Inner kInnerA, class T>
__device__ __forceinline__ void subtract_product(T* tile, const T* a, const T* b, int lane) {
  T sums[4][8];
#pragma unroll
  for (int q = 0; q < 4; ++q) {
#pragma unroll
    for (int p = 0; p < 8; ++p) sums[q][p] = fragment_element<kInnerA>(tile, lane, q, p);
  }
  tile_product<kInnerA, Inner::kRows, Sum::kSubtractUp>(sums, a, b, lane);
#pragma unroll
  for (int q = 0; q < 4; ++q) {
#pragma unroll
    for (int p = 0; p < 8; ++p) fragment_element<kInnerA>(tile, lane, q, p) = sums[q][p];
  }
}

// Of a tile of the diagonal the entries from (row, column) on, 16 x 16 of them, -= those of A^T A, in the order of
// subtract_product. Unrolled: nothing else hides how long loads take.
__device__ __forceinline__ void subtract_quarter(float* tile, const float* a, int row, int column, int lane) {
  constexpr int kStride = TileTraits<float>::kStride;
  const float* left = a + row + lane / 4 * 2;
  const float* right = a + column + lane % 4 * 4;
  float* own = tile + (row + lane / 4 * 2) * kStride + column + lane % 4 * 4;
  float sums[2][4];
#pragma unroll
  for (int q = 0; q < 2; ++q) load_pack(own + q * kStride, sums[q]);
#pragma unroll
  for (int k = 0; k < kTile; ++k) {
    const float2 factors = *reinterpret_cast<const float2*>(left + k * kStride);
    float pack[4];
    load_pack(right + k * kStride, pack);
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      sums[0][p] = fma(-factors.x, pack[p], sums[0][p]);
      sums[1][p] = fma(-factors.y, pack[p], sums[1][p]);
    }
  }
#pragma unroll
  for (int q = 0; q < 2; ++q) store_pack(own + q * kStride, sums[q]);
}

// Beside a block's first warp, who update its tile of the diagonal.
constexpr int kDiagonalHelpers = 2;

// The upper triangle of a tile of the diagonal -= A^T A: a quarter by a block's first warp (part 0), which factors the
// tile next and returns when all of it is there, and one by each of its last two, which have the fewest other products
// to make. In float64, whose products tensor cores make, by the first warp alone.
template <class T>
__device__ __forceinline__ void update_diagonal(T* tile, const T* a, int part, int lane) {
  if constexpr (sizeof(T) == 4) {
    constexpr int kBarrier = 1 + kFactorGroups;  // those before are FactorRows'
    constexpr int kThreads = (1 + kDiagonalHelpers) * static_cast<int>(kWarpSize);
    subtract_quarter(tile, a, part == 1 ? 16 : 0, part == 0 ? 0 : 16, lane);
    if (part == 0) {
      named_barrier_wait(kBarrier, kThreads);
    } else {
      named_barrier_arrive(kBarrier, kThreads);
    }
  } else if (part == 0) {
    subtract_product<Inner::kRows>(tile, a, a, lane);
    __syncwarp();
  }
}

// The power of two that brings a positive number near 1, and a factor times it is still finite. Exact, so it changes no
// digit, but every pivot is then far from where reciprocals overflow or lose theirs.
__device__ __forceinline__ float unit_of(float value) {
  const int exponent = static_cast<int>(__float_as_uint(value) >> 23);
  return __uint_as_float(static_cast<unsigned>(min(max(254 - exponent, 27), 227)) << 23);
}

__device__ __forceinline__ double unit_of(double value) {
  const auto exponent = static_cast<int>(__double_as_longlong(value) >> 52);
  return __longlong_as_double(static_cast<long long>(min(max(2046 - exponent, 23), 2023)) << 52);
}

// Tile (i, j) of unit * (gram + ridge I), an identity beyond n.
template <class T>
__device__ __forceinline__ void load_tile(
    T* tile, const T* gram, int i, int j, int n, int stride, T ridge, T unit, int lane) {
  const int column = j * kTile + lane;
  for (int r = 0; r < kTile; ++r) {
    const int row = i * kTile + r;
    T value = row == column ? T(1) : T(0);
    if (row < n && column < n) value = unit * (gram[row * stride + column] + (row == column ? ridge : T(0)));
    tile[r * TileTraits<T>::kStride + lane] = value;
  }
}

template <InverseTeam kTeam, class T>
__device__ void load_tiles(const Team<kTeam>& team, const T* gram, int n, int stride, T ridge, T unit, T* tiles) {
  const int lane = team.thread % static_cast<int>(kWarpSize);
  const int along = tiles_along(n);
  int index = 0;
  for (int j = 0; j < along; ++j) {
    for (int i = 0; i <= j; ++i, ++index) {
      if (index % team.warps != team.warp) continue;
      load_tile(tiles + index * TileTraits<T>::kElements, gram, i, j, n, stride, ridge, unit, lane);
    }
  }
}

// Between a block's first warp, which factors a tile, and `followers` other warps that solve with it while it does.
class FactorRows {
 public:
  __device__ __forceinline__ explicit FactorRows(int followers)
      : threads_((1 + followers) * static_cast<int>(kWarpSize)) {}

  // What factor_tile and substitute_forward call.
  __device__ __forceinline__ void publish(int group) const {
    if (threads_ > static_cast<int>(kWarpSize)) named_barrier_arrive(1 + group, threads_);
  }
  // With nothing to wait for, a barrier still keeps loads from coming so early that they take registers that others
  // need.
  __device__ __forceinline__ void await(int group, bool follows) const {
    if (follows) {
      named_barrier_wait(1 + group, threads_);
    } else {
      __syncwarp();
    }
  }

 private:
  int threads_;
};

// tile <- D W, as factor_tile. A cluster's tiles lie in global memory: scratch, in shared memory, is where it works.
template <InverseTeam kTeam, class T>
__device__ __forceinline__ bool factor_tile_of(T* tile, T* scratch, int lane, const FactorRows& rows) {
  const auto publish = [&](int group) { rows.publish(group); };
  if constexpr (kTeam == InverseTeam::kBlock) {
    return factor_tile(tile, lane, publish);
  } else {
    constexpr int kStride = TileTraits<T>::kStride;
#pragma unroll 8
    for (int i = 0; i < kTile; ++i) scratch[i * kStride + lane] = tile[i * kStride + lane];
    __syncwarp();
    const bool works = factor_tile(scratch, lane, publish);
    for (int i = 0; i < kTile; ++i) tile[i * kStride + lane] = scratch[i * kStride + lane];
    tile[lane * kStride + kTile] = scratch[lane * kStride + kTile];
    return works;
  }
}

// The tiles <- U, those of the diagonal as factor_tile leaves them. Returns early where a pivot breaks down;
// state->broken is then 1 + the tile it is in.
//
// A step ends with a row of U. Its first warp brings the tile of the diagonal up to date with the row before and
// factors it, while the others do the same with the rest and then solve the row, in a block while its tile is being
// factored.
template <InverseTeam kTeam, class T>
__device__ void factor_tiles(const Team<kTeam>& team, int along, T* tiles, T* scratch, InverseState<T>* state) {
  using Traits = TileTraits<T>;
  constexpr bool kFollow = kTeam == InverseTeam::kBlock;
  const int lane = team.thread % static_cast<int>(kWarpSize);
  const auto at = [&](int i, int j) { return tiles + tile_index(i, j) * Traits::kElements; };
  const bool first = is_first_warp(team.warp);
  const int others = max(team.warps - 1, 1), own = team.warp - 1;  // more than one tile has four warps
  const auto update_tile_of_diagonal = [&](int k, int part) {
    if constexpr (kFollow) {
      update_diagonal(at(k, k), at(k - 1, k), part, lane);
    } else {
      subtract_product<Inner::kRows>(at(k, k), at(k - 1, k), at(k - 1, k), lane);
      __syncwarp();
    }
  };
  for (int k = 0; k < along; ++k) {
    const FactorRows rows(kFollow ? min(along - 1 - k, others) : 0);
    if (first) {
      if (k > 0) update_tile_of_diagonal(k, 0);
      if (!factor_tile_of<kTeam>(at(k, k), scratch, lane, rows) && lane == 0) state->broken = 1 + k;
    } else if (k > 0) {
      if (kFollow && own >= others - kDiagonalHelpers) update_tile_of_diagonal(k, others - own);
      // Row k first, each tile by the warp that will solve it.
      int index = 0;
      for (int i = k; i < along; ++i) {
        for (int j = max(i, k + 1); j < along; ++j, ++index) {
          if (index % others == own) subtract_product<Inner::kRows>(at(i, j), at(k - 1, i), at(k - 1, j), lane);
        }
      }
      __syncwarp();
    }
    if constexpr (!kFollow) team.sync();
    if (!first) {
      for (int j = k + 1 + own; j < along; j += others) {
        const bool follows = kFollow && j == k + 1 + own;
        substitute_forward(at(k, k), at(k, j), at(k, j), lane, [&](int group) { rows.await(group, follows); });
      }
    }
    team.sync();
    if (state->broken != 0 && state->broken <= 1 + k) return;  // what lies beyond is for the next step
  }
}

// The tiles, as factor_tiles leaves them, <- V = U^-1. From the last row of tiles up: with row k of V known, every row
// above takes its share of it. spare is one tile more.
template <InverseTeam kTeam, class T>
__device__ void invert_tiles(const Team<kTeam>& team, int along, T* tiles, T* spare) {
  using Traits = TileTraits<T>;
  const int lane = team.thread % static_cast<int>(kWarpSize);
  const auto at = [&](int i, int j) { return tiles + tile_index(i, j) * Traits::kElements; };
  for (int k = team.warp; k < along; k += team.warps) scale_factor(at(k, k), at(k, k), lane);
  team.sync();
  for (int k = along - 1; k >= 0; --k) {
    // V[k, j] = U_kk^-1 S[k, j], where S[k, k] is an identity. V[k, k] stays aside until U_kk has been read.
    for (int j = along - 1 - team.warp; j >= k; j -= team.warps) {
      T* tile = j == k ? spare : at(k, j);
      T column[kTile];
#pragma unroll
      for (int i = 0; i < kTile; ++i) column[i] = j == k ? T(i == lane) : tile[i * Traits::kStride + lane];
      substitute_backward(at(k, k), column);
#pragma unroll
      for (int i = 0; i < kTile; ++i) tile[i * Traits::kStride + lane] = column[i];
    }
    team.sync();
    if (team.warp == 0) {
      T* tile = at(k, k);
      for (int i = 0; i < kTile; ++i) tile[i * Traits::kStride + lane] = spare[i * Traits::kStride + lane];
    }
    // S[i, j] -= U[i, k] V[k, j]. S[i, k] takes the place of U[i, k] and waits until that has been read: it is the last
    // that a warp computes, for one row each.
    for (int first = 0; first < k; first += team.warps) {
      const int rows = min(team.warps, k - first);
      const int tasks = rows * (along - k);
      const int rounds = (tasks - 1 - team.warp + team.warps) / team.warps;
      for (int round = rounds - 1; round >= (team.warp < rows ? 1 : 0); --round) {
        const int task = round * team.warps + team.warp;
        const int i = first + task % rows;
        const int j = k + task / rows;
        subtract_product<Inner::kColumns>(at(i, j), at(i, k), at(k, j), lane);
      }
      T sums[4][8] = {};
      if (team.warp < rows)
        tile_product<Inner::kColumns, Inner::kRows, Sum::kSubtractUp>(sums, at(first + team.warp, k), spare, lane);
      team.sync();
      if (team.warp < rows) {
        T* tile = at(first + team.warp, k);
#pragma unroll
        for (int q = 0; q < 4; ++q) {
#pragma unroll
          for (int p = 0; p < 8; ++p) fragment_element<Inner::kColumns>(tile, lane, q, p) = sums[q][p];
        }
      }
    }
    team.sync();
  }
}

// The inverse's rows from first_row and columns from first_column on, and the mirror, <- multiplier * sums, a product
// of columns.
template <class T, int kRows, int kColumns>
__device__ __forceinline__ void store_inverse_tile(
    const T (&sums)[kRows][kColumns], int first_row, int first_column, int n, int stride, T multiplier, T* inverse,
    int lane) {
#pragma unroll
  for (int q = 0; q < kRows; ++q) {
#pragma unroll
    for (int p = 0; p < kColumns; ++p) {
      const int row = first_row + fragment_row<T, Inner::kColumns>(lane, q);
      const int column = first_column + fragment_column<T, Inner::kColumns>(lane, p);
      if (row > column || column >= n) continue;  // of a tile on the diagonal, one triangle and its mirror
      const T value = multiplier * sums[q][p];
      inverse[row * stride + column] = value;
      inverse[column * stride + row] = value;
    }
  }
}

// inverse <- multiplier * V V^T, both triangles. Summed from the last column of V to the first: the other way round the
// sums lose up to four times the digits on duplicate rows.
template <InverseTeam kTeam, class T>
__device__ void multiply_tiles(const Team<kTeam>& team, int n, int stride, const T* tiles, T multiplier, T* inverse) {
  using Traits = TileTraits<T>;
  const int lane = team.thread % static_cast<int>(kWarpSize);
  const int along = tiles_along(n);
  const auto at = [&](int i, int j) { return tiles + tile_index(i, j) * Traits::kElements; };
  int index = 0;
  for (int j = 0; j < along; ++j) {
    for (int i = 0; i <= j; ++i, ++index) {
      if (index % team.warps != team.warp) continue;
      T sums[4][8] = {};
#pragma unroll 1
      for (int k = along - 1; k >= j; --k) {
        tile_product<Inner::kColumns, Inner::kColumns, Sum::kAddDown>(sums, at(i, k), at(j, k), lane);
      }
      store_inverse_tile(sums, i * kTile, j * kTile, n, stride, multiplier, inverse, lane);
    }
  }
}

// What the team needs again after each attempt lies in its state: held in registers through a factor, it would spill.
template <class T>
__device__ __forceinline__ void begin_attempt(InverseState<T>* state, int attempt) {
  state->attempt = attempt;
  state->growth = attempt == 0 ? T(1) : 10 * state->growth;
  state->broken = 0;
}

// fill(row, column) for every entry of the inverse. For the rare ends without a factor.
template <InverseTeam kTeam, class T, class Fill>
__device__ __forceinline__ void fill_inverse(const Team<kTeam>& team, T* inverse, int n, int stride, const Fill& fill) {
#pragma unroll 1
  for (int row = 0; row < n; ++row) {
#pragma unroll 1
    for (int column = team.thread; column < n; column += team.threads) {
      inverse[row * stride + column] = fill(row, column);
    }
  }
}

// The whole, for one matrix and all threads of its team, whose state is. Rows of the item's gram are `stride` apart.
// factor(ridge) factors gram + ridge I in state's unit and leaves state->broken to all threads; where that is 0,
// finish(multiplier) inverts. count_breakdown() is called by one thread, where a first attempt broke down.
template <InverseTeam kTeam, class T, class Factor, class Finish, class Count>
__device__ __forceinline__ void invert_with_retries(
    const Team<kTeam>& team, const InverseItem<T>& item, int n, int stride, InverseState<T>* state,
    const Factor& factor, const Finish& finish, const Count& count_breakdown) {
  const int lane = team.thread % static_cast<int>(kWarpSize);
  if (team.warp == 0) {
    T trace = 0;
    for (int i = lane; i < n; i += static_cast<int>(kWarpSize)) trace += item.gram[i * stride + i];
    for (int step = kWarpSize / 2; step > 0; step /= 2) trace += __shfl_xor_sync(kFullWarp, trace, step);
    if (lane == 0) {
      const T ridge = static_cast<T>(item.relative ? item.damping * trace / item.rank : item.damping);
      state->trace = trace;
      state->ridge = ridge;
      state->multiplier = static_cast<T>(item.scaled_by_c ? item.factor * ridge : item.factor);
      state->unit = unit_of(trace / static_cast<T>(n) + ridge);
      begin_attempt(state, 0);
      if (item.only_if != nullptr && trace != 0 && isfinite(trace)) {  // the first attempt, elsewhere, broke down
        count_breakdown();
        begin_attempt(state, 1);
      }
    }
  }
  team.sync();
  const T trace = state->trace;
  if (trace == 0 || !isfinite(trace)) {
    const T value = trace - trace;  // zero, or NaN
    fill_inverse(team, item.inverse, n, item.inverse_stride, [&](int, int) { return value; });
    return;
  }
#pragma unroll 1
  while (state->attempt <= kInverseRetries) {
    factor(state->ridge * state->growth);
    if (!state->broken) {
      finish(state->unit * state->multiplier);
      return;
    }
    team.sync();
    if (team.thread == 0) {
      if (state->attempt == 0) count_breakdown();
      begin_attempt(state, state->attempt + 1);
    }
    team.sync();
  }
  fill_inverse(team, item.inverse, n, item.inverse_stride, [&](int row, int column) {
    return row == column ? state->multiplier / (item.gram[row * stride + column] + state->ridge) : T(0);
  });
}

// Both of the item's matrices may be the same. tiles, one more than the triangle has, are the team's; scratch is one
// tile of a cluster's first block, in shared memory.
template <InverseTeam kTeam, class T, class Count>
__device__ void invert_matrix(
    const Team<kTeam>& team, const InverseItem<T>& item, int n, int stride, T* tiles, std::type_identity_t<T>* scratch,
    InverseState<T>* state, const Count& count_breakdown) {
  const auto factor = [&](T ridge) {
    load_tiles(team, item.gram, n, stride, ridge, state->unit, tiles);
    team.sync();
    factor_tiles(team, tiles_along(n), tiles, scratch, state);
  };
  const auto finish = [&](T multiplier) {
    const int along = tiles_along(n);
    T* spare = tiles + tile_index(0, along) * TileTraits<T>::kElements;
    invert_tiles(team, along, tiles, spare);
    multiply_tiles(team, n, item.inverse_stride, tiles, multiplier, item.inverse);
  };
  invert_with_retries(team, item, n, stride, state, factor, finish, count_breakdown);
}

}  // namespace consequentialism::cuda
