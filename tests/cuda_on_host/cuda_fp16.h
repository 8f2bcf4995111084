// fp16 conversions, rounding to nearest even as the device's.
#pragma once

#include <cuda_runtime.h>

struct __half {
    unsigned short raw;
};
struct alignas(4) __half2 {
    __half x, y;
};
using half = __half;
using half2 = __half2;

inline float __half2float(__half h) { return static_cast<float>(cuda_on_host::as<_Float16>(h.raw)); }
inline __half __float2half_rn(float x) { return {cuda_on_host::as<unsigned short>(static_cast<_Float16>(x))}; }
inline __half __float2half(float x) { return __float2half_rn(x); }
inline float2 __half22float2(__half2 h) { return {__half2float(h.x), __half2float(h.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
