// One vector type per SIMD level, through the compilers' vector extensions: the same source serves x86-64 and arm64.
//
// Everything here has internal linkage. A level's object file must define no weak (COMDAT) symbol: the linker keeps one
// copy of each, and an AVX-512 copy of an inline function would then run on a CPU without AVX-512. So no std:: templates.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "kernels.h"

#ifndef PYFOLD_SIMD
#error "compile with -DPYFOLD_SIMD=<level namespace>"
#endif

namespace pyfold {
namespace PYFOLD_SIMD {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vfloat __attribute__((vector_size(4 * kLanes)));
typedef int32_t vint __attribute__((vector_size(4 * kLanes)));

inline vfloat load(const float* p) {
    vfloat v;
    memcpy(&v, p, sizeof v);
    return v;
}

inline void store(float* p, vfloat v) { memcpy(p, &v, sizeof v); }

inline vfloat splat(float x) { return x - vfloat{}; }

inline float bits_to_float(uint32_t u) {
    float f;
    memcpy(&f, &u, 4);
    return f;
}

inline uint32_t float_to_bits(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    return u;
}

// IEEE half <-> float, round to nearest even; exact for every finite half.
inline float half_to_float(uint16_t h) {
    const uint32_t magnitude = static_cast<uint32_t>(h & 0x7fff) << 13;
    const float scaled = bits_to_float(magnitude) * bits_to_float(0x77800000);  // 2^112: rebias, subnormals included
    const uint32_t special = magnitude >= 0x0f800000 ? 0x7f800000u | magnitude : float_to_bits(scaled);
    return bits_to_float(special | static_cast<uint32_t>(h & 0x8000) << 16);
}

inline uint16_t float_to_half(float f) {
    const uint32_t u = float_to_bits(f);
    const uint32_t magnitude = u & 0x7fffffff;
    uint32_t h;
    if (magnitude >= 0x7f800001) {
        h = 0x7e00;
    } else if (magnitude >= 0x477ff000) {  // rounds past 65504
        h = 0x7c00;
    } else if (magnitude < 0x38800000) {  // subnormal: let the adder round
        h = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000;
    } else {
        h = (magnitude - 0x38000000 + 0x0fff + (magnitude >> 13 & 1)) >> 13;
    }
    return static_cast<uint16_t>(h | (u >> 16 & 0x8000));
}

inline float bf16_to_float(uint16_t b) { return bits_to_float(static_cast<uint32_t>(b) << 16); }

inline uint16_t float_to_bf16(float f) {
    const uint32_t u = float_to_bits(f);
    if ((u & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

// `count` elements of any dtype starting at element `at` -> fp32.
inline void read_floats(const void* x, DType dtype, int64_t at, int64_t count, float* out) {
    if (dtype == DType::f32) {
        memcpy(out, static_cast<const float*>(x) + at, sizeof(float) * count);
        return;
    }
    const uint16_t* p = static_cast<const uint16_t*>(x) + at;
    int64_t i = 0;
    if (dtype == DType::bf16) {
        for (; i < count; i++) out[i] = bf16_to_float(p[i]);
        return;
    }
#if defined(__F16C__)
    for (; i + 8 <= count; i += 8)
        _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i))));
#endif
    for (; i < count; i++) out[i] = half_to_float(p[i]);
}

// fp32 -> `count` elements of any dtype starting at element `at`, rounding to nearest even.
inline void write_floats(const float* in, int64_t count, void* x, DType dtype, int64_t at) {
    if (dtype == DType::f32) {
        memcpy(static_cast<float*>(x) + at, in, sizeof(float) * count);
        return;
    }
    uint16_t* p = static_cast<uint16_t*>(x) + at;
    int64_t i = 0;
    if (dtype == DType::bf16) {
        for (; i < count; i++) p[i] = float_to_bf16(in[i]);
        return;
    }
#if defined(__F16C__)
    for (; i + 8 <= count; i += 8)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p + i), _mm256_cvtps_ph(_mm256_loadu_ps(in + i), 0));
#endif
    for (; i < count; i++) p[i] = float_to_half(in[i]);
}

// out[i] = table[index[i]]; compilers leave this loop scalar.
inline void gather(const float* table, const int32_t* index, int64_t count, float* out) {
    int64_t i = 0;
#if defined(__AVX512F__)
    const __m512 none = _mm512_setzero_ps();
    for (; i + 16 <= count; i += 16)
        _mm512_storeu_ps(out + i, _mm512_mask_i32gather_ps(none, 0xffff, _mm512_loadu_si512(index + i), table, 4));
#elif defined(__AVX2__)
    for (; i + 8 <= count; i += 8)
        _mm256_storeu_ps(out + i,
                         _mm256_i32gather_ps(table, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index + i)), 4));
#endif
    for (; i < count; i++) out[i] = table[index[i]];
}

inline int64_t item_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace
}  // namespace PYFOLD_SIMD
}  // namespace pyfold
