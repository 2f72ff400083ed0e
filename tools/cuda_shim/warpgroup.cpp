// Asynchronous products of warpgroups. Each warp has its own 16 rows of them and meets no other warp in one: what holds
// the warps of a block together are barriers alone. A warp's products are computed, in their order, when it waits for
// them: an operand that was overwritten before shows. When one is issued its operands must be there and fenced, and
// until it is waited for its sums hold NaN, and must still do so then. The four warps of a warpgroup must have issued
// the same products in the end.
#include <algorithm>
#include <array>
#include <cstring>

#include "matrix_tiles.h"
#include "state.h"
#include "wgmma.cuh"

namespace consequentialism::cuda::shim {

namespace {

constexpr int kRows = 16, kColumns = 256, kInner = kWarpgroupInner;  // of a warp's share
constexpr int kSums = kWarpgroupSums;
constexpr int kChunk = 8;                    // elements of 16 bytes
constexpr uint32_t kInFlight = 0xFFFFFFFFu;  // the bits of sums: NaN

struct ProductCall {
  float* sums;
  Product product;
};

// What a descriptor says, of bits 0-13, 16-29, 32-45, 49-51 and 62-63.
struct Operand {
  uint32_t address, panel, lines;
  bool outer_major;

  Operand(uint64_t descriptor, bool outer) : outer_major(outer) {
    const auto decode = [&](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3FFFu) << 4; };
    address = decode(0);
    panel = decode(16);
    lines = decode(32);
    const auto swizzle = static_cast<unsigned>(descriptor >> 62), base = static_cast<unsigned>(descriptor >> 49 & 7u);
    if (swizzle != 1 || base != 0) {
      fail(cudaErrorInvalidValue, "a product's descriptor with swizzle %u and base offset %u", swizzle, base);
    }
    constexpr uint64_t kUsed = 0x3FFFu | uint64_t{0x3FFFu} << 16 | uint64_t{0x3FFFu} << 32 | uint64_t{3} << 62;
    if ((descriptor & ~kUsed) != 0) fail(cudaErrorInvalidValue, "a product's descriptor with reserved bits");
  }

  // Bytes of shared memory's window before the swizzle, which flips bits 4-6 by bits 7-9 of the address itself.
  uint32_t place(int outer, int inner) const {
    const auto o = static_cast<uint32_t>(outer), i = static_cast<uint32_t>(inner);
    const uint32_t at = outer_major ? address + o / 64 * panel + o % 64 * 2 + i / 8 * lines + i % 8 * 128
                                    : address + o / 8 * lines + o % 8 * 128 + i * 2;
    return at ^ (at >> 3 & 0x70u);
  }
};

uint32_t window_of_shared() {
  return static_cast<uint32_t>(kSharedAlignment * (1 + state.seed % 7));  // as little aligned as it may be
}

const unsigned char* at_window(uint32_t address) {
  const Region& shared = *state.current->block->shared;
  const auto offset = static_cast<ptrdiff_t>(address) - static_cast<ptrdiff_t>(window_of_shared());
  check_shared("a product's operand", shared.base + offset, 2 * kChunk, 2 * kChunk);
  return shared.base + offset;
}

// Elements [count, 16] of an operand from `first` on, as they are now.
template <int kCount>
void read(const Product& product, uint64_t descriptor, int first, float (&values)[kCount][kInner]) {
  const Operand operand(descriptor, product.outer_major);
  const int outer_step = product.outer_major ? kChunk : 1, inner_step = product.outer_major ? 1 : kChunk;
  for (int outer = 0; outer < kCount; outer += outer_step) {
    for (int inner = 0; inner < kInner; inner += inner_step) {
      uint16_t bits[kChunk];
      memcpy(bits, at_window(operand.place(first + outer, inner)), sizeof bits);
      for (int i = 0; i < kChunk; ++i) {
        values[outer + (product.outer_major ? i : 0)][inner + (product.outer_major ? 0 : i)] = product.value(bits[i]);
      }
    }
  }
}

// Every chunk of an operand must have been copied, waited for and fenced by its writer.
void check_operand(const Product& product, uint64_t descriptor, int first, int count) {
  const Operand operand(descriptor, product.outer_major);
  const Block& block = *state.current->block;
  const int outer_step = product.outer_major ? kChunk : 1, inner_step = product.outer_major ? 1 : kChunk;
  for (int outer = first; outer < first + count; outer += outer_step) {
    for (int inner = 0; inner < kInner; inner += inner_step) {
      const ptrdiff_t offset = at_window(operand.place(outer, inner)) - block.shared->base;
      const CopyMark& mark = block.marks[static_cast<size_t>(offset) / kMarkBytes];
      if (mark.fiber != nullptr && mark.copy > mark.fiber->copies_fenced) {
        fail(
            cudaErrorLaunchFailure, "a product reads byte %td of shared memory, whose copy by thread %u is not %s",
            offset, mark.fiber->thread.x, mark.copy > mark.fiber->copies_landed ? "waited for" : "fenced");
      }
    }
  }
}

int warp_of_group() {
  const unsigned warps = (blockDim.x * blockDim.y * blockDim.z) / 32;
  if (warps % 4 != 0) fail(cudaErrorLaunchFailure, "a product in a block of %u warps", warps);
  return static_cast<int>(state.current->warp->index % 4);
}

void check_in_flight(const PendingSums& pending) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < kSums; ++i) {
      uint32_t bits;
      memcpy(&bits, pending.sums[lane] + i, sizeof bits);
      if (bits != kInFlight) fail(cudaErrorLaunchFailure, "sum %d of lane %d was touched while in flight", i, lane);
    }
  }
}

