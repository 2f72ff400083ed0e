#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "../conv_geometry.h"

namespace consequentialism::cpu {

// gram [groups, n, n] <- patches^T patches, lower triangles, from patches that are unfolded block by block.
void conv_gram_direct_(
    const at::Tensor& gram, const at::Tensor& x, const ConvGeometry& geometry, bool bias, int64_t patch_bytes);

// The same from products of x with itself, displaced, for a stride of 1: taps with the same displacement share one
// product, but for strips at the border.
void conv_gram_displaced_(
    const at::Tensor& gram, const at::Tensor& x, const ConvGeometry& geometry, bool bias, int64_t patch_bytes);

}  // namespace consequentialism::cpu
