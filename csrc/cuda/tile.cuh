// Tiles of 32 x 32 on which one warp works: products, and factors and substitutions in registers.
#pragma once

#include <cfloat>

#include "mma.cuh"
#include "platform.cuh"

namespace consequentialism::cuda {

constexpr int kTile = 32;

// A tile's rows are padded so that vectors of 16 bytes read along rows, by lanes in different rows, meet no bank twice.
// The first column of the padding holds the reciprocals of the diagonal of a factored tile.
template <class T>
struct TileTraits {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  static constexpr int kPack = 16 / static_cast<int>(sizeof(T));
  static constexpr int kStride = kTile + kPack;
  static constexpr int kElements = kTile * kStride;
  static_assert(kStride * sizeof(T) % 16 == 0);
};

template <class T>
__device__ __forceinline__ void load_pack(const T* from, T (&values)[TileTraits<T>::kPack]) {
  if constexpr (sizeof(T) == 4) {
    const float4 pack = *reinterpret_cast<const float4*>(from);
    values[0] = pack.x, values[1] = pack.y, values[2] = pack.z, values[3] = pack.w;
  } else {
    const double2 pack = *reinterpret_cast<const double2*>(from);
    values[0] = pack.x, values[1] = pack.y;
  }
}

template <class T>
__device__ __forceinline__ void store_pack(T* to, const T (&values)[TileTraits<T>::kPack]) {
  if constexpr (sizeof(T) == 4) {
    *reinterpret_cast<float4*>(to) = make_float4(values[0], values[1], values[2], values[3]);
  } else {
    *reinterpret_cast<double2*>(to) = make_double2(values[0], values[1]);
  }
}

template <int kValue>
struct Index {
  __host__ __device__ constexpr operator int() const { return kValue; }
};

// step(0), step(1), ..., step(kCount - 1), unrolled whatever the compiler thinks of it: arrays stay in registers.
template <int kCount, class Step, int... kIndices>
__device__ __forceinline__ void unroll(const Step& step, std::integer_sequence<int, kIndices...>) {
  (step(Index<kIndices>{}), ...);
}

template <int kCount, class Step>
__device__ __forceinline__ void unroll(const Step& step) {
  unroll<kCount>(step, std::make_integer_sequence<int, kCount>{});
}

// Along which way of a tile the inner index of a product runs.
enum class Inner { kRows, kColumns };

// What becomes of the products: sums -= the first, the second, ...; or sums += the last, the last but one, ...
enum class Sum { kSubtractUp, kAddDown };

// A lane's 4 x 8 elements of a product's tile; which ones depends on how the operands are read, for no read meets a
// bank twice. From q = 4 on, those of a second tile below.
template <class T, Inner kInnerA>
__device__ __forceinline__ int fragment_row(int lane, int q) {
  constexpr bool kNeighbours = (kInnerA == Inner::kRows) == (sizeof(T) == 4);
  return kNeighbours ? lane / 4 * 4 + q % 4 + q / 4 * kTile : lane / 4 + 8 * q;
}

template <class T, Inner kInnerB, int kColumns = 8>
__device__ __forceinline__ int fragment_column(int lane, int p) {
  if constexpr (sizeof(T) == 4) return kInnerB == Inner::kRows ? lane % 4 * kColumns + p : lane % 4 + 4 * p;
  return kInnerB == Inner::kRows ? lane % 4 * 2 + p % 2 + p / 2 * 8 : lane % 4 * 8 + p;
}

// sums -= A B or += A B, where A[r, k] = a[r, k] (inner index along columns) or a[k, r] (along rows), B[k,
// c] = b[k, c] (along rows) or b[c, k] (along columns). With kRows = 8 for two tiles a, the second behind the first,
// which read two thirds as much for each product; with kColumns = 4 for 16 columns of B. By fused multiply and add: of
// terms of TF32 on tensor cores, which cut sums off at float32's digits instead of rounding them, inverses come out up
// to three times as far off.
template <Inner kInnerA, Inner kInnerB, Sum kSum, int kRows, int kColumns>
__device__ __forceinline__ void tile_product(float (&sums)[kRows][kColumns], const float* a, const float* b, int lane) {
  using T = float;
  using Traits = TileTraits<T>;
  constexpr int kPack = Traits::kPack;
  constexpr int kStride = Traits::kStride;
#pragma unroll 1
  for (int step = 0; step < kTile; step += kPack) {
    const int k = kSum == Sum::kAddDown ? kTile - kPack - step : step;
    T left[kRows][kPack], right[kColumns][kPack];
    if constexpr (kInnerA == Inner::kColumns) {
#pragma unroll
      for (int q = 0; q < kRows; ++q) load_pack(a + fragment_row<T, kInnerA>(lane, q) * kStride + k, left[q]);
    } else {
#pragma unroll
      for (int kk = 0; kk < kPack; ++kk) {
#pragma unroll
        for (int q = 0; q < kRows; q += kPack) {
          T pack[kPack];
          load_pack(a + (q / 4 * kTile + k + kk) * kStride + fragment_row<T, kInnerA>(lane, q % 4), pack);
#pragma unroll
          for (int i = 0; i < kPack; ++i) left[q + i][kk] = pack[i];
        }
      }
    }
    if constexpr (kInnerB == Inner::kColumns) {
#pragma unroll
      for (int p = 0; p < kColumns; ++p)
        load_pack(b + fragment_column<T, kInnerB, kColumns>(lane, p) * kStride + k, right[p]);
    } else {
#pragma unroll
      for (int kk = 0; kk < kPack; ++kk) {
#pragma unroll
        for (int p = 0; p < kColumns; p += kPack) {
          T pack[kPack];
          load_pack(b + (k + kk) * kStride + fragment_column<T, kInnerB, kColumns>(lane, p), pack);
#pragma unroll
          for (int i = 0; i < kPack; ++i) right[p + i][kk] = pack[i];
        }
      }
    }
#pragma unroll
    for (int inner = 0; inner < kPack; ++inner) {
      const int kk = kSum == Sum::kAddDown ? kPack - 1 - inner : inner;
#pragma unroll
      for (int q = 0; q < kRows; ++q) {
        const T factor = kSum == Sum::kAddDown ? left[q][kk] : -left[q][kk];
#pragma unroll
        for (int p = 0; p < kColumns; ++p) sums[q][p] = fma(factor, right[p][kk], sums[q][p]);
      }
    }
  }
}

// A lane's part of an operand's lines k..k + 7 along the inner index: those of two instructions, by four outer indices.
template <Inner kInner>
__device__ __forceinline__ void load_lines(double (&lines)[2][4], const double* tile, int k, int lane) {
  constexpr int kStride = TileTraits<double>::kStride;
  const int line = k + lane % 4 * 2;
#pragma unroll
  for (int o = 0; o < 4; ++o) {
    const int outer = fragment_row<double, kInner>(lane, o);
    if constexpr (kInner == Inner::kColumns) {
      double pack[2];
      load_pack(tile + outer * kStride + line, pack);
      lines[0][o] = pack[0], lines[1][o] = pack[1];
    } else {
      lines[0][o] = tile[line * kStride + outer], lines[1][o] = tile[(line + 1) * kStride + outer];
    }
  }
}

// The same in float64, by tensor cores, whose sums are rounded there.
template <Inner kInnerA, Inner kInnerB, Sum kSum>
__device__ __forceinline__ void tile_product(double (&sums)[4][8], const double* a, const double* b, int lane) {
  constexpr bool kDown = kSum == Sum::kAddDown;
  constexpr int kLines = 8;
#pragma unroll 1
  for (int step = 0; step < kTile; step += kLines) {
    const int k = kDown ? kTile - kLines - step : step;
    double left[2][4], right[2][4];
    load_lines<kInnerA>(left, a, k, lane);
    load_lines<kInnerB>(right, b, k, lane);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int own = kDown ? 1 - half : half;
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const double factor = kDown ? left[own][q] : -left[own][q];
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          double& first = sums[q][kInnerB == Inner::kRows ? 2 * n : n];
          double& second = sums[q][kInnerB == Inner::kRows ? 2 * n + 1 : n + 4];
          double pair[2] = {first, second};
          mma_m8n8k4_f64(pair, factor, right[own][n]);
          first = pair[0], second = pair[1];
        }
      }
    }
  }
}

