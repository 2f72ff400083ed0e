// Kernels with one mistake each, which the shim has to catch; some are right where `right` says so.
#include <string_view>

#include "mma.cuh"
#include "platform.cuh"

using namespace consequentialism::cuda;

namespace {

struct Arguments {
  float* in;
  float* out;
  int count;  // floats in `in`
  int offset;
  bool right;
};

__global__ void missing_barrier(Arguments a) {
  float* shared = dynamic_shared<float>();
  const unsigned thread = threadIdx.x;
  shared[thread] = a.in[thread];
  if (a.right) __syncthreads();
  a.out[thread] = shared[blockDim.x - 1 - thread];
}

// The warps meet before the sum, but not before the next round overwrites what the others still read.
__global__ void missing_second_barrier(Arguments a) {
  float* shared = dynamic_shared<float>();
  const unsigned thread = threadIdx.x, warps = blockDim.x / kWarpSize;
  float sum = 0;
  for (int round = 1; round < 4; ++round) {
    float value = a.in[thread] * static_cast<float>(round);
    for (int flips = 16; flips > 0; flips /= 2) value += __shfl_xor_sync(kFullWarp, value, flips);
    if (thread % kWarpSize == 0) shared[thread / kWarpSize] = value;
    __syncthreads();
    for (unsigned warp = 0; warp < warps; ++warp) sum += shared[warp];
    if (a.right) __syncthreads();
  }
  a.out[thread] = sum;
}

__global__ void missing_syncwarp(Arguments a) {
  float* shared = dynamic_shared<float>();
  const unsigned lane = threadIdx.x % kWarpSize, first = threadIdx.x - lane;
  shared[threadIdx.x] = a.in[threadIdx.x];
  if (a.right) __syncwarp();
  a.out[threadIdx.x] = shared[first + (lane ^ 1)];
}

__global__ void missing_grid_barrier(Arguments a) {
  const unsigned own = blockIdx.x * blockDim.x + threadIdx.x, threads = gridDim.x * blockDim.x;
  unsigned* counter = reinterpret_cast<unsigned*>(a.in) + threads;
  a.in[own] += 1.0f;
  if (a.right) grid_barrier(counter, gridDim.x);
  a.out[own] = a.in[threads - 1 - own];
}

__global__ void divergent_barrier(Arguments a) {
  if (a.right || threadIdx.x % kWarpSize < 16) {
    __syncthreads();
  } else {
    __syncwarp();
  }
}

__global__ void two_barriers(Arguments a) {
  if (threadIdx.x < kWarpSize) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  a.out[threadIdx.x] = 0;
}

__global__ void grid_barrier_alone(Arguments a) {
  grid_barrier(reinterpret_cast<unsigned*>(a.in), gridDim.x);
}

// The second warp reads what the first one has not written yet.
__global__ void arrives_too_early(Arguments a) {
  float* shared = dynamic_shared<float>();
  const unsigned lane = threadIdx.x % kWarpSize;
  if (threadIdx.x >= kWarpSize) {
    named_barrier_wait(1, 64);
    a.out[lane] = shared[lane];
    return;
  }
  if (!a.right) named_barrier_arrive(1, 64);
  shared[lane] = a.in[lane];
  if (a.right) named_barrier_arrive(1, 64);
}

__global__ void nobody_waits(Arguments a) {
  if (threadIdx.x < kWarpSize) named_barrier_arrive(1, 64);
  if (threadIdx.x >= kWarpSize && a.right) named_barrier_wait(1, 64);
}

__global__ void arrives_twice(Arguments a) {
  named_barrier_arrive(1, 64);
  if (threadIdx.x < kWarpSize) named_barrier_arrive(1, 64);
  a.out[threadIdx.x] = 0;
}

__global__ void other_count(Arguments) {
  named_barrier_wait(1, threadIdx.x < kWarpSize ? 64 : 32);
}

__global__ void exited_lane(Arguments a) {
  if (threadIdx.x == 7) return;
  a.out[threadIdx.x] = __shfl_xor_sync(kFullWarp, a.in[threadIdx.x], 1);
}

__global__ void exits_later(Arguments a) {
  if (a.offset >= 0 && static_cast<int>(threadIdx.x) == 31 - a.offset) return;
  __syncwarp();
}

__global__ void other_collective(Arguments a) {
  if (threadIdx.x < 5) {
    __syncwarp();
  } else {
    a.out[threadIdx.x] = __shfl_sync(kFullWarp, a.in[threadIdx.x], 3);
  }
}

__global__ void caller_not_in_mask(Arguments a) {
  a.out[threadIdx.x] = __shfl_sync(0x7FFFFFFFu, a.in[threadIdx.x], 0);
}

__global__ void other_mask(Arguments a) {
  a.out[threadIdx.x] = __shfl_sync(threadIdx.x < 9 ? kFullWarp : 0xFFFFFE00u, a.in[threadIdx.x], 12);
}

__global__ void divergent_mma(Arguments a) {
  uint32_t left[4] = {}, right[2] = {};
  float sum[4] = {};
  if (threadIdx.x % 2 == 0) {
    mma_m16n8k8_tf32(sum, left, right);
  } else {
    mma_m16n8k8_tf32(sum, left, right);
  }
  a.out[threadIdx.x] = sum[0];
}

__global__ void value_of_no_lane(Arguments a) {
  if (threadIdx.x < 16) a.out[threadIdx.x] = __shfl_xor_sync(0x0000FFFFu, a.in[threadIdx.x], 16);
}

__global__ void missing_copy_wait(Arguments a) {
  float* shared = dynamic_shared<float>();
  copy_async_16(shared + 4 * threadIdx.x, a.in + 4 * threadIdx.x, 16);
  copy_async_commit();
  if (a.right) copy_async_wait<0>();
  __syncthreads();
  a.out[threadIdx.x] = shared[4 * threadIdx.x];
}

__global__ void missing_copy_commit(Arguments a) {
  float* shared = dynamic_shared<float>();
  copy_async_16(shared + 4 * threadIdx.x, a.in + 4 * threadIdx.x, 16);
  if (a.right) copy_async_commit();
  copy_async_wait<0>();
  a.out[threadIdx.x] = shared[4 * threadIdx.x];
}

__global__ void missing_barrier_after_copy(Arguments a) {
  float* shared = dynamic_shared<float>();
  copy_async_16(shared + 4 * threadIdx.x, a.in + 4 * threadIdx.x, 16);
  copy_async_commit();
  copy_async_wait<0>();
  if (a.right) __syncthreads();
  a.out[threadIdx.x] = shared[4 * (threadIdx.x ^ 33)];
}

__global__ void copy_over_what_is_read(Arguments a) {
  float* shared = dynamic_shared<float>();
  shared[4 * threadIdx.x] = a.in[threadIdx.x];
  __syncthreads();
  const float read = shared[4 * (threadIdx.x ^ 33)];
  if (a.right) __syncthreads();
  copy_async_16(shared + 4 * threadIdx.x, a.in + 4 * threadIdx.x, 16);
  copy_async_commit();
  a.out[threadIdx.x] = read;
}

__global__ void misaligned_copy(Arguments a) {
  float* shared = dynamic_shared<float>();
  copy_async_16(shared + a.offset, a.in + 1 - a.offset, 16);
}

__global__ void stray_copy(Arguments a) {
  float* shared = dynamic_shared<float>();
  if (a.offset < 0) {
    copy_async_16(shared, a.in + a.count, 16);
  } else {
    copy_async_16(shared + a.offset, a.in, 16);
  }
  copy_async_commit();
  copy_async_wait<0>();
}

__global__ void read_global(Arguments a) {
  a.out[threadIdx.x] = a.in[a.offset];
}

__global__ void write_global(Arguments a) {
  a.in[a.offset] = 1;
}

__global__ void read_shared(Arguments a) {
  a.out[threadIdx.x] = dynamic_shared<float>()[a.offset];
}

__global__ void write_shared(Arguments a) {
  dynamic_shared<float>()[a.offset] = 1;
}

__global__ void misaligned_vector(Arguments a) {
  const float4 value = *reinterpret_cast<const float4*>(a.in + a.offset);
  a.out[threadIdx.x] = value.x + value.w;
}

__global__ void ldmatrix_row(Arguments a) {
  uint32_t registers[4];
  ldmatrix_x4(registers, reinterpret_cast<const unsigned char*>(dynamic_shared<float>()) + a.offset);
  a.out[threadIdx.x] = __uint_as_float(registers[0]);
}

__global__ void array_index(Arguments a) {
  float values[4] = {1, 2, 3, 4};
  values[a.offset] = a.in[0];
  a.out[threadIdx.x] = values[0] + values[3];
}

__global__ void divide_by_zero(Arguments a) {
  a.out[threadIdx.x] = static_cast<float>(a.count / a.offset);
}

__global__ void no_pointer(Arguments a) {
  float* volatile nowhere = nullptr;
  a.out[threadIdx.x] = *nowhere;
}

__global__ void deep(Arguments a) {
  volatile float values[20000];
  for (int i = 19999; i >= 0; --i) values[i] = a.in[0];
  a.out[threadIdx.x] = values[a.offset];
}

__global__ void cluster_before(Arguments a) {
  float* own = dynamic_shared<float>();
  if (a.right) cluster_sync();
  *cluster_map(own + threadIdx.x, 1 - cluster_block_rank()) = a.in[threadIdx.x];
  cluster_sync();
  a.out[threadIdx.x] = own[threadIdx.x];
}

__global__ void cluster_after(Arguments a) {
  float* own = dynamic_shared<float>();
  own[threadIdx.x] = a.in[threadIdx.x];
  cluster_sync();
  a.out[threadIdx.x] = *cluster_map(own + threadIdx.x, 1 - cluster_block_rank());
  if (a.right) cluster_sync();
}

__global__ void cluster_rank(Arguments a) {
  a.out[0] = *cluster_map(dynamic_shared<float>(), cluster_size());
}

__global__ void trap(Arguments a) {
  if (static_cast<int>(threadIdx.x) == a.offset) __trap();
}

__global__ void endless(Arguments a) {
  while (*static_cast<volatile float*>(a.in) >= 0) {
  }
}

struct Broken {
  std::string_view name;
  void (*kernel)(Arguments);
  LaunchShape shape;
};

const Broken kBroken[] = {
    {"missing_barrier", missing_barrier, {1, 64, 64 * 4}},
    {"missing_second_barrier", missing_second_barrier, {1, 64, 2 * 4}},
    {"missing_syncwarp", missing_syncwarp, {1, 64, 64 * 4}},
    {"missing_grid_barrier", missing_grid_barrier, {4, 16, 0, nullptr, 1, true}},
    {"divergent_barrier", divergent_barrier, {1, 64}},
    {"two_barriers", two_barriers, {1, 64}},
    {"grid_barrier_alone", grid_barrier_alone, {2, 32}},
    {"arrives_too_early", arrives_too_early, {1, 64, 32 * 4}},
    {"nobody_waits", nobody_waits, {1, 64}},
    {"arrives_twice", arrives_twice, {1, 64}},
    {"other_count", other_count, {1, 64}},
    {"exited_lane", exited_lane, {1, 32}},
    {"exits_later", exits_later, {1, 32}},
    {"other_collective", other_collective, {1, 32}},
    {"caller_not_in_mask", caller_not_in_mask, {1, 32}},
    {"other_mask", other_mask, {1, 32}},
    {"partial_warp", other_mask, {1, 8}},
    {"divergent_mma", divergent_mma, {1, 32}},
    {"value_of_no_lane", value_of_no_lane, {1, 32}},
    {"missing_copy_wait", missing_copy_wait, {1, 64, 64 * 16}},
    {"missing_copy_commit", missing_copy_commit, {1, 64, 64 * 16}},
    {"missing_barrier_after_copy", missing_barrier_after_copy, {1, 64, 64 * 16}},
    {"copy_over_what_is_read", copy_over_what_is_read, {1, 64, 64 * 16}},
    {"misaligned_copy", misaligned_copy, {1, 1, 64}},
    {"stray_copy", stray_copy, {1, 1, 64}},
    {"read_global", read_global, {1, 1}},
    {"write_global", write_global, {1, 1}},
    {"read_shared", read_shared, {1, 1, 128}},
    {"write_shared", write_shared, {1, 1, 128}},
    {"write_odd_shared", write_shared, {1, 1, 20}},
    {"misaligned_vector", misaligned_vector, {1, 1}},
    {"ldmatrix_row", ldmatrix_row, {1, 32, 128}},
    {"array_index", array_index, {1, 1}},
    {"divide_by_zero", divide_by_zero, {1, 1}},
    {"no_pointer", no_pointer, {1, 1}},
    {"deep", deep, {1, 1}},
    {"cluster_before", cluster_before, {2, 32, 128, nullptr, 2}},
    {"cluster_after", cluster_after, {2, 32, 128, nullptr, 2}},
    {"cluster_rank", cluster_rank, {2, 32, 128, nullptr, 2}},
    {"trap", trap, {1, 32}},
    {"endless", endless, {1, 32}},
};

}  // namespace

extern "C" int call_broken(const char* name, float* in, float* out, int64_t count, int64_t offset, bool right) {
  for (const Broken& broken : kBroken) {
    if (broken.name != name) continue;
    return launch(
        broken.kernel, broken.shape, Arguments{in, out, static_cast<int>(count), static_cast<int>(offset), right});
  }
  return -1;
}
