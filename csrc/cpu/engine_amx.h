// The product engine of AMX tiles: packed points x packed points -> blocks of inner products.
//
// fp32 points are multiplied as integers, exactly. Over a panel a point is x = v 2⁻ᵉ, with e such that the largest |v| has 23
// bits, and v = 2¹⁶ d0 + 2⁸ d1 + d2 in signed digits of 8 bits. The tiles multiply int8 and sum in int32:
//     Σ v w = 2³² Σ d0 d0' + 2²⁴ Σ (d0 d1' + d1 d0') + 2¹⁶ Σ (d0 d2' + d1 d1' + d2 d0') + 2⁸ Σ (d1 d2' + d2 d1') + Σ d2 d2'
// The last sum is left out, at most 2⁻²¹ of |x| |y|; the others do not overflow within a panel. The rounding of x to v is at
// most 2⁻²³ of the point's largest number, which matters where one number is above all others: then by up to √512 2⁻²³ |x| |y|,
// ten times what it is otherwise; an FMA chain is mostly off by more.
//
// fp16 numbers have 11 bits and are, whatever stands beside them, the sum of two bf16 numbers. The tiles multiply bf16 exactly
// and sum in fp32, pairs of columns at a time, four sums for a pair of points: x·y = x0·y0 + ((x0·y1 + x1·y0) + x1·y1).
// bf16 points are multiplied as they are.
//
// x·y is y·x bit for bit: integer sums have no order, sums in fp32 have the same one, and the sum of x0·y1 and x1·y0 none.
#pragma once

#include <immintrin.h>

#include "simd.h"

namespace pyfold {
namespace PYFOLD_SIMD {
namespace {

constexpr int64_t kBlock = 32;  // points: two tiles of 16
constexpr int64_t kTile = 12;   // cache tile of 384 x 384 points: two operands of a panel take 1.2 MiB of L2
constexpr bool kTwoForms = true;
// Of fp32 points over a panel, in units of |x| |y|: (√512 + 2) 2⁻²³, for the rounding of both, which cannot both be at their
// worst; 2⁻²¹; and three roundings of sums.
constexpr float kProductError = 4e-6f;

// A tile: 16 rows of 64 bytes, of the left operand a point each; the right operand's has its words transposed.
constexpr int64_t kTileFloats = 256, kTilePoints = 16;
constexpr int64_t kDigits = 3;
static_assert(kBlock == 2 * kTilePoints && kPanel % 64 == 0, "blocks and panels are whole tiles");
static_assert((127 * 127 * 256 + 2 * 127 * 128) * kPanel < int64_t{1} << 31, "sums of a panel fit int32");

// Columns of a panel: fp16 points' tiles of 512 would leave L1 before they are read again, for 1.15 x the time.
constexpr int64_t panel_of(Form form) { return form == Form::fp16 ? kPanel / 2 : kPanel; }

// Steps of a panel, 64 bytes of columns each, and the tiles of a step: digits, or bf16 parts.
constexpr int64_t columns_of(Form form) { return form == Form::fp32 ? 64 : 32; }
constexpr int64_t steps_of(Form form, int64_t width) { return (width + columns_of(form) - 1) / columns_of(form); }
constexpr int64_t parts_of(Form form) { return form == Form::fp32 ? kDigits : form == Form::fp16 ? 2 : 1; }

// Packed floats of one block over one panel: [tile][step][part], then for fp32 the points' exponents.
constexpr int64_t tile_floats(Form form, int64_t width) { return steps_of(form, width) * parts_of(form) * kTileFloats; }
constexpr int64_t block_floats(Form form, int64_t width) { return 2 * tile_floats(form, width) + kBlock; }
inline int64_t buffer_floats() { return kBlock * kBlock; }

// The compilers' tile loads do not say which memory they read.
inline void stores_before_tiles() { __asm__ volatile("" ::: "memory"); }

struct Session {  // the tile configuration of a thread
    Session() {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } config;
        stores_before_tiles();
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

// One line of bf16 numbers -> a point's row in every step's tile.
inline void pack_bf16(const float* line, int64_t steps, float* rows) {
    for (int64_t step = 0; step < steps; step++, line += 32, rows += kTileFloats) {
        const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(_mm512_loadu_ps(line)), 16);
        const __m512i high = _mm512_srli_epi32(_mm512_castps_si512(_mm512_loadu_ps(line + 16)), 16);
        const __m512i words =
            _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(low)), _mm512_cvtepi32_epi16(high), 1);
        _mm512_storeu_si512(rows, words);
    }
}

// One line of fp16 numbers -> a point's bf16 parts, in every step's tiles.
inline void pack_fp16(const float* line, int64_t steps, float* rows) {
    for (int64_t step = 0; step < steps; step++, rows += 2 * kTileFloats)
        for (int64_t k = 0; k < 16; k += 8, line += 16) {
            const __m512 x = _mm512_loadu_ps(line);
            const __m256i first = (__m256i)_mm512_cvtneps_pbh(x);
            const __m512 rest = _mm512_sub_ps(x, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(first), 16)));
            memcpy(rows + k, &first, sizeof first);
            const __m256i second = (__m256i)_mm512_cvtneps_pbh(rest);
            memcpy(rows + kTileFloats + k, &second, sizeof second);
        }
}

