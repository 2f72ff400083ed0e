// The loops of a step over entries, each one pass over memory.
#pragma once

#include <cstdint>

namespace consequentialism::cpu {

struct Sgd {
  double rate, momentum, dampening;
  bool nesterov;
};

struct Rmsprop {
  double rate, alpha, momentum, epsilon;
};

struct Adam {
  double rate;   // lr / (1 - beta1^t)
  double scale;  // 1 / sqrt(1 - beta2^t)
  double beta1, beta2, epsilon;
};

struct Momentum {
  double momentum;
  bool nesterov;
};

// What an optimizer wants to add to n entries, with torch's numbers but for rounding: change holds the gradient and
// becomes the change, the moments become those of this step. They are torch's: momentum_buffer alone; square_avg and
// momentum_buffer; exp_avg and exp_avg_sq. A buffer is not touched without a momentum. Momentum is Muon's, whose change
// is still to be made orthogonal.
void apply(const Sgd& rule, int64_t n, float* change, float* buffer, float* none);
void apply(const Sgd& rule, int64_t n, double* change, double* buffer, double* none);
void apply(const Rmsprop& rule, int64_t n, float* change, float* square, float* buffer);
void apply(const Rmsprop& rule, int64_t n, double* change, double* square, double* buffer);
void apply(const Adam& rule, int64_t n, float* change, float* mean, float* square);
void apply(const Adam& rule, int64_t n, double* change, double* mean, double* square);
void apply(const Momentum& rule, int64_t n, float* change, float* buffer, float* none);
void apply(const Momentum& rule, int64_t n, double* change, double* buffer, double* none);

// parameter <- kept parameter + change, n entries.
void add_change(int64_t n, float* parameter, const float* change, double kept);
void add_change(int64_t n, double* parameter, const double* change, double kept);

// out [n, m] <- diagonal [n] in [n, m]; out may be in.
void scale_rows(int64_t n, int64_t m, float* out, const float* in, const float* diagonal);
void scale_rows(int64_t n, int64_t m, double* out, const double* in, const double* diagonal);

// What the bias's column adds to a product [values | column] S whose S ends in the row [beside | corner] and the column
// above: out [n, m] += column beside, out_column [n] <- kept out_column + values above + column corner. Rows of out and
// values are a stride apart; with by_columns their columns are, and rows begin one after the other. out_column is not
// read with kept = 0.
template <typename scalar_t>
struct Edge {
  int64_t n, m, stride;
  bool by_columns;
  scalar_t *out, *out_column;
  const scalar_t *values, *column, *above, *beside;
  scalar_t corner, kept;
};
void add_edge(const Edge<float>& edge);
void add_edge(const Edge<double>& edge);

}  // namespace consequentialism::cpu
