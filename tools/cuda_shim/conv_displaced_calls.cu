// What tests/test_cuda_conv_gram_displaced.py calls.
#include "conv_gram_displaced_launcher.h"
#include "conv_numbers.h"
#include "element_types.h"

using namespace consequentialism;
using namespace consequentialism::cuda;
using namespace consequentialism::cuda::shim;

namespace {

DisplacedPlan plan_of(const ConvGeometry& g, int64_t type, bool wide, int64_t patch_bytes, int64_t processors) {
  const size_t element = wide ? 8 : bytes_of(type), sum = sum_bytes_of(type, wide);
  Limits limits = kHopper;
  limits.processors = static_cast<int>(processors);
  return plan_conv_gram_displaced(g, element, sum, patch_bytes, limits);
}

}  // namespace

// tile, sources, targets, cells, samples, depth, pieces, tiles of a piece, padded_bytes, workspace_bytes.
extern "C" int call_displaced_plan(
    int64_t* values, const int64_t* numbers, int64_t type, bool wide, int64_t patch_bytes, int64_t processors) {
  const DisplacedPlan plan = plan_of(geometry_of(numbers), type, wide, patch_bytes, processors);
  const int64_t all[] = {
      plan.tile,
      plan.displacements.sources,
      plan.displacements.targets,
      plan.displacements.cells(),
      plan.padded.samples,
      plan.depth,
      plan.pieces,
      plan.tiles_down * plan.tiles_across,
      static_cast<int64_t>(plan.padded_bytes),
      static_cast<int64_t>(plan.workspace_bytes)};
  for (int i = 0; i < 10; ++i) values[i] = all[i];
  return 0;
}

// strides [5] of x; wide: in float64.
extern "C" int call_conv_gram_displaced(
    const void* x, const int64_t* strides, const int64_t* numbers, void* gram, void* padded, void* workspace, bool bias,
    int64_t type, bool wide, bool tf32, int64_t patch_bytes, int64_t processors) {
  const ConvGeometry g = geometry_of(numbers);
  const DisplacedPlan plan = plan_of(g, type, wide, patch_bytes, processors);
  const std::array<int64_t, 5> steps{strides[0], strides[1], strides[2], strides[3], strides[4]};
  const auto run = [&](auto from, auto to) -> int {
    using From = decltype(from);
    using T = decltype(to);
    return launch_conv_gram_displaced<From, T>(
        static_cast<const From*>(x), steps, g, bias, tf32, static_cast<Accumulator<T>*>(gram), plan,
        static_cast<T*>(padded), workspace, nullptr);
  };
  return with_type(type, [&](auto from) { return wide ? run(from, double{}) : run(from, from); });
}
