#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstring>

#include "../guards.h"
#include "conv_gram.h"
#include "input_gram.h"

namespace consequentialism::cpu {

namespace {

constexpr int64_t kSmall = 32;             // order up to which the own kernel is faster than BLAS
constexpr int64_t kBlockBytes = 1 << 20;   // of unfolded patches: what stays in a core's cache
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

// gram <- gram + the lines' patches^T patches, of one group.
template <typename scalar_t>
void add_lines(
    const at::Tensor& gram, const at::Tensor& x, const ConvGeometry& g, int64_t group, Lines lines, bool bias,
    const at::Tensor& space) {
  const int64_t length = (lines.end - lines.begin) * g.positions[2];
  const int64_t inputs = g.inputs();
  const at::Tensor a = space.narrow(0, 0, (inputs + bias) * length).view({inputs + bias, length});
  scalar_t* rows = a.mutable_data_ptr<scalar_t>();
  const int64_t plane = x.stride(1);
  const scalar_t* first_plane = x.const_data_ptr<scalar_t>() + group * g.group_channels() * plane;
  at::parallel_for(0, inputs, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k = i % g.taps();
      const std::array<int64_t, 3> tap = {
          k / (g.kernel[1] * g.kernel[2]), k / g.kernel[2] % g.kernel[1], k % g.kernel[2]};
      unfold_input(rows + i * length, first_plane + i / g.taps() * plane, x.stride(0), g, tap, lines);
    }
  });
  if (bias) std::fill_n(rows + inputs * length, length, scalar_t(1));
  if (inputs + bias <= kSmall) {
    add_small_gram(gram.mutable_data_ptr<scalar_t>(), rows, inputs + bias, length);
  } else {
    lower_gram_(gram, a, 1, 1);
  }
}

// Whole samples, or lines of one sample, whose patches fill a block.
template <typename scalar_t>
void add_range(
    const at::Tensor& gram, const at::Tensor& x, const ConvGeometry& g, int64_t group, Lines range, bool bias,
    int64_t block_bytes) {
  const int64_t sample_lines = g.positions[0] * g.positions[1];
  const int64_t line_bytes = (g.inputs() + bias) * g.positions[2] * static_cast<int64_t>(sizeof(scalar_t));
  const int64_t step = std::clamp<int64_t>(block_bytes / line_bytes, 1, range.end - range.begin);
  const at::Tensor space = at::empty({step * line_bytes / static_cast<int64_t>(sizeof(scalar_t))}, gram.options());
  for (int64_t begin = range.begin; begin < range.end; begin += step) {
    const int64_t end = std::min(range.end, begin + step);
    const int64_t sample = begin / sample_lines;
    const at::Tensor some = x.narrow(0, sample, (end - 1) / sample_lines + 1 - sample);
    const at::Tensor own = some.to(gram.scalar_type()).contiguous();  // copied only where type or layout ask for it
    add_lines<scalar_t>(gram, own, g, group, {begin - sample * sample_lines, end - sample * sample_lines}, bias, space);
  }
}

}  // namespace

void conv_gram_direct_(
    const at::Tensor& gram, const at::Tensor& x, const ConvGeometry& g, bool bias, int64_t patch_bytes) {
  const int64_t n = g.inputs() + bias;
  const int64_t threads = at::get_num_threads();
  // Every thread sums up a share of the lines, or whole groups, on its own, unless that takes too many Grams.
  const int64_t partial_bytes = threads * n * n * static_cast<int64_t>(gram.element_size());
  const bool alone = g.groups < threads && partial_bytes <= patch_bytes / 2;
  const int64_t shares = g.groups >= threads ? 1 : alone ? std::min(threads, g.lines()) : 1;
  const int64_t tasks = g.groups * shares;
  const int64_t budget = std::max<int64_t>(1, patch_bytes / 2 / (tasks == 1 ? 1 : threads));
  const int64_t wanted = n <= kSmall ? kSmallBlockBytes : kBlockBytes * (tasks == 1 ? threads : 1);
  const at::Tensor partial = shares == 1 ? gram : at::zeros({tasks, n, n}, gram.options());
  AT_DISPATCH_FLOATING_TYPES(gram.scalar_type(), "conv_gram", [&] {
    at::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
      const PlainKernelGuard guard;
      for (int64_t task = first; task < last; ++task) {
        const int64_t share = task % shares;
        const Lines range = {share * g.lines() / shares, (share + 1) * g.lines() / shares};
        add_range<scalar_t>(partial.select(0, task), x, g, task / shares, range, bias, std::min(budget, wanted));
      }
    });
  });
  if (shares == 1) return;
  for (int64_t group = 0; group < g.groups; ++group) {
    const at::Tensor own = partial.narrow(0, group * shares, shares);
    gram.select(0, group).copy_(own.sum(0));
  }
}

}  // namespace consequentialism::cpu