template <class T>
constexpr T kLeastNormal = static_cast<T>(sizeof(T) == 4 ? FLT_MIN : DBL_MIN);

// w / pivot for w in each lane. The approximation's error e is taken out of the result, not out of the reciprocal: the
// product and e are computed side by side.
__device__ __forceinline__ float divide(float w, float pivot) {
  const float reciprocal = approximate_reciprocal(pivot);
  const float quotient = w * reciprocal, error = fmaf(-pivot, reciprocal, 1.0F);
  return fmaf(quotient, error, quotient);
}

__device__ __forceinline__ double divide(double w, double pivot) {
  double reciprocal = approximate_reciprocal(pivot);
  reciprocal = fma(reciprocal, fma(-pivot, reciprocal, 1.0), reciprocal);
  const double quotient = w * reciprocal, error = fma(-pivot, reciprocal, 1.0);
  return fma(quotient, error, quotient);
}

__device__ __forceinline__ float reciprocal_root(float value) {
  const float root = approximate_reciprocal_root(value);
  return fmaf(0.5F * root, fmaf(-value * root, root, 1.0F), root);
}

__device__ __forceinline__ double reciprocal_root(double value) {
  return rsqrt(value);  // off by one unit, and no function call that spills a tile
}

// Warps that wait for a tile's factor row by row do so after every so many rows, and once more for the reciprocals.
constexpr int kFactorGroup = 8;
constexpr int kFactorGroups = kTile / kFactorGroup + 1;

