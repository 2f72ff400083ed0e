#include "emended_input.cuh"
#include "emended_input_launcher.h"

namespace consequentialism::cuda {

namespace {

// Blocks that share their part of x follow one another.
template <class Traits, class T, class G, class Y, bool kPrimal>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kResident) emended_input_kernel(
    const MatrixView<G> inverse, const MatrixView<T> x, int64_t rows, int64_t inputs, bool bias, bool even,
    Y* __restrict__ y, Accumulator<T>* __restrict__ column) {
  using P = typename Traits::P;
  const int64_t order = kPrimal ? inputs : rows;  // of P, without its border
  const int64_t along = max((order + P::kTileM - 1) / P::kTileM, int64_t{1});
  const int64_t of_inverse = blockIdx.x % along * P::kTileM;
  const int64_t of_input = blockIdx.x / along * P::kTileM;
  const int64_t first_row = kPrimal ? of_input : of_inverse;
  const int64_t first_column = kPrimal ? of_inverse : of_input;
  const bool wanted = bias && first_column == 0;
  const typename Traits::Inverse p{inverse, of_inverse, order};
  const typename Traits::Input input{x, of_input, kPrimal ? rows : inputs};
  const G* border = inverse.data + inputs * inverse.stride;  // where primal, with a bias
  unsigned char* shared = dynamic_shared<unsigned char>();
  BlockSums<P> sums;
  if constexpr (kPrimal) {
    block_product<P>(sums, input, p, false, 0, order, shared, VectorAt<G>{wanted, border, order});
  } else {
    block_product<P>(sums, p, input, false, 0, order, shared, Ones{wanted});
  }
  for_each_pair<P>(sums, [&](int r, int c, typename P::Sum left, typename P::Sum right) {
    const int64_t at = first_column + c;
    if constexpr (kPrimal) {
      if (bias) {
        if (at < inputs) left += border[at];
        if (at + 1 < inputs) right += border[at + 1];
      }
    }
    write_pair(y, first_row + r, at, rows, inputs, even, left, right);
  });
  if (wanted) {
    for_each_of_vector<P>(sums, [&](int r, typename P::Sum value) {
      if (first_row + r >= rows) return;
      if (kPrimal) value += border[inputs];
      column[first_row + r] = static_cast<Accumulator<T>>(value);
    });
  }
}

template <class T, class G, bool kPrimal, int kTile, int kTerms>
cudaError_t launch_tiles(
    const MatrixView<G>& inverse, const MatrixView<T>& x, int64_t rows, int64_t inputs, bool bias, Emended<T>* y,
    Accumulator<T>* column, const EmendPlan& plan, cudaStream_t stream) {
  using Traits = EmendTraits<T, G, kPrimal, kTile, kTerms>;
  if (plan.shared_bytes != Traits::P::kSharedBytes) return cudaErrorInvalidValue;
  LaunchShape shape{};
  shape.grid = dim3(static_cast<unsigned>(plan.blocks));
  shape.block = dim3(Traits::kThreads);
  shape.shared_bytes = plan.shared_bytes;
  shape.stream = stream;
  const bool even = inputs % 2 == 0 && reinterpret_cast<uintptr_t>(y) % (2 * sizeof(Emended<T>)) == 0;
  return launch(
      emended_input_kernel<Traits, T, G, Emended<T>, kPrimal>, shape, inverse, x, rows, inputs, bias, even, y, column);
}

template <class T, class G, bool kPrimal, int kTerms>
cudaError_t launch_tiles(
    const MatrixView<G>& inverse, const MatrixView<T>& x, int64_t rows, int64_t inputs, bool bias, Emended<T>* y,
    Accumulator<T>* column, const EmendPlan& plan, cudaStream_t stream) {
  if constexpr (std::is_same_v<G, float>) {
    if (plan.tile == kLargeTile) {
      return launch_tiles<T, G, kPrimal, kLargeTile, kTerms>(inverse, x, rows, inputs, bias, y, column, plan, stream);
    }
  }
  if (plan.tile != kSmallTile) return cudaErrorInvalidValue;
  return launch_tiles<T, G, kPrimal, kSmallTile, kTerms>(inverse, x, rows, inputs, bias, y, column, plan, stream);
}

}  // namespace

template <class T, class G>
cudaError_t launch_emended_input(
    const G* inverse, int64_t inverse_stride, const T* x, int64_t rows, int64_t inputs, int64_t row_stride, bool bias,
    bool primal, bool tf32, Emended<T>* y, Accumulator<T>* column, const EmendPlan& plan, cudaStream_t stream) {
  if (rows == 0 || plan.tile == 0 || plan.blocks > kMaxGrid) return cudaErrorInvalidValue;
  const MatrixView<G> p = view_of(inverse, inverse_stride);
  const MatrixView<T> view = view_of(x, row_stride);
  if constexpr (std::is_same_v<T, float> && std::is_same_v<G, float>) {
    if (!tf32) {
      return primal ? launch_tiles<T, G, true, 2>(p, view, rows, inputs, bias, y, column, plan, stream)
                    : launch_tiles<T, G, false, 2>(p, view, rows, inputs, bias, y, column, plan, stream);
    }
  }
  if constexpr (std::is_same_v<T, bfloat16> && std::is_same_v<G, float>) {
    if (plan.two_terms) {
      return primal ? launch_tiles<T, G, true, 2>(p, view, rows, inputs, bias, y, column, plan, stream)
                    : launch_tiles<T, G, false, 2>(p, view, rows, inputs, bias, y, column, plan, stream);
    }
  }
  return primal ? launch_tiles<T, G, true, 1>(p, view, rows, inputs, bias, y, column, plan, stream)
                : launch_tiles<T, G, false, 1>(p, view, rows, inputs, bias, y, column, plan, stream);
}

#define CONSEQUENTIALISM_INSTANTIATE(T, W)                                                                \
  template cudaError_t launch_emended_input<T, Accumulator<W>>(                                           \
      const Accumulator<W>*, int64_t, const T*, int64_t, int64_t, int64_t, bool, bool, bool, Emended<T>*, \
      Accumulator<T>*, const EmendPlan&, cudaStream_t);
CONSEQUENTIALISM_FOR_ELEMENTS_AND_WIDE(CONSEQUENTIALISM_INSTANTIATE)
#undef CONSEQUENTIALISM_INSTANTIATE

}  // namespace consequentialism::cuda
