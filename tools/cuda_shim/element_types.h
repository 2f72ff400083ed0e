// Types of elements by the numbers that the tests give: 0 float64, 1 float32, 2 bfloat16, 3 float16.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../../csrc/cuda/types.h"

namespace consequentialism::cuda::shim {

inline size_t bytes_of(int64_t type) {
  constexpr size_t kBytes[] = {8, 4, 2, 2};
  return kBytes[type];
}

// Of the sums; wide: in float64 whatever the type.
inline size_t sum_bytes_of(int64_t type, bool wide = false) {
  return wide || type == 0 ? 8 : 4;
}

// call(T{}) for the type T.
template <class Call>
int with_type(int64_t type, const Call& call) {
  switch (type) {
    case 0:
      return call(double{});
    case 1:
      return call(float{});
    case 2:
      return call(bfloat16{});
    default:
      return call(float16{});
  }
}

}  // namespace consequentialism::cuda::shim
