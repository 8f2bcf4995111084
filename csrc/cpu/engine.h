// Packed points x packed points -> blocks of inner products, on the units that this level has for it.
#pragma once

#include "simd.h"

namespace pyfold {
namespace PYFOLD_SIMD {
namespace {

// What packed points stand for: fp16 or bf16 numbers where both operands hold nothing else, which may be faster or more
// exact; fp32 otherwise.
enum class Form { fp32, fp16, bf16 };

}  // namespace
}  // namespace PYFOLD_SIMD
}  // namespace pyfold

#if defined(__AMX_BF16__)
#include "engine_amx.h"
#else
#include "engine_fma.h"
#endif

namespace pyfold {
namespace PYFOLD_SIMD {
namespace {

inline int64_t blocks_of(int64_t n) { return (n + kBlock - 1) / kBlock; }

inline int64_t panels_of(Form form, int64_t d) { return (d + panel_of(form) - 1) / panel_of(form); }

// Floats, to a multiple of a cache line.
inline int64_t lines_of(int64_t floats) { return (floats + 15) / 16 * 16; }

}  // namespace
}  // namespace PYFOLD_SIMD
}  // namespace pyfold
