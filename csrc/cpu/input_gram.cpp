#include "input_gram.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/sum.h>
#include <torch/library.h>

#include <algorithm>

#include "../checks.h"
#include "../guards.h"

namespace consequentialism::cpu {

namespace {

constexpr int64_t kWhole = 96;  // order up to which one product of the whole square is faster than its half in panels
constexpr int64_t kMinTile = 32;
constexpr int64_t kMaxTile = 128;

// Rows of a panel: wide enough for BLAS, and at least two panels for each thread where n allows it.
int64_t tile_rows(int64_t n, int64_t threads) {
  const int64_t even = (n + 4 * threads - 1) / (4 * threads);
  const int64_t tile = (even + 15) / 16 * 16;
  return std::clamp(tile, kMinTile, kMaxTile);
}

}  // namespace

void lower_gram_(const at::Tensor& gram, const at::Tensor& a, double beta, double alpha) {
  const int64_t n = gram.size(0);
  if (n == 0) return;
  if (n <= kWhole) {
    at::Tensor out = gram;
    at::addmm_out(out, out, a, a.t(), beta, alpha);
    return;
  }
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t tile = tile_rows(n, threads);
  const int64_t panels = (n + tile - 1) / tile;
  auto panel = [&](int64_t p) {
    const int64_t begin = p * tile;
    const int64_t rows = std::min(tile, n - begin);
    at::Tensor out = gram.narrow(0, begin, rows).narrow(1, 0, begin + rows);
    at::addmm_out(out, out, a.narrow(0, begin, rows), a.narrow(0, 0, begin + rows).t(), beta, alpha);
  };
  // Panel p costs p + 1 tiles: the first is paired with the last, so that every pair costs the same.
  // Each thread then calls BLAS for whole tiles, which beats BLAS's own threads inside small products.
  const int64_t pairs = (panels + 1) / 2;
  at::parallel_for(0, pairs, 1, [&](int64_t first, int64_t last) {
    const PlainKernelGuard guard;
    for (int64_t p = first; p < last; ++p) {
      panel(panels - 1 - p);
      if (p != panels - 1 - p) panel(p);
    }
  });
}

at::Tensor lower_input_gram(const at::Tensor& x, bool bias, bool primal) {
  const int64_t rows = x.size(0);
  const int64_t inputs = x.size(1);
  if (!primal) {
    // The bias's column adds 1 to every entry.
    at::Tensor gram = at::empty({rows, rows}, x.options());
    if (bias) {
      AT_DISPATCH_FLOATING_TYPES(gram.scalar_type(), "ones", [&] {
        std::fill_n(gram.mutable_data_ptr<scalar_t>(), rows * rows, scalar_t(1));
      });
    }
    lower_gram_(gram, x, bias ? 1 : 0, 1);
    return gram;
  }
  at::Tensor gram = at::empty({inputs + bias, inputs + bias}, x.options());
  lower_gram_(gram.narrow(0, 0, inputs).narrow(1, 0, inputs), x.t(), 0, 1);
  if (bias) {
    gram.select(0, inputs).narrow(0, 0, inputs).copy_(x.sum(0));
    gram.select(0, inputs).select(0, inputs).fill_(rows);
  }
  return gram;
}

void mirror_lower_(const at::Tensor& square) {
  const int64_t n = square.size(0);
  AT_DISPATCH_FLOATING_TYPES(square.scalar_type(), "mirror_lower", [&] {
    scalar_t* data = square.mutable_data_ptr<scalar_t>();
    for (int64_t begin = 0; begin < n; begin += kMinTile) {  // by strips of columns, which stay in the cache
      const int64_t end = std::min(n, begin + kMinTile);
      for (int64_t i = begin; i < n; ++i) {
        for (int64_t j = begin; j < std::min(end, i); ++j) data[j * n + i] = data[i * n + j];
      }
    }
  });
}

at::Tensor computable(const at::Tensor& x) {
  at::Tensor y = x;
  if (x.scalar_type() == at::kHalf || x.scalar_type() == at::kBFloat16) y = y.to(at::kFloat);
  const bool row_major = y.stride(1) == 1 && y.stride(0) >= std::max<int64_t>(1, y.size(1));
  const bool column_major = y.stride(0) == 1 && y.stride(1) >= std::max<int64_t>(1, y.size(0));
  return row_major || column_major ? y : y.contiguous();
}

at::Tensor input_gram(const at::Tensor& x, bool bias, std::string_view form) {
  check_x(x);
  const bool primal = parse_form(form) == Form::kPrimal;
  const PlainKernelGuard guard;
  at::Tensor gram = lower_input_gram(computable(x), bias, primal);
  mirror_lower_(gram);
  return gram;
}

}  // namespace consequentialism::cpu

TORCH_LIBRARY_IMPL(consequentialism, CPU, m) {
  m.impl("input_gram", consequentialism::cpu::input_gram);
}
