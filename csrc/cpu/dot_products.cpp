#include "dot_products.h"

#include <algorithm>

#include "vector.h"

namespace consequentialism::cpu {

namespace {

constexpr int64_t kTall = 4;  // rows of x in a tile
// Rows of y in a tile: with four and three, twelve sums and four operands fill sixteen registers.
constexpr int64_t kWide = 3;
constexpr int64_t kWideOf32 = 4;  // where there are 32 registers

// sums[i][j] = x's row i times y's row j.
template <int64_t wide, typename scalar_t>
CONSEQUENTIALISM_INLINE void tile(
    const scalar_t* const (&x)[kTall], const scalar_t* const (&y)[wide], const Runs& runs,
    scalar_t (&sums)[kTall][wide]) {
  using V = Vec<scalar_t>;
  constexpr int64_t kStep = kLanes<scalar_t>;
  static_assert(kDotColumns % kStep == 0);
  V totals[kTall][wide]{};
  for (int64_t run = 0; run < runs.count; ++run) {
    const int64_t a = run * runs.x_stride;
    const int64_t b = run * runs.y_stride;
    for (int64_t k = 0; k < runs.columns; k += kStep) {
      V right[wide];
      CONSEQUENTIALISM_UNROLL
      for (int64_t j = 0; j < wide; ++j) right[j] = load(y[j] + b + k);
      CONSEQUENTIALISM_UNROLL
      for (int64_t i = 0; i < kTall; ++i) {
        const V left = load(x[i] + a + k);
        CONSEQUENTIALISM_UNROLL
        for (int64_t j = 0; j < wide; ++j) totals[i][j] += left * right[j];
      }
    }
  }
  for (int64_t i = 0; i < kTall; ++i) {
    for (int64_t j = 0; j < wide; ++j) sums[i][j] = sum_of<scalar_t>(totals[i][j]);
  }
}

template <int64_t wide, typename scalar_t>
CONSEQUENTIALISM_INLINE void dot_products(
    scalar_t* out, int64_t out_stride, const Rows<scalar_t>& x, const Rows<scalar_t>& y, const Runs& runs,
    scalar_t factor) {
  scalar_t sums[kTall][wide];
  for (int64_t i = 0; i < x.count; i += kTall) {
    const scalar_t* left[kTall];
    for (int64_t r = 0; r < kTall; ++r) left[r] = x.data + std::min(i + r, x.count - 1) * x.stride;
    for (int64_t j = 0; j < y.count; j += wide) {
      const scalar_t* right[wide];
      for (int64_t c = 0; c < wide; ++c) right[c] = y.data + std::min(j + c, y.count - 1) * y.stride;
      tile<wide, scalar_t>(left, right, runs, sums);
      for (int64_t r = 0; r < std::min(kTall, x.count - i); ++r) {
        for (int64_t c = 0; c < std::min(wide, y.count - j); ++c)
          out[(i + r) * out_stride + j + c] += factor * sums[r][c];
      }
    }
  }
}

CONSEQUENTIALISM_CLONES void narrow(
    float* out, int64_t out_stride, const Rows<float>& x, const Rows<float>& y, const Runs& runs, float factor) {
  dot_products<kWide>(out, out_stride, x, y, runs, factor);
}

CONSEQUENTIALISM_CLONES void narrow(
    double* out, int64_t out_stride, const Rows<double>& x, const Rows<double>& y, const Runs& runs, double factor) {
  dot_products<kWide>(out, out_stride, x, y, runs, factor);
}

CONSEQUENTIALISM_AVX512 void wide(
    float* out, int64_t out_stride, const Rows<float>& x, const Rows<float>& y, const Runs& runs, float factor) {
  dot_products<kWideOf32>(out, out_stride, x, y, runs, factor);
}

CONSEQUENTIALISM_AVX512 void wide(
    double* out, int64_t out_stride, const Rows<double>& x, const Rows<double>& y, const Runs& runs, double factor) {
  dot_products<kWideOf32>(out, out_stride, x, y, runs, factor);
}

}  // namespace

void add_dot_products(float* out, int64_t out_stride, Rows<float> x, Rows<float> y, const Runs& runs, float factor) {
  has_avx512() ? wide(out, out_stride, x, y, runs, factor) : narrow(out, out_stride, x, y, runs, factor);
}

void add_dot_products(
    double* out, int64_t out_stride, Rows<double> x, Rows<double> y, const Runs& runs, double factor) {
  has_avx512() ? wide(out, out_stride, x, y, runs, factor) : narrow(out, out_stride, x, y, runs, factor);
}

}  // namespace consequentialism::cpu
