// The input Gram by products of warpgroups: tiles of 128 by 256 of its upper triangle, each by two warpgroups of 64
// rows.
//
// A stage is 64 inner indices of both operands, in panels as wgmma.cuh has them. While the tensor cores work on one,
// the threads have copied the next and copy the one after it; a barrier a stage says that it is there, and that all
// have waited for the products of the stage before the last, whose place is written to.
#pragma once

#include "gram_entries.cuh"
#include "wgmma.cuh"

namespace consequentialism::cuda {

template <class T, bool kPrimal>
struct WarpgroupProduct {
  static_assert(sizeof(T) == 2);
  using Element = T;
  using Sum = float;
  static constexpr Major kMajor = kPrimal ? Major::kOuter : Major::kInner;
  static constexpr int kTileM = kWarpgroupRows;
  static constexpr int kTileN = kWarpgroupTile;
  static constexpr int kThreads = 256;
  static constexpr int kDepth = kWarpgroupDepth;
  static constexpr int kPanelsM = kTileM / 64;
  static constexpr int kPanelsN = kTileN / 64;
  static constexpr size_t kSharedBytes = kWarpgroupSharedBytes;
  static_assert(kSharedBytes <= kMaxSharedBytes);
};

template <class Source>
struct WarpgroupProductOfSource;
template <class T, bool kPrimal>
struct WarpgroupProductOfSource<MatrixSource<T, float, kPrimal>> {
  using Type = WarpgroupProduct<T, kPrimal>;
};
template <class T>
struct WarpgroupProductOfSource<ColumnBlocks<T>> {
  using Type = WarpgroupProduct<T, true>;
};
template <class Source>
using WarpgroupProductOf = typename WarpgroupProductOfSource<Source>::Type;

// vector: of row threadIdx.x, if there is one.
template <class T, bool kPrimal>
struct BlockSums<WarpgroupProduct<T, kPrimal>> {
  float tile[kWarpgroupSums];
  float vector;
};

template <class P, class T, bool kPrimal, class Step>
__device__ __forceinline__ void for_each_pair(const BlockSums<WarpgroupProduct<T, kPrimal>>& sums, const Step& step) {
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  const int first = static_cast<int>(threadIdx.x / kWarpSize) * 16 + lane / 4;
#pragma unroll
  for (int j = 0; j < P::kTileN / 8; ++j) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      step(first + 8 * half, 8 * j + 2 * (lane % 4), sums.tile[4 * j + 2 * half], sums.tile[4 * j + 2 * half + 1]);
    }
  }
}

template <class P, class T, bool kPrimal, class Step>
__device__ __forceinline__ void for_each_of_vector(
    const BlockSums<WarpgroupProduct<T, kPrimal>>& sums, const Step& step) {
  const int row = static_cast<int>(threadIdx.x);
  if (row < P::kTileM) step(row, sums.vector);
}

// Of index = 0, 1, ... in the order (0, 0), (1, 0), (0, 1), (1, 1), (2, 1), (3, 1), (0, 2), ...: a column of tiles has
// two more than the one before.
__device__ __forceinline__ UpperTile warpgroup_tile(unsigned index) {
  int column = static_cast<int>((sqrtf(4 * static_cast<float>(index) + 1) - 1) / 2);
  const auto first = [](int c) { return static_cast<unsigned>(c) * static_cast<unsigned>(c + 1); };
  while (first(column) > index) --column;
  while (first(column + 1) <= index) ++column;
  return {static_cast<int>(index - first(column)), column};
}

