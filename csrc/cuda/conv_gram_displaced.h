// Host side of a convolution's Gram from displaced products: how they are cut. What the kernels ask is here too.
//
// With a stride and a dilation of 1, block (s, t) of the Gram is a sum over the window of tap s in the padded image,
//   W(s, d) = sum of x[p] x[p + d]^T over p in [s, s + positions),  d = t - s.
// Along a dimension all taps' windows share a core, [kernel - 1, positions), and differ by single lines before and
// behind it. So the image is cut into cells, a core or a line along each dimension. Each cell's products are computed
// once for every displacement, and W is a sum of cells: 13 products of 64 channels in place of 45 for 3 x 3, and no
// position is multiplied twice.
//
// A product's tile is 128 wide, two taps of 64 channels. Its rows are x[p] and, up to 64 channels, x[p + 1] too, one
// step on along the last dimension of the kernel: with a column x[p + c] they make the displacements c and c - 1. Its
// windows begin one earlier, and the core along that dimension ends one earlier.
#pragma once

#include "../conv_geometry.h"
#include "conv_gram.h"
#include "types.h"

namespace consequentialism::cuda {

constexpr int kMostTargets = 128;

// A dimension, in cells: 0 is the core, then the lines before it, then those behind it.
struct CellAxis {
  int kernel, positions;
  int end;    // of the core, which begins at kernel - 1
  int first;  // line before the core of which not all is padding
  int before, behind;

  __host__ __device__ int cells() const { return 1 + before + behind; }
  __host__ __device__ int begin(int cell) const {
    if (cell == 0) return kernel - 1;
    return cell <= before ? first + cell - 1 : end + cell - before - 1;
  }
  __host__ __device__ int count(int cell) const { return cell == 0 ? end - kernel + 1 : 1; }
  // Whether it is of the window that begins at s, from -1 on.
  __host__ __device__ bool in_window(int cell, int s) const {
    return cell == 0 || (cell <= before ? begin(cell) >= s : begin(cell) < s + positions);
  }
};

// Rows of a cell and columns that a product stands at: of source and target times the channels.
struct ProductPlace {
  int source, target;
};

struct Displacements {
  CellAxis axes[3];
  int along;    // the kernel's last dimension
  int sources;  // rows: x[p], and with 2 x[p + 1]
  int targets;  // columns
  int of_none;  // targets of the displacements of none along the dimensions before `along`
  int of_each;  // of every other one

  // Of the displacement d, the first of whose numbers that are not zero is positive.
  __host__ __device__ ProductPlace place(const int (&d)[3]) const {
    int before = 0;
    for (int i = 0; i < along; ++i) before = before * (2 * axes[i].kernel - 1) + d[i];
    const int step = before == 0 ? d[along] : d[along] + axes[along].kernel - 1;
    const int first = before == 0 ? 0 : of_none + (before - 1) * of_each;
    if (sources == 1) return {0, first + step};
    return {1 - step % 2, first + step / 2};
  }
  // The target's displacement.
  __host__ __device__ void target(int index, int (&d)[3]) const {
    int before = 0, step = index;
    if (index >= of_none) {
      before = 1 + (index - of_none) / of_each;
      step = (index - of_none) % of_each;
    }
    for (int i = 0; i < 3; ++i) d[i] = 0;
    d[along] = (before == 0 ? 0 : 1 - axes[along].kernel) + (sources == 1 ? step : 2 * step + 1);
    for (int i = along - 1; i >= 0; --i) {
      const int width = 2 * axes[i].kernel - 1;
      d[i] = i == 0 ? before : (before + axes[i].kernel - 1) % width - axes[i].kernel + 1;
      before = (before - d[i]) / width;
    }
  }
  __host__ __device__ int cells() const { return axes[0].cells() * axes[1].cells() * axes[2].cells(); }
};

// One block for each tile of the products of a piece, which is at most `depth` rows of a cell. Each writes its sums
// into the workspace, [pieces, groups, sources * C, targets * C + 1], the last column being those of x[p]; a second
// kernel adds them up.
struct DisplacedPlan {
  int tile;  // 0 where there is no such plan: the Gram is then summed directly
  Displacements displacements;
  PatchShape padded;  // of the largest piece of the batch; the last one may have fewer samples
  int64_t depth;
  int64_t pieces;
  int64_t tiles_down, tiles_across;
  size_t shared_bytes;
  size_t padded_bytes;  // with what is read behind the last position, for products that nobody uses
  size_t workspace_bytes;
};

DisplacedPlan plan_conv_gram_displaced(
    const ConvGeometry& geometry, size_t element_bytes, size_t sum_bytes, int64_t patch_bytes, const Limits& limits);

// From the padded samples' position p to p + d, in elements.
int64_t flat_offset(const PatchShape& padded, const int (&d)[3]);

}  // namespace consequentialism::cuda
