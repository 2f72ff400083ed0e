// Vectors for kernels that are compiled for several instruction sets.
#pragma once

#include <cstdint>

// One binary for every x86 processor: the loader picks the widest instruction set that is there. That takes glibc's
// ifunc, and GCC 12 to know the levels by these names (GCC's bug 101696).
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__)
#define CONSEQUENTIALISM_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CONSEQUENTIALISM_CLONES
#endif
#if defined(__GNUC__)
#define CONSEQUENTIALISM_INLINE inline __attribute__((always_inline))
#else
#define CONSEQUENTIALISM_INLINE __forceinline
#endif
// So that compilers keep small arrays of vectors in registers.
#if defined(__clang__)
#define CONSEQUENTIALISM_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define CONSEQUENTIALISM_UNROLL _Pragma("GCC unroll 8")
#else
#define CONSEQUENTIALISM_UNROLL
#endif

namespace consequentialism::cpu {

constexpr int64_t kVectorBytes = 32;

template <typename scalar_t>
constexpr int64_t kLanes = kVectorBytes / static_cast<int64_t>(sizeof(scalar_t));

#if defined(__GNUC__)
template <typename scalar_t>
struct Vector {
  typedef scalar_t Type __attribute__((vector_size(kVectorBytes), aligned(sizeof(scalar_t)), may_alias));
};
#else
template <typename scalar_t>
struct Vector {
  struct Type {
    scalar_t lanes[kLanes<scalar_t>];
    scalar_t operator[](int64_t i) const { return lanes[i]; }
    Type& operator+=(const Type& other) {
      for (int64_t i = 0; i < kLanes<scalar_t>; ++i) lanes[i] += other.lanes[i];
      return *this;
    }
    friend Type operator-(Type a, const Type& b) {
      for (int64_t i = 0; i < kLanes<scalar_t>; ++i) a.lanes[i] -= b.lanes[i];
      return a;
    }
    friend Type operator*(Type a, const Type& b) {
      for (int64_t i = 0; i < kLanes<scalar_t>; ++i) a.lanes[i] *= b.lanes[i];
      return a;
    }
    friend Type operator*(scalar_t factor, Type a) {
      for (int64_t i = 0; i < kLanes<scalar_t>; ++i) a.lanes[i] *= factor;
      return a;
    }
  };
};
#endif

template <typename scalar_t>
using Vec = typename Vector<scalar_t>::Type;

template <typename scalar_t>
CONSEQUENTIALISM_INLINE const Vec<scalar_t>& load(const scalar_t* p) {
  return *reinterpret_cast<const Vec<scalar_t>*>(p);
}

template <typename scalar_t>
CONSEQUENTIALISM_INLINE void store(scalar_t* p, const Vec<scalar_t>& value) {
  *reinterpret_cast<Vec<scalar_t>*>(p) = value;
}

template <typename scalar_t>
CONSEQUENTIALISM_INLINE scalar_t sum_of(const Vec<scalar_t>& v) {
  scalar_t lanes[kLanes<scalar_t>];
  for (int64_t i = 0; i < kLanes<scalar_t>; ++i) lanes[i] = v[i];
  for (int64_t half = kLanes<scalar_t> / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

}  // namespace consequentialism::cpu
