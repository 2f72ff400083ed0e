// Launcher of the Gram's products by warpgroups, which are in builds for sm_90a. warpgroup_gram.cu is compiled for that
// alone, and CONSEQUENTIALISM_WARPGROUPS says that it is there.
#pragma once

#include "input_gram.h"
#include "types.h"

namespace consequentialism::cuda {

template <class T, class G, bool kPrimal>
struct MatrixSource;
template <class T>
struct ColumnBlocks;

// What warpgroups can multiply: 16-bit elements with float32 sums.
template <class Source>
constexpr bool kOfWarpgroups = false;
template <class T, bool kPrimal>
constexpr bool kOfWarpgroups<MatrixSource<T, float, kPrimal>> = sizeof(T) == 2;
template <class T>
constexpr bool kOfWarpgroups<ColumnBlocks<T>> = sizeof(T) == 2;

#ifdef CONSEQUENTIALISM_WARPGROUPS

// Whether the current device runs the kernels.
cudaError_t warpgroups_run(bool* run);

// As launch_gram_products with plan.tile = kWarpgroupTile; partial is null where plan.whole().
template <class Source, class Entries>
cudaError_t launch_warpgroup_gram(
    const Source& source, int64_t inner, const Entries& entries, int64_t grams, const GramPlan& plan, float* partial,
    cudaStream_t stream);

#else

inline cudaError_t warpgroups_run(bool* run) {
  *run = false;
  return cudaSuccess;
}

template <class Source, class Entries>
cudaError_t launch_warpgroup_gram(
    const Source&, int64_t, const Entries&, int64_t, const GramPlan&, float*, cudaStream_t) {
  return cudaErrorInvalidValue;
}

#endif

}  // namespace consequentialism::cuda
