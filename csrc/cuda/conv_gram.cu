#include <algorithm>
#include <limits>

#include "conv_gram.cuh"
#include "conv_gram_launcher.h"
#include "patch_copy_launcher.h"

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

}  // namespace

template <class From, class T>
cudaError_t launch_conv_gram(
    const From* x, const std::array<int64_t, 5>& strides, const ConvGeometry& g, bool bias, bool tf32,
    Accumulator<T>* gram, const ConvGramPlan& plan, T* padded, void* workspace, cudaStream_t stream) {
  using G = Accumulator<T>;
  const PatchShape largest = patch_shape(g, plan.pieces, sizeof(T));
  const int64_t outer = largest.taps() * largest.channels, inputs = g.inputs();
  const auto along = static_cast<size_t>(plan.pieces.along);
  const int64_t lines = g.positions[along];
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
      std::array<int64_t, 3> begin;
      for (size_t i = 0; i < 3; ++i) begin[i] = (i == along ? line * g.stride[i] : 0) - g.padding[i];
      cudaError_t error = launch_patch_copy(x + sample * strides[0], strides, g.size, begin, shape, padded, stream);
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
CONSEQUENTIALISM_FOR_ELEMENTS_AND_WIDE(CONSEQUENTIALISM_INSTANTIATE)
#undef CONSEQUENTIALISM_INSTANTIATE

}  // namespace consequentialism::cuda
