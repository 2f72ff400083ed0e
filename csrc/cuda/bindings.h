#pragma once

#include <cstdint>

namespace consequentialism::cuda {

// Factors that were retried with more damping on any device since the process began. Waits for the devices.
int64_t breakdowns();

}  // namespace consequentialism::cuda
