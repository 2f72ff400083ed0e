#include "symmetric_product.h"

#include <ATen/Parallel.h>
#include <ATen/ops/addmm.h>

#include <algorithm>

#include "../guards.h"
#include "input_gram.h"

namespace consequentialism::cpu {

namespace {

constexpr int64_t kWhole = 128;  // order up to which one product of the whole square is faster than its half in panels
constexpr int64_t kPanels = 4;   // of the half

}  // namespace

void symmetric_product(
    at::Tensor out, const at::Tensor& a, const at::Tensor& b, const at::Tensor& c, double beta, double alpha) {
  const int64_t n = out.size(0);
  if (n <= kWhole) {
    at::addmm_out(out, c, a, b, beta, alpha);
  } else {
    const int64_t tile = (n + kPanels - 1) / kPanels;
    // Panel p costs p + 1 tiles: the first is paired with the last, so that every pair costs the same.
    at::parallel_for(0, kPanels / 2, 1, [&](int64_t first, int64_t last) {
      const PlainKernelGuard guard;
      for (int64_t pair = first; pair < last; ++pair) {
        for (const int64_t p : {kPanels - 1 - pair, pair}) {
          const int64_t begin = std::min(n, p * tile), end = std::min(n, begin + tile);
          if (begin == end) continue;
          at::Tensor panel = out.narrow(0, begin, end - begin).narrow(1, 0, end);
          const at::Tensor before = c.narrow(0, begin, end - begin).narrow(1, 0, end);
          at::addmm_out(panel, before, a.narrow(0, begin, end - begin), b.narrow(1, 0, end), beta, alpha);
        }
      }
    });
  }
  mirror_lower_(out);
}

}  // namespace consequentialism::cpu
