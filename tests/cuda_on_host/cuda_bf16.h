// bf16 conversions, rounding to nearest even as the device's.
#pragma once

#include <cuda_runtime.h>

struct __nv_bfloat16 {
    unsigned short raw;
};
struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};

inline float __bfloat162float(__nv_bfloat16 b) { return __uint_as_float(static_cast<unsigned>(b.raw) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    const unsigned raw = __float_as_uint(x);
    if (x != x) return {0x7fff};
    return {static_cast<unsigned short>((raw + 0x7fff + (raw >> 16 & 1)) >> 16)};
}
inline __nv_bfloat16 __float2bfloat16(float x) { return __float2bfloat16_rn(x); }
inline float2 __bfloat1622float2(__nv_bfloat162 b) { return {__bfloat162float(b.x), __bfloat162float(b.y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)}; }
