// What a thread can do by itself or with its warp: shuffles and votes, asynchronous copies, conversions.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>

#include "state.h"

namespace consequentialism::cuda::shim {

unsigned char* shared_memory() {
  return state.current->block->shared->base;
}

unsigned lane() {
  return state.current->lane;
}

void warp_collective(
    const char* name, uint32_t mask, bool aligned, void* payload, Combine combine, const Where& where) {
  Fiber& self = *state.current;
  Warp& warp = *self.warp;
  const uint32_t bit = 1u << self.lane;
  if ((mask & bit) == 0 || (mask & ~warp.live) != 0) {
    fail(
        cudaErrorLaunchFailure, "%s at %s: the mask 0x%08x %s", name, describe(where).c_str(), mask,
        (mask & bit) == 0 ? "lacks the caller" : "names threads that have exited or never were");
  }
  uint32_t arrived = bit;
  for (uint32_t others = warp.waiting & mask; others != 0; others &= others - 1) {
    const int lane = __builtin_ctz(others);
    const Fiber& other = warp.first[lane];
    if ((other.mask & bit) == 0) continue;  // it is busy with others
    const bool same = other.mask == mask && (other.waits_in == name || strcmp(other.waits_in, name) == 0) &&
                      (!aligned || other.where.line() == where.line());
    if (!same) {
      fail(
          cudaErrorLaunchFailure, "%s(0x%08x) at %s meets %s(0x%08x) at %s of %s", name, mask, describe(where).c_str(),
          other.waits_in, other.mask, describe(other.where).c_str(), describe(other).c_str());
    }
    arrived |= 1u << lane;
  }
  self.waits_in = name;
  self.where = where;
  self.mask = mask;
  self.payload = payload;
  warp.waiting |= bit;
  if (arrived == mask) {
    void* payloads[32] = {};
    for (uint32_t lanes = mask; lanes != 0; lanes &= lanes - 1) {
      const int lane = __builtin_ctz(lanes);
      payloads[lane] = warp.first[lane].payload;
      make_ready(warp.first[lane]);
    }
    combine(payloads);
    warp.waiting &= ~mask;
  }
  suspend();
}

void shuffle(const char* name, uint32_t mask, ShuffleCall* call, const Where& where) {
  const auto combine = [](void* const* payloads) {
    for (int lane = 0; lane < 32; ++lane) {
      if (payloads[lane] == nullptr) continue;
      ShuffleCall& call = *static_cast<ShuffleCall*>(payloads[lane]);
      // The value of a lane that takes no part is undefined.
      const auto* source = static_cast<const ShuffleCall*>(payloads[call.source]);
      call.result = source == nullptr ? ~uint64_t{0} : source->value;
    }
  };
  warp_collective(name, mask, false, call, combine, where);
}

uint32_t ballot(const char* name, uint32_t mask, bool predicate, const Where& where) {
  uint64_t payload = predicate;
  const auto combine = [](void* const* payloads) {
    uint64_t votes = 0;
    for (int lane = 0; lane < 32; ++lane) {
      if (payloads[lane] != nullptr) votes |= *static_cast<const uint64_t*>(payloads[lane]) << lane;
    }
    for (int lane = 0; lane < 32; ++lane) {
      if (payloads[lane] != nullptr) *static_cast<uint64_t*>(payloads[lane]) = votes;
    }
  };
  warp_collective(name, mask, false, &payload, combine, where);
  return static_cast<uint32_t>(payload);
}

void check_shared(const char* name, const void* address, size_t bytes, size_t alignment) {
  const Region& shared = *state.current->block->shared;
  const ptrdiff_t offset = static_cast<const unsigned char*>(address) - shared.base;
  if (reinterpret_cast<uintptr_t>(address) % alignment != 0) {
    fail(cudaErrorMisalignedAddress, "%s: byte %td of shared memory is misaligned", name, offset);
  }
  if (offset < 0 || static_cast<size_t>(offset) + bytes > shared.bytes) {
    fail(
        cudaErrorIllegalAddress, "%s: %zu bytes at byte %td of the %zu of shared memory", name, bytes, offset,
        shared.bytes);
  }
}

void copy_async(void* shared, const void* global, int valid_bytes) {
  check_shared("copy_async_16", shared, 16, 16);
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    fail(
        cudaErrorMisalignedAddress, "copy_async_16: %s is misaligned",
        describe_address(static_cast<const unsigned char*>(global)).c_str());
  }
  if (valid_bytes < 0 || valid_bytes > 16) fail(cudaErrorInvalidValue, "copy_async_16 of %d bytes", valid_bytes);
  memset(shared, kFreshByte, 16);  // the chip may write from now on: a reader that is not done yet shows
  Fiber& self = *state.current;
  self.copies.push_back({shared, global, valid_bytes});
  const auto place = static_cast<size_t>(static_cast<unsigned char*>(shared) - self.block->shared->base);
  self.block->marks[place / kMarkBytes] = {&self, ++self.copies_issued};
}