// panel[64][64] <- from[line + r][column + c], zero from `lines` and `columns` on; every row of `from` is aligned to 16
// bytes, and so is column. The caller commits and waits.
template <int kThreads, class T>
__device__ __forceinline__ void stage_panel(
    unsigned char* panel, const MatrixView<T>& from, int64_t line, int64_t column, int64_t lines, int64_t columns) {
  constexpr int kChunk = 16 / static_cast<int>(sizeof(T)), kChunks = 64 / kChunk, kRows = kThreads / kChunks;
  static_assert(kRows % 8 == 0 && 64 % kRows == 0);
  const int first = static_cast<int>(threadIdx.x) / kChunks, chunk = static_cast<int>(threadIdx.x) % kChunks;
  const int left = static_cast<int>(min(columns - column, int64_t{64})) - chunk * kChunk;
  const int valid = max(0, min(left, kChunk)) * static_cast<int>(sizeof(T));
  const T* source = from.data + (line + first) * from.stride + column + chunk * kChunk;
  unsigned char* to = panel + first * kSwizzledLine + 16 * swizzled_chunk(first, chunk);
#pragma unroll
  for (int r = 0; r < 64; r += kRows) {
    const bool inside = valid > 0 && line + first + r < lines;
    copy_async_16(to + r * kSwizzledLine, inside ? source : from.data, inside ? valid : 0);
    source += kRows * from.stride;
  }
}

// The panels of x's outer indices from `outer` on, of one stage.
template <class P, int kPanels, class Source>
__device__ __forceinline__ void stage_panels(
    unsigned char* panels, const Source& source, int64_t outer, int64_t inner, int64_t inner_end) {
#pragma unroll
  for (int p = 0; p < kPanels; ++p, panels += kPanelBytes, outer += 64) {
    if constexpr (P::kMajor == Major::kInner) {
      stage_panel<P::kThreads>(panels, source.x, outer, inner, source.outer, inner_end);
    } else {
      stage_panel<P::kThreads>(panels, source.x, inner, outer, inner_end, source.outer);
    }
  }
}

// The descriptor of the stage's 16 inner indices from 16 k on.
template <class P>
__device__ __forceinline__ uint64_t descriptor_of(uint32_t panels, int k) {
  constexpr uint32_t kEightLines = 8 * kSwizzledLine;
  if constexpr (P::kMajor == Major::kInner) {
    return operand_descriptor(panels + static_cast<uint32_t>(k) * 32, 16, kEightLines);
  } else {
    return operand_descriptor(panels + static_cast<uint32_t>(k) * 2 * kEightLines, kPanelBytes, kEightLines);
  }
}

template <class T>
struct alignas(2 * sizeof(T)) ElementPair {
  T left, right;
};

// sums += this thread's share of the sums along inner of two of the 128 outer indices whose panels, outer-major, these
// are: a quarter of the stage.
template <class T>
__device__ __forceinline__ void add_columns(float (&sums)[2], const unsigned char* panels) {
  const int word = static_cast<int>(threadIdx.x) % 64, first = static_cast<int>(threadIdx.x) / 64 * 16;
  const unsigned char* panel = panels + word / 32 * kPanelBytes + word % 4 * 4;
#pragma unroll
  for (int line = first; line < first + 16; ++line) {
    const int chunk = swizzled_chunk(line, word % 32 / 4);
    const auto pair = *reinterpret_cast<const ElementPair<T>*>(panel + line * kSwizzledLine + 16 * chunk);
    sums[0] += to_float(pair.left);
    sums[1] += to_float(pair.right);
  }
}

// sums.vector <- the sums of all threads' shares, in shared memory that nobody uses.
template <class T, bool kPrimal>
__device__ __forceinline__ void add_shares(
    BlockSums<WarpgroupProduct<T, kPrimal>>& sums, const float (&shares)[2], unsigned char* shared) {
  float* own = reinterpret_cast<float*>(shared);  // [4][128]
  const int thread = static_cast<int>(threadIdx.x), at = thread / 64 * 128 + thread % 64 * 2;
  own[at] = shares[0];
  own[at + 1] = shares[1];
  __syncthreads();
  if (thread < 128) sums.vector = (own[thread] + own[128 + thread]) + (own[256 + thread] + own[384 + thread]);
}

