// Products of matrices by one block, on tensor cores: operands staged through shared memory, split into terms where
// their own type is not exact enough, summed in a fixed order.
//
// An operand is [outer, inner]; a product is C[m, n] = sum over inner of A[m, inner] B[n, inner]. Warps multiply
// fragments of 16 outer by Mma::kInner inner elements.
#pragma once

#include "matrix_tiles.h"
#include "mma.cuh"
#include "platform.cuh"

namespace consequentialism::cuda {

template <class S>
struct MatrixView {
  const S* data;
  int64_t stride;
  int unit;  // the most bytes, of 16, 8, 4 and 2, that every row is aligned to
};

template <class S>
MatrixView<S> view_of(const S* data, int64_t stride) {
  const uint64_t bits = reinterpret_cast<uintptr_t>(data) | static_cast<uint64_t>(stride) * sizeof(S);
  int unit = 16;
  while (bits % static_cast<uint64_t>(unit) != 0) unit /= 2;
  return {data, stride, unit};
}

// As copy_async_16, of kBytes, and aligned to that.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global, int valid_bytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  if constexpr (kBytes == 16) {
    copy_async_16(shared, global, valid_bytes);
  } else {
#ifdef CONSEQUENTIALISM_HOST_SHIM
    std::memset(shared, 0, kBytes);
    std::memcpy(shared, global, static_cast<size_t>(valid_bytes));
#else
    asm volatile(
        "cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
        "l"(__cvta_generic_to_global(global)), "n"(kBytes), "r"(valid_bytes)
        : "memory");
#endif
  }
}

// tile[r][c] <- from[r][c] for r < lines and c < columns, else zero, in copies of kBytes.
template <int kBytes, class S, int kLines, int kLength, int kStride, int kThreads>
__device__ __forceinline__ void stage_copies(S* tile, const S* from, int64_t stride, int lines, int columns) {
  constexpr int kPack = kBytes / static_cast<int>(sizeof(S));
  constexpr int kPacks = kLength / kPack;
  constexpr int kRows = kThreads / kPacks;
  static_assert(kLength % kPack == 0 && kStride % kPack == 0 && kThreads % kPacks == 0 && kLines % kRows == 0);
  const int thread = static_cast<int>(threadIdx.x);
  const int first = thread / kPacks, c = thread % kPacks * kPack;
  const int valid = max(0, min(columns - c, kPack)) * static_cast<int>(sizeof(S));
  const int end = valid > 0 ? lines : 0;
  const S* source = from + first * stride + c;
  S* to = tile + first * kStride + c;
#pragma unroll 8
  for (int r = 0; r < kLines; r += kRows) {
    const bool inside = first + r < end;
    if constexpr (kBytes == 2) {  // too few for an asynchronous copy
      to[r * kStride] = inside ? *source : S{};
    } else {
      copy_async<kBytes>(to + r * kStride, inside ? source : from, inside ? valid : 0);
    }
    source += kRows * stride;
  }
}

// tile[r][c] <- from[line + r][column + c], zero from `lines` and `columns` on. The caller commits and waits.
template <class S, int kLines, int kLength, int kStride, int kThreads>
__device__ __forceinline__ void stage_tile(
    S* tile, const MatrixView<S>& from, int64_t line, int64_t column, int64_t lines, int64_t columns) {
  constexpr int kSmall = sizeof(S) == 8 ? 8 : 4;
  const int left = static_cast<int>(min(columns - column, int64_t{kLength}));
  const int below = static_cast<int>(min(lines - line, int64_t{kLines}));
  const S* origin = from.data + line * from.stride + column;
  if (from.unit == 16) {
    stage_copies<16, S, kLines, kLength, kStride, kThreads>(tile, origin, from.stride, below, left);
  } else if (sizeof(S) >= 4 || from.unit >= 4) {
    stage_copies<kSmall, S, kLines, kLength, kStride, kThreads>(tile, origin, from.stride, below, left);
  } else if constexpr (sizeof(S) == 2) {
    stage_copies<2, S, kLines, kLength, kStride, kThreads>(tile, origin, from.stride, below, left);
  }
}

