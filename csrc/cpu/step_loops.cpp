#include "step_loops.h"

#include <cmath>

#include "vector.h"

namespace consequentialism::cpu {

namespace {

template <typename scalar_t>
CONSEQUENTIALISM_INLINE void sgd_body(
    const Sgd& rule, int64_t n, scalar_t* __restrict change, scalar_t* __restrict buffer) {
  const scalar_t rate = rule.rate, momentum = rule.momentum, share = 1 - rule.dampening;
  if (rule.momentum == 0) {
    for (int64_t i = 0; i < n; ++i) change[i] *= -rate;
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    buffer[i] = momentum * buffer[i] + share * change[i];
    change[i] = -rate * (rule.nesterov ? change[i] + momentum * buffer[i] : buffer[i]);
  }
}

template <typename scalar_t>
CONSEQUENTIALISM_INLINE void rmsprop_body(
    const Rmsprop& rule, int64_t n, scalar_t* __restrict change, scalar_t* __restrict square,
    scalar_t* __restrict buffer) {
  const scalar_t rate = rule.rate, alpha = rule.alpha, share = 1 - rule.alpha;
  const scalar_t momentum = rule.momentum, epsilon = rule.epsilon;
  for (int64_t i = 0; i < n; ++i) {
    square[i] = alpha * square[i] + share * change[i] * change[i];
    change[i] /= std::sqrt(square[i]) + epsilon;
  }
  if (rule.momentum > 0) {
    for (int64_t i = 0; i < n; ++i) change[i] = buffer[i] = momentum * buffer[i] + change[i];
  }
  for (int64_t i = 0; i < n; ++i) change[i] *= -rate;
}

template <typename scalar_t>
CONSEQUENTIALISM_INLINE void adam_body(
    const Adam& rule, int64_t n, scalar_t* __restrict change, scalar_t* __restrict mean, scalar_t* __restrict square) {
  const scalar_t rate = rule.rate, scale = rule.scale, epsilon = rule.epsilon;
  const scalar_t share1 = 1 - rule.beta1, beta2 = rule.beta2, share2 = 1 - rule.beta2;
  for (int64_t i = 0; i < n; ++i) {
    mean[i] += share1 * (change[i] - mean[i]);
    square[i] = beta2 * square[i] + share2 * change[i] * change[i];
    change[i] = -rate * mean[i] / (scale * std::sqrt(square[i]) + epsilon);
  }
}

template <typename scalar_t>
CONSEQUENTIALISM_INLINE void momentum_body(
    const Momentum& rule, int64_t n, scalar_t* __restrict change, scalar_t* __restrict buffer) {
  const scalar_t momentum = rule.momentum, share = 1 - rule.momentum;
  for (int64_t i = 0; i < n; ++i) {
    buffer[i] += share * (change[i] - buffer[i]);
    change[i] = rule.nesterov ? change[i] + momentum * (buffer[i] - change[i]) : buffer[i];
  }
}

template <typename scalar_t>
CONSEQUENTIALISM_INLINE void add_change_body(
    int64_t n, scalar_t* __restrict parameter, const scalar_t* __restrict change, scalar_t kept) {
  for (int64_t i = 0; i < n; ++i) parameter[i] = kept * parameter[i] + change[i];
}

template <typename scalar_t>
CONSEQUENTIALISM_INLINE void scale_rows_body(
    int64_t n, int64_t m, scalar_t* out, const scalar_t* in, const scalar_t* diagonal) {
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < m; ++j) out[i * m + j] = diagonal[i] * in[i * m + j];
  }
}

template <typename scalar_t>
CONSEQUENTIALISM_INLINE scalar_t dot(const scalar_t* a, const scalar_t* b, int64_t n) {
  constexpr int64_t kStep = kLanes<scalar_t>;
  Vec<scalar_t> sums{};
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) sums += load(a + i) * load(b + i);
  scalar_t sum = sum_of<scalar_t>(sums);
  for (; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

template <typename scalar_t>
CONSEQUENTIALISM_INLINE void add_edge_body(const Edge<scalar_t>& e) {
  for (int64_t i = 0; i < e.n; ++i) {
    e.out_column[i] = (e.kept == 0 ? 0 : e.kept * e.out_column[i]) + e.column[i] * e.corner;
  }
  if (e.by_columns) {
    for (int64_t j = 0; j < e.m; ++j) {
      scalar_t* out = e.out + j * e.stride;
      const scalar_t* values = e.values + j * e.stride;
      for (int64_t i = 0; i < e.n; ++i) out[i] += e.column[i] * e.beside[j];
      for (int64_t i = 0; i < e.n; ++i) e.out_column[i] += values[i] * e.above[j];
    }
    return;
  }
  for (int64_t i = 0; i < e.n; ++i) {
    scalar_t* out = e.out + i * e.stride;
    const scalar_t factor = e.column[i];
    for (int64_t j = 0; j < e.m; ++j) out[j] += factor * e.beside[j];
    e.out_column[i] += dot(e.values + i * e.stride, e.above, e.m);
  }
}

}  // namespace

CONSEQUENTIALISM_CLONES void apply(const Sgd& rule, int64_t n, float* change, float* buffer, float*) {
  sgd_body<float>(rule, n, change, buffer);
}

CONSEQUENTIALISM_CLONES void apply(const Sgd& rule, int64_t n, double* change, double* buffer, double*) {
  sgd_body<double>(rule, n, change, buffer);
}

CONSEQUENTIALISM_CLONES void apply(const Rmsprop& rule, int64_t n, float* change, float* square, float* buffer) {
  rmsprop_body<float>(rule, n, change, square, buffer);
}

CONSEQUENTIALISM_CLONES void apply(const Rmsprop& rule, int64_t n, double* change, double* square, double* buffer) {
  rmsprop_body<double>(rule, n, change, square, buffer);
}

CONSEQUENTIALISM_CLONES void apply(const Adam& rule, int64_t n, float* change, float* mean, float* square) {
  adam_body<float>(rule, n, change, mean, square);
}

CONSEQUENTIALISM_CLONES void apply(const Adam& rule, int64_t n, double* change, double* mean, double* square) {
  adam_body<double>(rule, n, change, mean, square);
}

CONSEQUENTIALISM_CLONES void apply(const Momentum& rule, int64_t n, float* change, float* buffer, float*) {
  momentum_body<float>(rule, n, change, buffer);
}

CONSEQUENTIALISM_CLONES void apply(const Momentum& rule, int64_t n, double* change, double* buffer, double*) {
  momentum_body<double>(rule, n, change, buffer);
}

CONSEQUENTIALISM_CLONES void add_change(int64_t n, float* parameter, const float* change, double kept) {
  add_change_body<float>(n, parameter, change, kept);
}

CONSEQUENTIALISM_CLONES void add_change(int64_t n, double* parameter, const double* change, double kept) {
  add_change_body<double>(n, parameter, change, kept);
}

CONSEQUENTIALISM_CLONES void scale_rows(int64_t n, int64_t m, float* out, const float* in, const float* diagonal) {
  scale_rows_body<float>(n, m, out, in, diagonal);
}

CONSEQUENTIALISM_CLONES void scale_rows(int64_t n, int64_t m, double* out, const double* in, const double* diagonal) {
  scale_rows_body<double>(n, m, out, in, diagonal);
}

CONSEQUENTIALISM_CLONES void add_edge(const Edge<float>& edge) {
  add_edge_body<float>(edge);
}

CONSEQUENTIALISM_CLONES void add_edge(const Edge<double>& edge) {
  add_edge_body<double>(edge);
}

}  // namespace consequentialism::cpu
