// x (N, D) in any dtype -> the upper block triangle of G += x xᵀ in fp32.
//
// Every entry G[i][j] is: for each panel of kPanel columns in order, one FMA chain over the panel's columns in order, then
// one addition. It depends on rows i and j alone, not on tiles, threads or the rows' positions, so permuting the rows
// permutes G bit for bit, and equal rows have distance exactly 0.
#include "simd.h"

namespace pyfold {
namespace PYFOLD_SIMD {
namespace {

// Register tile: MR x (NRV vectors). One packed copy of a panel serves both operands, so MR divides NR.
// 8 x 3 uses 24 of 32 AVX-512 registers for sums; 4 x 3 uses 12 of 16 elsewhere.
constexpr int kNrv = 3;
constexpr int kNr = kNrv * kLanes;
constexpr int kMr = kLanes == 16 ? 8 : 4;
static_assert(kNr % kMr == 0, "one packing serves rows and columns");
// Cache tile of kTile x kTile blocks: two packed operands of 8 * 48 * 512 floats take 1.5 MiB of L2 on AVX-512.
constexpr int64_t kTile = 8;

inline int64_t blocks_of(int64_t n) { return (n + kNr - 1) / kNr; }

// Packed layout: block b holds [column][kNr rows] of a panel, rows past N as zeros.
void pack(const void* x, DType dtype, int64_t n, int64_t ld, bool transposed, int64_t column, int64_t width, float* packed,
          int threads) {
    const int64_t n_blocks = blocks_of(n);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t b = 0; b < n_blocks; b++) {
        float* block = packed + b * kNr * kPanel;
        const int64_t first = b * kNr, rows = min_of(kNr, n - first);
        if (rows < kNr) memset(block, 0, sizeof(float) * kNr * width);
        if (transposed) {
            for (int64_t k = 0; k < width; k++) read_floats(x, dtype, (column + k) * ld + first, rows, block + k * kNr);
        } else {
            float line[kPanel];
            for (int64_t r = 0; r < rows; r++) {
                read_floats(x, dtype, (first + r) * ld + column, width, line);
                for (int64_t k = 0; k < width; k++) block[k * kNr + r] = line[k];
            }
        }
    }
}

// c (kMr x kNr, row stride ldc) += a bᵀ over `width` columns; a and b are packed, kNr apart.
inline void micro(const float* a, const float* b, int64_t width, float* c, int64_t ldc) {
    vfloat sum[kMr][kNrv] = {};
    for (int r = 0; r < kMr; r++)
        for (int v = 0; v < kNrv; v++) __builtin_prefetch(c + r * ldc + v * kLanes, 1);
    for (int64_t k = 0; k < width; k++, a += kNr, b += kNr) {
        const vfloat b0 = load(b), b1 = load(b + kLanes), b2 = load(b + 2 * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < kMr; r++) {
            const vfloat ar = splat(a[r]);
            sum[r][0] += ar * b0;
            sum[r][1] += ar * b1;
            sum[r][2] += ar * b2;
        }
    }
    for (int r = 0; r < kMr; r++)
        for (int v = 0; v < kNrv; v++) {
            float* p = c + r * ldc + v * kLanes;
            store(p, load(p) + sum[r][v]);
        }
}

// One register tile at rows i.., columns of block bj, clipped to N.
void tile(const float* packed, int64_t i, int64_t bj, int64_t width, float* gram, int64_t n) {
    const float* a = packed + i / kNr * kNr * kPanel + i % kNr;
    const float* b = packed + bj * kNr * kPanel;
    const int64_t j = bj * kNr;
    if (i + kMr <= n && j + kNr <= n) {
        micro(a, b, width, gram + i * n + j, n);
        return;
    }
    float edge[kMr * kNr];
    const int64_t rows = min_of(kMr, n - i), columns = min_of(kNr, n - j);
    memset(edge, 0, sizeof edge);
    for (int64_t r = 0; r < rows; r++) memcpy(edge + r * kNr, gram + (i + r) * n + j, sizeof(float) * columns);
    micro(a, b, width, edge, kNr);
    for (int64_t r = 0; r < rows; r++) memcpy(gram + (i + r) * n + j, edge + r * kNr, sizeof(float) * columns);
}

}  // namespace

int64_t gram_scratch(int64_t n) { return blocks_of(n) * kNr * kPanel; }

void gram(const void* x, DType dtype, int64_t n, int64_t d, int64_t ld, bool transposed, float* out, float* scratch,
          int threads) {
    const int64_t n_blocks = blocks_of(n), n_tiles = (n_blocks + kTile - 1) / kTile;
    for (int64_t column = 0; column < d; column += kPanel) {
        const int64_t width = min_of(kPanel, d - column);
        pack(x, dtype, n, ld, transposed, column, width, scratch, threads);
#pragma omp parallel for num_threads(threads) schedule(dynamic) collapse(2)
        for (int64_t ti = 0; ti < n_tiles; ti++) {
            for (int64_t tj = 0; tj < n_tiles; tj++) {
                if (tj < ti) continue;
                const int64_t i_end = min_of((ti + 1) * kTile * kNr, n), b_end = min_of((tj + 1) * kTile, n_blocks);
                for (int64_t i = ti * kTile * kNr; i < i_end; i += kMr)
                    for (int64_t bj = tj * kTile; bj < b_end; bj++)
                        if ((bj + 1) * kNr > i) tile(scratch, i, bj, width, out, n);
            }
        }
    }
}

void mirror(float* g, int64_t n, int threads) {
    constexpr int64_t kSide = 32;
    const int64_t n_sides = (n + kSide - 1) / kSide;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t bi = 0; bi < n_sides; bi++)
        for (int64_t bj = 0; bj <= bi; bj++) {
            const int64_t i_end = min_of((bi + 1) * kSide, n);
            for (int64_t i = bi * kSide; i < i_end; i++) {
                const int64_t j_end = min_of((bj + 1) * kSide, i);
                for (int64_t j = bj * kSide; j < j_end; j++) g[i * n + j] = g[j * n + i];
            }
        }
}

}  // namespace PYFOLD_SIMD
}  // namespace pyfold
