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
};

// As GramPlan has it, for each diagonal block; `blocks` and `reduce_blocks` are those of one, the workspace is for all.
struct DecayedGramPlan {
  GramPlan each;
  size_t workspace_bytes;
};

DecayedGramPlan plan_decayed_gram(const DecayedGramShape& shape, const Limits& limits);

// With this tile (64 or 128; 64 where sums are float64) and about so many splits.
DecayedGramPlan plan_decayed_gram_with(const DecayedGramShape& shape, int tile, int64_t splits);

}  // namespace consequentialism::cuda
