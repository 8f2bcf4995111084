// A matrix of 2- or 4-byte elements, transposed: the bits, whatever they stand for.
#pragma once

#include "simd.h"

namespace pyfold {
namespace PYFOLD_SIMD {
namespace {

// A square block of one 32-byte register per row.
template <typename T>
constexpr int64_t kSquare = 32 / sizeof(T);

#if defined(__AVX2__)
// 256-bit registers on AVX-512 too: their shuffles run on two ports there, the wider ones on one.
inline void transpose_words(__m256i v[8]) {
    __m256i pairs[8], quads[8];
    for (int i = 0; i < 8; i += 2) {
        pairs[i] = _mm256_unpacklo_epi32(v[i], v[i + 1]);
        pairs[i + 1] = _mm256_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int k = 0; k < 2; k++) {
            quads[i + 2 * k] = _mm256_unpacklo_epi64(pairs[i + k], pairs[i + k + 2]);
            quads[i + 2 * k + 1] = _mm256_unpackhi_epi64(pairs[i + k], pairs[i + k + 2]);
        }
    for (int i = 0; i < 4; i++) {
        v[i] = _mm256_permute2x128_si256(quads[i], quads[i + 4], 0x20);
        v[i + 4] = _mm256_permute2x128_si256(quads[i], quads[i + 4], 0x31);
    }
}

inline __m256i load_block_row(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

inline void store_block_row(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }

inline void transpose_block(const uint32_t* x, int64_t ld, uint32_t* out, int64_t ld_out) {
    __m256i v[8];
    for (int r = 0; r < 8; r++) v[r] = load_block_row(x + r * ld);
    transpose_words(v);
    for (int r = 0; r < 8; r++) store_block_row(out + r * ld_out, v[r]);
}

// Two rows side by side are words: columns 0-3 and 8-11 of each pair in one register, the others in another.
inline void transpose_block(const uint16_t* x, int64_t ld, uint16_t* out, int64_t ld_out) {
    __m256i low[8], high[8];
    for (int r = 0; r < 8; r++) {
        const __m256i even = load_block_row(x + 2 * r * ld), odd = load_block_row(x + (2 * r + 1) * ld);
        low[r] = _mm256_unpacklo_epi16(even, odd);
        high[r] = _mm256_unpackhi_epi16(even, odd);
    }
    transpose_words(low);
    transpose_words(high);
    for (int r = 0; r < 4; r++) {
        store_block_row(out + r * ld_out, low[r]);
        store_block_row(out + (r + 4) * ld_out, high[r]);
        store_block_row(out + (r + 8) * ld_out, low[r + 4]);
        store_block_row(out + (r + 12) * ld_out, high[r + 4]);
    }
}
#else
template <typename T>
inline void transpose_block(const T* x, int64_t ld, T* out, int64_t ld_out) {
    for (int64_t r = 0; r < kSquare<T>; r++)
        for (int64_t c = 0; c < kSquare<T>; c++) out[c * ld_out + r] = x[r * ld + c];
}
#endif

// x (rows x columns) -> out (columns x rows); ld and ld_out elements between rows. Rows are fetched ahead: 32 of them are more
// streams than hardware prefetch follows (fp16: 1.35 x as fast).
template <typename T>
inline void transpose(const T* x, int64_t ld, int64_t rows, int64_t columns, T* out, int64_t ld_out) {
    const int64_t whole_rows = rows - rows % kSquare<T>, whole_columns = columns - columns % kSquare<T>;
    constexpr int64_t kLine = 64 / sizeof(T), kAhead = 4 * kLine;
    for (int64_t c = 0; c < whole_columns; c += kSquare<T>) {
        if (c % kLine == 0)
            for (int64_t r = 0; r < whole_rows; r++) __builtin_prefetch(x + r * ld + c + kAhead);
        for (int64_t r = 0; r < whole_rows; r += kSquare<T>) transpose_block(x + r * ld + c, ld, out + c * ld_out + r, ld_out);
    }
    for (int64_t c = 0; c < columns; c++)
        for (int64_t r = c < whole_columns ? whole_rows : 0; r < rows; r++) out[c * ld_out + r] = x[r * ld + c];
}

}  // namespace
}  // namespace PYFOLD_SIMD
}  // namespace pyfold
