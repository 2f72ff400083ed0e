// The serial pieces of the kernels, each in a kernel of one warp, between two reads of the clock. tools/cuda_cycles.py
// counts what lies between them; on a GPU main() below runs the same kernels and prints what the clock says.
#include <cstdio>

#include "factored_inverse.cuh"

namespace consequentialism::cuda {

namespace {

__device__ __forceinline__ unsigned clock_now() {
  unsigned now;
  asm volatile("mov.u32 %0, %%clock;" : "=r"(now)::"memory");
  return now;
}

constexpr int kTiles = 5;

// tiles and cycles lie in global memory, what a piece works on in shared memory, as in a block's factor.
template <class T, class Piece>
__device__ __forceinline__ void measure(T* tiles, unsigned* cycles, const Piece& piece) {
  T* shared = dynamic_shared<T>();
  const int lane = static_cast<int>(threadIdx.x);
  constexpr int kElements = kTiles * TileTraits<T>::kElements;
  for (int i = lane; i < kElements; i += static_cast<int>(kWarpSize)) shared[i] = tiles[i];
  __syncwarp();
  const unsigned begin = clock_now();
  piece(shared, shared + TileTraits<T>::kElements, shared + 2 * TileTraits<T>::kElements, lane);
  __syncwarp();
  const unsigned end = clock_now();
  for (int i = lane; i < kElements; i += static_cast<int>(kWarpSize)) tiles[i] = shared[i];
  if (lane == 0) *cycles = end - begin;
}

template <class T>
__global__ void __launch_bounds__(32) factor_tile_piece(T* tiles, unsigned* cycles) {
  measure(tiles, cycles, [](T* a, T* b, T*, int lane) {
    if (!factor_tile(a, lane, [](int) {})) b[lane] = 0;
  });
}

template <class T>
__global__ void __launch_bounds__(32) substitute_forward_piece(T* tiles, unsigned* cycles) {
  measure(tiles, cycles, [](T* a, T* b, T*, int lane) { substitute_forward(a, b, b, lane, [](int) {}); });
}

template <class T>
__global__ void __launch_bounds__(32) substitute_backward_piece(T* tiles, unsigned* cycles) {
  measure(tiles, cycles, [](T* a, T* b, T*, int lane) {
    T column[kTile];
#pragma unroll
    for (int i = 0; i < kTile; ++i) column[i] = b[i * TileTraits<T>::kStride + lane];
    substitute_backward(a, column);
#pragma unroll
    for (int i = 0; i < kTile; ++i) b[i * TileTraits<T>::kStride + lane] = column[i];
  });
}

template <class T>
__global__ void __launch_bounds__(32) scale_factor_piece(T* tiles, unsigned* cycles) {
  measure(tiles, cycles, [](T* a, T* b, T*, int lane) { scale_factor(a, b, lane); });
}

template <class T>
__global__ void __launch_bounds__(32) product_of_rows_piece(T* tiles, unsigned* cycles) {
  measure(tiles, cycles, [](T* a, T* b, T* c, int lane) { subtract_product<Inner::kRows>(c, a, b, lane); });
}

template <class T>
__global__ void __launch_bounds__(32) quarter_product_piece(T* tiles, unsigned* cycles) {
  measure(tiles, cycles, [](T* a, T*, T* c, int lane) { subtract_quarter(c, a, 0, 16, lane); });
}

template <class T>
__global__ void __launch_bounds__(32) product_of_columns_piece(T* tiles, unsigned* cycles) {
  measure(tiles, cycles, [](T* a, T* b, T* c, int lane) { subtract_product<Inner::kColumns>(c, a, b, lane); });
}

template <class T>
__global__ void __launch_bounds__(32) solve_strip_piece(T* tiles, unsigned* cycles) {
  measure(tiles, cycles, [](T* a, T* b, T* c, int lane) {
    T* known = c + TileTraits<T>::kElements;
    solve_strip(c, c, a, known, b, known + kTile * kStrip, false, lane);
  });
}

template <class T>
__global__ void __launch_bounds__(32) product_of_group_piece(T* tiles, unsigned* cycles) {
  measure(tiles, cycles, [](T* a, T*, T*, int lane) {
    T* strip = a + kGroup * TileTraits<T>::kElements;
    StripSums<T, kGroup> sums;
    sums.template subtract_product<kTile, TileTraits<T>::kStride>(a, strip, lane);
    unroll<kGroup>([&](auto own) { sums.template store<own>(a + own * kTile * kStrip, lane); });
  });
}

template <class T>
__global__ void __launch_bounds__(32) product_of_square_piece(T* tiles, unsigned* cycles) {
  measure(tiles, cycles, [](T* a, T* b, T* c, int lane) {
    T sums[4][SquareTraits<T, 1>::kColumns] = {};
    tile_product<Inner::kColumns, Inner::kColumns, Sum::kAddDown>(sums, a, b, lane);
    for (int q = 0; q < 4; ++q) {
      for (int p = 0; p < SquareTraits<T, 1>::kColumns; ++p)
        c[(8 * q + p) * static_cast<int>(kWarpSize) + lane] = sums[q][p];
    }
  });
}

template <class T>
using Kernel = void (*)(T*, unsigned*);

// The least of several runs: the first one fetches the instructions.
template <class T>
void run(const char* name, const char* type, Kernel<T> kernel) {
  constexpr size_t kBytes = kTiles * TileTraits<T>::kElements * sizeof(T);
  T* tiles;
  unsigned* cycles;
  cudaMallocManaged(&tiles, kBytes);
  cudaMallocManaged(&cycles, sizeof(unsigned));
  unsigned least = ~0u;
  for (int attempt = 0; attempt < 5; ++attempt) {
    for (int i = 0; i < kTiles * TileTraits<T>::kElements; ++i) {
      const int row = i / TileTraits<T>::kStride % kTile, column = i % TileTraits<T>::kStride;
      tiles[i] = T(row == column || column == kTile ? 1 : 0.001);
    }
    kernel<<<1, 32, kBytes>>>(tiles, cycles);
    const cudaError_t error = cudaDeviceSynchronize();
    if (error != cudaSuccess) {
      std::printf("%s<%s>: %s\n", name, type, cudaGetErrorString(error));
      return;
    }
    if (*cycles < least) least = *cycles;
  }
  std::printf("%s<%s> %u\n", name, type, least);
  cudaFree(tiles);
  cudaFree(cycles);
}

}  // namespace

}  // namespace consequentialism::cuda

int main() {
  using namespace consequentialism::cuda;
#define CONSEQUENTIALISM_RUN(name)         \
  run<float>(#name, "float", name<float>); \
  run<double>(#name, "double", name<double>)
  CONSEQUENTIALISM_RUN(factor_tile_piece);
  CONSEQUENTIALISM_RUN(substitute_forward_piece);
  CONSEQUENTIALISM_RUN(substitute_backward_piece);
  CONSEQUENTIALISM_RUN(scale_factor_piece);
  CONSEQUENTIALISM_RUN(product_of_rows_piece);
  CONSEQUENTIALISM_RUN(product_of_columns_piece);
  CONSEQUENTIALISM_RUN(solve_strip_piece);
  CONSEQUENTIALISM_RUN(product_of_group_piece);
  CONSEQUENTIALISM_RUN(product_of_square_piece);
  run<float>("quarter_product_piece", "float", quarter_product_piece<float>);
#undef CONSEQUENTIALISM_RUN
}
