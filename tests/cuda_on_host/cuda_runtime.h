// CUDA kernels on a CPU, for tests without a GPU: csrc/cuda/*.cu compiled by g++ with this folder first on the include path.
//
//     g++ -x c++ -std=c++17 -O2 -ffp-contract=off -fno-gnu-unique -fno-extern-tls-init -shared -fPIC
//         -Itests/cuda_on_host -Icsrc csrc/cuda/KERNEL.cu tests/cuda_on_host/emulator.cpp
//
// A thread of a block is a fiber; a block runs to its end before the next begins (cooperative launches: to the next grid
// sync). What an ordinary GPU run hides, this makes fail: blocks, warps and lanes run in an order shuffled by
// cuda_on_host_seed; shared memory starts as NaN; a barrier or a warp-wide call that not all its threads reach aborts with
// their lines. Atomics on floats are left out: their sums depend on the order, so pyfold's kernels must not use them.
#pragma once

#include <math.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <type_traits>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ thread_local  // one thread runs all fibers; the emulator finds and poisons the library's thread-local block

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define CUDA_ON_HOST_VECTOR(type, name)                                                         \
    struct alignas(2 * sizeof(type)) name##2 { type x, y; };                                    \
    struct alignas(4 * sizeof(type) > 16 ? 16 : 4 * sizeof(type)) name##4 { type x, y, z, w; }; \
    inline name##2 make_##name##2(type x, type y) { return {x, y}; }                            \
    inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
CUDA_ON_HOST_VECTOR(float, float)
CUDA_ON_HOST_VECTOR(double, double)
CUDA_ON_HOST_VECTOR(int, int)
CUDA_ON_HOST_VECTOR(unsigned, uint)
CUDA_ON_HOST_VECTOR(unsigned short, ushort)
CUDA_ON_HOST_VECTOR(long long, longlong)
#undef CUDA_ON_HOST_VECTOR

inline constexpr int warpSize = 32;
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace cuda_on_host {
struct Site {  // where a thread waits
    const char* file;
    int line;
};
enum class Scope { warp, block, grid };
// Waits for every lane of `mask` (warp) or all threads; afterwards deposits()[lane] holds what each of the warp brought.
void wait(Scope scope, Site site, unsigned mask, uint64_t deposit);
const uint64_t* deposits();
struct Votes {  // of the block's threads, at the last block barrier
    int count, threads;
};
Votes votes();
int lane();
void run(dim3 grid, dim3 block, size_t shared, bool cooperative, const std::function<void()>& body);

template <typename T>
uint64_t bits(T value) {
    static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "a warp exchanges values of up to 8 bytes");
    uint64_t raw = 0;
    std::memcpy(&raw, &value, sizeof(T));
    return raw;
}
template <typename To, typename From>
To as(From from) {
    To to;
    std::memcpy(&to, &from, sizeof(To));
    return to;
}
template <typename T>
T exchange(unsigned mask, T value, int from, Site site) {
    wait(Scope::warp, site, mask, bits(value));
    if (!(mask >> from & 1)) std::abort();
    return as<T>(deposits()[from]);
}
template <typename T, typename Op>
T fold(unsigned mask, T value, Op op, Site site) {
    wait(Scope::warp, site, mask, bits(value));
    bool first = true;
    T result{};
    for (int l = 0; l < 32; l++) {
        if (!(mask >> l & 1)) continue;
        const T next = as<T>(deposits()[l]);
        result = first ? next : op(result, next);
        first = false;
    }
    return result;
}
}  // namespace cuda_on_host

#define CUDA_ON_HOST_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(CUDA_ON_HOST_SITE) { cuda_on_host::wait(cuda_on_host::Scope::block, {file, line}, 0, 0); }
inline int __syncthreads_count(int yes, CUDA_ON_HOST_SITE) {
    cuda_on_host::wait(cuda_on_host::Scope::block, {file, line}, 0, yes != 0);
    return cuda_on_host::votes().count;
}
inline int __syncthreads_or(int yes, CUDA_ON_HOST_SITE) { return __syncthreads_count(yes, file, line) > 0; }
inline int __syncthreads_and(int yes, CUDA_ON_HOST_SITE) {
    return __syncthreads_count(yes, file, line) == cuda_on_host::votes().threads;
}
inline void __syncwarp(unsigned mask = ~0u, CUDA_ON_HOST_SITE) {
    cuda_on_host::wait(cuda_on_host::Scope::warp, {file, line}, mask, 0);
}
inline unsigned __ballot_sync(unsigned mask, int yes, CUDA_ON_HOST_SITE) {
    return cuda_on_host::fold(mask, yes ? 1u << cuda_on_host::lane() : 0u, [](unsigned a, unsigned b) { return a | b; },
                              {file, line});
}
inline int __any_sync(unsigned mask, int yes, CUDA_ON_HOST_SITE) { return __ballot_sync(mask, yes, file, line) != 0; }
inline int __all_sync(unsigned mask, int yes, CUDA_ON_HOST_SITE) { return __ballot_sync(mask, yes, file, line) == mask; }
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, CUDA_ON_HOST_SITE) {
    const int first = cuda_on_host::lane() & ~(width - 1);
    return cuda_on_host::exchange(mask, value, first + (source & (width - 1)), {file, line});
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int other, int width = 32, CUDA_ON_HOST_SITE) {
    const int lane = cuda_on_host::lane(), from = lane ^ other;
    return cuda_on_host::exchange(mask, value, from / width > lane / width ? lane : from, {file, line});
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_ON_HOST_SITE) {
    const int lane = cuda_on_host::lane(), from = lane + static_cast<int>(delta);
    return cuda_on_host::exchange(mask, value, from / width > lane / width ? lane : from, {file, line});
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_ON_HOST_SITE) {
    const int lane = cuda_on_host::lane(), from = lane - static_cast<int>(delta);
    return cuda_on_host::exchange(mask, value, from < (lane & ~(width - 1)) ? lane : from, {file, line});
}
#define CUDA_ON_HOST_REDUCE(name, type, expression)                                                                         \
    inline type __reduce_##name##_sync(unsigned mask, type value, CUDA_ON_HOST_SITE) {                                      \
        return cuda_on_host::fold(mask, value, [](type a, type b) { return static_cast<type>(expression); }, {file, line}); \
    }
