// Rows times the symmetric root S, batched: what an optimizer sees, and what its answer does to the weights. float32 is
// multiplied in three products of TF32, whatever torch allows for its own: S has small eigenvalues beside large ones.
#include "emended_input.cuh"
#include "root_product_launcher.h"

namespace consequentialism::cuda {

namespace {

constexpr int64_t kMaxBatch = 65535;  // along y

// One block less than the emended input's: what is added to takes registers.
template <class Traits>
constexpr int kResident = Traits::kResident > 1 ? Traits::kResident - 1 : 1;

template <class S>
MatrixView<S> operand_of(const S* data, MatrixStrides strides, int64_t batch) {
  MatrixView<S> view = view_of(data, strides.row);
  while (batch > 1 && strides.matrix * static_cast<int64_t>(sizeof(S)) % view.unit != 0) view.unit /= 2;
  return view;
}

// to[0] and, where two, to[1] <- alpha left and right, plus what is there where it adds.
template <class Y, class G>
__device__ __forceinline__ void put(Y* to, bool two, bool adds, G left, G right) {
  const G before = adds ? static_cast<G>(to_accumulator(to[0])) : G(0);
  to[0] = from_accumulator<Y>(left + before);
  if (!two) return;
  const G beside = adds ? static_cast<G>(to_accumulator(to[1])) : G(0);
  to[1] = from_accumulator<Y>(right + beside);
}

// Blocks that share their rows follow one another; y is the matrix.
template <class Traits, class T, class G>
__global__ void __launch_bounds__(Traits::kThreads, kResident<Traits>) root_product_kernel(
    const MatrixView<T> rows, int64_t each_rows, const MatrixView<G> root, int64_t each_root, int64_t count,
    int64_t order, G alpha, const ProductOutput out) {
  using P = typename Traits::P;
  const int64_t along = (order + P::kTileN - 1) / P::kTileN;
  const int64_t matrix = blockIdx.y;
  const int64_t first_row = blockIdx.x / along * P::kTileM, first_column = blockIdx.x % along * P::kTileN;
  const MatrixView<T> own{rows.data + matrix * each_rows, rows.stride, rows.unit};
  const MatrixView<G> s{root.data + matrix * each_root, root.stride, root.unit};
  BlockSums<P> sums;
  block_product<P>(
      sums, typename Traits::Input{own, first_row, count}, typename Traits::Inverse{s, first_column, order}, false, 0,
      order, dynamic_shared<unsigned char>(), NoVector{});
  for_each_pair<P>(sums, [&](int r, int c, G left, G right) {
    const int64_t row = first_row + r, column = first_column + c;
    if (row >= count || column >= order) return;
    const int64_t at = matrix * out.strides.matrix + row * out.strides.row + column;
    const bool two = column + 1 < order;
    if (out.narrow) {
      put<T, G>(static_cast<T*>(out.data) + at, two, out.adds, alpha * left, alpha * right);
    } else {
      put<G, G>(static_cast<G*>(out.data) + at, two, out.adds, alpha * left, alpha * right);
    }
  });
}

template <class T, class G, int kTile>
cudaError_t launch_tiles(
    const T* rows, MatrixStrides row_strides, const G* root, MatrixStrides root_strides, const RootProductShape& shape,
    double alpha, const ProductOutput& out, const RootProductPlan& plan, cudaStream_t stream) {
  constexpr int kTerms = std::is_same_v<T, float> ? 2 : 1;
  using Traits = EmendTraits<T, G, true, kTile, kTerms>;
  if (plan.shared_bytes != Traits::P::kSharedBytes) return cudaErrorInvalidValue;
  LaunchShape launch_shape{};
  launch_shape.grid = dim3(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(shape.batch));
  launch_shape.block = dim3(Traits::kThreads);
  launch_shape.shared_bytes = plan.shared_bytes;
  launch_shape.stream = stream;
  return launch(
      root_product_kernel<Traits, T, G>, launch_shape, operand_of(rows, row_strides, shape.batch), row_strides.matrix,
      operand_of(root, root_strides, shape.batch), root_strides.matrix, shape.rows, shape.order, static_cast<G>(alpha),
      out);
}

template <class T, class G>
cudaError_t launch_tiles(
    const T* rows, MatrixStrides row_strides, const G* root, MatrixStrides root_strides, const RootProductShape& shape,
    double alpha, const ProductOutput& out, const RootProductPlan& plan, cudaStream_t stream) {
  if constexpr (std::is_same_v<G, float> && !std::is_same_v<T, float16>) {
    if (plan.tile == kLargeTile) {
      return launch_tiles<T, G, kLargeTile>(rows, row_strides, root, root_strides, shape, alpha, out, plan, stream);
    }
  }
  if (plan.tile != kSmallTile) return cudaErrorInvalidValue;
  return launch_tiles<T, G, kSmallTile>(rows, row_strides, root, root_strides, shape, alpha, out, plan, stream);
}

}  // namespace

template <class T, class G>
cudaError_t launch_root_product(
    const T* rows, MatrixStrides row_strides, const G* root, MatrixStrides root_strides, const RootProductShape& shape,
    double alpha, const ProductOutput& out, const RootProductPlan& plan, cudaStream_t stream) {
  const bool takes = plan.tile != 0 && shape.batch > 0 && shape.rows > 0 && shape.order > 0;
  if (!takes || shape.batch > kMaxBatch || plan.blocks > kMaxGrid) return cudaErrorInvalidValue;
  return launch_tiles<T, G>(rows, row_strides, root, root_strides, shape, alpha, out, plan, stream);
}

#define CONSEQUENTIALISM_INSTANTIATE(T)                                                               \
  template cudaError_t launch_root_product<T, Accumulator<T>>(                                        \
      const T*, MatrixStrides, const Accumulator<T>*, MatrixStrides, const RootProductShape&, double, \
      const ProductOutput&, const RootProductPlan&, cudaStream_t);
CONSEQUENTIALISM_FOR_ELEMENTS(CONSEQUENTIALISM_INSTANTIATE)
#undef CONSEQUENTIALISM_INSTANTIATE

}  // namespace consequentialism::cuda
