#include "step_rules.h"

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

}  // namespace consequentialism::cpu
