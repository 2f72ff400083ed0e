#include "fused_weight_grad.cuh"

namespace consequentialism::cuda {

namespace {

template <class T, int kTile, int kTerms>
cudaError_t launch_tile(
    const FusedArguments<T>& arguments, const FusedPlan& plan, void* workspace, unsigned* counters,
    unsigned* breakdowns, cudaStream_t stream) {
  using Traits = FusedTraits<T, kTile, kTerms>;
  if (plan.shared_bytes != Traits::kLayout.bytes || plan.depth % Traits::Gram::kDepth != 0) {
    return cudaErrorInvalidValue;
  }
  const bool cooperative = plan.variant == FusedVariant::kCooperative;
  LaunchShape shape{};
  shape.grid = dim3(static_cast<unsigned>(plan.blocks()));
  shape.block = dim3(Traits::kThreads);
  shape.shared_bytes = plan.shared_bytes;
  shape.stream = stream;
  shape.cooperative = cooperative;
  const bool even = arguments.inputs % 2 == 0 && reinterpret_cast<uintptr_t>(arguments.dw) % (2 * sizeof(T)) == 0;
  return launch(
      fused_weight_grad_kernel<Traits, T>, shape, arguments, view_of(arguments.x, arguments.x_stride),
      view_of(arguments.dy, arguments.dy_stride), static_cast<unsigned>(plan.slices), plan.group_tiles,
      static_cast<unsigned>(plan.splits), plan.depth, even,
      cooperative ? static_cast<Accumulator<T>*>(workspace) : nullptr, counters, breakdowns);
}

template <class T, int kTerms>
cudaError_t launch_terms(
    const FusedArguments<T>& arguments, const FusedPlan& plan, void* workspace, unsigned* counters,
    unsigned* breakdowns, cudaStream_t stream) {
  if constexpr (!std::is_same_v<T, double>) {
    if (plan.tile == kLargeTile) {
      return launch_tile<T, kLargeTile, kTerms>(arguments, plan, workspace, counters, breakdowns, stream);
    }
  }
  if (plan.tile != kSmallTile) return cudaErrorInvalidValue;
  return launch_tile<T, kSmallTile, kTerms>(arguments, plan, workspace, counters, breakdowns, stream);
}

template <class T>
cudaError_t launch_plan(
    const FusedArguments<T>& arguments, const FusedPlan& plan, void* workspace, unsigned* counters,
    unsigned* breakdowns, cudaStream_t stream) {
  if (plan.variant == FusedVariant::kNone || plan.blocks() > kMostArrivals || arguments.rows > plan.tile) {
    return cudaErrorInvalidValue;
  }
  if constexpr (std::is_same_v<T, float>) {
    if (!arguments.tf32) return launch_terms<T, 2>(arguments, plan, workspace, counters, breakdowns, stream);
  }
  return launch_terms<T, 1>(arguments, plan, workspace, counters, breakdowns, stream);
}

}  // namespace

template <class T>
cudaError_t launch_fused_weight_grad(
    const FusedArguments<T>& arguments, const FusedPlan& plan, void* workspace, unsigned* counters,
    unsigned* breakdowns, cudaStream_t stream) {
  const cudaError_t error = launch_plan(arguments, plan, workspace, counters, breakdowns, stream);
  if (error != cudaErrorCooperativeLaunchTooLarge || !plan.may_recompute) return error;
  cudaGetLastError();  // dealt with here: whoever asks for the last error later is not to find it
  const FusedShape shape{arguments.rows,          arguments.inputs, arguments.outputs,
                         arguments.db != nullptr, sizeof(T),        std::is_same_v<T, bfloat16>};
  return launch_plan(arguments, recompute_instead(plan, shape), nullptr, counters, breakdowns, stream);
}

#define CONSEQUENTIALISM_INSTANTIATE(T)             \
  template cudaError_t launch_fused_weight_grad<T>( \
      const FusedArguments<T>&, const FusedPlan&, void*, unsigned*, unsigned*, cudaStream_t);
CONSEQUENTIALISM_FOR_ELEMENTS(CONSEQUENTIALISM_INSTANTIATE)
#undef CONSEQUENTIALISM_INSTANTIATE

}  // namespace consequentialism::cuda