CUDA_ON_HOST_REDUCE(add, int, a + b)
CUDA_ON_HOST_REDUCE(add, unsigned, a + b)
CUDA_ON_HOST_REDUCE(min, int, a < b ? a : b)
CUDA_ON_HOST_REDUCE(min, unsigned, a < b ? a : b)
CUDA_ON_HOST_REDUCE(max, int, a > b ? a : b)
CUDA_ON_HOST_REDUCE(max, unsigned, a > b ? a : b)
CUDA_ON_HOST_REDUCE(or, unsigned, a | b)
CUDA_ON_HOST_REDUCE(and, unsigned, a& b)
#undef CUDA_ON_HOST_REDUCE

// Fibers change only where they wait, so a plain read and write is atomic.
#define CUDA_ON_HOST_ATOMIC(name, expression)                                                               \
    template <typename T>                                                                                   \
    T atomic##name(T* at, std::common_type_t<T> value) {                                                    \
        static_assert(std::is_integral<T>::value, "no atomics on floats: the result depends on the order"); \
        const T old = *at;                                                                                  \
        *at = static_cast<T>(expression);                                                                   \
        return old;                                                                                         \
    }
CUDA_ON_HOST_ATOMIC(Add, old + value)
CUDA_ON_HOST_ATOMIC(Sub, old - value)
CUDA_ON_HOST_ATOMIC(Min, value < old ? value : old)
CUDA_ON_HOST_ATOMIC(Max, value > old ? value : old)
CUDA_ON_HOST_ATOMIC(Or, old | value)
CUDA_ON_HOST_ATOMIC(And, old& value)
CUDA_ON_HOST_ATOMIC(Exch, value)
#undef CUDA_ON_HOST_ATOMIC
template <typename T>
T atomicCAS(T* at, std::common_type_t<T> expected, std::common_type_t<T> value) {
    const T old = *at;
    if (old == expected) *at = value;
    return old;
}

inline void __threadfence() {}
inline void __threadfence_block() {}
template <typename T>
T __ldg(const T* at) {
    return *at;
}
template <typename T>
T __ldcg(const T* at) {
    return *at;
}
template <typename T>
T __ldcs(const T* at) {
    return *at;
}
template <typename T, typename V>
void __stcg(T* at, V value) {
    *at = value;
}
template <typename T, typename V>
void __stcs(T* at, V value) {
    *at = value;
}

inline int __float_as_int(float x) { return cuda_on_host::as<int>(x); }
inline unsigned __float_as_uint(float x) { return cuda_on_host::as<unsigned>(x); }
inline float __int_as_float(int x) { return cuda_on_host::as<float>(x); }
inline float __uint_as_float(unsigned x) { return cuda_on_host::as<float>(x); }
inline long long __double_as_longlong(double x) { return cuda_on_host::as<long long>(x); }
inline double __longlong_as_double(long long x) { return cuda_on_host::as<double>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline float __double2float_rn(double x) { return static_cast<float>(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
template <typename A, typename B>
std::common_type_t<A, B> min(A a, B b) {
    return b < a ? b : a;
}
template <typename A, typename B>
std::common_type_t<A, B> max(A a, B b) {
    return a < b ? b : a;
}

// The runtime: device memory is host memory, streams are in order.
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = struct CUstream_st*;
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributePreferredSharedMemoryCarveout };
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount,
    cudaDevAttrMaxSharedMemoryPerBlockOptin,
    cudaDevAttrMaxSharedMemoryPerMultiprocessor,
    cudaDevAttrMaxThreadsPerMultiProcessor
};
enum cudaMemcpyKind {
    cudaMemcpyHostToHost,
    cudaMemcpyHostToDevice,
    cudaMemcpyDeviceToHost,
    cudaMemcpyDeviceToDevice,
    cudaMemcpyDefault
};
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative };
struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    struct {
        int cooperative;
    } val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};

inline constexpr int kSharedPerBlock = 227 * 1024;
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int value) {
    return value > kSharedPerBlock ? cudaErrorInvalidValue : cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    return *value = attribute == cudaDevAttrMultiProcessorCount ? 3 : kSharedPerBlock, cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
    return *blocks = 1, cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) { return error ? "invalid value" : "no error"; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
    return std::memcpy(to, from, bytes), cudaSuccess;
}
inline cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t rows,
                                     cudaMemcpyKind, cudaStream_t) {
    if (to_pitch < width || from_pitch < width) return cudaErrorInvalidValue;
    for (size_t row = 0; row < rows; row++)
        std::memcpy(static_cast<char*>(to) + row * to_pitch, static_cast<const char*>(from) + row * from_pitch, width);
    return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
    return std::memset(at, value, bytes), cudaSuccess;
}
template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args&&... args) {
    const dim3 g = config->gridDim, b = config->blockDim;
    if (g.x * g.y * g.z == 0 || b.x * b.y * b.z == 0 || b.x * b.y * b.z > 1024 || g.y > 65535 || g.z > 65535 ||
        config->dynamicSmemBytes > kSharedPerBlock)
        return cudaErrorInvalidConfiguration;
    cuda_on_host::run(g, b, config->dynamicSmemBytes, config->numAttrs > 0, [&] { kernel(args...); });
    return cudaSuccess;
}
