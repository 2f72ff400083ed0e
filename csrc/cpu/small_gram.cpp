#include "small_gram.h"

#include <algorithm>

#include "vector.h"

namespace consequentialism::cpu {

namespace {

constexpr int64_t kSide = 3;  // of a square of accumulators: nine of them and six operands fill sixteen registers

// sums[i][j] = the product of x's row i and y's row j over all lines, of three rows each.
template <typename scalar_t>
CONSEQUENTIALISM_INLINE void dot_products(
    const scalar_t* const (&x)[kSide], const scalar_t* const (&y)[kSide], const RowLines& shape, const scalar_t* mask,
    scalar_t (&sums)[kSide * kSide]) {
  using V = Vec<scalar_t>;
  constexpr int64_t kStep = kLanes<scalar_t>;
  // Named, not an array: compilers keep these in registers.
  V s00{}, s01{}, s02{}, s10{}, s11{}, s12{}, s20{}, s21{}, s22{};
  const V tail = load(mask);
  for (int64_t line = 0; line < shape.lines; ++line) {
    const int64_t begin = line * shape.line_stride;
    for (int64_t column = 0; column < shape.columns; column += kStep) {
      const int64_t k = begin + column;
      const V y0 = load(y[0] + k);
      const V y1 = load(y[1] + k);
      const V y2 = load(y[2] + k);
      V x0 = load(x[0] + k);
      V x1 = load(x[1] + k);
      V x2 = load(x[2] + k);
      if (column + kStep > shape.columns) {
        x0 = x0 * tail;
        x1 = x1 * tail;
        x2 = x2 * tail;
      }
      s00 += x0 * y0;
      s01 += x0 * y1;
      s02 += x0 * y2;
      s10 += x1 * y0;
      s11 += x1 * y1;
      s12 += x1 * y2;
      s20 += x2 * y0;
      s21 += x2 * y1;
      s22 += x2 * y2;
    }
  }
  const V* vectors[kSide * kSide] = {&s00, &s01, &s02, &s10, &s11, &s12, &s20, &s21, &s22};
  for (int64_t i = 0; i < kSide * kSide; ++i) sums[i] = sum_of<scalar_t>(*vectors[i]);
}

template <typename scalar_t>
CONSEQUENTIALISM_INLINE scalar_t sum_of_lines(const scalar_t* row, const RowLines& shape, const scalar_t* mask) {
  using V = Vec<scalar_t>;
  constexpr int64_t kStep = kLanes<scalar_t>;
  V sum{};
  const V tail = load(mask);
  for (int64_t line = 0; line < shape.lines; ++line) {
    const scalar_t* begin = row + line * shape.line_stride;
    for (int64_t k = 0; k < shape.columns; k += kStep) {
      sum += k + kStep > shape.columns ? load(begin + k) * tail : load(begin + k);
    }
  }
  return sum_of<scalar_t>(sum);
}

template <typename scalar_t>
CONSEQUENTIALISM_INLINE void small_gram_body(
    scalar_t* gram, const scalar_t* const* rows, int64_t inputs, const RowLines& shape, bool bias) {
  const int64_t n = inputs + bias;
  scalar_t mask[kLanes<scalar_t>];  // of a line's last vector
  for (int64_t i = 0; i < kLanes<scalar_t>; ++i) {
    mask[i] = (shape.columns - 1) / kLanes<scalar_t> * kLanes<scalar_t> + i < shape.columns ? 1 : 0;
  }
  scalar_t sums[kSide * kSide];
  for (int64_t i = 0; i < inputs; i += kSide) {
    const scalar_t* x[kSide];
    for (int64_t r = 0; r < kSide; ++r) x[r] = rows[std::min(i + r, inputs - 1)];
    for (int64_t j = 0; j <= i; j += kSide) {
      const scalar_t* y[kSide];
      for (int64_t r = 0; r < kSide; ++r) y[r] = rows[std::min(j + r, inputs - 1)];
      dot_products<scalar_t>(x, y, shape, mask, sums);
      for (int64_t r = 0; r < std::min(kSide, inputs - i); ++r) {
        for (int64_t c = 0; c < std::min(kSide, inputs - j); ++c) gram[(i + r) * n + j + c] += sums[r * kSide + c];
      }
    }
  }
  if (!bias) return;
  for (int64_t i = 0; i < inputs; ++i) gram[inputs * n + i] += sum_of_lines<scalar_t>(rows[i], shape, mask);
}

CONSEQUENTIALISM_CLONES void small_gram(
    float* gram, const float* const* rows, int64_t inputs, const RowLines& shape, bool bias) {
  small_gram_body<float>(gram, rows, inputs, shape, bias);
}

CONSEQUENTIALISM_CLONES void small_gram(
    double* gram, const double* const* rows, int64_t inputs, const RowLines& shape, bool bias) {
  small_gram_body<double>(gram, rows, inputs, shape, bias);
}

}  // namespace

void add_small_gram(float* gram, const float* const* rows, int64_t inputs, const RowLines& shape, bool bias) {
  small_gram(gram, rows, inputs, shape, bias);
}

void add_small_gram(double* gram, const double* const* rows, int64_t inputs, const RowLines& shape, bool bias) {
  small_gram(gram, rows, inputs, shape, bias);
}

}  // namespace consequentialism::cpu
