#include "tile_inverse.h"

#include <algorithm>
#include <cmath>

#include "vector.h"

namespace consequentialism::cpu {

namespace {

constexpr int64_t kTile = 16;      // rows of a block row, and what a workspace is padded to
constexpr int64_t kMicroRows = 4;  // accumulators: 4 rows of 2 vectors
template <typename scalar_t>
constexpr int64_t kMicroColumns = 2 * kLanes<scalar_t>;

// sums[r] = sum over k in [begin, end) of x[k * step_k + r * step_r] y[k, :], for 4 rows r and 2 vectors of columns.
template <typename scalar_t>
CONSEQUENTIALISM_INLINE void outer_products(
    const scalar_t* x, int64_t step_k, int64_t step_r, const scalar_t* y, int64_t ldy, int64_t begin, int64_t end,
    Vec<scalar_t> (&sums)[kMicroRows][2]) {
  using V = Vec<scalar_t>;
  // Named, not an array: compilers keep these in registers.
  V a0{}, a1{}, b0{}, b1{}, c0{}, c1{}, d0{}, d1{};
  for (int64_t k = begin; k < end; ++k) {
    const scalar_t* factors = x + k * step_k;
    const V left = load(y + k * ldy);
    const V right = load(y + k * ldy + kLanes<scalar_t>);
    a0 += factors[0] * left;
    a1 += factors[0] * right;
    b0 += factors[step_r] * left;
    b1 += factors[step_r] * right;
    c0 += factors[2 * step_r] * left;
    c1 += factors[2 * step_r] * right;
    d0 += factors[3 * step_r] * left;
    d1 += factors[3 * step_r] * right;
  }
  sums[0][0] = a0, sums[0][1] = a1, sums[1][0] = b0, sums[1][1] = b1;
  sums[2][0] = c0, sums[2][1] = c1, sums[3][0] = d0, sums[3][1] = d1;
}

// The square's lower triangle <- R, and reciprocals <- 1 / R's diagonal, where R^T R was that triangle.
template <typename scalar_t>
CONSEQUENTIALISM_INLINE bool factor_diagonal(scalar_t* square, int64_t ld, scalar_t* reciprocals) {
  for (int64_t k = kTile - 1; k >= 0; --k) {
    scalar_t* row = square + k * ld;
    const scalar_t pivot = row[k];
    if (!(pivot > 0) || !std::isfinite(pivot)) return false;
    reciprocals[k] = scalar_t(1) / std::sqrt(pivot);
    for (int64_t j = 0; j < kTile; ++j) row[j] *= reciprocals[k];
    for (int64_t i = 0; i < k; ++i) {
      for (int64_t j = 0; j < kTile; ++j) square[i * ld + j] -= row[i] * row[j];
    }
  }
  return true;
}

// out <- R^-1 sums, or R^-T sums where transposed, for two vectors of columns; R is a tile on the diagonal. By
// substitution: a product with the tile's inverse would lose digits to the tile's condition. sums is overwritten.
template <typename scalar_t, bool kTransposed>
CONSEQUENTIALISM_INLINE void substitute(
    const scalar_t* root, int64_t ldr, const scalar_t* reciprocals, scalar_t* sums, scalar_t* out, int64_t n) {
  using V = Vec<scalar_t>;
  constexpr int64_t kLane = kLanes<scalar_t>;
  for (int64_t step = 0; step < kTile; ++step) {
    const int64_t k = kTransposed ? kTile - 1 - step : step;
    const V left = reciprocals[k] * load(sums + k * n);
    const V right = reciprocals[k] * load(sums + k * n + kLane);
    store(out + k * n, left);
    store(out + k * n + kLane, right);
    for (int64_t i = kTransposed ? 0 : k + 1; i < (kTransposed ? k : kTile); ++i) {
      scalar_t* row = sums + i * n;
      const scalar_t factor = kTransposed ? root[k * ldr + i] : root[i * ldr + k];
      store(row, load(row) - factor * left);
      store(row + kLane, load(row + kLane) - factor * right);
    }
  }
}

// square [n, n], n a multiple of 16: from A to S, of which the tiles on and below the diagonal are read and right.
// S solves R S = I and not S R = I: the residual of the latter is what a product P x with few directions in x shows.
template <typename scalar_t>
CONSEQUENTIALISM_INLINE bool factor_body(scalar_t* square, scalar_t* sums, scalar_t* reciprocals, int64_t n) {
  constexpr int64_t kColumns = kMicroColumns<scalar_t>;
  Vec<scalar_t> acc[kMicroRows][2];
  // R: the block row at r is R_rr^-T (A[r, j] - sum_k R[k, r]^T R[k, j]).
  for (int64_t r = n - kTile; r >= 0; r -= kTile) {
    for (int64_t j = 0; j < r + kTile; j += kColumns) {
      for (int64_t i = 0; i < kTile; i += kMicroRows) {
        outer_products<scalar_t>(square + r + i, n, 1, square + j, n, r + kTile, n, acc);
        for (int64_t q = 0; q < kMicroRows; ++q) {
          for (int64_t h = 0; h < 2; ++h) {
            const int64_t column = j + h * kLanes<scalar_t>;
            store(sums + (i + q) * n + column, load(square + (r + i + q) * n + column) - acc[q][h]);
          }
        }
      }
    }
    scalar_t* diagonal = square + r * n + r;
    for (int64_t i = 0; i < kTile; ++i) std::copy_n(sums + i * n + r, kTile, diagonal + i * n);
    if (!factor_diagonal<scalar_t>(diagonal, n, reciprocals + r)) return false;
    for (int64_t j = 0; j < r; j += kColumns) {
      substitute<scalar_t, true>(diagonal, n, reciprocals + r, sums + j, square + r * n + j, n);
    }
  }
  // S: the block row at r is R_rr^-1 (I[r, j] - sum_k R[r, k] S[k, j]).
  for (int64_t r = 0; r < n; r += kTile) {
    for (int64_t j = 0; j < r; j += kColumns) {
      for (int64_t i = 0; i < kTile; i += kMicroRows) {
        outer_products<scalar_t>(square + (r + i) * n, 1, n, square + j, n, j / kTile * kTile, r, acc);
        for (int64_t q = 0; q < kMicroRows; ++q) {
          for (int64_t h = 0; h < 2; ++h) {
            store(sums + (i + q) * n + j + h * kLanes<scalar_t>, Vec<scalar_t>{} - acc[q][h]);
          }
        }
      }
    }
    scalar_t root[kTile * kTile];
    for (int64_t i = 0; i < kTile; ++i) {
      for (int64_t j = 0; j < kTile; ++j) sums[i * n + r + j] = i == j;
      std::copy_n(square + (r + i) * n + r, kTile, root + i * kTile);
    }
    for (int64_t j = 0; j < r + kTile; j += kColumns) {
      substitute<scalar_t, false>(root, kTile, reciprocals + r, sums + j, square + r * n + j, n);
    }
  }
  return true;
}

// out [n, n] <- multiplier * S S^T, symmetric. square [padded, padded] holds S; its upper triangle is used up.
template <typename scalar_t>
CONSEQUENTIALISM_INLINE void product_body(
    scalar_t* square, int64_t padded, scalar_t* out, int64_t n, scalar_t multiplier) {
  for (int64_t r = 0; r < padded; r += kTile) {  // the upper triangle <- S^T, whose rows lie as the sums want them
    for (int64_t j = 0; j < r; j += kTile) {
      for (int64_t i = 0; i < kTile; ++i) {
        for (int64_t k = 0; k < kTile; ++k) square[(j + i) * padded + r + k] = square[(r + k) * padded + j + i];
      }
    }
    for (int64_t i = 0; i < kTile; ++i) {
      for (int64_t k = 0; k < i; ++k) {
        square[(r + k) * padded + r + i] = square[(r + i) * padded + r + k];
        square[(r + i) * padded + r + k] = 0;
      }
    }
  }
  Vec<scalar_t> acc[kMicroRows][2];
  for (int64_t r = 0; r < n; r += kMicroRows) {
    const int64_t rows = std::min(kMicroRows, n - r);
    for (int64_t j = 0; j <= r + kMicroRows - 1; j += kMicroColumns<scalar_t>) {
      const int64_t columns = std::min(kMicroColumns<scalar_t>, n - j);
      outer_products<scalar_t>(square + r, padded, 1, square + j, padded, 0, j / kTile * kTile + kTile, acc);
      for (int64_t q = 0; q < rows; ++q) {
        for (int64_t l = 0; l < columns; ++l) {
          const scalar_t value = multiplier * acc[q][l / kLanes<scalar_t>][l % kLanes<scalar_t>];
          out[(r + q) * n + j + l] = value;
          out[(j + l) * n + r + q] = value;
        }
      }
    }
  }
}

CONSEQUENTIALISM_CLONES bool factor_tiles(float* square, float* sums, float* reciprocals, int64_t n) {
  return factor_body(square, sums, reciprocals, n);
}

CONSEQUENTIALISM_CLONES bool factor_tiles(double* square, double* sums, double* reciprocals, int64_t n) {
  return factor_body(square, sums, reciprocals, n);
}

CONSEQUENTIALISM_CLONES void product(float* square, int64_t padded, float* out, int64_t n, float multiplier) {
  product_body(square, padded, out, n, multiplier);
}

CONSEQUENTIALISM_CLONES void product(double* square, int64_t padded, double* out, int64_t n, double multiplier) {
  product_body(square, padded, out, n, multiplier);
}

int64_t padded_to_tile(int64_t n) {
  return (n + kTile - 1) / kTile * kTile;
}

// square <- S. The padding is an identity, which the factor leaves as it is. Returns the padded order, 0 on a
// breakdown.
template <typename scalar_t>
int64_t factor_copy(const scalar_t* a, int64_t lda, int64_t n, scalar_t* square) {
  const int64_t padded = padded_to_tile(n);
  for (int64_t i = 0; i < n; ++i) {
    std::copy_n(a + i * lda, i + 1, square + i * padded);
    std::fill(square + i * padded + i + 1, square + (i + 1) * padded, scalar_t(0));
  }
  for (int64_t i = n; i < padded; ++i) {
    std::fill_n(square + i * padded, padded, scalar_t(0));
    square[i * padded + i] = 1;
  }
  scalar_t* sums = square + padded * padded;
  return factor_tiles(square, sums, sums + kTile * padded, padded) ? padded : 0;
}

template <typename scalar_t>
bool factor_into(const scalar_t* a, int64_t lda, scalar_t* s, int64_t lds, int64_t n, scalar_t* workspace) {
  const int64_t padded = factor_copy(a, lda, n, workspace);
  if (padded == 0) return n == 0;
  for (int64_t i = 0; i < n; ++i) {
    std::copy_n(workspace + i * padded, i + 1, s + i * lds);
    std::fill(s + i * lds + i + 1, s + i * lds + n, scalar_t(0));
  }
  return true;
}

template <typename scalar_t>
bool invert_in_place(scalar_t* a, int64_t n, scalar_t multiplier, scalar_t* workspace) {
  const int64_t padded = factor_copy(a, n, n, workspace);
  if (padded == 0) return n == 0;
  product(workspace, padded, a, n, multiplier);
  return true;
}

}  // namespace

int64_t tile_workspace(int64_t n) {
  const int64_t padded = padded_to_tile(n);
  return padded * (padded + kTile + 1);
}

bool tile_factor(const float* a, int64_t lda, float* s, int64_t lds, int64_t n, float* workspace) {
  return factor_into(a, lda, s, lds, n, workspace);
}

bool tile_factor(const double* a, int64_t lda, double* s, int64_t lds, int64_t n, double* workspace) {
  return factor_into(a, lda, s, lds, n, workspace);
}

bool tile_inverse(float* a, int64_t n, float multiplier, float* workspace) {
  return invert_in_place(a, n, multiplier, workspace);
}

bool tile_inverse(double* a, int64_t n, double multiplier, double* workspace) {
  return invert_in_place(a, n, multiplier, workspace);
}

}  // namespace consequentialism::cpu
