// Which SIMD levels this build has, and which of them this CPU can run.
#include <cstring>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(PYFOLD_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pyfold {

namespace {

#if defined(PYFOLD_AMX)
// Linux gives a process the tile registers when it asks (since 5.16); every thread started later has them too.
bool amx_granted() {
    unsigned a, b, c, d = 0;
    constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24, kInt8 = 1u << 25, kAll = kBf16 | kTiles | kInt8;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kAll) != kAll) return false;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

#if defined(__x86_64__)
// clang knows no "f16c" in __builtin_cpu_supports before version 19.
bool has_f16c() {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

bool runs(const char* level) {
#if defined(__x86_64__)
    __builtin_cpu_init();
#if defined(PYFOLD_AMX)
    static const bool amx = amx_granted();
    if (!strcmp(level, "amx")) return amx && runs("avx512bf16");
#endif
#if defined(PYFOLD_AVX512BF16)
    if (!strcmp(level, "avx512bf16")) return __builtin_cpu_supports("avx512bf16") && runs("avx512");
#endif
    if (!strcmp(level, "avx512"))
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512dq") && runs("avx2");
    if (!strcmp(level, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
#endif
    return !strcmp(level, "baseline");
}

#if defined(PYFOLD_AVX512BF16) || defined(PYFOLD_AMX)
Kernels avx512_with(const Products& products) {
    Kernels kernels = avx512::kernels;
    kernels.products = &products;
    return kernels;
}
#endif

}  // namespace

const Kernels* kernels_for(const char* level) {
    if (!runs(level)) return nullptr;
#if defined(__x86_64__)
#if defined(PYFOLD_AMX)
    static const Kernels amx_kernels = avx512_with(amx::products);
    if (!strcmp(level, "amx")) return &amx_kernels;
#endif
#if defined(PYFOLD_AVX512BF16)
    static const Kernels bf16_kernels = avx512_with(avx512bf16::products);
    if (!strcmp(level, "avx512bf16")) return &bf16_kernels;
#endif
    if (!strcmp(level, "avx512")) return &avx512::kernels;
    if (!strcmp(level, "avx2")) return &avx2::kernels;
#endif
    return &baseline::kernels;
}

}  // namespace pyfold
