// wgmma.cuh by definition, as late and as strictly as the chip may take it: a product reads shared memory, through its
// descriptors, when it is waited for; until then its sums are NaN. See warpgroup.cpp.
#pragma once

#include "shim.h"

namespace consequentialism::cuda {

namespace shim {

struct Product {
  uint64_t a, b;
  bool outer_major;
  float (*value)(uint16_t bits);
};

uint32_t shared_address(const void* shared);
void fence_shared_for_products();
void warpgroup_fence(const Where& where);
void warpgroup_commit(const Where& where);
void warpgroup_wait(unsigned pending, const Where& where);
void warpgroup_product(float* sums, const Product& product, const Where& where);

}  // namespace shim

inline uint32_t shared_address(const void* shared) {
  return shim::shared_address(shared);
}
inline void fence_shared_for_products() {
  shim::fence_shared_for_products();
}
inline void warpgroup_fence(shim::Where where = shim::Where::current()) {
  shim::warpgroup_fence(where);
}
inline void warpgroup_commit(shim::Where where = shim::Where::current()) {
  shim::warpgroup_commit(where);
}
template <int kPending>
void warpgroup_wait(shim::Where where = shim::Where::current()) {
  static_assert(kPending >= 0);
  shim::warpgroup_wait(kPending, where);
}

template <class T, Major kMajor>
void wgmma_m64n256k16(float (&d)[kWarpgroupSums], uint64_t a, uint64_t b, shim::Where where = shim::Where::current()) {
  static_assert(std::is_same_v<T, bfloat16> || std::is_same_v<T, float16>);
  const auto value = [](uint16_t bits) { return to_float(T{bits}); };
  shim::warpgroup_product(d, {a, b, kMajor == Major::kOuter, value}, where);
}

}  // namespace consequentialism::cuda
