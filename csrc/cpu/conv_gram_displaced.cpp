// With a stride of 1, block (s, t) of the Gram is a sum over the window of positions o,
//   W(s, d) = sum_o x[o + s] x[o + s + d]^T  [C, C],  d = t - s,
// which one step of s changes by the window's border alone:
//   W(s + e, d) = W(s, d) + (the positions that the window gains) - (those that it loses).
// So every displacement d costs one product over all positions, and every other pair of taps with it two strips.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <map>
#include <utility>
#include <vector>

#include "../guards.h"
#include "conv_gram.h"
#include "dot_products.h"
#include "input_gram.h"

namespace consequentialism::cpu {

namespace {

using Offset = std::array<int64_t, 3>;

constexpr int64_t kOwnChannels = 64;         // up to which the own products are faster than BLAS
constexpr int64_t kTaskRows = 4;             // of an own product that a thread takes at a time
constexpr int64_t kOwnBlockBytes = 1 << 20;  // of samples and what is copied of them: what stays in a core's cache
constexpr int64_t kBlockBytes = 12 << 20;    // for BLAS: what stays in the cache that the cores share

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

// By the first tap of their pairs.
using Displacements = std::map<Offset, std::vector<Displacement>>;

Displacements all_displacements(const ConvGeometry& g) {
  Displacements all;
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

// Padded samples of one group, [C, b, D, H, W], and how to step through them.
template <typename scalar_t>
struct Samples {
  const scalar_t* data;
  int64_t channels, count;
  Offset strides;  // of one depth, row and column
  int64_t plane;   // numbers of one channel of one sample

  const scalar_t* at(int64_t channel, int64_t sample) const { return data + (channel * count + sample) * plane; }

  // From a position's number to that which the tap reads there.
  int64_t shift(const ConvGeometry& g, const Offset& tap) const {
    int64_t sum = 0;
    for (int i = 0; i < 3; ++i) sum += tap[i] * g.dilation[i] * strides[i];
    return sum;
  }
};

// x at the positions, displaced by a tap; the numbers between lines of positions are left as they are.
template <typename scalar_t>
void copy_window(scalar_t* to, int64_t to_plane, const Samples<scalar_t>& x, const ConvGeometry& g, const Offset& tap) {
  at::parallel_for(0, x.channels, 4, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      for (int64_t b = 0; b < x.count; ++b) {
        const scalar_t* from = x.at(c, b) + x.shift(g, tap);
        scalar_t* out = to + (c * x.count + b) * to_plane;
        for (int64_t d = 0; d < g.positions[0]; ++d) {
          for (int64_t h = 0; h < g.positions[1]; ++h) {
            const int64_t line = d * x.strides[0] + h * x.strides[1];
            std::copy_n(from + line, g.positions[2], out + line);
          }
        }
      }
    }
  });
}

int64_t rounded_up(int64_t columns) {
  return (columns + kDotColumns - 1) / kDotColumns * kDotColumns;
}

// What one tap reads at a strip of positions: `dilation` layers along a dimension, all positions along the others.
struct Strip {
  Offset tap;
  int64_t along;
  bool gained;  // behind the last position, or at the first ones

  auto operator<=>(const Strip&) const = default;

  Offset size(const ConvGeometry& g) const {
    Offset all = g.positions;
    all[along] = g.dilation[along];
    return all;
  }
  int64_t numbers(const ConvGeometry& g) const { return size(g)[0] * size(g)[1] * size(g)[2]; }  // of a sample

  // In padded x.
  Offset first(const ConvGeometry& g) const {
    Offset begin;
    for (int i = 0; i < 3; ++i) begin[i] = tap[i] * g.dilation[i];
    if (gained) begin[along] += g.positions[along];
    return begin;
  }

  // Whether x is zero there.
  bool in_padding(const ConvGeometry& g) const {
    const int64_t begin = first(g)[along];
    return begin + g.dilation[along] <= g.padding[along] || begin >= g.padding[along] + g.size[along];
  }
};

// block <- block + (or -) the product of two strips.
struct StripProduct {
  Pair pair;
  Strip left, right;
};

// For what each step's window gains and loses.
std::vector<StripProduct> strip_products(const ConvGeometry& g, const Displacements& all) {
  std::vector<StripProduct> products;
  for (const auto& [low, some] : all) {
    for (const Displacement& one : some) {
      for (const Step& step : one.steps) {
        if (step.from < 0) continue;
        Offset t = step.previous;
        for (int i = 0; i < 3; ++i) t[i] += one.d[i];
        for (const bool gained : {true, false}) {
          const StripProduct product{step.pair, {step.previous, step.along, gained}, {t, step.along, gained}};
          if (!product.left.in_padding(g) && !product.right.in_padding(g)) products.push_back(product);
        }
      }
    }
  }
  return products;
}

// Products that are summed up sample by sample, and where in a copy of all strips each begins, per channel and sample.
struct Plan {
  Displacements displacements;
  std::vector<StripProduct> products;
  std::map<Strip, int64_t> strips;
  int64_t strip_numbers = 0;

