#include "dot_products.h"

#include <algorithm>

#include "vector.h"

namespace consequentialism::cpu {

namespace {

// Rows of x and of y in a tile: twelve sums and four operands fill sixteen registers.
constexpr int64_t kTall = 4;
constexpr int64_t kWide = 3;

// sums[i][j] = x's row i times y's row j.
template <typename scalar_t>
CONSEQUENTIALISM_INLINE void tile(
    const scalar_t* const (&x)[kTall], const scalar_t* const (&y)[kWide], const Runs& runs,
    scalar_t (&sums)[kTall][kWide]) {
  using V = Vec<scalar_t>;
  constexpr int64_t kStep = kLanes<scalar_t>;
  static_assert(kDotColumns % kStep == 0);
  V totals[kTall][kWide]{};
  for (int64_t run = 0; run < runs.count; ++run) {
    const int64_t a = run * runs.x_stride;
    const int64_t b = run * runs.y_stride;
    for (int64_t k = 0; k < runs.columns; k += kStep) {
      V right[kWide];
      CONSEQUENTIALISM_UNROLL
      for (int64_t j = 0; j < kWide; ++j) right[j] = load(y[j] + b + k);
      CONSEQUENTIALISM_UNROLL
      for (int64_t i = 0; i < kTall; ++i) {
        const V left = load(x[i] + a + k);
        CONSEQUENTIALISM_UNROLL
        for (int64_t j = 0; j < kWide; ++j) totals[i][j] += left * right[j];
      }
    }
  }
  for (int64_t i = 0; i < kTall; ++i) {
    for (int64_t j = 0; j < kWide; ++j) sums[i][j] = sum_of<scalar_t>(totals[i][j]);
  }
}

template <typename scalar_t>
CONSEQUENTIALISM_INLINE void dot_products_body(
    scalar_t* out, int64_t out_stride, const Rows<scalar_t>& x, const Rows<scalar_t>& y, const Runs& runs,
    scalar_t factor) {
  scalar_t sums[kTall][kWide];
  for (int64_t i = 0; i < x.count; i += kTall) {
    const scalar_t* left[kTall];
    for (int64_t r = 0; r < kTall; ++r) left[r] = x.data + std::min(i + r, x.count - 1) * x.stride;
    for (int64_t j = 0; j < y.count; j += kWide) {
      const scalar_t* right[kWide];
      for (int64_t c = 0; c < kWide; ++c) right[c] = y.data + std::min(j + c, y.count - 1) * y.stride;
      tile<scalar_t>(left, right, runs, sums);
      for (int64_t r = 0; r < std::min(kTall, x.count - i); ++r) {
        for (int64_t c = 0; c < std::min(kWide, y.count - j); ++c)
          out[(i + r) * out_stride + j + c] += factor * sums[r][c];
      }
    }
  }
}

CONSEQUENTIALISM_CLONES void dot_products(
    float* out, int64_t out_stride, const Rows<float>& x, const Rows<float>& y, const Runs& runs, float factor) {
  dot_products_body<float>(out, out_stride, x, y, runs, factor);
}

CONSEQUENTIALISM_CLONES void dot_products(
    double* out, int64_t out_stride, const Rows<double>& x, const Rows<double>& y, const Runs& runs, double factor) {
  dot_products_body<double>(out, out_stride, x, y, runs, factor);
}

}  // namespace

void add_dot_products(float* out, int64_t out_stride, Rows<float> x, Rows<float> y, const Runs& runs, float factor) {
  dot_products(out, out_stride, x, y, runs, factor);
}

void add_dot_products(
    double* out, int64_t out_stride, Rows<double> x, Rows<double> y, const Runs& runs, double factor) {
  dot_products(out, out_stride, x, y, runs, factor);
}

}  // namespace consequentialism::cpu