// sums <- the tile's, over inner in [begin, end), begin a multiple of 16 bytes; where `vector`, also those of its rows
// of x^T with ones. The tile's rows may lie among its columns, and are copied once then. shared has P::kSharedBytes; it
// may be in use before by others, not after, until the block meets again.
template <class P, class Source>
__device__ __forceinline__ void warpgroup_product(
    BlockSums<P>& sums, const Source& source, UpperTile tile, int64_t begin, int64_t end, unsigned char* shared,
    bool vector) {
  constexpr int kStages = kWarpgroupStages;
  constexpr int kSteps = P::kDepth / kWarpgroupInner;
  const bool diagonal = tile.row / 2 == tile.column;
  const int64_t first_row = static_cast<int64_t>(tile.row) * P::kTileM;
  const int64_t first_column = static_cast<int64_t>(tile.column) * P::kTileN;
  shared += (kSwizzledAlignment - shared_address(shared) % kSwizzledAlignment) % kSwizzledAlignment;
  const uint32_t address = shared_address(shared);
  const uint32_t warpgroup = threadIdx.x / 128;
  const uint32_t rows_at = diagonal ? static_cast<uint32_t>(tile.row % 2) * P::kPanelsM * kPanelBytes
                                    : static_cast<uint32_t>(P::kPanelsN) * kPanelBytes;
  float shares[2] = {};
#pragma unroll
  for (int i = 0; i < kWarpgroupSums; ++i) sums.tile[i] = 0;
  sums.vector = 0;
  const auto stage = [&](int64_t inner, int slot) {
    if (inner < end) {
      unsigned char* panels = shared + slot * kWarpgroupStageBytes;
      stage_panels<P, P::kPanelsN>(panels, source, first_column, inner, end);
      if (!diagonal) {
        stage_panels<P, P::kPanelsM>(panels + P::kPanelsN * kPanelBytes, source, first_row, inner, end);
      }
    }
    copy_async_commit();
  };
  __syncthreads();
#pragma unroll
  for (int slot = 0; slot < kStages - 2; ++slot) stage(begin + slot * P::kDepth, slot);
  int slot = 0;
#pragma unroll 1
  for (int64_t inner = begin; inner < end; inner += P::kDepth) {
    copy_async_wait<kStages - 3>();
    fence_shared_for_products();
    __syncthreads();  // this stage is there, and nobody reads the one before the last
    const uint32_t columns = address + static_cast<uint32_t>(slot) * static_cast<uint32_t>(kWarpgroupStageBytes);
    const uint32_t rows = columns + rows_at + warpgroup * kPanelBytes;
    warpgroup_fence();
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      wgmma_m64n256k16<typename P::Element, P::kMajor>(
          sums.tile, descriptor_of<P>(rows, k), descriptor_of<P>(columns, k));
    }
    warpgroup_commit();
    stage(inner + (kStages - 2) * P::kDepth, (slot + kStages - 2) % kStages);
    if constexpr (P::kMajor == Major::kOuter) {
      if (vector) add_columns<typename P::Element>(shares, shared + slot * kWarpgroupStageBytes + rows_at);
    }
    warpgroup_wait<1>();
    slot = (slot + 1) % kStages;
  }
  warpgroup_wait<0>();
  __syncthreads();
  if (vector) add_shares(sums, shares, shared);
}

