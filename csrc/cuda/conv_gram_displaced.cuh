// A convolution's Gram from displaced products: see conv_gram_displaced.h.
#pragma once

#include "conv_gram.cuh"
#include "conv_gram_displaced.h"

namespace consequentialism::cuda {

constexpr int kAssembleColumns = 32;  // channels of one tap, by as many threads
constexpr int kAssembleRows = 8;      // of the other

// A cell's positions as rows, and displaced channels as columns.
template <class T>
struct CellView : PatchView<T> {
  const int* offsets;  // of the displacements

  __device__ __forceinline__ int column(int j) const { return offsets[j / this->channels] + j % this->channels; }
};

// How the cells' rows are cut into pieces, in the order of the cells.
struct CellPieces {
  Displacements displacements;
  unsigned samples, depth;  // of the largest piece of the batch

  // Of a cell with so many positions in a sample.
  __device__ __forceinline__ unsigned of(int positions) const {
    const unsigned rows = samples * static_cast<unsigned>(positions);
    return rows / depth + (rows % depth != 0);
  }
};

// DisplacedPlan as the kernel takes it; strides and offsets in elements.
template <class T>
struct DisplacedView {
  const T* data;
  int64_t group;  // from group to group
  CellPieces pieces;
  Divisor core[3], line;
  int sample, step[3];  // from sample to sample, and along D, H, W
  int samples;
  int channels, used_channels;
  int unit;  // bytes of a copy
  int sources[2], targets[kMostTargets];

  // The cell of a piece, which becomes the index of the piece among the cell's.
  __device__ __forceinline__ void find(unsigned& piece, int (&cell)[3]) const {
    const auto& axes = pieces.displacements.axes;
    for (cell[0] = 0;; ++cell[0]) {
      for (cell[1] = 0; cell[1] < axes[1].cells(); ++cell[1]) {
        for (cell[2] = 0; cell[2] < axes[2].cells(); ++cell[2]) {
          const unsigned own = pieces.of(axes[0].count(cell[0]) * axes[1].count(cell[1]) * axes[2].count(cell[2]));
          if (piece < own) return;
          piece -= own;
        }
      }
    }
  }

  __device__ __forceinline__ CellView<T> of(const int (&cell)[3], const int* offsets) const {
    CellView<T> view{};
    view.data = data;
    view.sample = sample;
    view.channels = channels;
    view.used_channels = used_channels;
    view.unit = unit;
    view.offsets = offsets;
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      const Displacements& own = pieces.displacements;
      const bool ahead = own.sources == 2 && own.along == i;  // a line of memory before the image
      view.data += static_cast<int64_t>(own.axes[i].begin(cell[i]) + ahead) * step[i];
      view.position[i] = step[i];
      view.positions[i] = cell[i] == 0 ? core[i] : line;
    }
    return view;
  }
};

template <class T, int kTile, int kTerms>
struct DisplacedTraits {
  using Mma = GramMma<T, Accumulator<T>>;
  static constexpr int kThreads = threads_of_tile(kTile);
  static constexpr int kResident = resident_of_tile(kTile, sizeof(Accumulator<T>));
  static constexpr int kDepth = stage_depth(sizeof(T));
  using Operand = PatchOperand<Mma, T, kTile, kDepth, kThreads, CellView<T>>;
  using P = Product<Mma, Operand, kTerms, Operand, kTerms, kTile, kTile, 2, kTile == kLargeTile ? 4 : 2, kDepth>;
  static_assert(P::kThreads == kThreads);
};

// partial [pieces, groups, rows, columns + 1] <- the products of each piece, or onto it, and where wanted its rows'
// sums. Block (tile + tiles * piece, group).
template <class Traits, class T>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kResident) displaced_products_kernel(
    const __grid_constant__ DisplacedView<T> all, bool sums_wanted, bool accumulate, unsigned tiles,
    unsigned tiles_across, Accumulator<T>* __restrict__ partial) {
  using P = typename Traits::P;
  using G = Accumulator<T>;
  using Operand = typename Traits::Operand;
  const unsigned tile = blockIdx.x % tiles, piece = blockIdx.x / tiles;
  unsigned split = piece;
  int own[3];
  all.find(split, own);
  const Displacements& displacements = all.pieces.displacements;
  const auto& axes = displacements.axes;
  const int64_t inner = int64_t{all.samples} * axes[0].count(own[0]) * axes[1].count(own[1]) * axes[2].count(own[2]);
  const int64_t begin = min(static_cast<int64_t>(split) * all.pieces.depth, inner);
  const int64_t end = min(begin + all.pieces.depth, inner);
  const int64_t rows = displacements.sources * all.channels, columns = displacements.targets * all.channels;
  const int64_t first_row = static_cast<int64_t>(tile / tiles_across) * P::kTileM;
  const int64_t first_column = static_cast<int64_t>(tile % tiles_across) * P::kTileN;
  CellView<T> sources = all.of(own, all.sources), targets = all.of(own, all.targets);
  sources.data += blockIdx.y * all.group;
  targets.data += blockIdx.y * all.group;
  BlockSums<P> sums;
  const bool vector = sums_wanted && first_column == 0;
  block_product<P>(
      sums, Operand(sources, first_row, rows), Operand(targets, first_column, columns), false, begin, end,
      dynamic_shared<unsigned char>(), Ones{vector});
  G* out = partial + (static_cast<int64_t>(piece) * gridDim.y + blockIdx.y) * rows * (columns + 1);
  const auto write = [&](int64_t row, int64_t column, G sum) {
    if (row >= rows) return;
    G& entry = out[row * (columns + 1) + column];
    entry = accumulate ? entry + sum : sum;
  };
  for_each_pair<P>(sums, [&](int r, int c, G left, G right) {
    const int64_t column = first_column + c;
    if (column < columns) write(first_row + r, column, left);
    if (column + 1 < columns) write(first_row + r, column + 1, right);
  });
  if (vector) for_each_of_vector<P>(sums, [&](int r, G sum) { write(first_row + r, columns, sum); });
}

