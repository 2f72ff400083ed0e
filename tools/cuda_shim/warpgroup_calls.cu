// One product of a warpgroup, right or with one mistake, which the shim has to catch; tests/test_cuda_warpgroups.py.
#include "warpgroup_gram.cuh"

using namespace consequentialism::cuda;

namespace {

enum Mistake : int {
  kNone,
  kNoFenceOfCopies,
  kNoWaitForCopies,
  kNoFenceOfSums,
  kReadsEarly,
  kWritesSumsInFlight,
  kOverwritesOperand,
  kNeverWaits,
  kOtherProducts,
  kOtherSwizzle,
  kOtherDescriptors,
  kUnalignedPanels,
};

// out [64, 256] <- a b^T, a [64, 64], b [256, 64], each as its transpose where outer-major.
template <Major kMajor>
__global__ void product_kernel(const bfloat16* a, const bfloat16* b, float* out, int mistake) {
  using P = WarpgroupProduct<bfloat16, kMajor == Major::kOuter>;
  constexpr int kThreads = 128;
  unsigned char* panels = dynamic_shared<unsigned char>();
  panels += (kSwizzledAlignment - shared_address(panels) % kSwizzledAlignment) % kSwizzledAlignment;
  if (mistake == kUnalignedPanels) panels += 256;
  const bool outer_major = kMajor == Major::kOuter;
  const MatrixView<bfloat16> from_a{a, 64, 16}, from_b{b, outer_major ? 256 : 64, 16};
  const auto stage = [&] {
    stage_panel<kThreads>(panels, from_a, 0, 0, 64, 64);
    for (int p = 0; p < 4; ++p) {
      const int line = outer_major ? 0 : 64 * p, column = outer_major ? 64 * p : 0;
      stage_panel<kThreads>(
          panels + (1 + p) * kPanelBytes, from_b, line, column, outer_major ? 64 : 256, outer_major ? 256 : 64);
    }
    copy_async_commit();
  };
  stage();
  if (mistake != kNoWaitForCopies) copy_async_wait<0>();
  if (mistake != kNoFenceOfCopies) fence_shared_for_products();
  __syncthreads();
  float sums[kWarpgroupSums] = {};
  if (mistake != kNoFenceOfSums) warpgroup_fence();
  const uint32_t at = shared_address(panels);
  for (int k = 0; k < 4; ++k) {
    uint64_t left = descriptor_of<P>(at, k);
    if (mistake == kOtherProducts && threadIdx.x / kWarpSize == 2) left = descriptor_of<P>(at, 3 - k);
    if (mistake == kOtherSwizzle) left |= uint64_t{3} << 62;
    if (mistake == kOtherDescriptors && threadIdx.x % kWarpSize == 9) left = descriptor_of<P>(at, 3 - k);
    wgmma_m64n256k16<bfloat16, kMajor>(sums, left, descriptor_of<P>(at + kPanelBytes, k));
  }
  warpgroup_commit();
  if (mistake == kReadsEarly) out[threadIdx.x] = sums[0];
  if (mistake == kWritesSumsInFlight) sums[5] = 1;
  if (mistake == kOverwritesOperand) {
    __syncthreads();
    stage();
  }
  if (mistake != kNeverWaits) warpgroup_wait<0>();
  copy_async_wait<0>();
  if (mistake == kReadsEarly) return;
  BlockSums<P> all;
  for (int i = 0; i < kWarpgroupSums; ++i) all.tile[i] = sums[i];
  for_each_pair<P>(all, [&](int row, int column, float first, float second) {
    out[row * 256 + column] = first;
    out[row * 256 + column + 1] = second;
  });
}

}  // namespace

extern "C" int call_product(const void* a, const void* b, float* out, bool outer_major, int64_t mistake) {
  LaunchShape shape{};
  shape.grid = dim3(1);
  shape.block = dim3(128);
  shape.shared_bytes = 5 * kPanelBytes + kSwizzledAlignment + 256;
  auto* const kernel = outer_major ? product_kernel<Major::kOuter> : product_kernel<Major::kInner>;
  return launch(
      kernel, shape, static_cast<const bfloat16*>(a), static_cast<const bfloat16*>(b), out, static_cast<int>(mistake));
}

extern "C" int call_descriptor(uint64_t* words) {
  words[0] = operand_descriptor(0x2C40, 0x2000, 0x400);
  return 0;
}
