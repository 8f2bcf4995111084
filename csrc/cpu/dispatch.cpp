// Which SIMD levels this build has, and which of them this CPU can run.
#include <cstring>

#include "kernels.h"

namespace pyfold {

namespace {

bool runs(const char* level) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!strcmp(level, "avx512"))
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512dq") && runs("avx2");
    if (!strcmp(level, "avx2"))
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
    return !strcmp(level, "baseline");
}

}  // namespace

const Kernels* kernels_for(const char* level) {
    if (!runs(level)) return nullptr;
#if defined(__x86_64__)
    if (!strcmp(level, "avx512")) return &avx512::kernels;
    if (!strcmp(level, "avx2")) return &avx2::kernels;
#endif
    return &baseline::kernels;
}

const char* best_level() { return runs("avx512") ? "avx512" : runs("avx2") ? "avx2" : "baseline"; }

}  // namespace pyfold