// gram [groups, I + bias, I + bias] <- the pairs' sums of cells, in the cells' order; `count` is of the bias's corner.
// Block (tile of channels + tiles * pair of taps, group).
template <class G>
__global__ void __launch_bounds__(kAssembleColumns* kAssembleRows, 4) assemble_displaced_kernel(
    const __grid_constant__ CellPieces cells, int channels, int used_channels, const G* __restrict__ partial, bool bias,
    G count, G* __restrict__ gram) {
  const Displacements& displacements = cells.displacements;
  const auto& [depth, height, width] = displacements.axes;
  const int taps = depth.kernel * height.kernel * width.kernel;
  const int down = (used_channels + kAssembleRows - 1) / kAssembleRows;
  const int across = (used_channels + kAssembleColumns - 1) / kAssembleColumns;
  const int pair = static_cast<int>(blockIdx.x) / (down * across);
  const int tile = static_cast<int>(blockIdx.x) % (down * across);
  const int s = pair / taps, t = pair % taps;
  if (t < s) return;
  const int row = tile / across * kAssembleRows + static_cast<int>(threadIdx.x) / kAssembleColumns;
  const int column = tile % across * kAssembleColumns + static_cast<int>(threadIdx.x) % kAssembleColumns;
  const int s0 = s / width.kernel / height.kernel, s1 = s / width.kernel % height.kernel, s2 = s % width.kernel;
  const int t0 = t / width.kernel / height.kernel, t1 = t / width.kernel % height.kernel, t2 = t % width.kernel;
  const ProductPlace place = displacements.place({t0 - s0, t1 - s1, t2 - s2});
  // Of each cell its pieces, and whether it is of the window of the pair's source, and of the tap's own.
  constexpr unsigned kOfSource = 1, kOfTap = 2, kPieces = 4;
  unsigned* found = dynamic_shared<unsigned>();
  const int all = displacements.cells();
  for (int cell = static_cast<int>(threadIdx.x); cell < all; cell += kAssembleColumns * kAssembleRows) {
    const int k = cell % width.cells(), j = cell / width.cells() % height.cells();
    const int i = cell / width.cells() / height.cells();
    const auto in_window = [&](int source) {
      const int along = displacements.along;
      return depth.in_window(i, s0 - (along == 0 ? source : 0)) &&
             height.in_window(j, s1 - (along == 1 ? source : 0)) && width.in_window(k, s2 - (along == 2 ? source : 0));
    };
    found[cell] = kPieces * cells.of(depth.count(i) * height.count(j) * width.count(k)) +
                  (in_window(place.source) ? kOfSource : 0) + (in_window(0) ? kOfTap : 0);
  }
  __syncthreads();
  if (row >= used_channels || column >= used_channels) return;
  const int64_t stride = displacements.targets * channels + 1;
  const int64_t each = displacements.sources * channels * stride, step = gridDim.y * each;
  // What stands at `at` of the pieces of a window.
  const auto sum_of = [&](unsigned window, int64_t at) {
    const G* own = partial + blockIdx.y * each + at;
    G sum = 0;
#pragma unroll 1
    for (int cell = 0; cell < all; ++cell) {
      const unsigned pieces = found[cell] / kPieces;
      if ((found[cell] & window) != 0) {
#pragma unroll 4
        for (unsigned piece = 0; piece < pieces; ++piece) sum += own[piece * step];
      }
      own += pieces * step;
    }
    return sum;
  };
  const int64_t order = static_cast<int64_t>(used_channels) * taps, n = order + bias;
  G* out = gram + blockIdx.y * n * n;
  const int64_t i = static_cast<int64_t>(row) * taps + s, j = static_cast<int64_t>(column) * taps + t;
  if (s != t || row <= column) {
    const int64_t line = place.source * channels + row;
    out[i * n + j] = out[j * n + i] = sum_of(kOfSource, line * stride + place.target * channels + column);
  }
  if (!bias || s != t || column != 0) return;
  out[i * n + order] = out[order * n + i] = sum_of(kOfTap, row * stride + stride - 1);
  if (s == 0 && row == 0) out[n * n - 1] = count;
}

}  // namespace consequentialism::cuda