// One line -> a point's digits, in every step's tiles; returns its exponent, NaN where a number is not finite.
inline float pack_digits(const float* line, int64_t steps, float* rows) {
    __m512i most = _mm512_setzero_si512();
    for (int64_t k = 0; k < 64 * steps; k += 16)
        most = _mm512_max_epu32(most, _mm512_slli_epi32(_mm512_castps_si512(_mm512_loadu_ps(line + k)), 1));
    const uint32_t bits = _mm512_reduce_max_epu32(most) >> 1;
    float exponent = 0;
    if (bits >= 0x7f800000u) exponent = __builtin_nanf("");
    if (bits > 0 && bits < 0x7f800000u) {
        const __m128 largest = _mm_set_ss(bits_to_float(bits));
        exponent = 22 - _mm_cvtss_f32(_mm_getexp_ss(largest, largest));
        constexpr float kLargest = 0x7f7f7f;  // of three digits
        if (_mm_cvtss_f32(_mm_scalef_ss(largest, _mm_set_ss(exponent))) > kLargest) exponent--;
    }
    const __m512 scale = _mm512_set1_ps(exponent);
    const __m512i bias = _mm512_set1_epi32(0x808080);
    for (int64_t step = 0; step < steps; step++, rows += kDigits * kTileFloats) {
        __m128i digits[kDigits][4];
        for (int64_t k = 0; k < 4; k++, line += 16) {
            // Bytes of v + bias are digits + 128.
            const __m512i v = _mm512_cvtps_epi32(_mm512_scalef_ps(_mm512_loadu_ps(line), scale));
            const __m512i bytes = _mm512_xor_si512(_mm512_add_epi32(v, bias), bias);
            digits[0][k] = _mm512_cvtepi32_epi8(_mm512_srli_epi32(bytes, 16));
            digits[1][k] = _mm512_cvtepi32_epi8(_mm512_srli_epi32(bytes, 8));
            digits[2][k] = _mm512_cvtepi32_epi8(bytes);
        }
        for (int64_t d = 0; d < kDigits; d++) memcpy(rows + d * kTileFloats, digits[d], 64);
    }
    return exponent;
}

// Points first .. first + kBlock of x, columns column .. column + width, as the left operand, the right one, or both (the
// other null); points past N and columns past the width as zeros.
void pack(const void* x, DType dtype, Form form, int64_t n, int64_t ld, bool transposed, int64_t first, int64_t column,
          int64_t width, float* left, float* right, int64_t block) {
    alignas(64) float lines[kBlock][kPanel], unasked[block_floats(Form::fp32, kPanel)];  // the largest
    const int64_t points = min_of(kBlock, n - first), steps = steps_of(form, width), floats = tile_floats(form, width);
    const int64_t padded = steps * columns_of(form);
    float* rows = left ? left + block * block_floats(form, width) : unasked;
    float* exponents = rows + 2 * floats;
    if (transposed)
        for (int64_t k = 0; k < width; k++) {
            float at_k[kBlock] = {};
            read_floats(x, dtype, (column + k) * ld + first, points, at_k);
            for (int64_t r = 0; r < kBlock; r++) lines[r][k] = at_k[r];
        }
    for (int64_t r = 0; r < kBlock; r++) {
        const int64_t read = r < points ? width : 0;
        if (!transposed && read) read_floats(x, dtype, (first + r) * ld + column, read, lines[r]);
        memset(lines[r] + read, 0, sizeof(float) * (padded - read));
        float* row = rows + r / kTilePoints * floats + r % kTilePoints * 16;
        exponents[r] = 0;
        if (form == Form::bf16)
            pack_bf16(lines[r], steps, row);
        else if (form == Form::fp16)
            pack_fp16(lines[r], steps, row);
        else
            exponents[r] = pack_digits(lines[r], steps, row);
    }
    if (!right) return;
    float* turned = right + block * block_floats(form, width);
    memcpy(turned + 2 * floats, exponents, sizeof(float) * kBlock);
    for (int64_t tile = 0; tile < 2 * floats; tile += kTileFloats) {
        __m512i v[16];
        for (int64_t r = 0; r < 16; r++) v[r] = _mm512_loadu_si512(rows + tile + 16 * r);
        transpose(v);
        for (int64_t r = 0; r < 16; r++) _mm512_store_si512(turned + tile + 16 * r, v[r]);
    }
}