  explicit Plan(const ConvGeometry& g) : displacements(all_displacements(g)) {
    products = strip_products(g, displacements);
    for (const StripProduct& product : products) {
      for (const Strip& strip : {product.left, product.right}) {
        if (strips.emplace(strip, strip_numbers).second) strip_numbers += strip.numbers(g);
      }
    }
  }
};

// out [C, columns] <- the strip of every sample, zero behind its numbers.
template <typename scalar_t>
void copy_strip(scalar_t* out, int64_t columns, const Samples<scalar_t>& x, const ConvGeometry& g, const Strip& strip) {
  const Offset first = strip.first(g);
  const Offset size = strip.size(g);
  for (int64_t c = 0; c < x.channels; ++c) {
    scalar_t* to = out + c * columns;
    scalar_t* const end = to + columns;
    for (int64_t b = 0; b < x.count; ++b) {
      for (int64_t d = 0; d < size[0]; ++d) {
        const scalar_t* from = x.at(c, b) + (first[0] + d) * x.strides[0] + first[1] * x.strides[1] + first[2];
        if (size[2] == 1) {
          for (int64_t h = 0; h < size[1]; ++h) to[h] = from[h * x.strides[1]];
          to += size[1];
          continue;
        }
        for (int64_t h = 0; h < size[1]; ++h, from += x.strides[1]) to = std::copy_n(from, size[2], to);
      }
    }
    std::fill(to, end, scalar_t(0));
  }
}

// blocks [taps, taps, C, C] <- blocks + the products of strips, which are copied to `space`.
template <typename scalar_t>
void add_strips(
    scalar_t* blocks, scalar_t* space, const Samples<scalar_t>& x, const ConvGeometry& g, const Plan& plan) {
  const auto columns_of = [&](const Strip& strip) { return rounded_up(x.count * strip.numbers(g)); };
  std::map<Strip, scalar_t*> copies;
  scalar_t* next = space;
  for (const auto& [strip, begin] : plan.strips) {
    copies[strip] = next;
    copy_strip(next, columns_of(strip), x, g, strip);
    next += x.channels * columns_of(strip);
  }
  at::parallel_for(0, static_cast<int64_t>(plan.products.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const auto& [pair, left, right] = plan.products[k];
      const int64_t columns = columns_of(left);
      scalar_t* block = blocks + (pair.s * g.taps() + pair.t) * x.channels * x.channels;
      const Rows<scalar_t> rows = {copies.at(left), x.channels, columns};
      const Rows<scalar_t> others = {copies.at(right), x.channels, columns};
      add_dot_products(block, x.channels, rows, others, {1, 0, 0, columns}, left.gained ? 1 : -1);
    }
  });
}

