#include "factored_inverse.cuh"
#include "factored_inverse_launcher.h"

namespace consequentialism::cuda {

namespace {

// What the kernels are given of each item: its InverseState, behind it the tiles of U and two more, then room for V's.
template <class T>
struct Factored {
  InverseBatch<T> batch;
  int n;
  unsigned char* workspace;
  size_t workspace_bytes;  // of an item

  __device__ __forceinline__ const InverseState<T>& state(int item) const {
    return *reinterpret_cast<const InverseState<T>*>(workspace + item * workspace_bytes);
  }
  __device__ __forceinline__ T* factor(int item) const {
    return reinterpret_cast<T*>(workspace + item * workspace_bytes + kInverseStateBytes);
  }
  __device__ __forceinline__ T* inverse(int item) const {
    return factor(item) + tile_index(kMoreTiles, tiles_along(n)) * TileTraits<T>::kElements;
  }
  __device__ __forceinline__ bool exists(int item) const {
    const int* only_if = batch.items[item].only_if;
    return (only_if == nullptr || *only_if != 0) && has_factor(state(item));
  }
};

// A block for each item (x) and strip (y), the longest ones first.
template <class T, int kLine>
__global__ void __launch_bounds__(kMaxStripWarps* kWarpSize)
    inverse_strip_kernel(const __grid_constant__ Factored<T> factored) {
  const auto item = static_cast<int>(blockIdx.x);
  if (!factored.exists(item)) return;
  constexpr int kOfTile = kTile / kStrip;
  const auto strip = static_cast<int>(gridDim.y - 1 - blockIdx.y);
  const InverseStrip<T, kLine> own(
      strip / kOfTile, strip % kOfTile, factored.factor(item), factored.inverse(item), dynamic_shared<T>());
  own.run();
}

// A block for each item and group of rows of tiles (x), and column of tiles (y): the longest sums first.
template <class T, int kTiles>
__global__ void __launch_bounds__(SquareTraits<T, kTiles>::kThreads)
    inverse_square_kernel(const __grid_constant__ Factored<T> factored) {
  const int groups = (tiles_along(factored.n) + kTiles - 1) / kTiles;
  const int item = static_cast<int>(blockIdx.x) / groups;
  const int i = static_cast<int>(blockIdx.x) % groups * kTiles, j = static_cast<int>(blockIdx.y);
  if (i > j || !factored.exists(item)) return;
  const InverseState<T>& state = factored.state(item);
  const InverseItem<T>& to = factored.batch.items[item];
  multiply_column<T, kTiles>(
      i, j, factored.n, to.inverse_stride, factored.inverse(item), state.unit * state.multiplier, to.inverse,
      dynamic_shared<T>());
}

template <class T>
cudaError_t launch_strips(const Factored<T>& factored, int count, int line, cudaStream_t stream) {
  const int along = tiles_along(factored.n);
  LaunchShape shape{};
  shape.grid = dim3(static_cast<unsigned>(count), static_cast<unsigned>(along * (kTile / kStrip)));
  shape.block = dim3(static_cast<unsigned>(strip_warps(along)) * kWarpSize);
  shape.shared_bytes = strip_bytes(along, sizeof(T), line);
  shape.stream = stream;
  if constexpr (sizeof(T) == 4) {
    if (line == kNarrowStripLine) return launch(inverse_strip_kernel<T, kNarrowStripLine>, shape, factored);
  }
  return line == kStripLine ? launch(inverse_strip_kernel<T, kStripLine>, shape, factored) : cudaErrorInvalidValue;
}

template <class T, int kTiles>
cudaError_t launch_square(const Factored<T>& factored, int count, cudaStream_t stream) {
  const int along = tiles_along(factored.n), groups = (along + kTiles - 1) / kTiles;
  LaunchShape shape{};
  shape.grid = dim3(static_cast<unsigned>(count * groups), static_cast<unsigned>(along));
  shape.block = dim3(static_cast<unsigned>(SquareTraits<T, kTiles>::kThreads));
  shape.shared_bytes = SquareTraits<T, kTiles>::kSharedBytes;
  shape.stream = stream;
  return launch(inverse_square_kernel<T, kTiles>, shape, factored);
}

}  // namespace

cudaError_t load_factored_inverse() {
  cudaFuncAttributes compiled;
  return cudaFuncGetAttributes(&compiled, reinterpret_cast<const void*>(inverse_strip_kernel<float, kStripLine>));
}

template <class T>
cudaError_t launch_factored_inverse(
    const InverseBatch<T>& batch, int count, int n, const InversePlan& plan, unsigned char* workspace,
    cudaStream_t stream) {
  const Factored<T> factored{batch, n, workspace, plan.workspace_bytes};
  if (const cudaError_t error = launch_strips(factored, count, plan.strip_line, stream); error != cudaSuccess) {
    return error;
  }
  if constexpr (sizeof(T) == 4) {
    if (count >= plan.tall_squares_from) return launch_square<T, kTallSquare>(factored, count, stream);
  }
  return launch_square<T, 1>(factored, count, stream);
}

template cudaError_t launch_factored_inverse<float>(
    const InverseBatch<float>&, int, int, const InversePlan&, unsigned char*, cudaStream_t);
template cudaError_t launch_factored_inverse<double>(
    const InverseBatch<double>&, int, int, const InversePlan&, unsigned char*, cudaStream_t);

}  // namespace consequentialism::cuda
