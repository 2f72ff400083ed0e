#pragma once

#include <cstdint>

namespace consequentialism::cpu {

constexpr int64_t kDotColumns = 8;  // to a multiple of which the columns of a run are read

// Rows in pieces: so many runs of so many columns, a stride apart, which differs between the operands. What is read of
// x behind a run's last column must be zero, of y finite.
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

}  // namespace consequentialism::cpu
