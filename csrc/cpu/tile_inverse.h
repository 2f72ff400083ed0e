#pragma once

#include <cstdint>

namespace consequentialism::cpu {

// Inverses of small symmetric positive definite matrices on one thread, in tiles that stay in the cache.
//
// A = R^T R with R lower triangular, taken from the last row to the first, and S = R^-1, so that A^-1 = S S^T. S takes
// R's place. Every step is a sum of outer products of rows that are read as they lie in memory.

// The scalars of the workspace that a matrix of order n needs.
int64_t tile_workspace(int64_t n);

// s <- S, its upper triangle zero, from a's lower triangle; rows are lda and lds scalars apart. False where a pivot is
// not positive and finite; s is then untouched.
bool tile_factor(const float* a, int64_t lda, float* s, int64_t lds, int64_t n, float* workspace);
bool tile_factor(const double* a, int64_t lda, double* s, int64_t lds, int64_t n, double* workspace);

// a <- multiplier * a^-1, symmetric, [n, n], from a's lower triangle. False as above.
bool tile_inverse(float* a, int64_t n, float multiplier, float* workspace);
bool tile_inverse(double* a, int64_t n, double multiplier, double* workspace);

}  // namespace consequentialism::cpu