// The tile's sums, added up in the order of the cluster's blocks, to the Gram. Each block takes some of the rows, eight
// at a time: from shared memory, row by row above the diagonal and column by column below, so that both are written in
// whole sectors of 32 bytes. shared is that of the product.
template <class P, class Write>
__device__ __forceinline__ void write_tile_of_warpgroups(
    const BlockSums<P>& sums, int64_t first_row, int64_t first_column, int64_t outer, bool vector,
    unsigned char* shared, const Write& write) {
  constexpr int kStride = P::kTileN + 8;  // half a warp's pairs of sums meet no bank twice
  constexpr int kRows = 8;
  static_assert(P::kThreads == P::kTileN && P::kTileM * (kStride + 1) * sizeof(float) <= P::kSharedBytes);
  const int blocks = static_cast<int>(cluster_size()), rank = static_cast<int>(cluster_block_rank());
  const int thread = static_cast<int>(threadIdx.x);
  float* own = reinterpret_cast<float*>(shared);  // [128][264]
  float* own_vector = own + P::kTileM * kStride;  // [128]
  __syncthreads();
  for_each_pair<P>(sums, [&](int row, int column, float left, float right) {
    *reinterpret_cast<float2*>(own + row * kStride + column) = make_float2(left, right);
  });
  if (vector) for_each_of_vector<P>(sums, [&](int row, float value) { own_vector[row] = value; });
  cluster_sync();
  const auto add = [&](float* at) {
    float sum = 0;
    for (int block = 0; block < blocks; ++block) sum += *cluster_map(at, static_cast<unsigned>(block));
    return sum;
  };
#pragma unroll 1
  for (int first = kRows * rank; first < P::kTileM; first += kRows * blocks) {
    float* at = own + first * kStride + thread;
    float values[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) values[r] = add(at + r * kStride);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = first_row + first + r, column = first_column + thread;
      if (row <= column && column < outer) at[r * kStride] = write.upper(row, column, values[r]);
    }
  }
  for (int r = rank * P::kThreads + thread; vector && r < P::kTileM && first_row + r < outer;
       r += blocks * P::kThreads) {
    write(first_row + r, outer, add(own_vector + r));
  }
  __syncthreads();
#pragma unroll 1
  for (int first = kRows * rank; write.partial == nullptr && first < P::kTileM; first += kRows * blocks) {
#pragma unroll 1
    for (int c = thread / kRows; c < P::kTileN; c += P::kThreads / kRows) {
      const int r = first + thread % kRows;
      const int64_t row = first_row + r, column = first_column + c;
      if (row < column && column < outer) write.lower(row, column, own[r * kStride + c]);
    }
  }
  cluster_sync();
}

// As gram_kernel, by warpgroups; a split's range in chains of kWarpgroupChain, for more than one of which partial is
// needed.
template <class Source, class Entries>
__global__ void __launch_bounds__(WarpgroupProductOf<Source>::kThreads, 1) warpgroup_gram_kernel(
    const Source sources, int64_t inner, const GramGrid grid, const Entries all, float* __restrict__ partial) {
  using P = WarpgroupProductOf<Source>;
  const unsigned cluster = blockIdx.x / cluster_size();
  const int64_t split = static_cast<int64_t>(cluster / grid.tiles) * cluster_size() + cluster_block_rank();
  const UpperTile tile = warpgroup_tile(cluster % grid.tiles);
  const int64_t begin = min(split * grid.depth, inner), end = min(begin + grid.depth, inner);
  const auto source = sources.of(blockIdx.y, gridDim.y);
  const Entries entries = all.of(blockIdx.y, gridDim.y);
  const bool whole = partial == nullptr;
  const int64_t offset = (split * gridDim.y + blockIdx.y) * entries.order * entries.order;
  const int64_t first_row = static_cast<int64_t>(tile.row) * P::kTileM;
  const int64_t first_column = static_cast<int64_t>(tile.column) * P::kTileN;
  const bool vector = source.ones && tile.row / 2 == tile.column;
  unsigned char* shared = dynamic_shared<unsigned char>();
  GramWriter<float, Entries> write{entries, whole ? nullptr : partial + offset, false};
  int64_t chain = begin;
  do {
    BlockSums<P> sums;
    warpgroup_product<P>(sums, source, tile, chain, min(chain + kWarpgroupChain, end), shared, vector);
    write_tile_of_warpgroups<P>(sums, first_row, first_column, source.outer, vector, shared, write);
    chain += kWarpgroupChain;
    write.accumulate = true;
  } while (chain < end);
  if (tile.row != 0 || tile.column != 0 || (whole && cluster_block_rank() != 0)) return;
  write.accumulate = false;
  write_rest<P::kThreads>(source, entries, whole, whole ? inner : end - begin, write);
}

}  // namespace consequentialism::cuda
