// Memory between pages that fault.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

namespace consequentialism::cuda::shim {

constexpr size_t kGuardBytes = 256 << 10;  // before and after each buffer, so that a whole stray row faults
constexpr int kFreshByte = 0xFF;

inline size_t page_bytes() {
  static const size_t bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

inline size_t round_up(size_t value, size_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

struct Region {
  std::string name;
  unsigned char *map = nullptr, *open = nullptr, *base = nullptr;  // reserved, accessible, and what was asked for
  size_t map_bytes = 0, open_bytes = 0, bytes = 0;

  void reserve(size_t largest) {
    map_bytes = round_up(largest, page_bytes()) + 2 * kGuardBytes;
    void* address = mmap(nullptr, map_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (address == MAP_FAILED) {
      perror("cuda shim: mmap");
      abort();
    }
    map = open = static_cast<unsigned char*>(address);
  }

  void place(size_t size, size_t alignment, bool at_start) {
    const size_t wanted = round_up(round_up(size, alignment), page_bytes());
    unsigned char* const first = at_start ? map + kGuardBytes : map + map_bytes - kGuardBytes - wanted;
    if (first != open || wanted != open_bytes) {
      protect(PROT_NONE);
      open = first;
      open_bytes = wanted;
      protect(PROT_READ | PROT_WRITE);
    }
    bytes = size;
    base = at_start ? open : open + (wanted - size) / alignment * alignment;
    memset(open, kFreshByte, open_bytes);
  }

  void protect(int access) const {
    if (open_bytes != 0) mprotect(open, open_bytes, access);
  }

  // The offset from base of a byte around it that was written to, or 0: never at `base` unless nothing was asked for.
  bool spoilt(ptrdiff_t* offset) const {
    const auto spoilt = [](const unsigned char* begin, const unsigned char* end) {
      return std::find_if(begin, end, [](unsigned char byte) { return byte != kFreshByte; });
    };
    const unsigned char* found = spoilt(open, base);
    if (found == base) found = spoilt(base + bytes, open + open_bytes);
    *offset = found - base;
    return found != open + open_bytes;
  }
};

}  // namespace consequentialism::cuda::shim
