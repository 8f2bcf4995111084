// fp32, fp16 and bf16 in packs of up to 16 bytes: one access, converted in registers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#include "cpu/kernels.h"  // DType
#include "cuda/launch.h"

namespace pyfold {
namespace cuda {

// A pointer read from a table could point anywhere, and costs generic loads; this one is to global memory.
template <typename T>
__device__ T* global(T* pointer) {
#ifdef __CUDA_ARCH__
    __builtin_assume(__isGlobal(pointer));
#endif
    return pointer;
}

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ inline void narrow(float x, float& to) { to = x; }
__device__ inline void narrow(float x, __half& to) { to = __float2half_rn(x); }
__device__ inline void narrow(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }

template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
    T v[V];
};

// The hardware's words. A struct of __half is otherwise copied piece by piece: what nvcc makes of it, seen in the PTX.
template <int kBytes>
struct Word;
template <>
struct Word<2> {
    using type = unsigned short;
};
template <>
struct Word<4> {
    using type = unsigned;
};
template <>
struct Word<8> {
    using type = uint2;
};
template <>
struct Word<16> {
    using type = uint4;
};

// One access of sizeof(P) bytes.
template <typename P>
__device__ P load(const void* from) {
    const auto word = *static_cast<const typename Word<sizeof(P)>::type*>(from);
    P pack;
    memcpy(&pack, &word, sizeof(P));
    return pack;
}

template <typename P>
__device__ void store(void* to, const P& pack) {
    typename Word<sizeof(P)>::type word;
    memcpy(&word, &pack, sizeof(P));
    *static_cast<typename Word<sizeof(P)>::type*>(to) = word;
}

template <typename T, int V>
__device__ void store_as(T* to, const float (&values)[V]) {
    constexpr int kWidth = sizeof(T) * V > 16 ? 16 / sizeof(T) : V;  // eight floats go as two accesses
#pragma unroll
    for (int first = 0; first < V; first += kWidth) {
        Pack<T, kWidth> pack;
#pragma unroll
        for (int j = 0; j < kWidth; j++) narrow(values[first + j], pack.v[j]);
        store(to + first, pack);
    }
}

template <int V>
__device__ void store_floats(void* to, DType dtype, int64_t index, const float (&values)[V]) {
    if (dtype == DType::f32) store_as(static_cast<float*>(to) + index, values);
    if (dtype == DType::f16) store_as(static_cast<__half*>(to) + index, values);
    if (dtype == DType::bf16) store_as(static_cast<__nv_bfloat16*>(to) + index, values);
}

// call(x as a pointer to what dtype says).
template <typename Call>
auto with_dtype(const void* x, DType dtype, const Call& call) {
    if (dtype == DType::f16) return call(static_cast<const __half*>(x));
    if (dtype == DType::bf16) return call(static_cast<const __nv_bfloat16*>(x));
    return call(static_cast<const float*>(x));
}

inline bool aligned(const void* at, int64_t bytes) { return reinterpret_cast<uintptr_t>(at) % bytes == 0; }

}  // namespace cuda
}  // namespace pyfold
