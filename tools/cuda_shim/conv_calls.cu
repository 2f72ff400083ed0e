// What tests/test_cuda_conv_gram.py calls.
#include "conv_gram_launcher.h"
#include "conv_numbers.h"
#include "element_types.h"

using namespace consequentialism;
using namespace consequentialism::cuda;
using namespace consequentialism::cuda::shim;

namespace {

// tile 0: as planned. Negative splits: in a cluster.
ConvGramPlan plan_of(
    const ConvGeometry& g, bool bias, int64_t type, bool wide, int64_t patch_bytes, int64_t tile, int64_t splits) {
  const size_t element = wide ? 8 : bytes_of(type), sum = sum_bytes_of(type, wide);
  if (tile == 0) return plan_conv_gram(g, bias, element, sum, patch_bytes, kHopper);
  return plan_conv_gram_with(
      g, bias, element, sum, patch_bytes, static_cast<int>(tile), splits < 0 ? -splits : splits, splits < 0);
}

}  // namespace

// tile, cluster, splits, blocks, padded_bytes, workspace_bytes, samples, along, lines.
extern "C" int call_conv_gram_plan(
    int64_t* values, const int64_t* numbers, bool bias, int64_t type, bool wide, int64_t patch_bytes, int64_t tile,
    int64_t splits) {
  const ConvGramPlan plan = plan_of(geometry_of(numbers), bias, type, wide, patch_bytes, tile, splits);
  const int64_t all[] = {
      plan.gram.tile,
      static_cast<int64_t>(plan.gram.cluster),
      plan.gram.splits,
      plan.gram.blocks,
      static_cast<int64_t>(plan.padded_bytes),
      static_cast<int64_t>(plan.gram.workspace_bytes),
      plan.pieces.samples,
      plan.pieces.along,
      plan.pieces.lines};
  for (int i = 0; i < 9; ++i) values[i] = all[i];
  return 0;
}

// strides [5] of x; wide: in float64.
extern "C" int call_conv_gram(
    const void* x, const int64_t* strides, const int64_t* numbers, void* gram, void* padded, void* workspace, bool bias,
    int64_t type, bool wide, bool tf32, int64_t patch_bytes, int64_t tile, int64_t splits) {
  const ConvGeometry g = geometry_of(numbers);
  const ConvGramPlan plan = plan_of(g, bias, type, wide, patch_bytes, tile, splits);
  const std::array<int64_t, 5> steps{strides[0], strides[1], strides[2], strides[3], strides[4]};
  const auto run = [&](auto from, auto to) -> int {
    using From = decltype(from);
    using T = decltype(to);
    return launch_conv_gram<From, T>(
        static_cast<const From*>(x), steps, g, bias, tf32, static_cast<Accumulator<T>*>(gram), plan,
        static_cast<T*>(padded), workspace, nullptr);
  };
  return with_type(type, [&](auto from) { return wide ? run(from, double{}) : run(from, from); });
}
