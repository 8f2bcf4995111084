// x (N, D) in any dtype -> the upper block triangle of G += x xᵀ in fp32, or the first rows of it.
//
// Every entry G[i][j] is: for each panel of columns in order, the engine's product of rows i and j over the panel, then
// one addition. It depends on rows i and j alone, not on tiles, threads or the rows' positions, so permuting the rows
// permutes G bit for bit, and equal rows have distance exactly 0.
#include <omp.h>

#include "engine.h"

namespace pyfold {
namespace PYFOLD_SIMD {
namespace {

// Several panels are packed at once, and a cache tile of G visited once for all of them; as many as fit these bytes, and
// kPanel columns at least.
constexpr int64_t kPackedBytes = int64_t{40} << 20;

inline Form form_of(DType dtype) { return dtype == DType::bf16 ? Form::bf16 : dtype == DType::f16 ? Form::fp16 : Form::fp32; }

// Of a packed panel: the points as the right operand, and the rows' where the left one has a form of its own.
inline int64_t right_floats(int64_t n, Form form) { return blocks_of(n) * block_floats(form, panel_of(form)); }

inline int64_t panel_floats(int64_t n, int64_t n_rows, Form form) {
    return right_floats(n, form) + (kTwoForms ? right_floats(n_rows, form) : 0);
}

inline int64_t panels_at_once(int64_t n, int64_t n_rows, int64_t d, Form form) {
    const int64_t fit = kPackedBytes / (4 * panel_floats(n, n_rows, form)), least = kPanel / panel_of(form);
    return min_of(fit < least ? least : fit, panels_of(form, d));
}

// rows x kBlock products to G at (i, j), clipped to its n_rows x N.
inline void add(float* g, int64_t n, int64_t n_rows, int64_t i, int64_t j, int64_t rows, const float* products, bool replace) {
    const int64_t i_end = min_of(i + rows, n_rows), columns = min_of(kBlock, n - j);
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

int64_t gram_scratch(int64_t n, int64_t n_rows, int64_t d, DType dtype, int threads) {
    const Form form = form_of(dtype);
    return panels_at_once(n, n_rows, d, form) * panel_floats(n, n_rows, form) + threads * lines_of(buffer_floats());
}

void gram(const void* x, DType dtype, int64_t n, int64_t n_rows, int64_t d, int64_t ld, bool transposed, bool accumulate,
          float* out, float* scratch, int threads) {
    const int64_t n_blocks = blocks_of(n), n_tiles = (n_blocks + kTile - 1) / kTile;
    const int64_t row_blocks = blocks_of(n_rows), row_tiles = (row_blocks + kTile - 1) / kTile;
    const Form form = form_of(dtype);
    const int64_t together = panels_at_once(n, n_rows, d, form), stride = panel_floats(n, n_rows, form);
    float* buffers = scratch + together * stride;
    const auto right = [&](int64_t panel) { return scratch + panel * stride; };
    const auto left = [&](int64_t panel) { return right(panel) + (kTwoForms ? right_floats(n, form) : 0); };
    const int64_t most = panel_of(form);
    for (int64_t column = 0; column < d; column += together * most) {
        const int64_t width = min_of(together * most, d - column), n_panels = panels_of(form, width);
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2)
        for (int64_t panel = 0; panel < n_panels; panel++)
            for (int64_t b = 0; b < n_blocks; b++)
                pack(x, dtype, form, n, ld, transposed, b * kBlock, column + panel * most, min_of(most, width - panel * most),
                     !kTwoForms || b < row_blocks ? left(panel) : nullptr, right(panel), b);
#pragma omp parallel num_threads(threads)
        {
            const Session session;
            float* buffer = buffers + omp_get_thread_num() * lines_of(buffer_floats());
#pragma omp for schedule(dynamic) collapse(2)
            for (int64_t ti = 0; ti < row_tiles; ti++) {
                for (int64_t tj = 0; tj < n_tiles; tj++) {
                    if (tj < ti) continue;
                    for (int64_t panel = 0; panel < n_panels; panel++) {
                        const bool replace = !accumulate && column + panel == 0;
                        multiply(left(panel), ti * kTile, min_of((ti + 1) * kTile, row_blocks), right(panel), tj * kTile,
                                 min_of((tj + 1) * kTile, n_blocks), form, min_of(most, width - panel * most), true, buffer,
                                 [&](int64_t i, int64_t j, int64_t rows, const float* products) {
                                     add(out, n, n_rows, i, j, rows, products, replace);
                                 });
                    }
                }
            }
        }
    }
}

void mirror(float* g, int64_t n, int64_t ld, int threads) {
    // Through a block that fits a few cache lines: column by column every element read is a line of its own, all in one set of
    // the cache where N is a multiple of 1024.
    constexpr int64_t kSide = 16;
    const int64_t n_sides = (n + kSide - 1) / kSide;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4)
    for (int64_t bi = 0; bi < n_sides; bi++)
        for (int64_t bj = 0; bj <= bi; bj++) {
            const int64_t i0 = bi * kSide, j0 = bj * kSide, rows = min_of(kSide, n - i0), columns = min_of(kSide, n - j0);
            float upper[kSide][kSide];
            for (int64_t j = 0; j < columns; j++) memcpy(upper[j], g + (j0 + j) * ld + i0, sizeof(float) * rows);
            for (int64_t i = 0; i < rows; i++) {
                const int64_t j_end = min_of(columns, i0 + i - j0);
                for (int64_t j = 0; j < j_end; j++) g[(i0 + i) * ld + j0 + j] = upper[j][i];
            }
        }
}

}  // namespace PYFOLD_SIMD
}  // namespace pyfold
