// One small kernel for each thing that platform.cuh and mma.cuh promise; called by tests/test_cuda_shim.py.
#include "mma.cuh"
#include "platform.cuh"

using namespace consequentialism::cuda;

namespace {

__global__ void index_kernel(int* out) {
  const int block = static_cast<int>((blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x);
  const int thread = static_cast<int>((threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x);
  const int threads = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
  out[block * threads + thread] = block * 10000 + thread;
}

// The sum over blocks of rows by a tree in shared memory; threads past the end leave early.
__global__ void __launch_bounds__(256) block_sum_kernel(const float* __restrict__ in, float* out, int count) {
  const int thread = static_cast<int>(threadIdx.x);
  if (thread >= count) return;
  float* shared = dynamic_shared<float>();
  shared[thread] = __ldg(in + static_cast<int>(blockIdx.x) * count + thread);
  for (int width = 1; width < count; width *= 2) {
    __syncthreads();
    if (thread % (2 * width) == 0 && thread + width < count) shared[thread] += shared[thread + width];
  }
  if (thread == 0) out[blockIdx.x] = shared[0];
}

template <class T>
__global__ void shuffle_kernel(const T* in, T* out) {
  const unsigned lane = threadIdx.x;
  const T value = in[lane];
  out[lane] = __shfl_sync(kFullWarp, value, 5);
  out[32 + lane] = __shfl_up_sync(kFullWarp, value, 3);
  out[64 + lane] = __shfl_down_sync(kFullWarp, value, 4);
  out[96 + lane] = __shfl_xor_sync(kFullWarp, value, 17);
  // Each half of the warp by itself, in branches of its own.
  if (lane < 16) {
    out[128 + lane] = __shfl_sync(0x0000FFFFu, value, 2);
  } else {
    out[128 + lane] = __shfl_sync(0xFFFF0000u, value, 20);
  }
  __syncwarp();
}

__global__ void vote_kernel(unsigned* out) {
  const unsigned lane = threadIdx.x;
  const unsigned odd = __ballot_sync(kFullWarp, lane % 2);
  const int any = __any_sync(kFullWarp, lane == 7), none = __any_sync(kFullWarp, lane > 31);
  const int all = __all_sync(kFullWarp, lane < 32), not_all = __all_sync(kFullWarp, lane < 31);
  if (lane == 0) {
    out[0] = odd;
    out[1] = any != 0;
    out[2] = none != 0;
    out[3] = all != 0;
    out[4] = not_all != 0;
  }
}

__global__ void atomic_kernel(int* i, unsigned* u, unsigned long long* ull, unsigned* bits) {
  atomicAdd(i, -2);
  atomicAdd(u, 3u);
  atomicAdd(ull, 1ull << 33);
  atomicOr(bits, 1u << (threadIdx.x % 32));
  __threadfence();
}

__global__ void math_kernel(const float* in, float* out, int count) {
  for (int i = 0; i < count; ++i) {
    const float x = in[i];
    float* row = out + 13 * i;
    row[0] = fmaf(x, x, 1.0f);
    row[1] = sqrtf(fabsf(x));
    row[2] = rsqrtf(fabsf(x) + 1.0f);
    row[3] = isfinite(x) ? 1.0f : 0.0f;
    row[4] = max(x, 0.5f);
    row[5] = min(x, 0.5f);
    row[6] = __uint_as_float(__float_as_uint(x));
    row[7] = static_cast<float>(fma(static_cast<double>(x), 2.0, 1.0));
    row[8] = static_cast<float>(rsqrt(static_cast<double>(fabsf(x)) + 1.0) + sqrt(4.0));
    row[9] = __uint_as_float(float_to_tf32(x));
    row[10] = approximate_reciprocal(x);
    row[11] = static_cast<float>(approximate_reciprocal(static_cast<double>(x)));
    row[12] = approximate_reciprocal_root(fabsf(x));
  }
}

template <class T>
__global__ void convert_kernel(const float* in, T* out, float* back, int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    out[i] = from_float<T>(in[i]);
    back[i] = to_accumulator(out[i]);
  }
}

// Copies three groups and checks in between that what it waited for has come.
__global__ void copy_kernel(const float* in, float* out, int count) {
  float* shared = dynamic_shared<float>();
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  for (int group = 0; group < 3; ++group) {
    const int first = 4 * (group * threads + thread);
    const int valid = max(0, min(4, count - first));
    copy_async_16(shared + first, valid > 0 ? in + first : in, 4 * valid);
    copy_async_commit();
  }
  copy_async_wait<2>();
  float sum = shared[4 * thread];
  copy_async_wait<0>();
  __syncthreads();
  for (int i = thread; i < 12 * threads; i += threads) out[i] = shared[i];
  if (thread == 0) out[12 * threads] = sum;
}

// d += a b^T with a [16, 16] and b [8, 16], each row of 16 elements in shared memory; b once more through _trans of
// b^T [16, 8].
template <class T>
__global__ void half_mma_kernel(const T* a, const T* b, const T* b_transposed, float* d, float* d_transposed) {
  T* shared = dynamic_shared<T>();
  T *shared_a = shared, *shared_b = shared + 256, *shared_bt = shared + 384;
  const unsigned lane = threadIdx.x;
  for (unsigned i = lane; i < 256; i += 32) shared_a[i] = a[i];
  for (unsigned i = lane; i < 128; i += 32) {
    shared_b[i] = b[i];
    shared_bt[i] = b_transposed[i];
  }
  __syncwarp();
  uint32_t a_registers[4], b_registers[2], bt_registers[2], bt_again[4];
  ldmatrix_x4(a_registers, shared_a + 16 * (lane % 16) + 8 * (lane / 16));
  ldmatrix_x2(b_registers, shared_b + 16 * (lane % 8) + 8 * (lane / 8 % 2));
  ldmatrix_x2_trans(bt_registers, shared_bt + 8 * (lane % 16));
  ldmatrix_x4_trans(bt_again, shared_bt + 8 * (lane % 16));
  const unsigned row = lane / 4, column = 2 * (lane % 4);
  float sum[4], sum_transposed[4];
  for (unsigned i = 0; i < 4; ++i) sum[i] = sum_transposed[i] = d[8 * (row + 8 * (i / 2)) + column + i % 2];
  mma_m16n8k16<T>(sum, a_registers, b_registers);
  bt_registers[1] = bt_again[3];
  mma_m16n8k16<T>(sum_transposed, a_registers, bt_registers);
  for (unsigned i = 0; i < 4; ++i) {
    d[8 * (row + 8 * (i / 2)) + column + i % 2] = sum[i];
    d_transposed[8 * (row + 8 * (i / 2)) + column + i % 2] = sum_transposed[i];
  }
  // The same fragment without ldmatrix.
  const uint32_t expected = pack(a[16 * row + column], a[16 * row + column + 1]);
  if (a_registers[0] != expected) d[0] = __uint_as_float(0x7FC00000u);
}

// d += a b with a [16, 8], b [8, 8].
__global__ void tf32_mma_kernel(const float* a, const float* b, float* d) {
  const unsigned lane = threadIdx.x, row = lane / 4, pair = lane % 4;
  uint32_t a_registers[4], b_registers[2];
  for (unsigned i = 0; i < 4; ++i) a_registers[i] = float_to_tf32(a[8 * (row + 8 * (i % 2)) + pair + 4 * (i / 2)]);
  for (unsigned i = 0; i < 2; ++i) b_registers[i] = float_to_tf32(b[8 * (pair + 4 * i) + row]);
  float sum[4];
  for (unsigned i = 0; i < 4; ++i) sum[i] = d[8 * (row + 8 * (i / 2)) + 2 * pair + i % 2];
  mma_m16n8k8_tf32(sum, a_registers, b_registers);
  for (unsigned i = 0; i < 4; ++i) d[8 * (row + 8 * (i / 2)) + 2 * pair + i % 2] = sum[i];
}

// d += a b with a [8, 4], b [4, 8].
__global__ void f64_mma_kernel(const double* a, const double* b, double* d) {
  const unsigned lane = threadIdx.x, row = lane / 4, pair = lane % 4;
  double sum[2] = {d[8 * row + 2 * pair], d[8 * row + 2 * pair + 1]};
  mma_m8n8k4_f64(sum, a[4 * row + pair], b[8 * pair + row]);
  d[8 * row + 2 * pair] = sum[0];
  d[8 * row + 2 * pair + 1] = sum[1];
}

// Every block sums what the cluster's blocks hold.
__global__ void cluster_kernel(const float* in, float* out) {
  float* own = dynamic_shared<float>();
  own[threadIdx.x] = in[blockIdx.x * blockDim.x + threadIdx.x];
  cluster_sync();
  float sum = 0;
  for (unsigned rank = 0; rank < cluster_size(); ++rank) sum += *cluster_map(own + threadIdx.x, rank);
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum + 1000.0f * static_cast<float>(cluster_block_rank());
  cluster_sync();
}

// Each round, every block takes the value of the block after it.
__global__ void grid_kernel(float* values, float* next, unsigned* counter, int rounds) {
  const unsigned blocks = gridDim.x;
  for (int round = 0; round < rounds; ++round) {
    const unsigned own = blockIdx.x * blockDim.x + threadIdx.x;
    const unsigned after = (blockIdx.x + 1) % blocks * blockDim.x + threadIdx.x;
    next[own] = values[after] + 1.0f;
    grid_barrier(counter, blocks);
    values[own] = next[own];
    grid_barrier(counter, blocks);
  }
}

// The last block to come adds up what the others left.
__global__ void last_block_kernel(const float* in, float* partial, unsigned* arrived, float* out) {
  bool* last = dynamic_shared<bool>();
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = 2.0f * in[blockIdx.x];
    __threadfence();
    *last = atomicAdd(arrived, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!*last || threadIdx.x != 0) return;
  float sum = 0;
  for (unsigned block = 0; block < gridDim.x; ++block) sum += partial[block];
  *out = sum;
}

__global__ void vector_kernel(const float4* in, float4* out) {
  const float4 v = in[threadIdx.x];
  out[threadIdx.x] = make_float4(v.w, v.z, v.y, v.x);
}

__global__ void barriers_kernel(int rounds) {
  for (int round = 0; round < rounds; ++round) __syncthreads();
}

__global__ void shared_bytes_kernel(unsigned char* out, int bytes) {
  unsigned char* shared = dynamic_shared<unsigned char>();
  for (int i = 0; i < bytes; ++i) shared[i] = static_cast<unsigned char>(i);
  for (int i = 0; i < bytes; ++i) out[i] = shared[i];
}

}  // namespace

extern "C" {

int call_index(int* out) {
  return launch(index_kernel, {{3, 2, 2}, {4, 3, 2}}, out);
}

int call_block_sum(const float* in, float* out, int64_t blocks, int64_t count, int64_t threads) {
  return launch(
      block_sum_kernel,
      {static_cast<unsigned>(blocks), static_cast<unsigned>(threads), static_cast<size_t>(count) * sizeof(float)}, in,
      out, static_cast<int>(count));
}

int call_shuffle_int(const int* in, int* out) {
  return launch(shuffle_kernel<int>, {1, 32}, in, out);
}
int call_shuffle_unsigned(const unsigned* in, unsigned* out) {
  return launch(shuffle_kernel<unsigned>, {1, 32}, in, out);
}
int call_shuffle_float(const float* in, float* out) {
  return launch(shuffle_kernel<float>, {1, 32}, in, out);
}
int call_shuffle_double(const double* in, double* out) {
  return launch(shuffle_kernel<double>, {1, 32}, in, out);
}

int call_vote(unsigned* out) {
  return launch(vote_kernel, {1, 32}, out);
}

int call_atomic(int* i, unsigned* u, unsigned long long* ull, unsigned* bits) {
  return launch(atomic_kernel, {3, 40}, i, u, ull, bits);
}

int call_math(const float* in, float* out, int64_t count) {
  return launch(math_kernel, {1, 1}, in, out, static_cast<int>(count));
}

int call_convert_bfloat16(const float* in, bfloat16* out, float* back, int64_t count) {
  return launch(convert_kernel<bfloat16>, {1, 64}, in, out, back, static_cast<int>(count));
}
int call_convert_float16(const float* in, float16* out, float* back, int64_t count) {
  return launch(convert_kernel<float16>, {1, 64}, in, out, back, static_cast<int>(count));
}

int call_copy(const float* in, float* out, int64_t count) {
  return launch(copy_kernel, {1, 8, 3 * 8 * 16}, in, out, static_cast<int>(count));
}

int call_mma_bfloat16(const bfloat16* a, const bfloat16* b, const bfloat16* bt, float* d, float* dt) {
  return launch(half_mma_kernel<bfloat16>, {1, 32, 1024}, a, b, bt, d, dt);
}
int call_mma_float16(const float16* a, const float16* b, const float16* bt, float* d, float* dt) {
  return launch(half_mma_kernel<float16>, {1, 32, 1024}, a, b, bt, d, dt);
}
int call_mma_tf32(const float* a, const float* b, float* d) {
  return launch(tf32_mma_kernel, {1, 32}, a, b, d);
}
int call_mma_f64(const double* a, const double* b, double* d) {
  return launch(f64_mma_kernel, {1, 32}, a, b, d);
}

int call_cluster(const float* in, float* out, int64_t blocks, int64_t cluster, int64_t threads) {
  LaunchShape shape{static_cast<unsigned>(blocks), static_cast<unsigned>(threads)};
  shape.shared_bytes = static_cast<size_t>(threads) * sizeof(float);
  shape.cluster = static_cast<unsigned>(cluster);
  return launch(cluster_kernel, shape, in, out);
}

// Twice, so that the counter of the first launch has to do for the second.
int call_grid(float* values, float* next, unsigned* counter, int64_t blocks, int64_t threads, int64_t rounds) {
  LaunchShape shape{static_cast<unsigned>(blocks), static_cast<unsigned>(threads)};
  shape.cooperative = true;
  const int error = launch(grid_kernel, shape, values, next, counter, static_cast<int>(rounds));
  return error != 0 ? error : launch(grid_kernel, shape, values, next, counter, static_cast<int>(rounds));
}

int call_last_block(const float* in, float* partial, unsigned* arrived, float* out, int64_t blocks) {
  return launch(last_block_kernel, {static_cast<unsigned>(blocks), 32, 1}, in, partial, arrived, out);
}

int call_vector(const float4* in, float4* out, int64_t count) {
  return launch(vector_kernel, {1, static_cast<unsigned>(count)}, in, out);
}

int call_barriers(int64_t blocks, int64_t threads, int64_t rounds) {
  return launch(
      barriers_kernel, {static_cast<unsigned>(blocks), static_cast<unsigned>(threads)}, static_cast<int>(rounds));
}

int call_shared_bytes(unsigned char* out, int64_t bytes) {
  return launch(shared_bytes_kernel, {1, 1, static_cast<size_t>(bytes)}, out, static_cast<int>(bytes));
}

// Any shape, of a kernel that does nothing.
int call_shape(
    int64_t grid_x, int64_t grid_y, int64_t grid_z, int64_t threads, int64_t shared_bytes, int64_t cluster,
    bool cooperative) {
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(grid_x), static_cast<unsigned>(grid_y), static_cast<unsigned>(grid_z));
  shape.block = static_cast<unsigned>(threads);
  shape.shared_bytes = static_cast<size_t>(shared_bytes);
  shape.cluster = static_cast<unsigned>(cluster);
  shape.cooperative = cooperative;
  return launch(barriers_kernel, shape, 0);
}

}  // extern "C"
