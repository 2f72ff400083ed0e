#pragma once

#include <cstdint>

namespace consequentialism::cpu {

constexpr int64_t kSmallGramSlack = 8;  // numbers behind the last column of a row that are read, and must be finite

// What each row consists of: so many lines of so many columns, their beginnings a stride apart.
struct RowLines {
  int64_t lines, line_stride, columns;
};

// gram [n, n] += the lower triangle of a Gram of few rows, where BLAS is slow: of `inputs` rows, given by where they
// begin, and with a bias of one more row of ones, but for the number in its corner.
void add_small_gram(float* gram, const float* const* rows, int64_t inputs, const RowLines& shape, bool bias);
void add_small_gram(double* gram, const double* const* rows, int64_t inputs, const RowLines& shape, bool bias);

}  // namespace consequentialism::cpu
