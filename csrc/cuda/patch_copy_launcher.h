// Launcher of the padded copy of an image. Pointers are to device memory of the stream's device; nothing waits for the
// device.
#pragma once

#include "conv_gram.h"
#include "types.h"

namespace consequentialism::cuda {

// padded [groups, samples, D, H, W, C] <- a box of x [B, C, D, H, W], of any strides and the size [D, H, W], from its
// sample 0 and the position `begin` on: zero outside of x, and in channels that it has not. The box is the shape's.
template <class From, class T>
cudaError_t launch_patch_copy(
    const From* x, const std::array<int64_t, 5>& strides, const std::array<int64_t, 3>& size,
    const std::array<int64_t, 3>& begin, const PatchShape& shape, T* padded, cudaStream_t stream);

}  // namespace consequentialism::cuda