void copy_async_commit() {
  state.current->copies_groups.push_back(state.current->copies.size());
}

void copy_async_wait(unsigned pending) {
  Fiber& self = *state.current;
  if (self.copies_groups.size() <= pending) return;
  const size_t groups = self.copies_groups.size() - pending, copies = self.copies_groups[groups - 1];
  for (size_t i = 0; i < copies; ++i) {
    const Copy& copy = self.copies[i];
    memset(copy.shared, 0, 16);
    memcpy(copy.shared, copy.global, static_cast<size_t>(copy.valid_bytes));
  }
  self.copies_landed += copies;
  self.copies.erase(self.copies.begin(), self.copies.begin() + static_cast<ptrdiff_t>(copies));
  self.copies_groups.erase(self.copies_groups.begin(), self.copies_groups.begin() + static_cast<ptrdiff_t>(groups));
  for (size_t& end : self.copies_groups) end -= copies;
}

void* cluster_map(void* own_shared, unsigned rank) {
  const Block& own = *state.current->block;
  if (rank >= own.cluster->size) fail(cudaErrorLaunchFailure, "cluster_map to %u of %u", rank, own.cluster->size);
  const ptrdiff_t offset = static_cast<unsigned char*>(own_shared) - own.shared->base;
  if (offset < 0 || static_cast<size_t>(offset) > own.shared->bytes) {
    fail(cudaErrorIllegalAddress, "cluster_map of what is not in shared memory");
  }
  return own.cluster->blocks[rank].shared->base + offset;
}

}  // namespace consequentialism::cuda::shim

namespace consequentialism::cuda {

unsigned cluster_block_rank() {
  return shim::state.current->block->rank;
}

unsigned cluster_size() {
  return shim::state.current->block->cluster->size;
}

float to_float(bfloat16 value) {
  return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
}

bfloat16 to_bfloat16(float value) {
  const uint32_t bits = __float_as_uint(value);
  if (isnan(value)) return {0x7FFF};
  return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}

float to_float(float16 value) {
  const int exponent = value.bits >> 10 & 31, mantissa = value.bits & 1023;
  float magnitude = exponent == 0 ? ldexpf(static_cast<float>(mantissa), -24)
                                  : ldexpf(static_cast<float>(1024 + mantissa), exponent - 25);
  if (exponent == 31) magnitude = mantissa == 0 ? INFINITY : NAN;
  return (value.bits >> 15) != 0 ? -magnitude : magnitude;
}

float16 to_float16(float value) {
  const auto sign = static_cast<uint16_t>(signbit(value) ? 0x8000 : 0);
  const float magnitude = fabsf(value);
  if (isnan(value)) return {0x7FFF};
  if (magnitude >= 65520) return {static_cast<uint16_t>(sign | 0x7C00)};
  // In units of the last place, rounded to nearest even by the default mode; a carry moves on into the exponent.
  const int exponent = std::max(magnitude == 0 ? -14 : ilogbf(magnitude), -14);
  const auto units = static_cast<int>(nearbyintf(ldexpf(magnitude, 10 - exponent)));
  return {static_cast<uint16_t>(sign | (units + ((exponent + 14) << 10)))};
}

uint32_t float_to_tf32(float value) {
  const uint32_t bits = __float_as_uint(value);
  return isfinite(value) ? (bits + 0x1000u) & 0xFFFFE000u : bits;
}

namespace {

// As far off as the chip may be, by `error` of the exact value, up or down as the digits of the input come.
float approximate(double exact, double error, float input) {
  const bool up = __builtin_popcount(__float_as_uint(input) & 0x7FFFFFu) % 2 == 0;
  const auto result = static_cast<float>(exact * (up ? 1 + error : 1 - error));
  return isnormal(result) ? result : std::copysign(0.0F, result);
}

double upper_half(double value) {
  return __longlong_as_double(__double_as_longlong(value) & ~0xFFFFFFFFLL);
}

}  // namespace

float approximate_reciprocal(float value) {
  if (isnan(value)) return value;
  if (fabsf(value) < FLT_MIN) return std::copysign(INFINITY, value);
  return approximate(1 / static_cast<double>(value), 0x1p-23, value);
}

double approximate_reciprocal(double value) {
  if (isnan(value)) return value;
  if (fabs(value) < DBL_MIN) return std::copysign(static_cast<double>(INFINITY), value);
  const double result = upper_half(1 / upper_half(value));
  return isnormal(result) ? result : std::copysign(0.0, result);
}

float approximate_reciprocal_root(float value) {
  if (isnan(value) || value <= -FLT_MIN) return NAN;
  if (fabsf(value) < FLT_MIN) return std::copysign(INFINITY, value);
  return approximate(1 / std::sqrt(static_cast<double>(value)), 0x1.1p-23, value);
}

}  // namespace consequentialism::cuda
