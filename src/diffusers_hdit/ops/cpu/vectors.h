// Vectors of floats as wide as the processor's, for the kernels of this folder.

#pragma once

#if defined(__clang__) || !defined(__GNUC__)
#error "GCC is needed: PyTorch's threads are those of GCC's OpenMP"
#endif

#include <cstdint>
#include <cstring>

namespace {

using Index = std::int64_t;

#if defined(__AVX512F__)
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif

typedef float Vec __attribute__((vector_size(4 * LANES), may_alias));
typedef float VecAnywhere __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef std::int32_t Mask __attribute__((vector_size(4 * LANES), may_alias));
typedef std::uint32_t Bits __attribute__((vector_size(4 * LANES), may_alias));

inline Vec load(const float* p) { return *reinterpret_cast<const VecAnywhere*>(p); }
inline void store(float* p, Vec x) { *reinterpret_cast<VecAnywhere*>(p) = x; }
inline Vec all(float x) { return Vec{} + x; }
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }  // b if either is NaN

// 2^x for x <= 0 and a little above, NaN for NaN; the Taylor series of 2^f, |f| <= 1/2, up to f^7: 1e-8.
inline Vec exp2(Vec x) {
    const Vec shift = all(12582912.f);  // 1.5 * 2^23: the last bits of x + shift are x rounded
    x = larger(all(-126.f), x);
    const Vec rounded = x + shift, f = x - (rounded - shift);
    Vec p = all(1.5252734e-5f);
    for (float c : {1.5403530e-4f, 1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.f})
        p = p * f + c;
    Bits bits, exponent, offset;
    std::memcpy(&bits, &p, sizeof bits);
    std::memcpy(&exponent, &rounded, sizeof exponent);
    std::memcpy(&offset, &shift, sizeof offset);
    bits += (exponent - offset) << 23;
    std::memcpy(&p, &bits, sizeof p);
    return x == x ? p : x;
}

}  // namespace
