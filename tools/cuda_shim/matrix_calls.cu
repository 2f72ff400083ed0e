// What tests/test_cuda_input_gram.py and tests/test_cuda_emended_input.py call.
#include "element_types.h"
#include "emended_input.cuh"
#include "emended_input_launcher.h"
#include "input_gram.cuh"
#include "input_gram_launcher.h"

using namespace consequentialism::cuda;
using namespace consequentialism::cuda::shim;

namespace {

GramShape gram_shape(int64_t rows, int64_t inputs, bool bias, bool primal, int64_t type, bool wide) {
  return {rows, inputs, bias, primal, bytes_of(type), sum_bytes_of(type, wide)};
}

EmendShape emend_shape(
    int64_t rows, int64_t inputs, bool bias, bool primal, int64_t type, bool wide, double condition) {
  return {rows, inputs, bias, primal, bytes_of(type), sum_bytes_of(type, wide), type == 2 && !wide, condition};
}

// tile 0: as planned. Negative splits: in a cluster.
GramPlan gram_plan(const GramShape& shape, const Limits& limits, int64_t tile, int64_t splits) {
  if (tile == 0) return plan_gram(shape, limits);
  return plan_gram_with(shape, static_cast<int>(tile), splits < 0 ? -splits : splits, splits < 0);
}

EmendPlan emend_plan(const EmendShape& shape, const Limits& limits, int64_t tile) {
  return tile == 0 ? plan_emend(shape, limits) : plan_emend_with(shape, static_cast<int>(tile));
}

}  // namespace

// x begins `offset` elements into its buffer.
extern "C" int call_gram(
    const void* x, void* gram, void* workspace, int64_t type, bool wide, int64_t offset, int64_t rows, int64_t inputs,
    int64_t stride, bool bias, bool primal, bool tf32, int64_t tile, int64_t splits) {
  const GramPlan plan = gram_plan(gram_shape(rows, inputs, bias, primal, type, wide), kHopper, tile, splits);
  return with_type(type, [&](auto one) -> int {
    using T = decltype(one);
    const T* first = static_cast<const T*>(x) + offset;
    if (wide || type == 0) {
      auto* out = static_cast<double*>(gram);
      return launch_input_gram(first, rows, inputs, stride, bias, primal, tf32, out, plan, workspace, nullptr);
    }
    auto* out = static_cast<Accumulator<T>*>(gram);
    return launch_input_gram(first, rows, inputs, stride, bias, primal, tf32, out, plan, workspace, nullptr);
  });
}

extern "C" int call_emend(
    const void* inverse, const void* x, void* y, void* column, int64_t type, bool wide, int64_t offset, int64_t rows,
    int64_t inputs, int64_t stride, bool bias, bool primal, bool tf32, int64_t tile, double condition,
    int64_t padding) {
  const int64_t inverse_stride = (primal ? inputs + bias : rows) + padding;
  const EmendPlan plan = emend_plan(emend_shape(rows, inputs, bias, primal, type, wide, condition), kHopper, tile);
  return with_type(type, [&](auto one) -> int {
    using T = decltype(one);
    const T* first = static_cast<const T*>(x) + offset;
    auto* out = static_cast<Emended<T>*>(y);
    auto* sums = static_cast<Accumulator<T>*>(column);
    if (wide || type == 0) {
      const auto* p = static_cast<const double*>(inverse);
      return launch_emended_input(
          p, inverse_stride, first, rows, inputs, stride, bias, primal, tf32, out, sums, plan, nullptr);
    }
    const auto* p = static_cast<const Accumulator<T>*>(inverse);
    return launch_emended_input(
        p, inverse_stride, first, rows, inputs, stride, bias, primal, tf32, out, sums, plan, nullptr);
  });
}

// shapes [count, 2] are N and I; plans [count, 8].
extern "C" int call_gram_plans(
    const int64_t* shapes, int64_t* plans, int64_t count, bool bias, bool primal, int64_t type, bool wide,
    int64_t shared_limit, int64_t processors, int64_t cluster, bool warpgroups, int64_t tile, int64_t splits) {
  const int most = static_cast<int>(cluster);
  const Limits limits{static_cast<size_t>(shared_limit), static_cast<int>(processors), most > 0, warpgroups, most};
  for (int64_t i = 0; i < count; ++i) {
    GramShape shape = gram_shape(shapes[2 * i], shapes[2 * i + 1], bias, primal, type, wide);
    shape.aligned = warpgroups;
    const GramPlan plan = gram_plan(shape, limits, tile, splits);
    const int64_t values[] = {
        plan.tile,
        plan.splits,
        plan.depth,
        plan.blocks,
        plan.reduce_blocks,
        static_cast<int64_t>(plan.shared_bytes),
        static_cast<int64_t>(plan.workspace_bytes),
        static_cast<int64_t>(plan.cluster)};
    for (int64_t j = 0; j < 8; ++j) plans[8 * i + j] = values[j];
  }
  return 0;
}

