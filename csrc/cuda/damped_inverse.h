// Host side of the damped_inverse kernels: what it is asked for, and how a launch is chosen. Plain C++.
#pragma once

#include <cstddef>
#include <cstdint>

#include "device_limits.h"

namespace consequentialism::cuda {

// One matrix: inverse <- multiplier * (gram + c I)^-1, both [n, n]; gram's upper triangle is read. gram is contiguous,
// rows of the inverse are inverse_stride elements apart, and what lies between them is left alone.
//
// c = damping * trace / rank where relative, else damping; the multiplier is `factor`, or `factor` * c where
// scaled_by_c. Zero where the trace is zero, NaN where it is not finite. Where a pivot is not positive and finite
// the ridge grows tenfold, at most three times; then the diagonal of gram + c I stands in.
template <class T>
struct InverseItem {
  const T* gram;
  T* inverse;
  int inverse_stride;
  const int* only_if;  // null, or on the device: do nothing where it is 0, else begin with the first retry
  double damping;
  double rank;
  double factor;
  bool relative;
  bool scaled_by_c;
};

constexpr int kMaxInverseItems = 32;
constexpr int kMaxInverseOrder = 1056;  // above, cuSOLVER; 1024 inputs and their bias are the kernel's still
constexpr int kMaxRetryOrder = 32768;   // indices are 32 bits

constexpr int kInverseTile = 32;
constexpr size_t kInverseStateBytes = 128;   // before the tiles, of what a team shares beside them
constexpr int kInverseClusterBlocks = 8;     // what every chip with clusters takes
constexpr int kInverseLargeCluster = 16;     // what Hopper takes besides
constexpr int kInverseClusterThreads = 256;  // of a block

// The most threads of a matrix's only block: a tile of float64 takes a thread 64 registers.
constexpr int inverse_block_threads(size_t element_bytes) {
  return element_bytes == 8 ? 256 : 512;
}

// Of one tile, its rows padded.
constexpr size_t inverse_tile_bytes(size_t element_bytes) {
  return kInverseTile * (kInverseTile * element_bytes + 16);
}

template <class T>
struct InverseBatch {
  InverseItem<T> items[kMaxInverseItems];
};

// Who factors a matrix: one block in its shared memory; a cluster whose blocks keep what they work on in theirs, after
// which all blocks that a chip has room for make the inverse; a cluster in global memory (L2); nobody here.
enum class InverseTeam { kNone, kBlock, kResident, kCluster };

// The blocks of a resident cluster as a grid, and how many tiles that a block works on its shared memory has room for.
struct ResidentShape {
  int rows;
  int columns;
  int room;
};

// How a matrix of order n is factored.
struct InversePlan {
  InverseTeam team = InverseTeam::kNone;
  int threads = 0;             // of a block
  int blocks = 0;              // of a matrix
  size_t shared_bytes = 0;     // of a block
  size_t workspace_bytes = 0;  // of a matrix, in global memory
  ResidentShape resident{};
  // After a resident cluster, as factored_inverse.h has them.
  int strip_line = 0;
  int tall_squares_from = 0;
};

// Of `count` matrices that are given together.
InversePlan plan_damped_inverse(int64_t n, int64_t count, size_t element_bytes, const Limits& limits);

// By the team that is named; kNone where the device has no room for it.
InversePlan plan_damped_inverse_by(int64_t n, size_t element_bytes, const Limits& limits, InverseTeam team);

// By a resident cluster of so many blocks, 8 or 16; kNone where a block has too little shared memory.
InversePlan plan_resident_inverse(int64_t n, size_t element_bytes, size_t shared_bytes, int blocks);

// For an item with only_if whose first attempt was made elsewhere: rare, so any order is taken, however slow.
InversePlan plan_damped_inverse_retry(int64_t n, size_t element_bytes, const Limits& limits);

}  // namespace consequentialism::cuda
