#include <algorithm>

#include "conv_gram_displaced.cuh"
#include "conv_gram_displaced_launcher.h"
#include "patch_copy_launcher.h"

namespace consequentialism::cuda {

namespace {

CellPieces pieces_of(const DisplacedPlan& plan) {
  return {plan.displacements, static_cast<unsigned>(plan.padded.samples), static_cast<unsigned>(plan.depth)};
}

template <class T>
DisplacedView<T> view_of(const T* padded, const DisplacedPlan& plan, int64_t samples) {
  const PatchShape& shape = plan.padded;
  DisplacedView<T> view{};
  view.data = padded;
  view.group = samples * shape.sample_elements();
  view.pieces = pieces_of(plan);
  view.sample = static_cast<int>(shape.sample_elements());
  int64_t step = shape.channels;
  for (int i = 2; i >= 0; --i) {
    view.step[i] = static_cast<int>(step);
    view.core[i] = Divisor::of(plan.displacements.axes[i].count(0));
    step *= shape.size[static_cast<size_t>(i)];
  }
  view.line = Divisor::of(1);
  view.samples = static_cast<int>(samples);
  view.channels = static_cast<int>(shape.channels);
  view.used_channels = static_cast<int>(shape.used_channels);
  view.unit = static_cast<int>(std::min<int64_t>(16, shape.channels * static_cast<int64_t>(sizeof(T))));
  view.sources[1] = view.step[plan.displacements.along];
  for (int target = 0; target < plan.displacements.targets; ++target) {
    int d[3];
    plan.displacements.target(target, d);
    view.targets[target] = static_cast<int>(flat_offset(shape, d));
  }
  return view;
}

template <class T, int kTile, int kTerms>
cudaError_t launch_products(
    const DisplacedView<T>& view, const DisplacedPlan& plan, bool bias, bool accumulate, Accumulator<T>* partial,
    cudaStream_t stream) {
  using Traits = DisplacedTraits<T, kTile, kTerms>;
  if (plan.tile != kTile || plan.shared_bytes != Traits::P::kSharedBytes || plan.depth % Traits::kDepth != 0) {
    return cudaErrorInvalidValue;
  }
  const int64_t tiles = plan.tiles_down * plan.tiles_across;
  LaunchShape shape{};
  shape.grid = dim3(static_cast<unsigned>(plan.pieces * tiles), static_cast<unsigned>(plan.padded.groups));
  shape.block = dim3(Traits::kThreads);
  shape.shared_bytes = plan.shared_bytes;
  shape.stream = stream;
  return launch(
      displaced_products_kernel<Traits, T>, shape, view, bias, accumulate, static_cast<unsigned>(tiles),
      static_cast<unsigned>(plan.tiles_across), partial);
}

template <class T>
cudaError_t launch_products(
    const DisplacedView<T>& view, const DisplacedPlan& plan, bool bias, bool tf32, bool accumulate,
    Accumulator<T>* partial, cudaStream_t stream) {
  constexpr int kTile = std::is_same_v<T, double> ? kSmallTile : kLargeTile;
  if constexpr (std::is_same_v<T, float>) {
    if (!tf32) return launch_products<T, kTile, 2>(view, plan, bias, accumulate, partial, stream);
  }
  return launch_products<T, kTile, 1>(view, plan, bias, accumulate, partial, stream);
}

}  // namespace

template <class From, class T>
cudaError_t launch_conv_gram_displaced(
    const From* x, const std::array<int64_t, 5>& strides, const ConvGeometry& g, bool bias, bool tf32,
    Accumulator<T>* gram, const DisplacedPlan& plan, T* padded, void* workspace, cudaStream_t stream) {
  using G = Accumulator<T>;
  if (plan.tile == 0 || g.groups > kMaxGrams) return cudaErrorInvalidValue;
  G* partial = static_cast<G*>(workspace);
  const Displacements& displacements = plan.displacements;
  std::array<int64_t, 3> begin;
  for (size_t i = 0; i < 3; ++i) begin[i] = -g.padding[i];
  begin[static_cast<size_t>(displacements.along)] -= displacements.sources - 1;
  for (int64_t sample = 0; sample < g.batch; sample += plan.padded.samples) {
    PatchShape shape = plan.padded;
    shape.samples = std::min(shape.samples, g.batch - sample);
    cudaError_t error = launch_patch_copy(x + sample * strides[0], strides, g.size, begin, shape, padded, stream);
    if (error != cudaSuccess) return error;
    const DisplacedView<T> view = view_of(static_cast<const T*>(padded), plan, shape.samples);
    error = launch_products(view, plan, bias, tf32, sample > 0, partial, stream);
    if (error != cudaSuccess) return error;
  }
  const int64_t taps = g.taps(), channels = g.group_channels();
  const int64_t tiles = ceil_div(channels, kAssembleRows) * ceil_div(channels, kAssembleColumns);
  if (taps * taps * tiles > kMaxGrid) return cudaErrorInvalidValue;
  LaunchShape shape{};
  shape.grid = dim3(static_cast<unsigned>(taps * taps * tiles), static_cast<unsigned>(g.groups));
  shape.block = dim3(kAssembleColumns * kAssembleRows);
  shape.shared_bytes = static_cast<size_t>(displacements.cells()) * sizeof(unsigned);
  shape.stream = stream;
  const auto count = static_cast<G>(g.lines() * g.positions[2]);
  return launch(
      assemble_displaced_kernel<G>, shape, pieces_of(plan), static_cast<int>(plan.padded.channels),
      static_cast<int>(channels), static_cast<const G*>(partial), bias, count, gram);
}

#define CONSEQUENTIALISM_INSTANTIATE(From, T)                                                       \
  template cudaError_t launch_conv_gram_displaced<From, T>(                                         \
      const From*, const std::array<int64_t, 5>&, const ConvGeometry&, bool, bool, Accumulator<T>*, \
      const DisplacedPlan&, T*, void*, cudaStream_t);
CONSEQUENTIALISM_FOR_ELEMENTS_AND_WIDE(CONSEQUENTIALISM_INSTANTIATE)
#undef CONSEQUENTIALISM_INSTANTIATE

}  // namespace consequentialism::cuda