// 16 x 16 products of fp32 points over a panel. A tile product waits for the one before it into the same sums: Σ d1 d1' + d2
// d0' and Σ d0 d2' are kept apart.
inline void multiply_digits(const float* a, const float* b, int64_t steps, const float* exponents, const float* exponents_b,
                            float* products) {
    constexpr int64_t kStep = kDigits * kTileFloats;
    alignas(64) int32_t sums[5][kTileFloats];
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    for (int64_t step = 0; step < steps; step++, a += kStep, b += kStep) {
        _tile_loadd(5, a, 64);
        _tile_loadd(6, b, 64);
        _tile_dpbssd(0, 5, 6);
        _tile_loadd(7, b + kTileFloats, 64);
        _tile_dpbssd(1, 5, 7);
        _tile_loadd(5, a + kTileFloats, 64);
        _tile_dpbssd(2, 5, 7);
        _tile_dpbssd(1, 5, 6);
        _tile_loadd(6, b + 2 * kTileFloats, 64);
        _tile_dpbssd(4, 5, 6);
        _tile_loadd(5, a, 64);
        _tile_dpbssd(3, 5, 6);
        _tile_loadd(5, a + 2 * kTileFloats, 64);
        _tile_loadd(6, b, 64);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(4, 5, 7);
    }
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    _tile_stored(2, sums[2], 64);
    _tile_stored(3, sums[3], 64);
    _tile_stored(4, sums[4], 64);
    const __m512 columns = _mm512_loadu_ps(exponents_b);
    for (int64_t r = 0; r < 16; r++, products += kBlock) {
        __m512i sum[5];
        for (int64_t t = 0; t < 5; t++) sum[t] = _mm512_load_si512(sums[t] + 16 * r);
        const __m512i high = _mm512_add_epi32(_mm512_slli_epi32(sum[0], 8), sum[1]);
        const __m512i low = _mm512_add_epi32(_mm512_add_epi32(sum[2], sum[3]), _mm512_srai_epi32(sum[4], 8));
        const __m512 value = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), _mm512_set1_ps(256), _mm512_cvtepi32_ps(low));
        const __m512 unit = _mm512_sub_ps(_mm512_set1_ps(16 - exponents[r]), columns);
        _mm512_storeu_ps(products, _mm512_scalef_ps(value, unit));
    }
}

// Products of two left and two right bf16 tiles, `stride` floats from step to step: 32 x 32.
inline void multiply_bf16(const float* a, const float* a1, const float* b, const float* b1, int64_t steps, int64_t stride,
                          float* products) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t at = 0; at < steps * stride; at += stride) {
        _tile_loadd(4, a + at, 64);
        _tile_loadd(6, b + at, 64);
        _tile_loadd(5, a1 + at, 64);
        _tile_loadd(7, b1 + at, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, products, 4 * kBlock);
    _tile_stored(1, products + 16, 4 * kBlock);
    _tile_stored(2, products + 16 * kBlock, 4 * kBlock);
    _tile_stored(3, products + 16 * kBlock + 16, 4 * kBlock);
}

// 16 x 16 products of fp16 points over a panel.
inline void multiply_fp16(const float* a, const float* b, int64_t steps, float* products) {
    alignas(64) float sums[kBlock * kBlock];
    multiply_bf16(a, a + kTileFloats, b, b + kTileFloats, steps, 2 * kTileFloats, sums);
    for (int64_t r = 0; r < 16; r++, products += kBlock) {
        const float *of_first = sums + r * kBlock, *of_second = of_first + 16 * kBlock;
        store(products, load(of_first) + ((load(of_first + 16) + load(of_second)) + load(of_second + 16)));
    }
}

// Blocks [i0, i1) of the left operand with [j0, j1) of the right; sink(row, column, rows, products) gets `rows` x kBlock
// products at a time. `upper` leaves out what lies wholly below the diagonal.
template <class Sink>
inline void multiply(const float* left, int64_t i0, int64_t i1, const float* right, int64_t j0, int64_t j1, Form form,
                     int64_t width, bool upper, float* buffer, Sink sink) {
    const int64_t steps = steps_of(form, width), floats = tile_floats(form, width), stride = block_floats(form, width);
    stores_before_tiles();
    for (int64_t i = i0; i < i1; i++)
        for (int64_t j = upper && i > j0 ? i : j0; j < j1; j++) {
            const float *a = left + i * stride, *b = right + j * stride;
            if (form == Form::bf16)
                multiply_bf16(a, a + floats, b, b + floats, steps, kTileFloats, buffer);
            else
                for (int64_t t = 0; t < 4; t++) {
                    const int64_t tj = t / 2, ti = tj ^ (t & 1);  // the next one shares an operand
                    const float *ta = a + ti * floats, *tb = b + tj * floats;
                    float* products = buffer + (ti * kBlock + tj) * kTilePoints;
                    if (form == Form::fp16)
                        multiply_fp16(ta, tb, steps, products);
                    else
                        multiply_digits(ta, tb, steps, a + 2 * floats + ti * kTilePoints, b + 2 * floats + tj * kTilePoints,
                                        products);
                }
            sink(i * kBlock, j * kBlock, kBlock, buffer);
        }
}

}  // namespace
}  // namespace PYFOLD_SIMD
}  // namespace pyfold
