// What was built, for `consequentialism info`. setup.py defines the macros.
#pragma once

#ifndef CONSEQUENTIALISM_VERSION
#define CONSEQUENTIALISM_VERSION "unknown"
#endif
#ifndef CONSEQUENTIALISM_TORCH_VERSION
#define CONSEQUENTIALISM_TORCH_VERSION "unknown"
#endif
#ifndef CONSEQUENTIALISM_CUDA_ARCHITECTURES
#define CONSEQUENTIALISM_CUDA_ARCHITECTURES ""
#endif
