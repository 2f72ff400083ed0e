#include "damped_inverse.cuh"
#include "damped_inverse_launcher.h"
#include "damped_inverse_resident.cuh"
#include "factored_inverse_launcher.h"

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

template <class T>
__global__ void __launch_bounds__(kInverseClusterThreads) damped_inverse_resident_kernel(
    const __grid_constant__ InverseBatch<T> batch, int n, const ResidentShape shape, unsigned char* workspace,
    size_t workspace_bytes, unsigned* breakdowns) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900  // below there are no clusters, and nothing to launch
  const unsigned matrix = blockIdx.x / cluster_size();
  const InverseItem<T>& item = batch.items[matrix];
  if (item.only_if != nullptr && *item.only_if == 0) return;
  unsigned char* own = workspace + matrix * workspace_bytes;
  auto* state = reinterpret_cast<InverseState<T>*>(own);
  const Team<InverseTeam::kCluster> team(static_cast<int>(blockDim.x));
  const ResidentTiles<T> tiles(
      team, tiles_along(n), shape, dynamic_shared<T>(), reinterpret_cast<T*>(own + kInverseStateBytes));
  const auto factor = [&](T ridge) {
    tiles.load(item.gram, n, n, ridge, state->unit);
    tiles.factor(state);
  };
  const auto finish = [](T) {};  // factored_inverse.cuh's
  invert_with_retries(team, item, n, n, state, factor, finish, [breakdowns] { atomicAdd(breakdowns, 1u); });
#endif
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

cudaError_t clusters_run(bool* run, int* resident_blocks, int* resident_clusters) {
  *run = false;
  *resident_blocks = *resident_clusters = 0;
  const auto* kernel = reinterpret_cast<const void*>(damped_inverse_cluster_kernel<double>);  // which takes the most
  cudaFuncAttributes compiled;
  if (const cudaError_t error = cudaFuncGetAttributes(&compiled, kernel); error != cudaSuccess) return error;
  if (compiled.ptxVersion < kClusterPtx) return cudaSuccess;
  int device, most;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  const size_t tile = inverse_tile_bytes(sizeof(double));
  int active = 0;
  error = clusters_at_once(&active, kernel, kInverseClusterBlocks, kInverseClusterThreads, tile);
  if (error != cudaSuccess) return error;
  *run = active > 0;
  // With a processor's whole shared memory a block has it to itself: where so many have, those of any kernel fit.
  const auto* resident = reinterpret_cast<const void*>(damped_inverse_resident_kernel<double>);
  const auto at_once = [&](int blocks) {
    int count = 0;
    const auto cluster = static_cast<unsigned>(blocks);
    if (error == cudaSuccess) {
      error = clusters_at_once(&count, resident, cluster, kInverseClusterThreads, static_cast<size_t>(most));
    }
    return count;
  };
  const bool large = at_once(kInverseLargeCluster) > 0;
  *resident_clusters = at_once(kInverseClusterBlocks);
  int blocks = large ? kInverseLargeCluster : kInverseClusterBlocks;
  while (!large && blocks > 1 && at_once(blocks) == 0) --blocks;
  *resident_blocks = blocks > 1 ? blocks : 0;
  if (error == cudaSuccess && *resident_blocks >= kInverseClusterBlocks) error = load_factored_inverse();
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
  if (plan.team == InverseTeam::kResident) {
    auto* own = static_cast<unsigned char*>(workspace);
    const cudaError_t error = launch(
        damped_inverse_resident_kernel<T>, shape, batch, static_cast<int>(n), plan.resident, own, plan.workspace_bytes,
        breakdowns);
    if (error != cudaSuccess) return error;
    return launch_factored_inverse(batch, count, static_cast<int>(n), plan, own, stream);
  }
  return launch(
      damped_inverse_cluster_kernel<T>, shape, batch, static_cast<int>(n), static_cast<unsigned char*>(workspace),
      plan.workspace_bytes, breakdowns);
}

template cudaError_t launch_damped_inverse<float>(
    const InverseItem<float>*, int, int64_t, const InversePlan&, void*, unsigned*, cudaStream_t);
template cudaError_t launch_damped_inverse<double>(
    const InverseItem<double>*, int, int64_t, const InversePlan&, void*, unsigned*, cudaStream_t);

}  // namespace consequentialism::cuda
