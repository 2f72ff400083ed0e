// Host side of the decayed Gram: how a launch is chosen. Plain C++.
#pragma once

#include "input_gram.h"

namespace consequentialism::cuda {

struct DecayedGramShape {
  int64_t rows;
  int64_t inputs;  // without the bias's
  int64_t blocks;
  bool bias;
  size_t element_bytes;  // of x
  size_t sum_bytes;      // of the Gram
  bool aligned = false;  // every row of x begins at a multiple of 16 bytes
};

GramPlan plan_decayed_gram(const DecayedGramShape& shape, const Limits& limits);

// With this tile (64 or 128; 64 where sums are float64) and about so many splits, in a cluster where that is wanted.
GramPlan plan_decayed_gram_with(const DecayedGramShape& shape, int tile, int64_t splits, bool clustered);

}  // namespace consequentialism::cuda
