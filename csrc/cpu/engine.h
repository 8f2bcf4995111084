// Packed points x packed points -> blocks of inner products, on the units that this level has for it.
#pragma once

#if defined(__AMX_BF16__)
#include "engine_amx.h"
#else
#include "engine_fma.h"
#endif

namespace pyfold {
namespace PYFOLD_SIMD {
namespace {

inline int64_t blocks_of(int64_t n) { return (n + kBlock - 1) / kBlock; }

inline int64_t panels_of(int64_t d) { return (d + kPanel - 1) / kPanel; }

// Floats, to a multiple of a cache line.
inline int64_t lines_of(int64_t floats) { return (floats + 15) / 16 * 16; }

}  // namespace
}  // namespace PYFOLD_SIMD
}  // namespace pyfold