// A tile of the diagonal <- D W, upper triangular, where U = D^-1/2 (D W) has U^T U = tile, and the reciprocals of U's
// diagonal. Reads the upper triangle. False where a pivot is not positive, normal and finite. publish(g), by all lanes,
// where group g is written.
//
// Row i of D W is row i of the tile once the rows above have taken their share: the next row is brought up to date
// before all others, for on its pivot the next step waits. The others follow while it does.
template <class T, class Publish>
__device__ __forceinline__ bool factor_tile_inline(T* tile, int lane, const Publish& publish) {
  using Traits = TileTraits<T>;
  constexpr int kPack = Traits::kPack;
  constexpr int kStride = Traits::kStride;
  T column[kTile];
#pragma unroll
  for (int i = 0; i < kTile; ++i) column[i] = tile[i * kStride + lane];
  __syncwarp();
  T share = 0;  // of the row before this one, over its pivot
  unroll<kTile>([&](auto i) {
    const T pivot = __shfl_sync(kFullWarp, column[i], i);
    const T next = __shfl_sync(kFullWarp, column[i], (i + 1) % kTile);
    tile[i * kStride + lane] = column[i];
    __syncwarp();
    if constexpr (i % kFactorGroup == kFactorGroup - 1) publish(i / kFactorGroup);
    if constexpr (i > 0) {
      constexpr int kRow = i + 1;  // the first that the row before has not changed yet
      unroll<kTile / kPack>([&](auto r) {
        if constexpr (r * kPack + kPack > kRow) {
          T pack[kPack];
          load_pack(tile + (i - 1) * kStride + r * kPack, pack);
          unroll<kPack>([&](auto j) {
            constexpr int kOther = r * kPack + j;
            if constexpr (kOther >= kRow) column[kOther] = fma(-pack[j], share, column[kOther]);
          });
          if constexpr (sizeof(T) == 8 && r % 2 == 1) __syncwarp();  // fewer loads under way, fewer registers
        }
      });
    }
    if constexpr (i + 1 < kTile) {
      share = divide(column[i], pivot);
      column[i + 1] = fma(-next, share, column[i + 1]);
    }
  });
  const T own = tile[lane * kStride + lane];
  tile[lane * kStride + kTile] = reciprocal_root(own);
  __syncwarp();
  publish(kFactorGroups - 1);
  return __all_sync(kFullWarp, own >= kLeastNormal<T> && isfinite(own));
}

