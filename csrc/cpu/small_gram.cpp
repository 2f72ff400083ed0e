#include <algorithm>

#include "conv_gram.h"
#include "vector.h"

namespace consequentialism::cpu {

namespace {

constexpr int64_t kSide = 3;  // of a square of accumulators: nine of them and six operands fill sixteen registers

template <typename scalar_t>
CONSEQUENTIALISM_INLINE scalar_t sum_of(const Vec<scalar_t>& v) {
  scalar_t sum = 0;
  for (int64_t i = 0; i < kLanes<scalar_t>; ++i) sum += v[i];
  return sum;
}

// sums[i][j] = dot product of x's row i and y's row j, of three rows each.
template <typename scalar_t>
CONSEQUENTIALISM_INLINE void dot_products(
    const scalar_t* const (&x)[kSide], const scalar_t* const (&y)[kSide], int64_t length, scalar_t (&sums)[9]) {
  using V = Vec<scalar_t>;
  constexpr int64_t kStep = kLanes<scalar_t>;
  // Named, not an array: compilers keep these in registers.
  V s00{}, s01{}, s02{}, s10{}, s11{}, s12{}, s20{}, s21{}, s22{};
  int64_t k = 0;
  for (; k + kStep <= length; k += kStep) {
    const V y0 = load(y[0] + k);
    const V y1 = load(y[1] + k);
    const V y2 = load(y[2] + k);
    const V x0 = load(x[0] + k);
    s00 += x0 * y0;
    s01 += x0 * y1;
    s02 += x0 * y2;
    const V x1 = load(x[1] + k);
    s10 += x1 * y0;
    s11 += x1 * y1;
    s12 += x1 * y2;
    const V x2 = load(x[2] + k);
    s20 += x2 * y0;
    s21 += x2 * y1;
    s22 += x2 * y2;
  }
  const V* vectors[9] = {&s00, &s01, &s02, &s10, &s11, &s12, &s20, &s21, &s22};
  for (int64_t i = 0; i < 9; ++i) sums[i] = sum_of<scalar_t>(*vectors[i]);
  for (; k < length; ++k) {
    for (int64_t i = 0; i < 9; ++i) sums[i] += x[i / kSide][k] * y[i % kSide][k];
  }
}

template <typename scalar_t>
CONSEQUENTIALISM_INLINE void small_gram_body(scalar_t* gram, const scalar_t* a, int64_t n, int64_t length) {
  scalar_t sums[9];
  for (int64_t i = 0; i < n; i += kSide) {
    const int64_t rows = std::min(kSide, n - i);
    const scalar_t* x[kSide];
    for (int64_t r = 0; r < kSide; ++r) x[r] = a + std::min(i + r, n - 1) * length;
    for (int64_t j = 0; j <= i; j += kSide) {
      const int64_t columns = std::min(kSide, n - j);
      const scalar_t* y[kSide];
      for (int64_t r = 0; r < kSide; ++r) y[r] = a + std::min(j + r, n - 1) * length;
      dot_products<scalar_t>(x, y, length, sums);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < columns; ++c) gram[(i + r) * n + j + c] += sums[r * kSide + c];
      }
    }
  }
}

CONSEQUENTIALISM_CLONES void small_gram(float* gram, const float* a, int64_t n, int64_t length) {
  small_gram_body<float>(gram, a, n, length);
}

CONSEQUENTIALISM_CLONES void small_gram(double* gram, const double* a, int64_t n, int64_t length) {
  small_gram_body<double>(gram, a, n, length);
}

}  // namespace

void add_small_gram(float* gram, const float* a, int64_t n, int64_t length) {
  small_gram(gram, a, n, length);
}

void add_small_gram(double* gram, const double* a, int64_t n, int64_t length) {
  small_gram(gram, a, n, length);
}

}  // namespace consequentialism::cpu