template <Major kMajor, class S>
__device__ __forceinline__ S* element_at(S* tile, int stride, int outer, int inner) {
  return kMajor == Major::kInner ? tile + outer * stride + inner : tile + inner * stride + outer;
}

enum class Side { kA, kB };  // which operand a fragment is of

// Each Mma has gather, which makes a fragment of kTerms terms of value(outer, inner); load, of a tile in shared memory;
// and multiply, d[16, 8] += a b^T with b's n = 8 kHalf.., d as mma_m16n8k16 has it. A's registers are as an instruction
// has them.

// float32 in up to two terms of TF32.
struct Tf32Mma {
  using Register = uint32_t;
  using Sum = float;
  static constexpr int kInner = 8;
  static constexpr int kRegisters = 4;
  static constexpr bool kPairs = false;
  static constexpr bool kRoundsSums = true;
  static constexpr int kUnroll = 8;

  // B's registers as A's: they are loaded one by one, and n = 0..7 lies in the even ones.
  template <Side kSide, int kTerms, class Value>
  static __device__ __forceinline__ void gather(Register (&f)[kTerms][kRegisters], const Value& value, int lane) {
#pragma unroll
    for (int r = 0; r < kRegisters; ++r) {
      const auto stored = value(lane / 4 + 8 * (r % 2), lane % 4 + 4 * (r / 2));
      float rest = to_float(stored);
      if constexpr (sizeof(stored) == 2) {
        static_assert(kTerms == 1);  // exact as it is
        f[0][r] = __float_as_uint(rest);
      } else {
#pragma unroll
        for (int t = 0; t < kTerms; ++t) {
          f[t][r] = float_to_tf32(rest);
          rest -= __uint_as_float(f[t][r]);
        }
      }
    }
  }

  template <Side kSide, int kTerms, Major kMajor, class S>
  static __device__ __forceinline__ void load(Register (&f)[kTerms][kRegisters], const S* tile, int stride, int lane) {
    gather<kSide>(f, [&](int outer, int inner) { return *element_at<kMajor>(tile, stride, outer, inner); }, lane);
  }

  template <int kHalf>
  static __device__ __forceinline__ void multiply(
      Sum (&d)[4], const Register (&a)[kRegisters], const Register (&b)[kRegisters]) {
    const Register own[2] = {b[kHalf], b[kHalf + 2]};
    mma_m16n8k8_tf32(d, a, own);
  }
};

// T is bfloat16 or float16; float32 in up to three terms of bfloat16.
template <class T>
struct HalfMma {
  using Register = uint32_t;
  using Sum = float;
  static constexpr int kInner = 16;
  static constexpr int kRegisters = 4;
  static constexpr bool kPairs = true;
  static constexpr bool kRoundsSums = true;
  static constexpr int kUnroll = 8;

  // Of which half of the outer and of the inner elements register r is. B's two of n = 0..7 lie beside one another, and
  // those of n = 8..15: an instruction takes them so, and what ldmatrix loads otherwise would have to be moved first.
  template <Side kSide>
  static __device__ __forceinline__ constexpr int outer_half(int r) {
    return kSide == Side::kA ? r % 2 : r / 2;
  }
  template <Side kSide>
  static __device__ __forceinline__ constexpr int inner_half(int r) {
    return kSide == Side::kA ? r / 2 : r % 2;
  }

  template <Side kSide, int kTerms, class Value>
  static __device__ __forceinline__ void gather(Register (&f)[kTerms][kRegisters], const Value& value, int lane) {
#pragma unroll
    for (int r = 0; r < kRegisters; ++r) {
      const int outer = lane / 4 + 8 * outer_half<kSide>(r), inner = 2 * (lane % 4) + 8 * inner_half<kSide>(r);
      float low = to_float(value(outer, inner)), high = to_float(value(outer, inner + 1));
      if constexpr (kTerms == 1) {
        f[0][r] = pack(from_float<T>(low), from_float<T>(high));
      } else {
        static_assert(std::is_same_v<T, bfloat16>);
#pragma unroll
        for (int t = 0; t < kTerms; ++t) {
          f[t][r] = pack_bfloat16(low, high);
          low -= __uint_as_float(f[t][r] << 16);
          high -= __uint_as_float(f[t][r] & 0xFFFF0000u);
        }
      }
    }
  }

