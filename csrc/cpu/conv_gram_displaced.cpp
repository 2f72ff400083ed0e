// With a stride of 1, block (s, t) of the Gram is a sum over the window of positions o,
//   W(s, d) = sum_o x[o + s] x[o + s + d]^T  [C, C],  d = t - s,
// which one step of s changes by the window's border alone:
//   W(s + e, d) = W(s, d) + (the positions that the window gains) - (those that it loses).
// So every displacement d costs one product over all positions, and every other pair of taps with it two strips.
#include <ATen/Parallel.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <map>
#include <utility>
#include <vector>

#include "../guards.h"
#include "conv_gram.h"
#include "input_gram.h"

namespace consequentialism::cpu {

namespace {

using Offset = std::array<int64_t, 3>;

constexpr int64_t kBlockBytes = 4 << 20;  // of padded samples: what stays in the cache that the cores share

struct Pair {
  int64_t s, t;  // taps, s <= t
};

// A displacement's pairs of taps: the first has the window's product, each other one follows from an earlier one.
struct Step {
  Pair pair;
  int64_t from;     // index of the step it follows from, or -1
  int64_t along;    // the dimension of the unit step
  Offset previous;  // the offset s that it steps from
};

struct Displacement {
  Offset d;
  std::vector<Step> steps;
};

int64_t tap_index(const ConvGeometry& g, const Offset& tap) {
  return (tap[0] * g.kernel[1] + tap[1]) * g.kernel[2] + tap[2];
}

// All displacements, by the first tap of their pairs.
std::map<Offset, std::vector<Displacement>> displacements(const ConvGeometry& g) {
  std::map<Offset, std::vector<Displacement>> all;
  const auto [kd, kh, kw] = g.kernel;
  for (int64_t a = 0; a < kd; ++a) {
    for (int64_t b = a == 0 ? 0 : 1 - kh; b < kh; ++b) {
      for (int64_t c = a == 0 && b == 0 ? 0 : 1 - kw; c < kw; ++c) {
        Displacement own{{a, b, c}, {}};
        std::vector<int64_t> index(g.taps(), -1);
        Offset low, high;
        for (int i = 0; i < 3; ++i) {
          low[i] = std::max<int64_t>(0, -own.d[i]);
          high[i] = g.kernel[i] - 1 - std::max<int64_t>(0, own.d[i]);
        }
        Offset s;
        for (s[0] = low[0]; s[0] <= high[0]; ++s[0]) {
          for (s[1] = low[1]; s[1] <= high[1]; ++s[1]) {
            for (s[2] = low[2]; s[2] <= high[2]; ++s[2]) {
              const Offset t = {s[0] + a, s[1] + b, s[2] + c};
              Step step{{tap_index(g, s), tap_index(g, t)}, -1, -1, s};
              for (int i = 0; i < 3 && step.along < 0; ++i) {
                if (s[i] > low[i]) step.along = i;
              }
              if (step.along >= 0) {
                --step.previous[step.along];
                step.from = index[tap_index(g, step.previous)];
              }
              index[tap_index(g, s)] = static_cast<int64_t>(own.steps.size());
              own.steps.push_back(step);
            }
          }
        }
        all[low].push_back(std::move(own));
      }
    }
  }
  return all;
}

// The rows of x [c, b, D, H, W] at some positions, displaced; [c, positions].
at::Tensor window(const at::Tensor& x, const ConvGeometry& g, Offset tap, int64_t along, int64_t begin, int64_t count) {
  at::Tensor view = x;
  for (int64_t i = 0; i < 3; ++i) {
    const int64_t shift = tap[i] * g.dilation[i];
    view = i == along ? view.narrow(2 + i, shift + begin, count) : view.narrow(2 + i, shift, g.positions[i]);
  }
  return view.reshape({x.size(0), -1});
}

// Whether the strip lies in the padding, where x is zero.
bool in_padding(const ConvGeometry& g, int64_t tap, int64_t along, int64_t begin) {
  const int64_t first = tap * g.dilation[along] + begin;
  const int64_t last = first + g.dilation[along];
  return last <= g.padding[along] || first >= g.padding[along] + g.size[along];
}

// strips [C, C] <- strips + sign * the product over `dilation` layers of positions from `begin` on.
void add_strip(
    at::Tensor strips, const at::Tensor& x, const ConvGeometry& g, const Displacement& own, const Step& step,
    int64_t begin, double sign) {
  Offset t = step.previous;
  for (int i = 0; i < 3; ++i) t[i] += own.d[i];
  const int64_t along = step.along;
  if (in_padding(g, step.previous[along], along, begin) || in_padding(g, t[along], along, begin)) return;
  const int64_t count = g.dilation[along];
  const at::Tensor left = window(x, g, step.previous, along, begin, count);
  at::addmm_out(strips, strips, left, window(x, g, t, along, begin, count).t(), 1, sign);
}

// blocks [taps, taps, C, C] <- blocks + those of some samples of one group, padded: x [C, b, D, H, W].
void add_samples(
    const at::Tensor& blocks, const at::Tensor& x, const ConvGeometry& g,
    const std::map<Offset, std::vector<Displacement>>& all) {
  const at::Tensor flat = x.reshape({x.size(0), -1});
  const at::Tensor masked = at::zeros_like(x);  // x at the positions, displaced by a first tap, and zero elsewhere
  const at::Tensor left = masked.reshape({x.size(0), -1});
  for (const auto& [low, own] : all) {
    at::Tensor to = masked, from = x;
    for (int i = 0; i < 3; ++i) {
      to = to.narrow(2 + i, 0, g.positions[i]);
      from = from.narrow(2 + i, low[i] * g.dilation[i], g.positions[i]);
    }
    to.copy_(from);
    const std::vector<Displacement>& some = own;
    at::parallel_for(0, static_cast<int64_t>(some.size()), 1, [&](int64_t begin, int64_t end) {
      const PlainKernelGuard guard;
      for (int64_t k = begin; k < end; ++k) {
        int64_t shift = 0;
        for (int i = 0; i < 3; ++i) shift += std::max<int64_t>(0, some[k].d[i]) * g.dilation[i] * x.stride(2 + i);
        const int64_t length = flat.size(1) - shift;
        for (const Step& step : some[k].steps) {
          at::Tensor block = blocks.select(0, step.pair.s).select(0, step.pair.t);
          if (step.from < 0) {
            at::addmm_out(block, block, left.narrow(1, 0, length), flat.narrow(1, shift, length).t());
          } else {
            add_strip(block, x, g, some[k], step, g.positions[step.along], 1);
            add_strip(block, x, g, some[k], step, 0, -1);
          }
        }
      }
    });
  }
}

}  // namespace

void conv_gram_displaced_(
    const at::Tensor& gram, const at::Tensor& x, const ConvGeometry& g, bool bias, int64_t patch_bytes) {
  const int64_t channels = g.group_channels();
  const int64_t inputs = g.inputs();
  Offset padded;
  for (int i = 0; i < 3; ++i) padded[i] = g.size[i] + 2 * g.padding[i];
  const int64_t sample_bytes = channels * padded[0] * padded[1] * padded[2] * static_cast<int64_t>(gram.element_size());
  constexpr int64_t kCopies = 3;  // x padded, x masked, strips
  if (kCopies * sample_bytes > patch_bytes) return conv_gram_direct_(gram, x, g, bias, patch_bytes);
  const auto all = displacements(g);
  const int64_t step = std::max<int64_t>(1, std::min(kBlockBytes, patch_bytes / kCopies) / sample_bytes);
  for (int64_t group = 0; group < g.groups; ++group) {
    const at::Tensor blocks = at::zeros({g.taps(), g.taps(), channels, channels}, gram.options());
    at::Tensor sums = at::zeros({channels, padded[0], padded[1], padded[2]}, gram.options());
    for (int64_t first = 0; first < g.batch; first += step) {
      const at::Tensor some = x.narrow(0, first, std::min(step, g.batch - first)).narrow(1, group * channels, channels);
      const at::Tensor samples = at::zeros({channels, some.size(0), padded[0], padded[1], padded[2]}, gram.options());
      at::Tensor inner = samples;
      for (int i = 0; i < 3; ++i) inner = inner.narrow(2 + i, g.padding[i], g.size[i]);
      inner.copy_(some.transpose(0, 1));
      add_samples(blocks, samples, g, all);
      if (bias) sums.add_(samples.sum(1));
    }
    // Each pair of taps follows from an earlier one.
    for (const auto& [low, some] : all) {
      for (const Displacement& own : some) {
        for (const Step& step : own.steps) {
          if (step.from < 0) continue;
          const Pair earlier = own.steps[step.from].pair;
          blocks.select(0, step.pair.s).select(0, step.pair.t).add_(blocks.select(0, earlier.s).select(0, earlier.t));
        }
      }
    }
    // [s, t, c, c'] to [c, s, c', t]; the lower triangle takes the transposed blocks.
    at::Tensor own = gram.select(0, group).narrow(0, 0, inputs).narrow(1, 0, inputs);
    const at::Tensor square = own.unflatten(1, {channels, g.taps()}).unflatten(0, {channels, g.taps()});
    for (int64_t s = 0; s < g.taps(); ++s) {
      for (int64_t t = s; t < g.taps(); ++t) {
        const at::Tensor block = blocks.select(0, s).select(0, t);
        square.select(3, t).select(1, s).copy_(block);
        if (t > s) square.select(3, s).select(1, t).copy_(block.t());
      }
    }
    if (!bias) continue;
    at::Tensor border = gram.select(0, group).select(0, inputs).narrow(0, 0, inputs).unflatten(0, {channels, g.taps()});
    const at::Tensor one = sums.unsqueeze(1);
    for (int64_t k = 0; k < g.taps(); ++k) {
      const Offset tap = {k / (g.kernel[1] * g.kernel[2]), k / g.kernel[2] % g.kernel[1], k % g.kernel[2]};
      border.select(1, k).copy_(window(one, g, tap, -1, 0, 0).sum(1));
    }
  }
}

}  // namespace consequentialism::cpu