// plans [count, 3].
extern "C" int call_emend_plans(
    const int64_t* shapes, int64_t* plans, int64_t count, bool bias, bool primal, int64_t type, bool wide,
    int64_t shared_limit, int64_t processors) {
  const Limits limits{static_cast<size_t>(shared_limit), static_cast<int>(processors), true};
  for (int64_t i = 0; i < count; ++i) {
    const EmendShape shape = emend_shape(shapes[2 * i], shapes[2 * i + 1], bias, primal, type, wide, 1);
    const EmendPlan plan = plan_emend(shape, limits);
    plans[3 * i] = plan.tile;
    plans[3 * i + 1] = plan.blocks;
    plans[3 * i + 2] = static_cast<int64_t>(plan.shared_bytes);
  }
  return 0;
}

namespace {

template <class T, int kTile>
struct BlockTraits {
  static constexpr int kTerms = std::is_same_v<T, float> ? 2 : 1;
  using Gram = GramTraits<T, float, false, kTile, kTerms>;
  using Apply = ApplyTraits<T, kTile, 64, kTerms>;
  static constexpr size_t kGramBytes = kTile * Apply::kStride * sizeof(float);
  // The Gram lies where its stages were, and those of the product with it follow.
  static constexpr size_t kApplyBytes = kGramBytes + Apply::P::kSharedBytes;
  static constexpr size_t kSharedBytes = Gram::P::kSharedBytes > kApplyBytes ? Gram::P::kSharedBytes : kApplyBytes;
  static_assert(Gram::kThreads == Apply::kThreads);
};

// gram [n, n] = x x^T + 1; y [n, inputs] = gram x, column [n] = gram 1, all by one block.
template <class T, int kTile>
__global__ void block_kernel(const MatrixView<T> x, int n, int64_t inputs, float* gram, float* y, float* column) {
  using Traits = BlockTraits<T, kTile>;
  using P = typename Traits::Apply::P;
  constexpr int kStride = Traits::Apply::kStride;
  unsigned char* shared = dynamic_shared<unsigned char>();
  float* own = reinterpret_cast<float*>(shared);
  block_gram<typename Traits::Gram>(x, n, 0, inputs, 1.0f, shared, own, kStride);
  const int threads = static_cast<int>(blockDim.x);
  for (int i = static_cast<int>(threadIdx.x); i < n * n; i += threads) gram[i] = own[i / n * kStride + i % n];
  const typename P::A inverse{own, kStride};
  for (int64_t first = 0; first < inputs; first += P::kTileN) {
    block_apply<P>(
        inverse, n, typename P::B{x, first, inputs}, first == 0, shared + Traits::kGramBytes,
        [&](int row, int c, float left, float right) {
          const int64_t at = first + c;
          if (row < n && at < inputs) y[row * inputs + at] = left;
          if (row < n && at + 1 < inputs) y[row * inputs + at + 1] = right;
        },
        [&](int row, float value) {
          if (row < n) column[row] = value;
        });
  }
}

template <class T, int kTile>
int launch_block(const T* x, int64_t rows, int64_t inputs, float* gram, float* y, float* column) {
  using Traits = BlockTraits<T, kTile>;
  LaunchShape shape{};
  shape.grid = dim3(1);
  shape.block = dim3(Traits::Gram::kThreads);
  shape.shared_bytes = Traits::kSharedBytes;
  return launch(block_kernel<T, kTile>, shape, view_of(x, inputs), static_cast<int>(rows), inputs, gram, y, column);
}

}  // namespace

extern "C" int call_block(
    const void* x, float* gram, float* y, float* column, int64_t type, int64_t rows, int64_t inputs, int64_t tile) {
  return with_type(type, [&](auto one) -> int {
    using T = decltype(one);
    if constexpr (std::is_same_v<T, double>) {
      return cudaErrorInvalidValue;
    } else {
      const T* first = static_cast<const T*>(x);
      return tile == 64 ? launch_block<T, 64>(first, rows, inputs, gram, y, column)
                        : launch_block<T, 128>(first, rows, inputs, gram, y, column);
    }
  });
}
