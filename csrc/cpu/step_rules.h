// What an optimizer wants to add to a parameter, entry by entry in one pass over memory, with torch's numbers but for
// rounding. `change` holds the gradient and becomes the change; the moments become those of this step.
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

// n entries each. The moments are torch's: momentum_buffer alone; square_avg and momentum_buffer; exp_avg and
// exp_avg_sq. A buffer is not touched without a momentum.
void apply(const Sgd& rule, int64_t n, float* change, float* buffer, float* none);
void apply(const Sgd& rule, int64_t n, double* change, double* buffer, double* none);
void apply(const Rmsprop& rule, int64_t n, float* change, float* square, float* buffer);
void apply(const Rmsprop& rule, int64_t n, double* change, double* square, double* buffer);
void apply(const Adam& rule, int64_t n, float* change, float* mean, float* square);
void apply(const Adam& rule, int64_t n, double* change, double* mean, double* square);

}  // namespace consequentialism::cpu
