// The product engine of AMX tiles: packed points x packed points -> blocks of inner products.
//
// The tiles multiply bf16 and sum in fp32. A number of 24 bits is the exact sum of three of bf16's 8 bits, x = x0 + x1 + x2,
// each at most 2⁻⁸ of the one before; so x·y is six products, and the three left out are at most 2⁻²³ of |x| |y|:
//     x0·y0 + (x0·y1 + x1·y0) + x1·y1 + (x0·y2 + x2·y0)
// fp16 has 11 bits: two parts and four products are all. bf16 is one part. A coarse product keeps x0·y0 + (x0·y1 + x1·y0).
//
// x·y must be y·x bit for bit (permuting points permutes their Gram matrix). A tile product takes columns in pairs and sums
// the even and the odd ones apart before it adds the two; so (x0·y1 + x1·y0) runs over pairs (x0, x1) against (y1, y0), and
// swapping x and y swaps the even sum with the odd one. Hence the left and the right operand are packed differently.
#pragma once

#include <immintrin.h>

#include "simd.h"

namespace pyfold {
namespace PYFOLD_SIMD {
namespace {

constexpr int64_t kBlock = 32;  // points: two tiles of 16
constexpr int64_t kTile = 12;   // cache tile of 384 x 384 points: two operands of a chunk and fp32 sums take 1.3 MiB of L2
constexpr bool kTwoForms = true;

enum class Precision { full, coarse };
// Of a coarse product, in units of the norms' product: x1·y1, x0·y2 and x2·y0 are at most 3 · 2⁻¹⁶; the rest is for fp32 sums.
constexpr float kCoarseError = 1.0f / 16384;

// One term of the sum over parts: x_p · y_p, or x_p · y_q + x_q · y_p.
struct Term {
    int p, q;
};
struct Scheme {
    int n_parts, n_terms;
    Term terms[4];  // small ones first
};

inline Scheme scheme_of(DType dtype, Precision precision) {
    if (precision == Precision::coarse) return {2, 2, {{0, 1}, {0, 0}}};
    if (dtype == DType::bf16) return {1, 1, {{0, 0}}};
    if (dtype == DType::f16) return {2, 3, {{1, 1}, {0, 1}, {0, 0}}};
    return {3, 4, {{0, 2}, {1, 1}, {0, 1}, {0, 0}}};
}

// A step is one tile product: 32 bf16 columns. A chunk of steps is multiplied at a time, with its left and right operand in
// L1; between chunks the sums go through memory, which up to 16 steps is not worth it.
constexpr int64_t kChunk = 8, kShort = 16;
constexpr int64_t kTileFloats = 256, kStepFloats = 2 * kTileFloats;

inline int64_t steps_of(DType dtype, Precision precision, int64_t width) {
    const Scheme scheme = scheme_of(dtype, precision);
    int64_t steps = 0;
    for (int t = 0; t < scheme.n_terms; t++) steps += (scheme.terms[t].p == scheme.terms[t].q ? 1 : 2) * ((width + 31) / 32);
    return steps;
}

inline int64_t chunk_of(int64_t steps) { return steps <= kShort ? steps : kChunk; }

// Packed floats of one block over one panel.
inline int64_t block_floats(DType dtype, Precision precision, int64_t width) {
    return (steps_of(dtype, precision, width) + kChunk - 1) / kChunk * kChunk * kStepFloats;
}
inline int64_t buffer_floats() { return kTile * kTile * kBlock * kBlock; }

struct Operand {
    float* data;  // [chunk][block][step][16-point tile]
    int64_t n_blocks;

    float* step(int64_t block, int64_t s, int64_t chunk) const {
        return data + ((s / chunk * n_blocks + block) * chunk + s % chunk) * kStepFloats;
    }
};

struct Session {  // the tile configuration of a thread
    Session() {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } config;
        _tile_loadconfig(&config);
    }
    ~Session() { _tile_release(); }
};

// Rows of 16 words -> columns.
inline void transpose(__m512i v[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int k = 0; k < 2; k++) {
            v[i + 2 * k] = _mm512_unpacklo_epi64(t[i + k], t[i + k + 2]);
            v[i + 2 * k + 1] = _mm512_unpackhi_epi64(t[i + k], t[i + k + 2]);
        }
    for (int i = 0; i < 16; i += 8)
        for (int k = 0; k < 4; k++) {
            t[i + k] = _mm512_shuffle_i32x4(v[i + k], v[i + k + 4], 0x88);
            t[i + k + 4] = _mm512_shuffle_i32x4(v[i + k], v[i + k + 4], 0xdd);
        }
    for (int k = 0; k < 8; k++) {
        v[k] = _mm512_shuffle_i32x4(t[k], t[k + 8], 0x88);
        v[k + 8] = _mm512_shuffle_i32x4(t[k], t[k + 8], 0xdd);
    }
}

// One line of fp32 -> its bf16 parts.
inline void split(const float* line, int64_t width, int n_parts, uint16_t (*parts)[kPanel]) {
    for (int64_t k = 0; k < width; k += 16) {
        __m512 rest = _mm512_loadu_ps(line + k);
        for (int p = 0; p < n_parts; p++) {
            const __m256i part = (__m256i)_mm512_cvtneps_pbh(rest);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(parts[p] + k), part);
            rest = _mm512_sub_ps(rest, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(part), 16)));
        }
    }
}

inline __m512i interleave(const uint16_t* low, const uint16_t* high) {
    const __m512i l = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(low)));
    const __m512i h = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(high)));
    return _mm512_or_si512(l, _mm512_slli_epi32(h, 16));
}

