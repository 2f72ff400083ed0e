// For sm_90a alone: what is compiled for anything else has no such instructions, and must not be found by a device.
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "warpgroup_gram.cu is to be compiled with -gencode=arch=compute_90a,code=sm_90a, and no other architecture"
#endif

#include "gram_entries.cuh"
#include "warpgroup_gram.cuh"

namespace consequentialism::cuda {

cudaError_t warpgroups_run(bool* run) {
  *run = false;
  int device, major, minor;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error != cudaSuccess || major != 9 || minor != 0) return error;
  using Source = MatrixSource<bfloat16, float, false>;
  const auto* kernel = reinterpret_cast<const void*>(warpgroup_gram_kernel<Source, InputEntries<float>>);
  cudaFuncAttributes compiled;
  error = cudaFuncGetAttributes(&compiled, kernel);
  *run = error == cudaSuccess;
  return error;
}

template <class Source, class Entries>
cudaError_t launch_warpgroup_gram(
    const Source& source, int64_t inner, const Entries& entries, int64_t grams, const GramPlan& plan, float* partial,
    cudaStream_t stream) {
  using P = WarpgroupProductOf<Source>;
  const bool one_chain = plan.depth <= kWarpgroupChain;
  if (source.x.unit != 16 || plan.shared_bytes != P::kSharedBytes || plan.depth % P::kDepth != 0 ||
      (partial == nullptr && !one_chain)) {
    return cudaErrorInvalidValue;
  }
  LaunchShape shape{};
  shape.grid = dim3(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(grams));
  shape.block = dim3(P::kThreads);
  shape.shared_bytes = plan.shared_bytes;
  shape.stream = stream;
  shape.cluster = plan.cluster;
  const GramGrid grid{static_cast<unsigned>(plan.blocks / plan.splits), plan.depth, false};
  return launch(warpgroup_gram_kernel<Source, Entries>, shape, source, inner, grid, entries, partial);
}

#define CONSEQUENTIALISM_INSTANTIATE_OF(T)                                                                         \
  template cudaError_t launch_warpgroup_gram(                                                                      \
      const MatrixSource<T, float, false>&, int64_t, const InputEntries<float>&, int64_t, const GramPlan&, float*, \
      cudaStream_t);                                                                                               \
  template cudaError_t launch_warpgroup_gram(                                                                      \
      const MatrixSource<T, float, true>&, int64_t, const InputEntries<float>&, int64_t, const GramPlan&, float*,  \
      cudaStream_t);                                                                                               \
  template cudaError_t launch_warpgroup_gram(                                                                      \
      const ColumnBlocks<T>&, int64_t, const DecayedEntries<float>&, int64_t, const GramPlan&, float*, cudaStream_t);
CONSEQUENTIALISM_INSTANTIATE_OF(bfloat16)
CONSEQUENTIALISM_INSTANTIATE_OF(float16)
#undef CONSEQUENTIALISM_INSTANTIATE_OF

}  // namespace consequentialism::cuda
