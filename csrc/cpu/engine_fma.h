// The product engine of the FMA units: packed points x packed points -> blocks of inner products.
//
// Every product of two points over a panel of columns is one FMA chain over its columns in order. Where there are bf16 dot
// units, bf16 points go through them, two columns at a time. a·b = b·a bit for bit: swapping the operands changes nothing.
#pragma once

#include "simd.h"

namespace pyfold {
namespace PYFOLD_SIMD {
namespace {

// Register tile: kMr x (kNrv vectors). One packed copy of a panel serves both operands, so kMr divides kBlock.
// 8 x 3 uses 24 of 32 AVX-512 registers for sums; 4 x 3 uses 12 of 16 elsewhere.
constexpr int kNrv = 3;
constexpr int64_t kBlock = kNrv * kLanes;
constexpr int kMr = kLanes == 16 ? 8 : 4;
static_assert(kBlock % kMr == 0, "one packing serves rows and columns");
// Cache tile of kTile x kTile blocks: two packed operands of 8 * 48 * 512 floats take 1.5 MiB of L2 on AVX-512.
constexpr int64_t kTile = 8;
constexpr bool kTwoForms = false;  // left and right operands are packed alike
// Of fp32 points over a panel, in units of |x| |y|: a rounding of the sum a column.
constexpr float kProductError = kPanel * kRounding;

#if defined(__AVX512BF16__)
inline bool in_pairs(Form form) { return form == Form::bf16; }
inline vfloat multiply_add(vfloat sum, float a, vfloat b, bool pairs) {
    if (!pairs) return sum + a * b;
    return (vfloat)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(float_to_bits(a))), (__m512bh)b);
}
#else
inline bool in_pairs(Form) { return false; }
inline vfloat multiply_add(vfloat sum, float a, vfloat b, bool) { return sum + a * b; }
#endif

constexpr int64_t panel_of(Form) { return kPanel; }

// Packed floats of one block over one panel.
inline int64_t block_floats(Form, int64_t) { return kBlock * kPanel; }
inline int64_t buffer_floats() { return kMr * kBlock; }

struct Session {  // what a thread holds while it multiplies
    Session() {}
};

// Points first .. first + kBlock of x, columns column .. column + width, as [column][point]; points past N as zeros.
void pack(const void* x, DType dtype, Form form, int64_t n, int64_t ld, bool transposed, int64_t first, int64_t column,
          int64_t width, float* out, float*, int64_t block) {
    float* to = out + block * kBlock * kPanel;
    const int64_t points = min_of(kBlock, n - first);
    if (in_pairs(form)) {  // as [pair of columns][point][2]
        const uint16_t* from = static_cast<const uint16_t*>(x);
        uint16_t* pair = reinterpret_cast<uint16_t*>(to);
        memset(to, 0, sizeof(float) * kBlock * ((width + 1) / 2));
        for (int64_t r = 0; r < points; r++)
            for (int64_t k = 0; k < width; k++)
                pair[(k / 2 * kBlock + r) * 2 + k % 2] =
                    transposed ? from[(column + k) * ld + first + r] : from[(first + r) * ld + column + k];
        return;
    }
    if (points < kBlock) memset(to, 0, sizeof(float) * kBlock * width);
    if (transposed) {
        for (int64_t k = 0; k < width; k++) read_floats(x, dtype, (column + k) * ld + first, points, to + k * kBlock);
        return;
    }
    float line[kPanel];
    for (int64_t r = 0; r < points; r++) {
        read_floats(x, dtype, (first + r) * ld + column, width, line);
        for (int64_t k = 0; k < width; k++) to[k * kBlock + r] = line[k];
    }
}

// out (kMr x kBlock) = a bᵀ over `length` packed columns or pairs of columns.
template <bool pairs>
inline void micro(const float* a, const float* b, int64_t length, float* out) {
    vfloat sum[kMr][kNrv] = {};
    for (int64_t k = 0; k < length; k++, a += kBlock, b += kBlock) {
        const vfloat b0 = load(b), b1 = load(b + kLanes), b2 = load(b + 2 * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < kMr; r++) {
            sum[r][0] = multiply_add(sum[r][0], a[r], b0, pairs);
            sum[r][1] = multiply_add(sum[r][1], a[r], b1, pairs);
            sum[r][2] = multiply_add(sum[r][2], a[r], b2, pairs);
        }
    }
    for (int r = 0; r < kMr; r++)
        for (int v = 0; v < kNrv; v++) store(out + r * kBlock + v * kLanes, sum[r][v]);
}

// Blocks [i0, i1) of the left operand with [j0, j1) of the right; sink(row, column, rows, products) gets `rows` x kBlock
// products at a time. `upper` leaves out what lies wholly below the diagonal.
template <class Sink>
inline void multiply(const float* left, int64_t i0, int64_t i1, const float* right, int64_t j0, int64_t j1, Form form,
                     int64_t width, bool upper, float* buffer, Sink sink) {
    for (int64_t i = i0 * kBlock; i < i1 * kBlock; i += kMr) {
        const float* a = left + i / kBlock * kBlock * kPanel + i % kBlock;
        for (int64_t j = upper && i / kBlock > j0 ? i / kBlock : j0; j < j1; j++) {
            const float* b = right + j * kBlock * kPanel;
            if (in_pairs(form))
                micro<true>(a, b, (width + 1) / 2, buffer);
            else
                micro<false>(a, b, width, buffer);
            sink(i, j * kBlock, kMr, buffer);
        }
    }
}

}  // namespace
}  // namespace PYFOLD_SIMD
}  // namespace pyfold
