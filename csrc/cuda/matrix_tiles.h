// Shapes of the tiles that products are made of, for kernels and for their plans. Plain C++.
#pragma once

#include <cstddef>
#include <cstdint>

namespace consequentialism::cuda {

// Which index of an operand [outer, inner] is contiguous; the product's sum is over inner.
enum class Major { kInner, kOuter };

constexpr int kProductStages = 3;
constexpr int kSmallTile = 64;
constexpr int kLargeTile = 128;

// Products of warpgroups: 128 rows by 256 columns, of 16-bit elements.
constexpr int kWarpgroupTile = 256;
constexpr int kWarpgroupRows = 128;
constexpr int kWarpgroupDepth = 64;  // of a stage
constexpr int kWarpgroupStages = 4;
constexpr int kPanelBytes = 64 * 128;     // 64 lines of 64 elements
constexpr int kSwizzledAlignment = 1024;  // of panels
constexpr size_t kWarpgroupStageBytes = (kWarpgroupRows + kWarpgroupTile) / 64 * kPanelBytes;
constexpr size_t kWarpgroupSharedBytes = kWarpgroupStages * kWarpgroupStageBytes + kSwizzledAlignment;

// What tensor cores add up by themselves, cutting off: the sums of so many products are added in float32, rounded.
constexpr int64_t kWarpgroupChain = 2048;

constexpr int threads_of_tile(int tile) {
  return tile == kLargeTile ? 256 : 128;
}

// How many blocks a processor has registers for: 168 a thread with small tiles and float32 sums, else 255.
constexpr int resident_of_tile(int tile, size_t sum_bytes) {
  return tile == kLargeTile ? 1 : sum_bytes == 8 ? 2 : 3;
}

// How deep a stage is: 128 bytes of the wider operand.
constexpr int stage_depth(size_t widest_element_bytes) {
  return static_cast<int>(128 / widest_element_bytes);
}

// Elements from one line of a staged tile to the next: a multiple of 16 bytes, and padded so that the lanes that read
// one fragment meet no bank twice. `pairs`: a lane reads two neighbours along inner, for 16-bit fragments.
constexpr int padded_line(int length, size_t element_bytes, bool pairs, Major major) {
  if (element_bytes == 2) return length + 8;
  if (element_bytes == 8) return length + 4;
  return length + (pairs == (major == Major::kInner) ? 8 : 4);
}

constexpr size_t operand_bytes(int outer, int depth, size_t element_bytes, bool pairs, Major major) {
  const int lines = major == Major::kInner ? outer : depth;
  const int length = major == Major::kInner ? depth : outer;
  return static_cast<size_t>(lines * padded_line(length, element_bytes, pairs, major)) * element_bytes;
}

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace consequentialism::cuda
