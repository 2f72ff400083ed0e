// mma.cuh by definition: the fragments of 32 lanes are gathered into matrices, multiplied in float64 and rounded once.
#pragma once

#include "shim.h"

namespace consequentialism::cuda {

namespace shim {

constexpr uint32_t kAllLanes = 0xFFFFFFFFu;

template <class D, class A, class B>
struct MmaCall {
  D* d;
  const A* a;
  const B* b;
};

// place_*(lane, element) -> {row, column}, of D's kOut, A's kA and B's kB elements in each lane.
template <int kM, int kN, int kK, class Layout, class Call>
void multiply(void* const* payloads) {
  double a[kM][kK], b[kK][kN];
  for (int lane = 0; lane < 32; ++lane) {
    const Call& call = *static_cast<const Call*>(payloads[lane]);
    for (int i = 0; i < Layout::kA; ++i) {
      const auto [row, column] = Layout::place_a(lane, i);
      a[row][column] = Layout::value(call.a, i);
    }
    for (int i = 0; i < Layout::kB; ++i) {
      const auto [row, column] = Layout::place_b(lane, i);
      b[row][column] = Layout::value(call.b, i);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const Call& call = *static_cast<const Call*>(payloads[lane]);
    for (int i = 0; i < kM * kN / 32; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
      double sum = call.d[i];
      for (int k = 0; k < kK; ++k) {
        // Of narrower types than D the product is exact.
        sum = Layout::kExact ? sum + a[row][k] * b[k][column] : fma(a[row][k], b[k][column], sum);
      }
      call.d[i] = static_cast<std::remove_reference_t<decltype(call.d[i])>>(sum);
    }
  }
}

struct Place {
  int row, column;
};

template <class T>
struct HalfLayout {
  static constexpr bool kExact = true;
  static constexpr int kA = 8, kB = 4;  // elements, two to a register
  static double value(const uint32_t* registers, int i) {
    return to_float(T{static_cast<uint16_t>(registers[i / 2] >> (16 * (i % 2)))});
  }
  static Place place_a(int lane, int i) { return {lane / 4 + 8 * (i / 2 % 2), 2 * (lane % 4) + 8 * (i / 4) + i % 2}; }
  static Place place_b(int lane, int i) { return {2 * (lane % 4) + 8 * (i / 2) + i % 2, lane / 4}; }
};

struct Tf32Layout {
  static constexpr bool kExact = true;
  static constexpr int kA = 4, kB = 2;
  static double value(const uint32_t* registers, int i) { return __uint_as_float(registers[i] & 0xFFFFE000u); }
  static Place place_a(int lane, int i) { return {lane / 4 + 8 * (i % 2), lane % 4 + 4 * (i / 2)}; }
  static Place place_b(int lane, int i) { return {lane % 4 + 4 * i, lane / 4}; }
};

struct DoubleLayout {
  static constexpr bool kExact = false;
  static constexpr int kA = 1, kB = 1;
  static double value(const double* registers, int i) { return registers[i]; }
  static Place place_a(int lane, int) { return {lane / 4, lane % 4}; }
  static Place place_b(int lane, int) { return {lane % 4, lane / 4}; }
};

struct LdmatrixCall {
  uint32_t* r;
  uint16_t row[8];
};

template <int kMatrices, bool kTransposed>
void distribute(void* const* payloads) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < kMatrices; ++i) {
      const auto element = [&](int row, int column) -> uint32_t {
        return static_cast<const LdmatrixCall*>(payloads[8 * i + row])->row[column];
      };
      const int row = lane / 4, pair = 2 * (lane % 4);
      static_cast<LdmatrixCall*>(payloads[lane])->r[i] = kTransposed
                                                             ? element(pair, row) | element(pair + 1, row) << 16
                                                             : element(row, pair) | element(row, pair + 1) << 16;
    }
  }
}

template <int kMatrices, bool kTransposed>
void ldmatrix(const char* name, uint32_t* r, const void* row, const Where& where) {
  LdmatrixCall call{r, {}};
  if (lane() < 8 * kMatrices) {
    check_shared(name, row, 16, 16);
    std::memcpy(call.row, row, 16);
  }
  warp_collective(name, kAllLanes, true, &call, distribute<kMatrices, kTransposed>, where);
}

}  // namespace shim

template <class T>
void mma_m16n8k16(
    float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], shim::Where where = shim::Where::current()) {
  static_assert(std::is_same_v<T, bfloat16> || std::is_same_v<T, float16>);
  using Call = shim::MmaCall<float, uint32_t, uint32_t>;
  Call call{d, a, b};
  constexpr const char* kName = std::is_same_v<T, bfloat16> ? "mma_m16n8k16<bfloat16>" : "mma_m16n8k16<float16>";
  shim::warp_collective(
      kName, shim::kAllLanes, true, &call, shim::multiply<16, 8, 16, shim::HalfLayout<T>, Call>, where);
}

inline void mma_m16n8k8_tf32(
    float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], shim::Where where = shim::Where::current()) {
  using Call = shim::MmaCall<float, uint32_t, uint32_t>;
  Call call{d, a, b};
  shim::warp_collective(
      "mma_m16n8k8_tf32", shim::kAllLanes, true, &call, shim::multiply<16, 8, 8, shim::Tf32Layout, Call>, where);
}

inline void mma_m8n8k4_f64(double (&d)[2], double a, double b, shim::Where where = shim::Where::current()) {
  using Call = shim::MmaCall<double, double, double>;
  Call call{d, &a, &b};
  shim::warp_collective(
      "mma_m8n8k4_f64", shim::kAllLanes, true, &call, shim::multiply<8, 8, 4, shim::DoubleLayout, Call>, where);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, shim::Where where = shim::Where::current()) {
  shim::ldmatrix<4, false>("ldmatrix_x4", r, row, where);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, shim::Where where = shim::Where::current()) {
  shim::ldmatrix<4, true>("ldmatrix_x4_trans", r, row, where);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* row, shim::Where where = shim::Where::current()) {
  shim::ldmatrix<2, false>("ldmatrix_x2", r, row, where);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row, shim::Where where = shim::Where::current()) {
  shim::ldmatrix<2, true>("ldmatrix_x2_trans", r, row, where);
}

inline void copy_async_16(void* shared, const void* global, int valid_bytes) {
  shim::copy_async(shared, global, valid_bytes);
}
inline void copy_async_commit() {
  shim::copy_async_commit();
}
template <int kPending>
void copy_async_wait() {
  static_assert(kPending >= 0);
  shim::copy_async_wait(kPending);
}

}  // namespace consequentialism::cuda
