// Host side of the factored_inverse kernels: how a launch is shaped. Plain C++.
#pragma once

#include <cstddef>

#include "damped_inverse.h"

namespace consequentialism::cuda {

constexpr int kMoreTiles = 2;       // behind those of U
constexpr int kStrip = 16;          // columns of V for one block
constexpr int kGroup = 3;           // tiles of one column that a warp works on
constexpr int kStripStages = 2;     // of what such a warp reads
constexpr int kMaxStripWarps = 12;  // of a block: orders up to kMaxInverseOrder

// Bytes of a stage, for each row of those tiles: the narrow one in float32, where shared memory has no room for the
// wide one. 16 more are left free, so that no two lanes that read the same columns meet in a bank.
constexpr int kStripLine = 64, kNarrowStripLine = 32;
constexpr int padded_strip_line(int line) {
  return line + 16;
}

// The first warp solves, the others have all rows of tiles but the last two.
constexpr int strip_warps(int along) {
  return 1 + (along > 2 ? (along - 2 + kGroup - 1) / kGroup : 0);
}
static_assert(strip_warps((kMaxInverseOrder + kInverseTile - 1) / kInverseTile) == kMaxStripWarps);

// Shared memory of such a block: four tiles of U, two strips of V and two of what comes next, stages of the others.
constexpr size_t strip_bytes(int along, size_t element_bytes, int line) {
  const size_t stages = static_cast<size_t>(kStripStages * kGroup * kInverseTile * padded_strip_line(line));
  return 4 * inverse_tile_bytes(element_bytes) + 4 * kInverseTile * kStrip * element_bytes +
         static_cast<size_t>(strip_warps(along) - 1) * stages;
}

// The line of the stages of such a block, 0 where its shared memory has no room for either.
constexpr int strip_line(int along, size_t element_bytes, size_t shared_bytes) {
  if (strip_bytes(along, element_bytes, kStripLine) <= shared_bytes) return kStripLine;
  const bool narrow = element_bytes == 4 && strip_bytes(along, element_bytes, kNarrowStripLine) <= shared_bytes;
  return narrow ? kNarrowStripLine : 0;
}

// From so many matrices of a launch on a block makes four tiles of V V^T below each other, not one, which reads five
// eighths as much: then it is the multiprocessors that are full, and no longer one sum of `along` products that takes
// longest. Of 132 multiprocessors.
constexpr int kTallSquare = 4;
constexpr int tall_squares_from(int along) {
  return 4096 / (along * along) + 1;
}

}  // namespace consequentialism::cuda
