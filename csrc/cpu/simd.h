// One vector type per SIMD level, through the compilers' vector extensions: the same source serves x86-64 and arm64.
//
// Everything here has internal linkage. A level's object file must define no weak (COMDAT) symbol: the linker keeps one
// copy of each, and an AVX-512 copy of an inline function would then run on a CPU without AVX-512. So no std:: templates.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
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

constexpr float kRounding = __FLT_EPSILON__ / 2;  // of one operation, relative

typedef float vfloat __attribute__((vector_size(4 * kLanes)));
typedef int32_t vint __attribute__((vector_size(4 * kLanes)));
typedef uint16_t vhalf __attribute__((vector_size(2 * kLanes)));

inline vfloat load(const float* p) {
    vfloat v;
    memcpy(&v, p, sizeof v);
    return v;
}

inline void store(float* p, vfloat v) { memcpy(p, &v, sizeof v); }

inline vfloat splat(float x) { return x - vfloat{}; }

inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

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

// kLanes elements of any dtype starting at element `at` -> fp32.
inline vfloat read_vector(const void* x, DType dtype, int64_t at) {
    if (dtype == DType::f32) return load(static_cast<const float*>(x) + at);
    const uint16_t* p = static_cast<const uint16_t*>(x) + at;
    if (dtype == DType::bf16) {
        vhalf v;
        memcpy(&v, p, sizeof v);
        return reinterpret_cast<vfloat>(__builtin_convertvector(v, vint) << 16);
    }
#if defined(__AVX512F__)
    return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    vfloat v;
    for (int i = 0; i < kLanes; i++) v[i] = half_to_float(p[i]);
    return v;
#endif
}

// fp32 -> kLanes elements of any dtype starting at element `at`, rounding to nearest even.
inline void write_vector(vfloat v, void* x, DType dtype, int64_t at) {
    if (dtype == DType::f32) return store(static_cast<float*>(x) + at, v);
    uint16_t* p = static_cast<uint16_t*>(x) + at;
    if (dtype == DType::bf16) {
        const vint u = reinterpret_cast<vint>(v);
        const vint rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
        const vhalf h = __builtin_convertvector((u & 0x7fffffff) > 0x7f800000 ? vint{} + 0x7fc0 : rounded, vhalf);
        memcpy(p, &h, sizeof h);
        return;
    }
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtps_ph(0xffff, v, 0));
#elif defined(__F16C__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, 0));
#else
    for (int i = 0; i < kLanes; i++) p[i] = float_to_half(v[i]);
#endif
}

// `count` elements of any dtype starting at element `at` -> fp32.
inline void read_floats(const void* x, DType dtype, int64_t at, int64_t count, float* out) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(out + i, read_vector(x, dtype, at + i));
    if (dtype == DType::f32)
        for (; i < count; i++) out[i] = static_cast<const float*>(x)[at + i];
    else
        for (; i < count; i++) {
            const uint16_t h = static_cast<const uint16_t*>(x)[at + i];
            out[i] = dtype == DType::f16 ? half_to_float(h) : bf16_to_float(h);
        }
}

// fp32 -> `count` elements of any dtype starting at element `at`, rounding to nearest even.
inline void write_floats(const float* in, int64_t count, void* x, DType dtype, int64_t at) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) write_vector(load(in + i), x, dtype, at + i);
    if (dtype == DType::f32)
        for (; i < count; i++) static_cast<float*>(x)[at + i] = in[i];
    else
        for (; i < count; i++)
            static_cast<uint16_t*>(x)[at + i] = dtype == DType::f16 ? float_to_half(in[i]) : float_to_bf16(in[i]);
}

constexpr int64_t item_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// Copies past the caches: a result that no core reads soon need not first be read into one. Ends with stream_fence().
inline void stream(void* out, const void* from, int64_t bytes) {
    char* to = static_cast<char*>(out);
    const char* p = static_cast<const char*>(from);
#if defined(__SSE2__)
    const int64_t head = min_of(-reinterpret_cast<intptr_t>(to) & 63, bytes);
    memcpy(to, p, head);
    int64_t i = head;
    for (; i + 64 <= bytes; i += 64) {
#if defined(__AVX512F__)
        _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(p + i));
#else
        for (int64_t k = i; k < i + 64; k += 16)
            _mm_stream_si128(reinterpret_cast<__m128i*>(to + k), _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + k)));
#endif
    }
    memcpy(to + i, p + i, bytes - i);
#else
    memcpy(to, p, bytes);
#endif
}

inline void stream_fence() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

}  // namespace
}  // namespace PYFOLD_SIMD
}  // namespace pyfold
