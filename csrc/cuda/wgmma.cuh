// Products of warpgroups, of sm_90a: four warps whose first is a multiple of four, operands in shared memory, sums in
// registers that the tensor cores write while the threads go on.
//
// An operand is [outer, inner], bfloat16 or float16, in lines of 128 bytes (64 elements of the index that is
// contiguous), the 16-byte chunk c of line l at chunk c ^ l % 8, from an address that is a multiple of
// kSwizzledAlignment on. Lines are contiguous; inner-major operands have a line for each outer index, outer-major ones
// a line for each inner index and, for every 64 outer indices, a panel of lines of its own.
#pragma once

#include "matrix_tiles.h"
#include "platform.cuh"

namespace consequentialism::cuda {

constexpr int kSwizzledLine = 128;              // bytes
constexpr int kWarpgroupSums = 64 * 256 / 128;  // of a thread
constexpr int kWarpgroupInner = 16;             // of one instruction

// Where the chunk lies in its line.
__host__ __device__ constexpr int swizzled_chunk(int line, int chunk) {
  return chunk ^ (line & 7);
}

// The descriptor of an operand in shared memory: its first line's address, or the first chunk's of a later inner index;
// bytes from a panel of 64 outer indices to the next (outer-major only); bytes from eight lines to the next.
__host__ __device__ constexpr uint64_t operand_descriptor(uint32_t address, uint32_t panel, uint32_t lines) {
  constexpr auto kEncode = [](uint32_t bytes) { return uint64_t{(bytes & 0x3FFFFu) >> 4}; };
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  return kEncode(address) | kEncode(panel) << 16 | kEncode(lines) << 32 | kSwizzle128;
}

}  // namespace consequentialism::cuda

#ifdef CONSEQUENTIALISM_HOST_SHIM
#include "shim_wgmma.h"
#else

namespace consequentialism::cuda {

// As descriptors have it.
__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// What this thread has written to shared memory, copies that it has waited for included, is seen by the products that
// are issued after the next barrier.
__device__ __forceinline__ void fence_shared_for_products() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// All of the following are for whole warps of a warpgroup that is whole. Before the first product, and wherever a
// thread has touched sums since: products that are issued after it see them.
__device__ __forceinline__ void warpgroup_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// The products since the last commit are a group; the wait is for all groups but the last kPending. From a product to
// the wait for it its sums must not be touched, its operands not be written to.
__device__ __forceinline__ void warpgroup_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void warpgroup_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

#define CONSEQUENTIALISM_SUMS_8(d, i)                                                                         \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define CONSEQUENTIALISM_SUMS_32(d, i)                                                                  \
  CONSEQUENTIALISM_SUMS_8(d, i), CONSEQUENTIALISM_SUMS_8(d, i + 8), CONSEQUENTIALISM_SUMS_8(d, i + 16), \
      CONSEQUENTIALISM_SUMS_8(d, i + 24)
#define CONSEQUENTIALISM_WGMMA(type)                                                                                   \
  asm volatile(                                                                                                        \
      "{.reg .pred accumulate; setp.eq.u32 accumulate, 0, 0;\n"                                                        \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type                                                     \
      " {"                                                                                                             \
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29," \
      "%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,"   \
      "%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,"   \
      "%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,"  \
      "%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127},"               \
      " %128, %129, accumulate, 1, 1, %130, %130;}"                                                                    \
      : CONSEQUENTIALISM_SUMS_32(d, 0), CONSEQUENTIALISM_SUMS_32(d, 32), CONSEQUENTIALISM_SUMS_32(d, 64),              \
        CONSEQUENTIALISM_SUMS_32(d, 96)                                                                                \
      : "l"(a), "l"(b), "n"(kMajor == Major::kOuter))

// d[64, 256] += a[64, 16] b[256, 16]^T, in float32; a and b are descriptors of operands of either major, the same in
// all threads. With warp = of the warpgroup, row = lane / 4 and pair = lane % 4 a thread has, for j = 0 .. 31, d: {[16
// warp + row, 8 j + 2 pair], the next column's, [16 warp + row + 8, 8 j + 2 pair], the next column's}.
template <class T, Major kMajor>
__device__ __forceinline__ void wgmma_m64n256k16(float (&d)[kWarpgroupSums], uint64_t a, uint64_t b) {
  static_assert(std::is_same_v<T, bfloat16> || std::is_same_v<T, float16>);
  if constexpr (std::is_same_v<T, bfloat16>) {
    CONSEQUENTIALISM_WGMMA("bf16");
  } else {
    CONSEQUENTIALISM_WGMMA("f16");
  }
}

#undef CONSEQUENTIALISM_WGMMA
#undef CONSEQUENTIALISM_SUMS_32
#undef CONSEQUENTIALISM_SUMS_8

}  // namespace consequentialism::cuda

#endif