// Points first .. first + kBlock of x, columns column .. column + width, as the left operand, the right one, or both; points
// past N and columns past the width as zeros.
void pack(const void* x, DType dtype, Precision precision, int64_t n, int64_t ld, bool transposed, int64_t first,
          int64_t column, int64_t width, const Operand& left, const Operand& right, int64_t block) {
    const Scheme scheme = scheme_of(dtype, precision);
    const int64_t points = min_of(kBlock, n - first), padded = (width + 31) / 32 * 32;
    alignas(64) uint16_t parts[kBlock][3][kPanel];
    alignas(64) float line[kPanel];
    if (transposed) {
        alignas(64) float lines[kBlock][kPanel];
        for (int64_t k = 0; k < padded; k++) {
            float at_k[kBlock] = {};
            if (k < width) read_floats(x, dtype, (column + k) * ld + first, points, at_k);
            for (int64_t r = 0; r < kBlock; r++) lines[r][k] = at_k[r];
        }
        for (int64_t r = 0; r < kBlock; r++) split(lines[r], padded, scheme.n_parts, parts[r]);
    } else {
        for (int64_t r = 0; r < kBlock; r++) {
            const int64_t read = r < points ? width : 0;
            if (read) read_floats(x, dtype, (first + r) * ld + column, width, line);
            memset(line + read, 0, sizeof(float) * (padded - read));
            split(line, padded, scheme.n_parts, parts[r]);
        }
    }
    const int64_t chunk = chunk_of(steps_of(dtype, precision, width));
    int64_t step = 0;
    for (int t = 0; t < scheme.n_terms; t++) {
        const auto [p, q] = scheme.terms[t];
        const int64_t columns = p == q ? 32 : 16;  // of x in one step
        for (int64_t k = 0; k < padded; k += columns, step++)
            for (int64_t tile = 0; tile < 2; tile++) {
                __m512i v[16];
                if (left.data) {
                    float* to = left.step(block, step, chunk) + tile * kTileFloats;
                    for (int r = 0; r < 16; r++) {
                        const uint16_t (*row)[kPanel] = parts[16 * tile + r];
                        _mm512_store_si512(to + 16 * r,
                                           p == q ? _mm512_loadu_si512(row[p] + k) : interleave(row[p] + k, row[q] + k));
                    }
                }
                if (right.data) {
                    float* to = right.step(block, step, chunk) + tile * kTileFloats;
                    for (int r = 0; r < 16; r++) {
                        const uint16_t (*row)[kPanel] = parts[16 * tile + r];
                        v[r] = p == q ? _mm512_loadu_si512(row[p] + k) : interleave(row[q] + k, row[p] + k);
                    }
                    transpose(v);
                    for (int r = 0; r < 16; r++) _mm512_store_si512(to + 16 * r, v[r]);
                }
            }
    }
}

// Blocks [i0, i1) of the left operand with [j0, j1) of the right; sink(row, column, rows, products) gets `rows` x kBlock
// products at a time. `upper` leaves out what lies wholly below the diagonal. `buffer` keeps fp32 sums between chunks.
template <class Sink>
inline void multiply(const Operand& left, int64_t i0, int64_t i1, const Operand& right, int64_t j0, int64_t j1, DType dtype,
                     Precision precision, int64_t width, bool upper, float* buffer, Sink sink) {
    const int64_t steps = steps_of(dtype, precision, width);
    const int64_t chunk = chunk_of(steps);
    for (int64_t s0 = 0; s0 < steps; s0 += chunk) {
        const int64_t length = min_of(chunk, steps - s0);
        const bool last = s0 + length == steps, kept = steps > chunk;
        for (int64_t i = i0; i < i1; i++)
            for (int64_t j = upper && i > j0 ? i : j0; j < j1; j++) {
                const float* a = left.step(i, s0, chunk);
                const float* b = right.step(j, s0, chunk);
                float* sums = buffer + (kept ? ((i - i0) * kTile + j - j0) * kBlock * kBlock : 0);
                if (s0 == 0) {
                    _tile_zero(0);
                    _tile_zero(1);
                    _tile_zero(2);
                    _tile_zero(3);
                } else {
                    _tile_loadd(0, sums, 4 * kBlock);
                    _tile_loadd(1, sums + 16, 4 * kBlock);
                    _tile_loadd(2, sums + 16 * kBlock, 4 * kBlock);
                    _tile_loadd(3, sums + 16 * kBlock + 16, 4 * kBlock);
                }
                for (int64_t s = 0; s < length; s++, a += kStepFloats, b += kStepFloats) {
                    _tile_loadd(4, a, 64);
                    _tile_loadd(6, b, 64);
                    _tile_loadd(5, a + kTileFloats, 64);
                    _tile_loadd(7, b + kTileFloats, 64);
                    _tile_dpbf16ps(0, 4, 6);
                    _tile_dpbf16ps(1, 4, 7);
                    _tile_dpbf16ps(2, 5, 6);
                    _tile_dpbf16ps(3, 5, 7);
                }
                _tile_stored(0, sums, 4 * kBlock);
                _tile_stored(1, sums + 16, 4 * kBlock);
                _tile_stored(2, sums + 16 * kBlock, 4 * kBlock);
                _tile_stored(3, sums + 16 * kBlock + 16, 4 * kBlock);
                if (last) sink(i * kBlock, j * kBlock, kBlock, sums);
            }
    }
}

}  // namespace
}  // namespace PYFOLD_SIMD
}  // namespace pyfold
