#pragma once

#include <cstdint>

namespace consequentialism::cpu {

constexpr int64_t kDotColumns = 8;  // to a multiple of which the columns of a run are read

// Rows in pieces: so many runs of so many columns, a stride apart, which may differ between the operands. What is read
// behind a run's last column must be finite, and of the x of add_dot_products zero.
struct Runs {
  int64_t count, x_stride, y_stride, columns;
};

template <typename scalar_t>
struct Rows {
  const scalar_t* data;
  int64_t count, stride;
};

// out [m, n] += factor * x y^T of x [m, k] and y [n, k], where m and n are so small that BLAS is slow.
void add_dot_products(float* out, int64_t out_stride, Rows<float> x, Rows<float> y, const Runs& runs, float factor = 1);
void add_dot_products(
    double* out, int64_t out_stride, Rows<double> x, Rows<double> y, const Runs& runs, double factor = 1);

// gram [n, n] += the lower triangle of a Gram of few rows: of `inputs` rows, given by where they begin, with one stride
// between runs, and with a bias of one more row of ones, but for the number in its corner.
void add_small_gram(float* gram, const float* const* rows, int64_t inputs, const Runs& runs, bool bias);
void add_small_gram(double* gram, const double* const* rows, int64_t inputs, const Runs& runs, bool bias);

}  // namespace consequentialism::cpu
