// x (N, D) in any dtype -> the upper block triangle of G += x xᵀ in fp32.
//
// Every entry G[i][j] is: for each panel of kPanel columns in order, the engine's product of rows i and j over the panel, then
// one addition. It depends on rows i and j alone, not on tiles, threads or the rows' positions, so permuting the rows
// permutes G bit for bit, and equal rows have distance exactly 0.
#include <omp.h>

#include "engine.h"

namespace pyfold {
namespace PYFOLD_SIMD {
namespace {

// Several panels are packed at once, and a cache tile of G visited once for all of them; as many as fit these bytes.
constexpr int64_t kPackedBytes = int64_t{96} << 20;

inline int64_t panel_floats(int64_t n, DType dtype) {
    return blocks_of(n) * block_floats(dtype, Precision::full, kPanel) * (kTwoForms ? 2 : 1);
}

inline int64_t panels_at_once(int64_t n, int64_t d, DType dtype) {
    const int64_t fit = kPackedBytes / (4 * panel_floats(n, dtype)), most = fit < 1 ? 1 : fit;
    return min_of(most, panels_of(d));
}

// rows x kBlock products to G at (i, j), clipped to N.
inline void add(float* g, int64_t n, int64_t i, int64_t j, int64_t rows, const float* products, bool replace) {
    const int64_t i_end = min_of(i + rows, n), columns = min_of(kBlock, n - j);
    for (; i < i_end; i++, products += kBlock) {
        float* to = g + i * n + j;
        if (replace)
            memcpy(to, products, sizeof(float) * columns);
        else if (columns == kBlock)
            for (int64_t k = 0; k < kBlock; k += kLanes) store(to + k, load(to + k) + load(products + k));
        else
            for (int64_t k = 0; k < columns; k++) to[k] += products[k];
    }
}

}  // namespace

int64_t gram_scratch(int64_t n, int64_t d, DType dtype, int threads) {
    return panels_at_once(n, d, dtype) * panel_floats(n, dtype) + threads * lines_of(buffer_floats());
}

void gram(const void* x, DType dtype, int64_t n, int64_t d, int64_t ld, bool transposed, bool accumulate, float* out,
          float* scratch, int threads) {
    const int64_t n_blocks = blocks_of(n), n_tiles = (n_blocks + kTile - 1) / kTile;
    const int64_t together = panels_at_once(n, d, dtype), stride = panel_floats(n, dtype);
    float* buffers = scratch + together * stride;
    const auto left = [&](int64_t panel) { return Operand{scratch + panel * stride, n_blocks}; };
    const auto right = [&](int64_t panel) {
        return Operand{scratch + panel * stride + (kTwoForms ? stride / 2 : 0), n_blocks};
    };
    for (int64_t column = 0; column < d; column += together * kPanel) {
        const int64_t width = min_of(together * kPanel, d - column), n_panels = panels_of(width);
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2)
        for (int64_t panel = 0; panel < n_panels; panel++)
            for (int64_t b = 0; b < n_blocks; b++)
                pack(x, dtype, Precision::full, n, ld, transposed, b * kBlock, column + panel * kPanel,
                     min_of(kPanel, width - panel * kPanel), left(panel), right(panel), b);
#pragma omp parallel num_threads(threads)
        {
            const Session session;
            float* buffer = buffers + omp_get_thread_num() * lines_of(buffer_floats());
#pragma omp for schedule(dynamic) collapse(2)
            for (int64_t ti = 0; ti < n_tiles; ti++) {
                for (int64_t tj = 0; tj < n_tiles; tj++) {
                    if (tj < ti) continue;
                    for (int64_t panel = 0; panel < n_panels; panel++) {
                        const bool replace = !accumulate && column + panel == 0;
                        multiply(left(panel), ti * kTile, min_of((ti + 1) * kTile, n_blocks), right(panel), tj * kTile,
                                 min_of((tj + 1) * kTile, n_blocks), dtype, Precision::full,
                                 min_of(kPanel, width - panel * kPanel), true, buffer,
                                 [&](int64_t i, int64_t j, int64_t rows, const float* products) {
                                     add(out, n, i, j, rows, products, replace);
                                 });
                    }
                }
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