// blocks [taps, taps, C, C] <- blocks + those of some samples of one group, padded. `left` is zero where it is not
// written: x at the positions, displaced by a first tap, [C, b] planes of `left_plane` numbers. `strips` is space for
// copies of the strips.
template <typename scalar_t>
void add_samples(
    const at::Tensor& blocks, const at::Tensor& samples, const at::Tensor& left, const at::Tensor& strips,
    const ConvGeometry& g, const Plan& plan) {
  const int64_t channels = samples.size(0);
  const int64_t left_plane = left.size(2);
  const Samples<scalar_t> x{
      samples.const_data_ptr<scalar_t>(),
      channels,
      samples.size(1),
      {samples.stride(2), samples.stride(3), 1},
      samples.stride(1)};
  scalar_t* numbers = blocks.mutable_data_ptr<scalar_t>();
  const auto block_of = [&](const Pair& pair) { return numbers + (pair.s * g.taps() + pair.t) * channels * channels; };
  scalar_t* rows = left.mutable_data_ptr<scalar_t>();
  int64_t window = 1;  // from the first position's number to behind the last one's
  for (int i = 0; i < 3; ++i) window += (g.positions[i] - 1) * x.strides[i];
  const Runs runs = {x.count, left_plane, x.plane, rounded_up(window)};
  const bool own = channels <= kOwnChannels;
  const int64_t tasks = own ? (channels + kTaskRows - 1) / kTaskRows : 1;  // of a product
  const at::Tensor flat = samples.flatten(1);
  for (const auto& [low, some] : plan.displacements) {
    copy_window(rows, left_plane, x, g, low);
    at::parallel_for(0, static_cast<int64_t>(some.size()) * tasks, 1, [&, &some = some](int64_t begin, int64_t end) {
      const PlainKernelGuard guard;
      for (int64_t task = begin; task < end; ++task) {
        const Displacement& one = some[task / tasks];
        const Pair& first = one.steps[0].pair;
        Offset to;
        for (int i = 0; i < 3; ++i) to[i] = std::max<int64_t>(0, one.d[i]);
        const int64_t shift = x.shift(g, to);
        if (own) {
          const int64_t row = task % tasks * kTaskRows;
          const int64_t row_stride = x.count * left_plane;
          const Rows<scalar_t> some_rows = {rows + row * row_stride, std::min(kTaskRows, channels - row), row_stride};
          const Rows<scalar_t> displaced = {x.data + shift, channels, x.count * x.plane};
          add_dot_products(block_of(first) + row * channels, channels, some_rows, displaced, runs);
        } else {
          const int64_t length = flat.size(1) - shift;
          at::Tensor block = blocks.select(0, first.s).select(0, first.t);
          at::addmm_out(block, block, left.flatten(1).narrow(1, 0, length), flat.narrow(1, shift, length).t());
        }
      }
    });
  }
  add_strips(numbers, strips.mutable_data_ptr<scalar_t>(), x, g, plan);
}

// blocks: each pair of taps from the earlier one that it follows from. Then gram [n, n] <- blocks, [s, t, c, c'] to
// [c, s, c', t].
template <typename scalar_t>
void assemble(const at::Tensor& gram, const at::Tensor& blocks, const ConvGeometry& g, const Displacements& all) {
  const int64_t taps = g.taps();
  const int64_t channels = g.group_channels();
  scalar_t* numbers = blocks.mutable_data_ptr<scalar_t>();
  scalar_t* out = gram.mutable_data_ptr<scalar_t>();
  const int64_t n = gram.size(1);
  for (const auto& [low, some] : all) {
    for (const Displacement& one : some) {
      for (const Step& step : one.steps) {
        const auto [s, t] = step.pair;
        scalar_t* block = numbers + (s * taps + t) * channels * channels;
        if (step.from >= 0) {
          const Pair& earlier = one.steps[step.from].pair;
          const scalar_t* from = numbers + (earlier.s * taps + earlier.t) * channels * channels;
          for (int64_t i = 0; i < channels * channels; ++i) block[i] += from[i];
        }
        for (int64_t c = 0; c < channels; ++c) {
          for (int64_t other = 0; other < channels; ++other) {
            const scalar_t value = block[c * channels + other];
            out[(c * taps + s) * n + other * taps + t] = value;
            out[(other * taps + t) * n + c * taps + s] = value;
          }
        }
      }
    }
  }
}

// What some samples of one group add up to.
struct Sums {
  at::Tensor blocks;   // [taps, taps, C, C]
  at::Tensor samples;  // [C, D, H, W], padded, with a bias: what its row of the Gram is summed from
};

// sums <- sums + those of x [b, C, D, H, W], of one group, `step` samples at a time.
void add_group(const Sums& sums, const at::Tensor& x, const ConvGeometry& g, const Plan& plan, int64_t step) {
  const int64_t channels = x.size(1);
  const Offset padded = g.padded();
  const int64_t plane = padded[0] * padded[1] * padded[2];
  const int64_t left_plane = plane + (channels <= kOwnChannels ? kDotColumns : 0);
  const auto options = sums.blocks.options();
  const at::Tensor left = at::zeros({channels * step * left_plane}, options);
  const at::Tensor space = at::zeros({channels * step * plane + kDotColumns}, options);
  const int64_t strip_numbers = plan.strip_numbers * step + static_cast<int64_t>(plan.strips.size()) * kDotColumns;
  const at::Tensor strips = at::empty({channels * strip_numbers}, options);
  for (int64_t first = 0; first < x.size(0); first += step) {
    const int64_t count = std::min(step, x.size(0) - first);
    if (count < step && first > 0) {  // the last planes are elsewhere than those before them
      space.zero_();
      left.zero_();
    }
    const at::Tensor samples =
        space.narrow(0, 0, channels * count * plane).view({channels, count, padded[0], padded[1], padded[2]});
    at::Tensor inner = samples;
    for (int i = 0; i < 3; ++i) inner = inner.narrow(2 + i, g.padding[i], g.size[i]);
    inner.copy_(x.narrow(0, first, count).transpose(0, 1));
    const at::Tensor own = left.narrow(0, 0, channels * count * left_plane).view({channels, count, left_plane});
    AT_DISPATCH_FLOATING_TYPES(
        samples.scalar_type(), "conv_gram", [&] { add_samples<scalar_t>(sums.blocks, samples, own, strips, g, plan); });
    if (sums.samples.defined()) sums.samples.add_(samples.sum(1));
  }
}