  template <Side kSide, int kTerms, Major kMajor, class S>
  static __device__ __forceinline__ void load(Register (&f)[kTerms][kRegisters], const S* tile, int stride, int lane) {
    if constexpr (std::is_same_v<S, T>) {
      static_assert(kTerms == 1);
      // Of the matrix that is register lane / 8: its row of 8 elements, along inner or along outer.
      const int matrix = lane / 8, line = lane % 8;
      const int outer = 8 * outer_half<kSide>(matrix) + (kMajor == Major::kInner ? line : 0);
      const int inner = 8 * inner_half<kSide>(matrix) + (kMajor == Major::kInner ? 0 : line);
      if constexpr (kMajor == Major::kInner) {
        ldmatrix_x4(f[0], tile + outer * stride + inner);
      } else {
        ldmatrix_x4_trans(f[0], tile + inner * stride + outer);
      }
    } else {
      gather<kSide>(f, [&](int outer, int inner) { return *element_at<kMajor>(tile, stride, outer, inner); }, lane);
    }
  }

  template <int kHalf>
  static __device__ __forceinline__ void multiply(
      Sum (&d)[4], const Register (&a)[kRegisters], const Register (&b)[kRegisters]) {
    const Register own[2] = {b[2 * kHalf], b[2 * kHalf + 1]};
    mma_m16n8k16<T>(d, a, own);
  }
};

// Every type, in float64.
struct DoubleMma {
  using Register = double;
  using Sum = double;
  static constexpr int kInner = 4;
  static constexpr int kRegisters = 2;
  static constexpr bool kPairs = false;
  static constexpr bool kRoundsSums = false;
  static constexpr int kUnroll = 2;

  template <Side kSide, int kTerms, class Value>
  static __device__ __forceinline__ void gather(Register (&f)[kTerms][kRegisters], const Value& value, int lane) {
    static_assert(kTerms == 1);
#pragma unroll
    for (int r = 0; r < kRegisters; ++r) {
      f[0][r] = static_cast<double>(to_accumulator(value(lane / 4 + 8 * r, lane % 4)));
    }
  }

  template <Side kSide, int kTerms, Major kMajor, class S>
  static __device__ __forceinline__ void load(Register (&f)[kTerms][kRegisters], const S* tile, int stride, int lane) {
    gather<kSide>(f, [&](int outer, int inner) { return *element_at<kMajor>(tile, stride, outer, inner); }, lane);
  }

  template <int kHalf>
  static __device__ __forceinline__ void multiply(
      Sum (&d)[4], const Register (&a)[kRegisters], const Register (&b)[kRegisters]) {
#pragma unroll
    for (int r = 0; r < kRegisters; ++r) {
      double own[2] = {d[2 * r], d[2 * r + 1]};
      mma_m8n8k4_f64(own, a[r], b[kHalf]);
      d[2 * r] = own[0];
      d[2 * r + 1] = own[1];
    }
  }
};

// An operand that comes from global memory, a stage at a time.
template <class Mma, class S, Major kMajor_, int kOuter, int kDepth, int kThreads>
struct StagedOperand {
  using Stored = S;
  static constexpr Major kMajor = kMajor_;
  static constexpr int kLines = kMajor == Major::kInner ? kOuter : kDepth;
  static constexpr int kLength = kMajor == Major::kInner ? kDepth : kOuter;
  static constexpr int kStride = padded_line(kLength, sizeof(S), Mma::kPairs, kMajor);
  static constexpr int kElements = kLines * kStride;
  static constexpr size_t kBytes = kElements * sizeof(S);
  static_assert(kBytes == operand_bytes(kOuter, kDepth, sizeof(S), Mma::kPairs, kMajor));

