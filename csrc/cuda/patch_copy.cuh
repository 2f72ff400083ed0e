// The padded copy of an image that patches are read from.
#pragma once

#include "platform.cuh"

namespace consequentialism::cuda {

// x [B, C, D, H, W], from the first sample of a piece on.
template <class S>
struct ImageView {
  const S* data;
  int64_t strides[5];
  int64_t size[3];
  int64_t begin[3];  // where the piece begins; below zero it is padding
};

constexpr int kCopyTile = 32;  // of channels and of columns
constexpr int kCopyThreads = 256;

// padded [groups, samples, D, H, W, C] <- the image, zero around it and in channels that it has not. A block copies a
// tile of a line, which it turns in shared memory: the image's columns are neighbours, or its channels.
template <class From, class T>
__global__ void __launch_bounds__(kCopyThreads) copy_patches_kernel(
    const ImageView<From> image, int64_t samples, int depth, int height, int width, int channels, int used_channels,
    T* __restrict__ padded) {
  constexpr int kStride = kCopyTile + 1;
  T* tile = dynamic_shared<T>();  // [channels][columns]
  const unsigned across = static_cast<unsigned>((channels + kCopyTile - 1) / kCopyTile);
  const unsigned along = static_cast<unsigned>((width + kCopyTile - 1) / kCopyTile);
  unsigned rest = blockIdx.x;
  const int first_channel = static_cast<int>(rest % across) * kCopyTile;
  rest /= across;
  const int first_column = static_cast<int>(rest % along) * kCopyTile;
  const int64_t line = rest / along;  // of all groups, samples, depths and rows
  const int64_t h = line % height + image.begin[1], d = line / height % depth + image.begin[0];
  const int64_t sample = line / height / depth % samples, group = line / height / depth / samples;
  const int columns = min(kCopyTile, width - first_column), some = min(kCopyTile, channels - first_channel);
  const bool inside = 0 <= d && d < image.size[0] && 0 <= h && h < image.size[1];
  const From* row = image.data + sample * image.strides[0] + group * used_channels * image.strides[1] +
                    d * image.strides[2] + h * image.strides[3];
  const bool channels_last = image.strides[1] < image.strides[4];
  for (int i = static_cast<int>(threadIdx.x); i < columns * some; i += kCopyThreads) {
    const int c = channels_last ? i % some : i / columns, column = channels_last ? i / some : i % columns;
    const int64_t channel = first_channel + c, w = first_column + column + image.begin[2];
    T value{};
    if (inside && channel < used_channels && 0 <= w && w < image.size[2]) {
      const From from = row[channel * image.strides[1] + w * image.strides[4]];
      if constexpr (std::is_same_v<From, T>) {
        value = from;
      } else {
        value = static_cast<T>(to_accumulator(from));
      }
    }
    tile[c * kStride + column] = value;
  }
  __syncthreads();
  T* out = padded + (line * width + first_column) * channels + first_channel;
  for (int i = static_cast<int>(threadIdx.x); i < columns * some; i += kCopyThreads) {
    out[i / some * channels + i % some] = tile[i % some * kStride + i / some];
  }
}

}  // namespace consequentialism::cuda