// The bias's row of a Gram, [I], from padded samples that are summed up.
void sum_windows_(const at::Tensor& row, const at::Tensor& samples, const ConvGeometry& g) {
  at::Tensor by_tap = row.unflatten(0, {g.group_channels(), g.taps()});
  for (int64_t k = 0; k < g.taps(); ++k) {
    const Offset tap = {k / (g.kernel[1] * g.kernel[2]), k / g.kernel[2] % g.kernel[1], k % g.kernel[2]};
    at::Tensor window = samples;
    for (int i = 0; i < 3; ++i) window = window.narrow(1 + i, tap[i] * g.dilation[i], g.positions[i]);
    by_tap.select(1, k).copy_(window.sum({1, 2, 3}));
  }
}

}  // namespace

void conv_gram_displaced_(
    const at::Tensor& gram, const at::Tensor& x, const ConvGeometry& g, bool bias, int64_t patch_bytes) {
  const int64_t channels = g.group_channels();
  const int64_t inputs = g.inputs();
  const auto element_bytes = static_cast<int64_t>(gram.element_size());
  const Offset padded = g.padded();
  const Plan plan(g);
  // x padded, x at the positions, strips.
  const int64_t sample_bytes =
      channels * (2 * (padded[0] * padded[1] * padded[2] + kDotColumns) + plan.strip_numbers) * element_bytes;
  if (sample_bytes > patch_bytes) return conv_gram_direct_(gram, x, g, bias, patch_bytes);
  // Every thread sums up whole groups, or a share of the samples, on its own, unless that takes too much memory.
  const int64_t threads = at::get_num_threads();
  const int64_t wanted_shares = std::min((threads + g.groups - 1) / g.groups, g.batch);
  const int64_t at_once = std::min(threads, g.groups * wanted_shares);
  const int64_t sums_bytes = g.groups * wanted_shares * inputs * inputs * element_bytes;
  const bool alone = at_once * sample_bytes <= patch_bytes / 2 && sums_bytes <= patch_bytes / 2;
  const int64_t shares = alone ? wanted_shares : 1;
  const int64_t budget = alone ? patch_bytes / 2 / at_once : patch_bytes;
  const int64_t wanted = channels <= kOwnChannels ? kOwnBlockBytes : kBlockBytes;
  const int64_t step = std::clamp<int64_t>(std::min(wanted, budget) / sample_bytes, 1, g.batch);
  const at::Tensor blocks = at::zeros({g.groups * shares, g.taps(), g.taps(), channels, channels}, gram.options());
  const at::Tensor samples =
      at::zeros({bias ? g.groups * shares : 0, channels, padded[0], padded[1], padded[2]}, gram.options());
  const auto run = [&](int64_t begin, int64_t end) {
    const PlainKernelGuard guard;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t share = task % shares;
      const int64_t first = share * g.batch / shares;
      const at::Tensor some = x.narrow(0, first, (share + 1) * g.batch / shares - first);
      const at::Tensor own = some.narrow(1, task / shares * channels, channels);
      add_group({blocks.select(0, task), bias ? samples.select(0, task) : at::Tensor()}, own, g, plan, step);
    }
  };
  if (alone && at_once > 1) {
    at::parallel_for(0, g.groups * shares, 1, run);
  } else {
    run(0, g.groups * shares);  // the threads share each block of samples
  }
  for (int64_t group = 0; group < g.groups; ++group) {
    const at::Tensor own = gram.select(0, group);
    const auto sum = [&](const at::Tensor& of) {
      const at::Tensor parts = of.narrow(0, group * shares, shares);
      return shares == 1 ? parts.select(0, 0) : parts.sum(0);
    };
    AT_DISPATCH_FLOATING_TYPES(
        gram.scalar_type(), "conv_gram", [&] { assemble<scalar_t>(own, sum(blocks), g, plan.displacements); });
    if (bias) sum_windows_(own.select(0, inputs).narrow(0, 0, inputs), sum(samples), g);
  }
}

}  // namespace consequentialism::cpu