  MatrixView<S> matrix;
  int64_t outer;      // the first one of the block
  int64_t outer_end;  // of the matrix

  __device__ __forceinline__ void stage(unsigned char* buffer, int64_t inner, int64_t inner_end) const {
    S* tile = reinterpret_cast<S*>(buffer);
    if constexpr (kMajor == Major::kInner) {
      stage_tile<S, kLines, kLength, kStride, kThreads>(tile, matrix, outer, inner, outer_end, inner_end);
    } else {
      stage_tile<S, kLines, kLength, kStride, kThreads>(tile, matrix, inner, outer, inner_end, outer_end);
    }
  }
  __device__ __forceinline__ const S* tile(const unsigned char* buffer, int64_t) const {
    return reinterpret_cast<const S*>(buffer);
  }
  __device__ __forceinline__ int stride() const { return kStride; }
};

// An operand that lies in shared memory, whole, with zeros up to full tiles and stages.
template <class S, Major kMajor_>
struct ResidentOperand {
  using Stored = S;
  static constexpr Major kMajor = kMajor_;
  static constexpr size_t kBytes = 0;

  const S* data;
  int line_stride;

  __device__ __forceinline__ void stage(unsigned char*, int64_t, int64_t) const {}
  __device__ __forceinline__ const S* tile(const unsigned char*, int64_t inner) const {
    return element_at<kMajor>(data, line_stride, 0, static_cast<int>(inner));
  }
  __device__ __forceinline__ int stride() const { return line_stride; }
};

template <
    class Mma_, class A_, int kTermsA_, class B_, int kTermsB_, int kTileM_, int kTileN_, int kWarpsM_, int kWarpsN_,
    int kDepth_>
struct Product {
  using Mma = Mma_;
  using A = A_;
  using B = B_;
  using Sum = typename Mma::Sum;
  static constexpr int kTermsA = kTermsA_;
  static constexpr int kTermsB = kTermsB_;
  static constexpr int kTileM = kTileM_;
  static constexpr int kTileN = kTileN_;
  static constexpr int kWarpsM = kWarpsM_;
  static constexpr int kThreads = kWarpsM * kWarpsN_ * static_cast<int>(kWarpSize);
  static constexpr int kWarpRows = kTileM / kWarpsM;
  static constexpr int kWarpColumns = kTileN / kWarpsN_;
  static constexpr int kM = kWarpRows / 16;
  static constexpr int kN = kWarpColumns / 16;
  static constexpr int kDepth = kDepth_;
  static constexpr size_t kStageBytes = A::kBytes + B::kBytes;
  static constexpr size_t kSharedBytes = kProductStages * kStageBytes;
  static_assert(kWarpRows % 16 == 0 && kWarpColumns % 16 == 0 && kDepth % Mma::kInner == 0);
  static_assert(A::kBytes % 16 == 0 && B::kBytes % 16 == 0 && kSharedBytes <= kMaxSharedBytes);

  static __device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x / kWarpSize); }
  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x % kWarpSize); }
  static __device__ __forceinline__ int warp_row() { return warp() % kWarpsM * kWarpRows; }
  static __device__ __forceinline__ int warp_column() { return warp() / kWarpsM * kWarpColumns; }
};

// What a thread has of a block's tile, and of its product with one vector.
template <class P>
struct BlockSums {
  typename P::Sum tile[P::kM][P::kN][2][4];
  typename P::Sum vector[P::kM][2];  // of rows lane / 4 and lane / 4 + 8; lanes of a row have the same
};

// A vector in a product is split into kTerms terms, 0: as many as B is.

// No vector in a product.
struct NoVector {
  static constexpr bool kExists = false;
  static constexpr int kTerms = 0;
  bool wanted = false;
  __device__ __forceinline__ float operator()(int64_t) const { return 0; }
};

// The vector of ones.
struct Ones {
  static constexpr bool kExists = true;
  static constexpr int kTerms = 0;
  bool wanted;
  __device__ __forceinline__ float operator()(int64_t) const { return 1; }
};

