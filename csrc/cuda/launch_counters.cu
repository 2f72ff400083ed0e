#include "launch_counters.h"

namespace consequentialism::cuda {

namespace {

__device__ unsigned all_counters[kStreamSlots * kLaunchCounters];

}  // namespace

cudaError_t launch_counters_address(unsigned** address) {
  return cudaGetSymbolAddress(reinterpret_cast<void**>(address), all_counters);
}

}  // namespace consequentialism::cuda
