// What a block of a launch does last where one of them works for all.
#pragma once

#include "platform.cuh"

namespace consequentialism::cuda {

// Whether some thread of the block comes with `flag`; shared is one integer.
__device__ __forceinline__ bool block_any(bool flag, int* shared) {
  __syncthreads();
  if (threadIdx.x == 0) *shared = 0;
  __syncthreads();
  if (flag) *shared = 1;
  __syncthreads();
  return *shared != 0;
}

constexpr unsigned kMostArrivals = 0xFFFF;  // blocks of a ticket, whose upper half counts those with a flag

enum class Arrival : int { kEarlier, kLast, kLastOfFlagged };

// For one thread of each of the `blocks` that come here. What the others wrote before is seen after. The ticket is zero
// before and is left so.
__device__ __forceinline__ Arrival count_in(unsigned* ticket, unsigned blocks, bool flag) {
  constexpr unsigned kFlagged = kMostArrivals + 1;
  const unsigned own = flag ? kFlagged + 1 : 1;
  __threadfence();
  const unsigned all = atomicAdd(ticket, own) + own;
  const bool last = all % kFlagged == blocks;
  if (last) *ticket = 0;
  __threadfence();
  if (!last) return Arrival::kEarlier;
  return all >= kFlagged ? Arrival::kLastOfFlagged : Arrival::kLast;
}

// Whether the block is the last of those that come here, and if so whether some block came with `flag`: the same in all
// its threads. shared is one integer.
__device__ __forceinline__ Arrival arrive(unsigned* ticket, unsigned blocks, bool flag, int* shared) {
  __syncthreads();
  if (threadIdx.x == 0) *shared = static_cast<int>(count_in(ticket, blocks, flag));
  __syncthreads();
  return static_cast<Arrival>(*shared);
}

// Whether the block is the last of those that come here, and some block came with `flag`.
__device__ __forceinline__ bool last_of_flagged(unsigned* ticket, unsigned blocks, bool flag, int* shared) {
  bool last = false;
  __syncthreads();
  if (threadIdx.x == 0) last = count_in(ticket, blocks, flag) == Arrival::kLastOfFlagged;
  return block_any(last, shared);
}

}  // namespace consequentialism::cuda
