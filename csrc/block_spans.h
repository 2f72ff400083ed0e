// How inputs are cut into diagonal blocks of nearly equal size, the larger ones first; a bias's one stands in the last.
// Plain C++, for kernels too.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define CONSEQUENTIALISM_EVERYWHERE __host__ __device__
#else
#define CONSEQUENTIALISM_EVERYWHERE
#endif

namespace consequentialism {

// Where block i of `blocks` begins; block i + 1 begins where it ends.
CONSEQUENTIALISM_EVERYWHERE constexpr int64_t block_begin(int64_t inputs, int64_t blocks, int64_t i) {
  const int64_t more = inputs % blocks;
  return i * (inputs / blocks) + (i < more ? i : more);
}

// The order of the largest block.
constexpr int64_t block_order(int64_t inputs, int64_t blocks, bool bias) {
  const int64_t each = inputs / blocks;
  const int64_t first = each + (inputs % blocks > 0), last = each + bias;
  return first > last ? first : last;
}

}  // namespace consequentialism
