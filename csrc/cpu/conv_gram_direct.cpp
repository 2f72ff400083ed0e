#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "../guards.h"
#include "conv_gram.h"
#include "dot_products.h"
#include "input_gram.h"

namespace consequentialism::cpu {

namespace {

constexpr int64_t kSmall = 32;            // order up to which the own kernel is faster than BLAS
constexpr int64_t kBlockBytes = 1 << 20;  // of unfolded patches: what stays in a core's cache
constexpr int64_t kSmallBlockBytes = 1 << 15;

// Some lines of positions of some samples; x has these samples only.
struct Lines {
  int64_t begin, end;
};

// One input over the lines: x's plane of one channel, at one tap. Zero where the tap is in the padding.
template <typename scalar_t>
void unfold_input(
    scalar_t* out, const scalar_t* plane, int64_t sample_stride, const ConvGeometry& g, std::array<int64_t, 3> tap,
    Lines lines) {
  const auto [depth, height, width] = g.size;
  const int64_t columns = g.positions[2];
  const int64_t stride = g.stride[2];
  const int64_t shift = tap[2] * g.dilation[2] - g.padding[2];  // x's column of position 0
  const int64_t first = std::clamp<int64_t>(shift >= 0 ? 0 : (-shift + stride - 1) / stride, 0, columns);
  const int64_t last = std::clamp<int64_t>(width - shift <= 0 ? 0 : (width - shift - 1) / stride + 1, first, columns);
  for (int64_t line = lines.begin; line < lines.end; ++line, out += columns) {
    const int64_t h = line % g.positions[1] * g.stride[1] - g.padding[1] + tap[1] * g.dilation[1];
    const int64_t rest = line / g.positions[1];
    const int64_t d = rest % g.positions[0] * g.stride[0] - g.padding[0] + tap[0] * g.dilation[0];
    if (h < 0 || h >= height || d < 0 || d >= depth) {
      std::fill_n(out, columns, scalar_t(0));
      continue;
    }
    const scalar_t* row = plane + rest / g.positions[0] * sample_stride + (d * height + h) * width + shift;
    std::fill_n(out, first, scalar_t(0));
    if (stride == 1) {
      std::copy(row + first, row + last, out + first);
    } else {
      for (int64_t j = first; j < last; ++j) out[j] = row[j * stride];
    }
    std::fill_n(out + last, columns - last, scalar_t(0));
  }
}

std::array<int64_t, 3> tap_of(const ConvGeometry& g, int64_t k) {
  return {k / (g.kernel[1] * g.kernel[2]), k / g.kernel[2] % g.kernel[1], k % g.kernel[2]};
}

// x in a type, with planes of rows without gaps; copied only where type or layout ask for it.
at::Tensor with_planes(const at::Tensor& x, at::ScalarType dtype) {
  const bool planes = x.stride(4) == 1 && x.stride(3) == x.size(4) && x.stride(2) == x.size(3) * x.size(4);
  return planes && x.scalar_type() == dtype ? x : x.to(dtype).contiguous();
}

// gram <- gram + the lines' patches^T patches, of one group, x [b, group's C, D, H, W].
template <typename scalar_t>
void add_lines(
    const at::Tensor& gram, const at::Tensor& x, const ConvGeometry& g, Lines lines, bool bias,
    const at::Tensor& space) {
  const int64_t length = (lines.end - lines.begin) * g.positions[2];
  const int64_t inputs = g.inputs();
  const at::Tensor a = space.narrow(0, 0, (inputs + bias) * length).view({inputs + bias, length});
  scalar_t* rows = a.mutable_data_ptr<scalar_t>();
  const scalar_t* planes = x.const_data_ptr<scalar_t>();
  const int64_t sample_stride = x.stride(0);
  const int64_t plane_stride = x.stride(1);
  at::parallel_for(0, inputs, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const scalar_t* plane = planes + i / g.taps() * plane_stride;
      unfold_input(rows + i * length, plane, sample_stride, g, tap_of(g, i % g.taps()), lines);
    }
  });
  if (inputs + bias > kSmall) {
    if (bias) std::fill_n(rows + inputs * length, length, scalar_t(1));
    lower_gram_(gram, a, 1, 1);
    return;
  }
  const scalar_t* starts[kSmall];
  for (int64_t i = 0; i < inputs; ++i) starts[i] = rows + i * length;
  add_small_gram(gram.mutable_data_ptr<scalar_t>(), starts, inputs, {1, 0, 0, length}, bias);
}

// By blocks of whole samples, or lines of one sample, that are unfolded.
template <typename scalar_t>
void add_unfolded(
    const at::Tensor& gram, const at::Tensor& x, const ConvGeometry& g, Lines range, bool bias, int64_t block_bytes) {
  const int64_t sample_lines = g.positions[0] * g.positions[1];
  const int64_t line_size = (g.inputs() + bias) * g.positions[2];
  const int64_t read = g.group_channels() * g.size[0] * g.size[1] * g.size[2] / sample_lines;  // of x, may be copied
  const int64_t line_bytes = std::max(line_size, read) * static_cast<int64_t>(sizeof(scalar_t));
  const int64_t step = std::clamp<int64_t>(block_bytes / line_bytes, 1, range.end - range.begin);
  const at::Tensor space = at::zeros({step * line_size + kDotColumns}, gram.options());
  for (int64_t begin = range.begin; begin < range.end; begin += step) {
    const int64_t end = std::min(range.end, begin + step);
    const int64_t sample = begin / sample_lines;
    const at::Tensor some = x.narrow(0, sample, (end - 1) / sample_lines + 1 - sample);
    const Lines lines = {begin - sample * sample_lines, end - sample * sample_lines};
    add_lines<scalar_t>(gram, with_planes(some, gram.scalar_type()), g, lines, bias, space);
  }
}

