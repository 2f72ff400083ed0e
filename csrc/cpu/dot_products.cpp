#include "dot_products.h"

#include <algorithm>

#include "vector.h"

namespace consequentialism::cpu {

namespace {

// Rows of x and of y in a tile: twelve sums and four operands fill sixteen registers.
constexpr int64_t kTall = 4;
constexpr int64_t kWide = 3;
// Of a Gram's tile, which has to be a square: with four by three a Gram of nine rows took 1.3 to 1.4 times as long.
constexpr int64_t kSide = 3;

// The last vector of a run, behind whose columns something else follows.
template <typename scalar_t>
struct Tail {
  int64_t begin;
  bool some;
  scalar_t mask[kLanes<scalar_t>];

  explicit Tail(int64_t columns) : begin(columns / kLanes<scalar_t> * kLanes<scalar_t>), some(begin < columns) {
    for (int64_t i = 0; i < kLanes<scalar_t>; ++i) mask[i] = begin + i < columns ? 1 : 0;
  }
};

// x is zero behind a run's columns, so that none is needed.
template <typename scalar_t>
struct NoTail {
  int64_t begin;
  static constexpr bool some = false;
  static constexpr const scalar_t* mask = nullptr;
};

// sums[i][j] = x's row i times y's row j.
template <typename scalar_t, int64_t kTall, int64_t kWide, typename Last>
CONSEQUENTIALISM_INLINE void tile(
    const scalar_t* const (&x)[kTall], const scalar_t* const (&y)[kWide], const Runs& runs, const Last& tail,
    scalar_t (&sums)[kTall][kWide]) {
  using V = Vec<scalar_t>;
  constexpr int64_t kStep = kLanes<scalar_t>;
  V totals[kTall][kWide]{};
  for (int64_t run = 0; run < runs.count; ++run) {
    const int64_t a = run * runs.x_stride;
    const int64_t b = run * runs.y_stride;
    for (int64_t k = 0; k < tail.begin; k += kStep) {
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
    if (!tail.some) continue;
    CONSEQUENTIALISM_UNROLL
    for (int64_t i = 0; i < kTall; ++i) {
      const V left = load(x[i] + a + tail.begin) * load(tail.mask);
      CONSEQUENTIALISM_UNROLL
      for (int64_t j = 0; j < kWide; ++j) totals[i][j] += left * load(y[j] + b + tail.begin);
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
  const NoTail<scalar_t> tail{runs.columns};
  scalar_t sums[kTall][kWide];
  for (int64_t i = 0; i < x.count; i += kTall) {
    const scalar_t* left[kTall];
    for (int64_t r = 0; r < kTall; ++r) left[r] = x.data + std::min(i + r, x.count - 1) * x.stride;
    for (int64_t j = 0; j < y.count; j += kWide) {
      const scalar_t* right[kWide];
      for (int64_t c = 0; c < kWide; ++c) right[c] = y.data + std::min(j + c, y.count - 1) * y.stride;
      tile(left, right, runs, tail, sums);
      for (int64_t r = 0; r < std::min(kTall, x.count - i); ++r) {
        for (int64_t c = 0; c < std::min(kWide, y.count - j); ++c)
          out[(i + r) * out_stride + j + c] += factor * sums[r][c];
      }
    }
  }
}

template <typename scalar_t>
CONSEQUENTIALISM_INLINE scalar_t sum_of_runs(const scalar_t* row, const Runs& runs, const Tail<scalar_t>& tail) {
  constexpr int64_t kStep = kLanes<scalar_t>;
  Vec<scalar_t> sum{};
  for (int64_t run = 0; run < runs.count; ++run) {
    const scalar_t* begin = row + run * runs.x_stride;
    for (int64_t k = 0; k < tail.begin; k += kStep) sum += load(begin + k);
    if (tail.some) sum += load(begin + tail.begin) * load(tail.mask);
  }
  return sum_of<scalar_t>(sum);
}

template <typename scalar_t>
CONSEQUENTIALISM_INLINE void small_gram_body(
    scalar_t* gram, const scalar_t* const* rows, int64_t inputs, const Runs& runs, bool bias) {
  const int64_t n = inputs + bias;
  const Tail<scalar_t> tail(runs.columns);
  scalar_t sums[kSide][kSide];
  for (int64_t i = 0; i < inputs; i += kSide) {
    const int64_t end = std::min(i + kSide, inputs);
    const scalar_t* left[kSide];
    for (int64_t r = 0; r < kSide; ++r) left[r] = rows[std::min(i + r, inputs - 1)];
    for (int64_t j = 0; j < end; j += kSide) {
      const scalar_t* right[kSide];
      for (int64_t c = 0; c < kSide; ++c) right[c] = rows[std::min(j + c, inputs - 1)];
      tile(left, right, runs, tail, sums);
      for (int64_t r = i; r < end; ++r) {
        for (int64_t c = j; c < std::min(j + kSide, end); ++c) gram[r * n + c] += sums[r - i][c - j];
      }
    }
  }
  if (!bias) return;
  for (int64_t i = 0; i < inputs; ++i) gram[inputs * n + i] += sum_of_runs<scalar_t>(rows[i], runs, tail);
}

CONSEQUENTIALISM_CLONES void dot_products(
    float* out, int64_t out_stride, const Rows<float>& x, const Rows<float>& y, const Runs& runs, float factor) {
  dot_products_body<float>(out, out_stride, x, y, runs, factor);
}

CONSEQUENTIALISM_CLONES void dot_products(
    double* out, int64_t out_stride, const Rows<double>& x, const Rows<double>& y, const Runs& runs, double factor) {
  dot_products_body<double>(out, out_stride, x, y, runs, factor);
}

CONSEQUENTIALISM_CLONES void small_gram(
    float* gram, const float* const* rows, int64_t inputs, const Runs& runs, bool bias) {
  small_gram_body<float>(gram, rows, inputs, runs, bias);
}

CONSEQUENTIALISM_CLONES void small_gram(
    double* gram, const double* const* rows, int64_t inputs, const Runs& runs, bool bias) {
  small_gram_body<double>(gram, rows, inputs, runs, bias);
}

}  // namespace

void add_dot_products(float* out, int64_t out_stride, Rows<float> x, Rows<float> y, const Runs& runs, float factor) {
  dot_products(out, out_stride, x, y, runs, factor);
}

void add_dot_products(
    double* out, int64_t out_stride, Rows<double> x, Rows<double> y, const Runs& runs, double factor) {
  dot_products(out, out_stride, x, y, runs, factor);
}

void add_small_gram(float* gram, const float* const* rows, int64_t inputs, const Runs& runs, bool bias) {
  small_gram(gram, rows, inputs, runs, bias);
}

void add_small_gram(double* gram, const double* const* rows, int64_t inputs, const Runs& runs, bool bias) {
  small_gram(gram, rows, inputs, runs, bias);
}

}  // namespace consequentialism::cpu