PendingSums* find_pending(Warp& warp, const float* sums) {
  const auto found = std::find_if(
      warp.pending.begin(), warp.pending.end(), [&](const PendingSums& one) { return one.sums[0] == sums; });
  return found == warp.pending.end() ? nullptr : &*found;
}

void issue(void* const* payloads) {
  Warp& warp = *state.current->warp;
  const auto call = [&](int lane) -> const ProductCall& { return *static_cast<const ProductCall*>(payloads[lane]); };
  const Product& product = call(0).product;
  for (int lane = 1; lane < 32; ++lane) {
    if (call(lane).product.a != product.a || call(lane).product.b != product.b) {
      fail(cudaErrorLaunchFailure, "a product's descriptors differ between lanes 0 and %d", lane);
    }
  }
  check_operand(product, product.a, kRows * warp_of_group(), kRows);
  check_operand(product, product.b, 0, kColumns);
  PendingSums* pending = find_pending(warp, call(0).sums);
  if (pending == nullptr) {
    if (!warp.fenced) fail(cudaErrorLaunchFailure, "a product without warpgroup_fence before");
    pending = &warp.pending.emplace_back();
    pending->values.resize(32 * kSums);
    for (int lane = 0; lane < 32; ++lane) {
      pending->sums[lane] = call(lane).sums;
      memcpy(&pending->values[static_cast<size_t>(lane * kSums)], call(lane).sums, kSums * sizeof(float));
      memset(call(lane).sums, 0xFF, kSums * sizeof(float));
    }
  }
  ++pending->products;
  warp.products.push_back({product, pending->sums[0]});
  for (const uint64_t word : {product.a, product.b}) warp.issued = mix(warp.issued ^ word);
}

void execute(Warp& warp, const PendingProduct& one) {
  float a[kRows][kInner];
  static float b[kColumns][kInner];
  read(one.product, one.product.a, kRows * warp_of_group(), a);
  read(one.product, one.product.b, 0, b);
  PendingSums& pending = *find_pending(warp, one.sums);
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < kSums; ++i) {
      const int row = lane / 4 + 8 * (i / 2 % 2), column = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
      float& value = pending.values[static_cast<size_t>(lane * kSums + i)];
      double sum = value;
      for (int k = 0; k < kInner; ++k) sum += static_cast<double>(a[row][k]) * static_cast<double>(b[column][k]);
      value = static_cast<float>(sum);
    }
  }
  if (--pending.products != 0) return;
  check_in_flight(pending);
  for (int lane = 0; lane < 32; ++lane) {
    memcpy(pending.sums[lane], &pending.values[static_cast<size_t>(lane * kSums)], kSums * sizeof(float));
  }
  std::erase_if(warp.pending, [](const PendingSums& sums) { return sums.products == 0; });
  warp.fenced = false;
}

}  // namespace

uint32_t shared_address(const void* shared) {
  check_shared("shared_address", shared, 0, 1);
  const ptrdiff_t offset = static_cast<const unsigned char*>(shared) - state.current->block->shared->base;
  return window_of_shared() + static_cast<uint32_t>(offset);
}

void fence_shared_for_products() {
  state.current->copies_fenced = state.current->copies_landed;
}

void warpgroup_fence(const Where& where) {
  warp_collective(
      "warpgroup_fence", 0xFFFFFFFFu, true, nullptr, [](void* const*) { state.current->warp->fenced = true; }, where);
}

void warpgroup_product(float* sums, const Product& product, const Where& where) {
  ProductCall call{sums, product};
  warp_collective("wgmma_m64n256k16", 0xFFFFFFFFu, true, &call, issue, where);
}

void warpgroup_commit(const Where& where) {
  const auto commit = [](void* const*) {
    Warp& warp = *state.current->warp;
    warp.groups.push_back(warp.products.size());
  };
  warp_collective("warpgroup_commit", 0xFFFFFFFFu, true, nullptr, commit, where);
}

void warpgroup_wait(unsigned pending, const Where& where) {
  const auto wait = [](void* const* payloads) {
    Warp& warp = *state.current->warp;
    const unsigned kept = *static_cast<const unsigned*>(payloads[0]);
    if (warp.groups.size() <= kept) return;
    const auto groups = static_cast<ptrdiff_t>(warp.groups.size() - kept);
    const size_t products = warp.groups[static_cast<size_t>(groups - 1)];
    for (size_t i = 0; i < products; ++i) execute(warp, warp.products[i]);
    warp.products.erase(warp.products.begin(), warp.products.begin() + static_cast<ptrdiff_t>(products));
    warp.groups.erase(warp.groups.begin(), warp.groups.begin() + groups);
    for (size_t& end : warp.groups) end -= products;
  };
  warp_collective("warpgroup_wait", 0xFFFFFFFFu, true, &pending, wait, where);
}

void check_products_of_warp(const Warp& warp) {
  if (!warp.products.empty()) fail(cudaErrorLaunchFailure, "a warp exits with products that it has not waited for");
}

void check_products_of_block(const Warp* warps, unsigned count) {
  for (unsigned i = 0; i < count; ++i) {
    if (warps[i].issued != warps[i / 4 * 4].issued) {
      fail(cudaErrorLaunchFailure, "warps %u and %u of a warpgroup have issued other products", i / 4 * 4, i);
    }
  }
}

}  // namespace consequentialism::cuda::shim
