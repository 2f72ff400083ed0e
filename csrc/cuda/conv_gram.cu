#include <algorithm>
#include <limits>

#include "conv_gram.cuh"
#include "conv_gram_launcher.h"

namespace consequentialism::cuda {

namespace {

template <class T>
PatchView<T> view_of(const T* padded, const PatchShape& shape) {
  PatchView<T> view{};
  view.data = padded;
  view.sample = static_cast<int>(shape.sample_elements());
  view.group = shape.samples * shape.sample_elements();
  int64_t step = shape.channels;
  for (int i = 2; i >= 0; --i) {
    view.position[i] = static_cast<int>(step * shape.stride[i]);
    view.tap[i] = static_cast<int>(step * shape.dilation[i]);
    view.positions[i] = Divisor::of(shape.positions[i]);
    view.taps[i] = static_cast<int>(shape.kernel[i]);
    step *= shape.size[i];
  }
  view.channels = static_cast<int>(shape.channels);
  view.used_channels = static_cast<int>(shape.used_channels);
  view.unit = static_cast<int>(std::min<int64_t>(16, shape.channels * static_cast<int64_t>(sizeof(T))));
  return view;
}

// padded <- the piece's samples and positions of x, whose first ones are given.
template <class From, class T>
cudaError_t launch_copy(
    const From* x, const std::array<int64_t, 5>& strides, const ConvGeometry& g, int64_t first_sample, int along,
    int64_t first_line, const PatchShape& shape, T* padded, cudaStream_t stream) {
  ImageView<From> image{};
  image.data = x + first_sample * strides[0];
  std::copy_n(strides.begin(), 5, image.strides);
  for (int i = 0; i < 3; ++i) {
    image.size[i] = g.size[i];
    image.begin[i] = (i == along ? first_line * g.stride[i] : 0) - g.padding[i];
  }
  const int64_t lines = shape.groups * shape.samples * shape.size[0] * shape.size[1];
  const int64_t blocks = lines * ceil_div(shape.size[2], kCopyTile) * ceil_div(shape.channels, kCopyTile);
  if (blocks > kMaxGrid) return cudaErrorInvalidValue;
  LaunchShape launch_shape{};
  launch_shape.grid = dim3(static_cast<unsigned>(blocks));
  launch_shape.block = dim3(kCopyThreads);
  launch_shape.shared_bytes = kCopyTile * (kCopyTile + 1) * sizeof(T);
  launch_shape.stream = stream;
  return launch(
      copy_patches_kernel<From, T>, launch_shape, image, shape.samples, static_cast<int>(shape.size[0]),
      static_cast<int>(shape.size[1]), static_cast<int>(shape.size[2]), static_cast<int>(shape.channels),
      static_cast<int>(shape.used_channels), padded);
}

}  // namespace

template <class From, class T>
cudaError_t launch_conv_gram(
    const From* x, const std::array<int64_t, 5>& strides, const ConvGeometry& g, bool bias, bool tf32,
    Accumulator<T>* gram, const ConvGramPlan& plan, T* padded, void* workspace, cudaStream_t stream) {
  using G = Accumulator<T>;
  const PatchShape largest = patch_shape(g, plan.pieces, sizeof(T));
  const int64_t outer = largest.taps() * largest.channels, inputs = g.inputs();
  const int64_t lines = g.positions[plan.pieces.along];
  G* partial = plan.gram.whole() ? nullptr : static_cast<G*>(workspace);
  ConvEntries<G> entries{
      gram,
      outer + bias,
      inputs + bias,
      outer + bias,
      static_cast<int>(largest.taps()),
      static_cast<int>(largest.channels),
      static_cast<int>(largest.used_channels),
      false};
  bool accumulate = false;
  for (int64_t sample = 0; sample < g.batch; sample += largest.samples) {
    for (int64_t line = 0; line < lines; line += plan.pieces.lines) {
      const ConvPieces piece{
          std::min(largest.samples, g.batch - sample), plan.pieces.along, std::min(plan.pieces.lines, lines - line)};
      const PatchShape shape = patch_shape(g, piece, sizeof(T));
      if (shape.samples * shape.sample_elements() > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidValue;
      cudaError_t error = launch_copy(x, strides, g, sample, piece.along, line, shape, padded, stream);
      if (error != cudaSuccess) return error;
      entries.accumulate = accumulate && partial == nullptr;
      const PatchSource<T> source{view_of(static_cast<const T*>(padded), shape), outer, bias};
      error =
          launch_gram_products(source, shape.rows(), tf32, entries, g.groups, plan.gram, partial, accumulate, stream);
      if (error != cudaSuccess) return error;
      accumulate = true;
    }
  }
  entries.accumulate = false;
  if (partial == nullptr) return cudaSuccess;
  return launch_reduce_gram(static_cast<const G*>(partial), entries, g.groups, plan.gram, stream);
}

#define CONSEQUENTIALISM_INSTANTIATE(From, T)                                                       \
  template cudaError_t launch_conv_gram<From, T>(                                                   \
      const From*, const std::array<int64_t, 5>&, const ConvGeometry&, bool, bool, Accumulator<T>*, \
      const ConvGramPlan&, T*, void*, cudaStream_t);
CONSEQUENTIALISM_INSTANTIATE(float, float)
CONSEQUENTIALISM_INSTANTIATE(bfloat16, bfloat16)
CONSEQUENTIALISM_INSTANTIATE(float16, float16)
CONSEQUENTIALISM_INSTANTIATE(double, double)
CONSEQUENTIALISM_INSTANTIATE(float, double)
CONSEQUENTIALISM_INSTANTIATE(bfloat16, double)
CONSEQUENTIALISM_INSTANTIATE(float16, double)
#undef CONSEQUENTIALISM_INSTANTIATE

}  // namespace consequentialism::cuda