template <class Publish>
__device__ __forceinline__ bool factor_tile(float* tile, int lane, const Publish& publish) {
  return factor_tile_inline(tile, lane, publish);
}

// A function of its own takes fewer registers than its code inside another, where some would spill.
template <class Publish>
__device__ __attribute__((noinline)) bool factor_tile(double* tile, int lane, const Publish& publish) {
  return factor_tile_inline(tile, lane, publish);
}

// to <- U, with zeros below, and the reciprocals of its diagonal, from what factor_tile leaves. Both may be the same.
template <class T>
__device__ __forceinline__ void scale_factor(const T* from, T* to, int lane) {
  constexpr int kStride = TileTraits<T>::kStride;
  const T root = from[lane * kStride + kTile];
#pragma unroll
  for (int i = 0; i < kTile; ++i) {
    const T scaled = from[i * kStride + lane] * __shfl_sync(kFullWarp, root, i);
    to[i * kStride + lane] = i <= lane ? scaled : T(0);
  }
  to[lane * kStride + kTile] = root;
}

// to <- U^-T from, a column for each lane; factor is as factor_tile leaves it. await(g), by all lanes, before what
// group g holds is read.
template <class T, class Await>
__device__ __forceinline__ void substitute_forward(
    const T* factor, const T* from, T* to, int lane, const Await& await) {
  using Traits = TileTraits<T>;
  constexpr int kPack = Traits::kPack;
  T column[kTile];
#pragma unroll
  for (int i = 0; i < kTile; ++i) column[i] = from[i * Traits::kStride + lane];
  T reciprocal = 0;  // of the pivot of one row of a group
  unroll<kTile>([&](auto i) {
    const T* row = factor + i * Traits::kStride;
    if constexpr (i % kFactorGroup == 0) {
      await(i / kFactorGroup);
      reciprocal = divide(T(1), factor[(i + lane % kFactorGroup) * (Traits::kStride + 1)]);
    }
    if constexpr (i + 1 < kTile) {
      const T share = column[i] * __shfl_sync(kFullWarp, reciprocal, i % kFactorGroup);
      unroll<kTile / kPack>([&](auto r) {
        if constexpr (r * kPack + kPack - 1 > i) {
          T pack[kPack];
          load_pack(row + r * kPack, pack);
          unroll<kPack>([&](auto j) {
            constexpr int kRow = r * kPack + j;
            if constexpr (kRow > i) column[kRow] = fma(-pack[j], share, column[kRow]);
          });
        }
      });
    }
  });
  await(kFactorGroups - 1);
  const T root = factor[lane * Traits::kStride + kTile];
#pragma unroll
  for (int i = 0; i < kTile; ++i) to[i * Traits::kStride + lane] = column[i] * __shfl_sync(kFullWarp, root, i);
}

// column <- U^-1 column, a column for each lane.
template <class T>
__device__ __forceinline__ void substitute_backward(const T* upper, T (&column)[kTile]) {
  using Traits = TileTraits<T>;
  constexpr int kPack = Traits::kPack;
  unroll<kTile>([&](auto step) {
    constexpr int i = kTile - 1 - step;
    const T* row = upper + i * Traits::kStride;
    unroll<kTile / kPack>([&](auto back) {
      constexpr int r = kTile - kPack - back * kPack;
      if constexpr (r + kPack - 1 > i) {
        T pack[kPack];
        load_pack(row + r, pack);
        unroll<kPack>([&](auto j) {
          constexpr int kRow = r + kPack - 1 - j;
          if constexpr (kRow > i) column[i] = fma(-pack[kPack - 1 - j], column[kRow], column[i]);
        });
      }
    });
    column[i] *= row[kTile];
  });
}

}  // namespace consequentialism::cuda
