#include <algorithm>

#include "matrix_tiles.h"
#include "patch_copy.cuh"
#include "patch_copy_launcher.h"

namespace consequentialism::cuda {

template <class From, class T>
cudaError_t launch_patch_copy(
    const From* x, const std::array<int64_t, 5>& strides, const std::array<int64_t, 3>& size,
    const std::array<int64_t, 3>& begin, const PatchShape& shape, T* padded, cudaStream_t stream) {
  ImageView<From> image{};
  image.data = x;
  std::copy_n(strides.begin(), 5, image.strides);
  std::copy_n(size.begin(), 3, image.size);
  std::copy_n(begin.begin(), 3, image.begin);
  const int64_t lines = shape.groups * shape.samples * shape.size[0] * shape.size[1];
  const int64_t blocks = lines * ceil_div(shape.size[2], kCopyTile) * ceil_div(shape.channels, kCopyTile);
  if (blocks > kMaxGrid) return cudaErrorInvalidValue;
  LaunchShape launch_shape{};
  launch_shape.grid = dim3(static_cast<unsigned>(blocks));
  launch_shape.block = dim3(kCopyThreads);
  launch_shape.shared_bytes = kCopyTile * (kCopyTile + 1) * sizeof(T);
  launch_shape.stream = stream;
  return launch(
      copy_patches_kernel<From, T>, launch_shape, image, shape.samples, static_cast<int>(shape.size[0]),
      static_cast<int>(shape.size[1]), static_cast<int>(shape.size[2]), static_cast<int>(shape.channels),
      static_cast<int>(shape.used_channels), padded);
}

#define CONSEQUENTIALISM_INSTANTIATE(From, T)                                                                   \
  template cudaError_t launch_patch_copy<From, T>(                                                              \
      const From*, const std::array<int64_t, 5>&, const std::array<int64_t, 3>&, const std::array<int64_t, 3>&, \
      const PatchShape&, T*, cudaStream_t);
CONSEQUENTIALISM_FOR_ELEMENTS_AND_WIDE(CONSEQUENTIALISM_INSTANTIATE)
#undef CONSEQUENTIALISM_INSTANTIATE

}  // namespace consequentialism::cuda