// By samples that are padded, not unfolded: with columns a stride of 1 apart, an input's rows are x's own, displaced.
template <typename scalar_t>
void add_padded(
    const at::Tensor& gram, const at::Tensor& x, const ConvGeometry& g, Lines range, bool bias, int64_t block_bytes) {
  const int64_t sample_lines = g.positions[0] * g.positions[1];
  const auto [depth, height, width] = g.size;
  const int64_t row = width + 2 * g.padding[2];
  const int64_t plane = (height + 2 * g.padding[1]) * row;
  const int64_t channel = (depth + 2 * g.padding[0]) * plane;
  const at::Tensor space = at::zeros({g.group_channels() * channel + kDotColumns}, gram.options());
  scalar_t* padded = space.mutable_data_ptr<scalar_t>();
  const int64_t sample_bytes = g.group_channels() * depth * height * width * static_cast<int64_t>(sizeof(scalar_t));
  const int64_t step = std::max<int64_t>(1, block_bytes / sample_bytes);  // samples copied at once, where they must be
  const int64_t last_sample = (range.end - 1) / sample_lines + 1;
  const scalar_t* starts[kSmall];
  for (int64_t first = range.begin / sample_lines; first < last_sample; first += step) {
    const at::Tensor some = with_planes(x.narrow(0, first, std::min(step, last_sample - first)), gram.scalar_type());
    for (int64_t b = 0; b < some.size(0); ++b) {
      for (int64_t c = 0; c < g.group_channels(); ++c) {
        const scalar_t* from = some.const_data_ptr<scalar_t>() + b * some.stride(0) + c * some.stride(1);
        for (int64_t d = 0; d < depth; ++d) {
          scalar_t* to = padded + c * channel + (d + g.padding[0]) * plane + g.padding[1] * row + g.padding[2];
          for (int64_t h = 0; h < height; ++h, from += width) std::copy(from, from + width, to + h * row);
        }
      }
      for (int64_t d = 0; d < g.positions[0]; ++d) {
        const int64_t line = (first + b) * sample_lines + d * g.positions[1];
        const int64_t begin = std::clamp<int64_t>(range.begin - line, 0, g.positions[1]);
        const int64_t end = std::clamp<int64_t>(range.end - line, begin, g.positions[1]);
        for (int64_t i = 0; i < g.inputs(); ++i) {
          const auto [kd, kh, kw] = tap_of(g, i % g.taps());
          starts[i] = padded + i / g.taps() * channel + (d * g.stride[0] + kd * g.dilation[0]) * plane +
                      (begin * g.stride[1] + kh * g.dilation[1]) * row + kw * g.dilation[2];
        }
        const int64_t stride = g.stride[1] * row;
        add_small_gram(
            gram.mutable_data_ptr<scalar_t>(), starts, g.inputs(), {end - begin, stride, stride, g.positions[2]}, bias);
      }
    }
  }
}

// Whether a sample can be padded within the budget, and its inputs be read without unfolding them.
bool reads_padded(const ConvGeometry& g, bool bias, int64_t element_bytes, int64_t budget) {
  int64_t numbers = g.group_channels();
  for (int i = 0; i < 3; ++i) numbers *= g.size[i] + 2 * g.padding[i];
  return g.inputs() + bias <= kSmall && g.stride[2] == 1 && numbers * element_bytes <= budget;
}

}  // namespace

void conv_gram_direct_(
    const at::Tensor& gram, const at::Tensor& x, const ConvGeometry& g, bool bias, int64_t patch_bytes) {
  const int64_t n = g.inputs() + bias;
  const int64_t threads = at::get_num_threads();
  // Every thread sums up whole groups, or a share of the lines, on its own, unless that takes too many Grams.
  const int64_t wanted_shares = std::min((threads + g.groups - 1) / g.groups, g.lines());
  const int64_t partial_bytes = g.groups * wanted_shares * n * n * static_cast<int64_t>(gram.element_size());
  const int64_t shares = partial_bytes <= patch_bytes / 2 ? wanted_shares : 1;
  const int64_t tasks = g.groups * shares;
  const int64_t budget = std::max<int64_t>(1, patch_bytes / 2 / std::min(tasks, threads));
  const int64_t wanted = n <= kSmall ? kSmallBlockBytes : kBlockBytes * (tasks == 1 ? threads : 1);
  const bool padded = reads_padded(g, bias, static_cast<int64_t>(gram.element_size()), budget);
  const at::Tensor partial = shares == 1 ? gram : at::zeros({tasks, n, n}, gram.options());
  AT_DISPATCH_FLOATING_TYPES(gram.scalar_type(), "conv_gram", [&] {
    auto run = [&](int64_t first, int64_t last) {
      const PlainKernelGuard guard;
      for (int64_t task = first; task < last; ++task) {
        const int64_t share = task % shares;
        const Lines range = {share * g.lines() / shares, (share + 1) * g.lines() / shares};
        const at::Tensor own = x.narrow(1, task / shares * g.group_channels(), g.group_channels());
        const auto add = padded ? add_padded<scalar_t> : add_unfolded<scalar_t>;
        add(partial.select(0, task), own, g, range, bias, std::min(budget, wanted));
      }
    };
    if (tasks == 1) {
      run(0, 1);  // the threads share its blocks
    } else {
      at::parallel_for(0, tasks, 1, run);
    }
  });
  if (shares == 1) return;
  for (int64_t group = 0; group < g.groups; ++group) {
    const at::Tensor own = partial.narrow(0, group * shares, shares);
    gram.select(0, group).copy_(own.sum(0));
  }
}

}  // namespace consequentialism::cpu
