#include "damped_inverse.cuh"
#include "damped_inverse_launcher.h"

namespace consequentialism::cuda {

namespace {

template <class T>
__global__ void __launch_bounds__(inverse_block_threads(sizeof(T)))
    damped_inverse_block_kernel(const __grid_constant__ InverseBatch<T> batch, int n, unsigned* breakdowns) {
  const InverseItem<T>& item = batch.items[blockIdx.x];
  if (item.only_if != nullptr && *item.only_if == 0) return;
  unsigned char* shared = dynamic_shared<unsigned char>();
  invert_matrix(
      Team<InverseTeam::kBlock>(static_cast<int>(blockDim.x)), item, n, n,
      reinterpret_cast<T*>(shared + kInverseStateBytes), nullptr, reinterpret_cast<InverseState<T>*>(shared),
      [breakdowns] { atomicAdd(breakdowns, 1u); });
}

template <class T>
__global__ void __launch_bounds__(kInverseClusterThreads) damped_inverse_cluster_kernel(
    const __grid_constant__ InverseBatch<T> batch, int n, unsigned char* workspace, size_t workspace_bytes,
    unsigned* breakdowns) {
  const unsigned matrix = blockIdx.x / cluster_size();
  const InverseItem<T>& item = batch.items[matrix];
  if (item.only_if != nullptr && *item.only_if == 0) return;
  unsigned char* own = workspace + matrix * workspace_bytes;
  invert_matrix(
      Team<InverseTeam::kCluster>(static_cast<int>(blockDim.x)), item, n, n,
      reinterpret_cast<T*>(own + kInverseStateBytes), dynamic_shared<T>(), reinterpret_cast<InverseState<T>*>(own),
      [breakdowns] { atomicAdd(breakdowns, 1u); });
}

constexpr int kClusterPtx = 90;  // below, cluster_size() was compiled to be 1

#ifndef CONSEQUENTIALISM_HOST_SHIM
__device__ unsigned breakdown_counter;
#endif

}  // namespace

#ifndef CONSEQUENTIALISM_HOST_SHIM
cudaError_t breakdown_counter_address(unsigned** address) {
  return cudaGetSymbolAddress(reinterpret_cast<void**>(address), breakdown_counter);
}
#endif

cudaError_t clusters_run(bool* run) {
  *run = false;
  const auto* kernel = reinterpret_cast<const void*>(damped_inverse_cluster_kernel<double>);  // which takes the most
  cudaFuncAttributes compiled;
  if (const cudaError_t error = cudaFuncGetAttributes(&compiled, kernel); error != cudaSuccess) return error;
  if (compiled.ptxVersion < kClusterPtx) return cudaSuccess;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {kInverseClusterBlocks, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(kInverseClusterBlocks);
  config.blockDim = dim3(kInverseClusterThreads);
  config.attrs = &cluster;
  config.numAttrs = 1;
  int active = 0;
  const cudaError_t error = cudaOccupancyMaxActiveClusters(&active, kernel, &config);
  *run = error == cudaSuccess && active > 0;
  return error;
}

template <class T>
cudaError_t launch_damped_inverse(
    const InverseItem<T>* items, int count, int64_t n, const InversePlan& plan, void* workspace, unsigned* breakdowns,
    cudaStream_t stream) {
  if (count == 0 || n == 0) return cudaSuccess;
  if (plan.team == InverseTeam::kNone || count > kMaxInverseItems) return cudaErrorInvalidValue;
  InverseBatch<T> batch{};
  for (int i = 0; i < count; ++i) batch.items[i] = items[i];
  LaunchShape shape{};
  shape.grid = dim3(static_cast<unsigned>(count * plan.blocks));
  shape.block = dim3(static_cast<unsigned>(plan.threads));
  shape.shared_bytes = plan.shared_bytes;
  shape.stream = stream;
  if (plan.team == InverseTeam::kBlock)
    return launch(damped_inverse_block_kernel<T>, shape, batch, static_cast<int>(n), breakdowns);
  shape.cluster = static_cast<unsigned>(plan.blocks);
  return launch(
      damped_inverse_cluster_kernel<T>, shape, batch, static_cast<int>(n), static_cast<unsigned char*>(workspace),
      plan.workspace_bytes, breakdowns);
}

template cudaError_t launch_damped_inverse<float>(
    const InverseItem<float>*, int, int64_t, const InversePlan&, void*, unsigned*, cudaStream_t);
template cudaError_t launch_damped_inverse<double>(
    const InverseItem<double>*, int, int64_t, const InversePlan&, void*, unsigned*, cudaStream_t);

}  // namespace consequentialism::cuda
