// What tests/test_cuda_coordinates.py calls.
#include "../../csrc/cuda/decayed_gram_launcher.h"
#include "../../csrc/cuda/inverse_root_launcher.h"
#include "../../csrc/cuda/matrix_tiles.h"
#include "../../csrc/cuda/root_product_launcher.h"
#include "element_types.h"

using namespace consequentialism::cuda;
using namespace consequentialism::cuda::shim;

namespace {

// tile 0: as planned. Negative splits: in a cluster.
GramPlan gram_plan(const DecayedGramShape& shape, const Limits& limits, int64_t tile, int64_t splits) {
  if (tile == 0) return plan_decayed_gram(shape, limits);
  return plan_decayed_gram_with(shape, static_cast<int>(tile), splits < 0 ? -splits : splits, splits < 0);
}

InverseRootPlan root_plan(const InverseRootShape& shape, const Limits& limits, int64_t tile) {
  return tile == 0 ? plan_inverse_root(shape, limits) : plan_inverse_root_with(shape, static_cast<int>(tile));
}

}  // namespace

// memory and beta in factors; x begins `offset` elements into its buffer.
extern "C" int call_decayed_gram(
    const void* before, const void* x, const double* factors, void* gram, void* workspace, int64_t type, int64_t offset,
    int64_t rows, int64_t inputs, int64_t stride, int64_t blocks, bool bias, bool tf32, int64_t tile, int64_t splits) {
  const DecayedGramShape shape{rows, inputs, blocks, bias, bytes_of(type), sum_bytes_of(type)};
  const GramPlan plan = gram_plan(shape, kHopper, tile, splits);
  return with_type(type, [&](auto one) -> int {
    using T = decltype(one);
    using G = Accumulator<T>;
    return launch_decayed_gram(
        factors[0] == 0 ? nullptr : static_cast<const G*>(before), static_cast<const T*>(x) + offset, shape, stride,
        factors[0], factors[1], tf32, static_cast<G*>(gram), plan, workspace, nullptr);
  });
}

// tile, splits, depth, blocks, reduce_blocks, shared_bytes, workspace_bytes.
extern "C" int call_decayed_gram_plan(
    int64_t* values, int64_t type, int64_t rows, int64_t inputs, int64_t blocks, bool bias, int64_t tile,
    int64_t splits) {
  const DecayedGramShape shape{rows, inputs, blocks, bias, bytes_of(type), sum_bytes_of(type)};
  const GramPlan plan = gram_plan(shape, kHopper, tile, splits);
  const int64_t all[] = {
      plan.tile,
      plan.splits,
      plan.depth,
      plan.blocks,
      plan.reduce_blocks,
      static_cast<int64_t>(plan.shared_bytes),
      static_cast<int64_t>(plan.workspace_bytes)};
  for (int i = 0; i < 7; ++i) values[i] = all[i];
  return 0;
}

extern "C" int call_inverse_root(
    const void* matrix, const double* coefficients, void* result, void* workspace, int64_t type, int64_t batch,
    int64_t order, int64_t root, int64_t steps, int64_t tile) {
  const InverseRootShape shape{batch, order, bytes_of(type)};
  const InverseRootPlan plan = root_plan(shape, kHopper, tile);
  if (type == 0) {
    return launch_inverse_root(
        static_cast<const double*>(matrix), shape, root, coefficients, steps, static_cast<double*>(result), plan,
        workspace, nullptr);
  }
  return launch_inverse_root(
      static_cast<const float*>(matrix), shape, root, coefficients, steps, static_cast<float*>(result), plan, workspace,
      nullptr);
}

// tile, blocks, stride, shared_bytes, workspace_bytes.
extern "C" int call_inverse_root_plan(int64_t* values, int64_t type, int64_t batch, int64_t order, int64_t tile) {
  const InverseRootPlan plan = root_plan({batch, order, bytes_of(type)}, kHopper, tile);
  const int64_t all[] = {
      plan.tile, plan.blocks, plan.stride, static_cast<int64_t>(plan.shared_bytes),
      static_cast<int64_t>(plan.workspace_bytes)};
  for (int i = 0; i < 5; ++i) values[i] = all[i];
  return 0;
}

// strides: of rows, of the root, of the output, each from row to row and from matrix to matrix; alpha in factors.
extern "C" int call_root_product(
    const void* rows, const void* root, const double* factors, void* out, const int64_t* strides, int64_t type,
    bool narrow, bool adds, int64_t batch, int64_t count, int64_t order, int64_t tile) {
  const RootProductShape shape{batch, count, order, bytes_of(type), sum_bytes_of(type), type == 2};
  const RootProductPlan plan =
      tile == 0 ? plan_root_product(shape, kHopper) : plan_root_product_with(shape, static_cast<int>(tile));
  const ProductOutput to{out, {strides[4], strides[5]}, narrow, adds};
  return with_type(type, [&](auto one) -> int {
    using T = decltype(one);
    return launch_root_product(
        static_cast<const T*>(rows), {strides[0], strides[1]}, static_cast<const Accumulator<T>*>(root),
        {strides[2], strides[3]}, shape, factors[0], to, plan, nullptr);
  });
}
