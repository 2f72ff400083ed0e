// M^(-1/p) by the coupled iteration of consequentialism/solve/root.py: products of symmetric matrices that commute, of
// which half is computed and mirrored.
#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/eye.h>
#include <torch/library.h>

#include <array>
#include <utility>

#include "../checks.h"
#include "../coordinates_checks.h"
#include "../guards.h"
#include "symmetric_product.h"

namespace consequentialism::cpu {

namespace {

// result <- the inverse root of matrix, both [n, n] and contiguous.
void invert_root(const at::Tensor& matrix, int64_t root, c10::ArrayRef<double> coefficients, at::Tensor result) {
  std::array<at::Tensor, 4> room;
  for (at::Tensor& one : room) one = at::empty_like(matrix);
  at::Tensor current = matrix;
  at::Tensor turn = room[0], power = room[1], spare = room[2], kept = room[3];
  for (size_t k = 0; k < coefficients.size(); k += 3) {
    const bool first = k == 0, last = k + 3 == coefficients.size();
    symmetric_product(turn, current, current, current, coefficients[k + 1], coefficients[k + 2]);
    turn.diagonal().add_(coefficients[k]);
    if (!last) {
      symmetric_product(power, turn, turn, turn, 0, 1);
      for (int64_t raised = 2; raised < root; raised *= 2) {
        symmetric_product(spare, power, power, power, 0, 1);
        std::swap(power, spare);
      }
      symmetric_product(spare, power, current, current, 0, 1);
      if (first) {
        current = spare;
        spare = at::empty_like(matrix);
      } else {
        std::swap(current, spare);
      }
    }
    if (first) {
      result.copy_(turn);
    } else {
      symmetric_product(kept, result, turn, turn, 0, 1);
      result.copy_(kept);
    }
  }
}

}  // namespace

at::Tensor inverse_root(const at::Tensor& matrix, int64_t root, c10::ArrayRef<double> coefficients) {
  check_inverse_root(matrix, root, coefficients);
  const PlainKernelGuard guard;
  const int64_t n = matrix.size(-1);
  at::Tensor result = at::empty_like(matrix, at::MemoryFormat::Contiguous);
  if (result.numel() == 0) return result;
  if (coefficients.empty()) return result.copy_(at::eye(n, matrix.options()));
  const at::Tensor given = matrix.contiguous().view({-1, n, n});
  const at::Tensor each = result.view({-1, n, n});
  // Whole matrices on the threads where there are enough of them: then every product is one thread's.
  const bool many = given.size(0) >= at::get_num_threads();
  at::parallel_for(0, given.size(0), many ? 1 : given.size(0), [&](int64_t first, int64_t last) {
    const PlainKernelGuard plain;
    for (int64_t i = first; i < last; ++i) invert_root(given.select(0, i), root, coefficients, each.select(0, i));
  });
  return result;
}

}  // namespace consequentialism::cpu

TORCH_LIBRARY_IMPL(consequentialism, CPU, m) {
  m.impl("inverse_root", consequentialism::cpu::inverse_root);
}