// The vector at data, of `size`.
template <class S>
struct VectorAt {
  static constexpr bool kExists = true;
  static constexpr int kTerms = 0;
  bool wanted;
  const S* data;
  int64_t size;
  __device__ __forceinline__ S operator()(int64_t inner) const { return inner < size ? __ldg(data + inner) : S(0); }
};

// a b^T's products of terms whose indices add up to `order`; the large ones are small.
template <class Mma, int kHalf, int kTermsA, int kTermsB>
__device__ __forceinline__ void multiply_terms(
    typename Mma::Sum (&d)[4], const typename Mma::Register (&a)[kTermsA][Mma::kRegisters],
    const typename Mma::Register (&b)[kTermsB][Mma::kRegisters], int order) {
#pragma unroll
  for (int t = 0; t < kTermsA; ++t) {
    if (order - t >= 0 && order - t < kTermsB) Mma::template multiply<kHalf>(d, a[t], b[order - t]);
  }
}

// sums += the product of one stage, and where wanted of A with vector(inner + 0), vector(inner + 1), ...
template <class P, class Vector>
__device__ __forceinline__ void multiply_stage(
    BlockSums<P>& sums, const typename P::A::Stored* a, int stride_a, const typename P::B::Stored* b, int stride_b,
    const Vector& vector, int64_t inner) {
  using Mma = typename P::Mma;
  using Sum = typename P::Sum;
  constexpr int kOrders = P::kTermsA > P::kTermsB ? P::kTermsA : P::kTermsB;
  const int lane = P::lane();
  const int row = P::warp_row(), column = P::warp_column();
  // Tensor cores truncate their float32 sums: they add up one stage, and the stages are added here, rounded.
  Sum stage[P::kM][P::kN][2][4];
#pragma unroll
  for (int i = 0; i < P::kM; ++i) {
#pragma unroll
    for (int j = 0; j < P::kN; ++j) {
#pragma unroll
      for (int e = 0; e < 8; ++e) stage[i][j][e / 4][e % 4] = Mma::kRoundsSums ? Sum(0) : sums.tile[i][j][e / 4][e % 4];
    }
  }
#pragma unroll(Mma::kUnroll)
  for (int k = 0; k < P::kDepth; k += Mma::kInner) {
    typename Mma::Register fa[P::kM][P::kTermsA][Mma::kRegisters], fb[P::kN][P::kTermsB][Mma::kRegisters];
#pragma unroll
    for (int i = 0; i < P::kM; ++i) {
      Mma::template load<Side::kA, P::kTermsA, P::A::kMajor>(
          fa[i], element_at<P::A::kMajor>(a, stride_a, row + 16 * i, k), stride_a, lane);
    }
#pragma unroll
    for (int j = 0; j < P::kN; ++j) {
      Mma::template load<Side::kB, P::kTermsB, P::B::kMajor>(
          fb[j], element_at<P::B::kMajor>(b, stride_b, column + 16 * j, k), stride_b, lane);
    }
#pragma unroll
    for (int order = kOrders - 1; order >= 0; --order) {
#pragma unroll
      for (int i = 0; i < P::kM; ++i) {
#pragma unroll
        for (int j = 0; j < P::kN; ++j) {
          multiply_terms<Mma, 0>(stage[i][j][0], fa[i], fb[j], order);
          multiply_terms<Mma, 1>(stage[i][j][1], fa[i], fb[j], order);
        }
      }
    }
    if constexpr (Vector::kExists) {
      if (vector.wanted && column == 0) {
        constexpr int kTermsV = Vector::kTerms == 0 ? P::kTermsB : Vector::kTerms;
        constexpr int kOrdersV = P::kTermsA > kTermsV ? P::kTermsA : kTermsV;
        typename Mma::Register fv[kTermsV][Mma::kRegisters];
        Mma::template gather<Side::kB>(fv, [&](int, int step) { return vector(inner + k + step); }, lane);
#pragma unroll
        for (int i = 0; i < P::kM; ++i) {
          Sum d[4] = {};
#pragma unroll
          for (int order = kOrdersV - 1; order >= 0; --order) multiply_terms<Mma, 0>(d, fa[i], fv, order);
          sums.vector[i][0] += d[0];
          sums.vector[i][1] += d[2];
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < P::kM; ++i) {
#pragma unroll
    for (int j = 0; j < P::kN; ++j) {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const Sum value = stage[i][j][e / 4][e % 4];
        sums.tile[i][j][e / 4][e % 4] = Mma::kRoundsSums ? sums.tile[i][j][e / 4][e % 4] + value : value;
      }
    }
  }
}

// sums <- the product over inner in [begin, end), begin a multiple of 16 bytes of either operand. shared has
// P::kSharedBytes, aligned to 16; it may be in use before by others, not after, until the block meets again.
// same: B's tile is A's.
template <class P, class Vector>
__device__ __forceinline__ void block_product(
    BlockSums<P>& sums, const typename P::A& a, const typename P::B& b, bool same, int64_t begin, int64_t end,
    unsigned char* shared, const Vector& vector) {
#pragma unroll
  for (int i = 0; i < P::kM; ++i) {
    sums.vector[i][0] = sums.vector[i][1] = 0;
#pragma unroll
    for (int j = 0; j < P::kN; ++j) {
#pragma unroll
      for (int e = 0; e < 8; ++e) sums.tile[i][j][e / 4][e % 4] = 0;
    }
  }
  const auto stage = [&](int64_t inner, int slot) {
    if (inner < end) {
      unsigned char* buffer = shared + slot * P::kStageBytes;
      a.stage(buffer, inner, end);
      if (!same) b.stage(buffer + P::A::kBytes, inner, end);
    }
    copy_async_commit();
  };
  __syncthreads();
#pragma unroll
  for (int slot = 0; slot < kProductStages - 1; ++slot) stage(begin + slot * P::kDepth, slot);
  int slot = 0;
#pragma unroll 1
  for (int64_t inner = begin; inner < end; inner += P::kDepth) {
    copy_async_wait<kProductStages - 2>();
    __syncthreads();  // this stage is there, and the one before is read
    stage(inner + (kProductStages - 1) * P::kDepth, slot == 0 ? kProductStages - 1 : slot - 1);
    const unsigned char* buffer = shared + slot * P::kStageBytes;
    const auto* tile_a = a.tile(buffer, inner);
    const auto* tile_b = b.tile(buffer + P::A::kBytes, inner);
    if constexpr (std::is_same_v<typename P::A, typename P::B>) tile_b = same ? tile_a : tile_b;
    multiply_stage<P>(sums, tile_a, a.stride(), tile_b, b.stride(), vector, inner);
    slot = slot == kProductStages - 1 ? 0 : slot + 1;
  }
}

// step(row, column, left, right) for each two neighbours (row, column), (row, column + 1) of this thread in the tile.
template <class P, class Step>
__device__ __forceinline__ void for_each_pair(const BlockSums<P>& sums, const Step& step) {
  const int lane = P::lane();
#pragma unroll
  for (int i = 0; i < P::kM; ++i) {
#pragma unroll
    for (int half_row = 0; half_row < 2; ++half_row) {
#pragma unroll
      for (int j = 0; j < P::kN; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = P::warp_row() + 16 * i + 8 * half_row + lane / 4;
          const int column = P::warp_column() + 16 * j + 8 * half + 2 * (lane % 4);
          const auto& d = sums.tile[i][j][half];
          step(row, column, d[2 * half_row], d[2 * half_row + 1]);
        }
      }
    }
  }
}

// step(row, value) for each row of the product with the vector; every row is one thread's.
template <class P, class Step>
__device__ __forceinline__ void for_each_of_vector(const BlockSums<P>& sums, const Step& step) {
  const int lane = P::lane();
  if (P::warp_column() != 0 || lane % 4 != 0) return;
#pragma unroll
  for (int i = 0; i < P::kM; ++i) {
    step(P::warp_row() + 16 * i + lane / 4, sums.vector[i][0]);
    step(P::warp_row() + 16 * i + 8 + lane / 4, sums.vector[i][1]);
  }
}

}  // namespace consequentialism::cuda
