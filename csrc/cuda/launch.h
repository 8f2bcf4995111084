// The one place that launches kernels: a plain call, so that the sources hold no <<<>>> and any C++ compiler can read them
// (tests/cuda_on_host runs them on a CPU).
//
//     launch(kernel, grid, block, shared_bytes, stream, arguments...)                 returns the launch's error
//     launch_cooperative(kernel, blocks, block, shared_bytes, stream, arguments...)   all blocks resident: grid sync works
//     resident_blocks(kernel, block, shared_bytes)                                    the most that launch_cooperative takes
//     dynamic_shared<T>()                                                             in a kernel: its dynamic shared memory
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

namespace pyfold {
namespace cuda {

template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
    extern __shared__ __align__(16) unsigned char dynamic_bytes[];
    return reinterpret_cast<T*>(dynamic_bytes);
}

// Past 48 KiB a kernel must ask for its shared memory first.
template <typename... Params>
cudaError_t allow_shared(void (*kernel)(Params...), size_t shared) {
    if (shared <= 48 * 1024) return cudaSuccess;
    return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                static_cast<int>(shared));
}

template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream, Args... args) {
    if (const cudaError_t error = allow_shared(kernel, shared)) return error;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
}

template <typename... Params, typename... Args>
cudaError_t launch_cooperative(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
                               Args... args) {
    if (const cudaError_t error = allow_shared(kernel, shared)) return error;
    cudaLaunchAttribute cooperative{};
    cooperative.id = cudaLaunchAttributeCooperative;
    cooperative.val.cooperative = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &cooperative;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
}

// Blocks of this kernel that the current device holds at once; 0 where they do not fit.
template <typename... Params>
int resident_blocks(void (*kernel)(Params...), int block, size_t shared) {
    int device = 0, processors = 0, each = 0;
    if (allow_shared(kernel, shared) != cudaSuccess || cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess ||
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, block, shared) != cudaSuccess)
        return 0;
    return processors * each;
}

}  // namespace cuda
}  // namespace pyfold
