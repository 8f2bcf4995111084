// Problem sizes and a chip's limits -> how a kernel is launched. Pure functions of integers: tested without a GPU.
#pragma once

#include <cstdint>

namespace pyfold {
namespace cuda {

struct Chip {
    int64_t shared_per_block;  // bytes a block may ask for: 232448 on sm_90 and sm_100, 166912 on sm_80, 101376 on sm_86
    int64_t shared_per_sm;     // 233472, 167936, 102400: a block takes kReserved of it beside what it asked for
    int64_t threads_per_sm;    // 2048; 1536 on sm_86
};

struct Tile {
    int64_t threads;
    int64_t rows;           // of the matrix that a block holds at once; 0: they do not fit, and are read in place
    int64_t shared;         // bytes, dynamic
    int64_t blocks_per_sm;  // resident at once; a persistent grid is this times the SMs
};

inline constexpr int64_t kReserved = 1024;  // shared memory that the system takes from every block
inline constexpr int64_t kStatic = 512;     // at most, of the kernels here

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
// A point is four columns' worth of work for a thread; a block is at least two warps and at most 1024 threads.
constexpr int64_t threads_for(int64_t n) { return smaller(1024, larger(64, ceil_div(ceil_div(n, 4), 32) * 32)); }

// Floats of shared memory for a row of n: it starts at the row's own offset from a 16-byte boundary.
constexpr int64_t row_floats(int64_t n) { return ceil_div(n + 3, 4) * 4; }

// Lloyd's pass: one row in use and the next on its way (rows = 2) where both fit. What sums a row (indices, two floats a
// cluster: 10 bytes a point at K = N/2) should stay in the L1 cache, which shares its memory with the rows: blocks take
// half of the SM's at most, unless one alone takes more.
constexpr Tile lloyd_tile(int64_t n, const Chip& chip) {
    const int64_t row = 4 * row_floats(n), limit = chip.shared_per_block - kStatic;
    const int64_t rows = 2 * row <= limit ? 2 : row <= limit ? 1 : 0;
    const int64_t threads = threads_for(n), block = rows * row + kStatic + kReserved;
    const int64_t by_threads = larger(1, chip.threads_per_sm / threads), by_memory = larger(1, chip.shared_per_sm / 2 / block);
    return Tile{threads, rows, rows * row, smaller(by_threads, by_memory)};
}

// Merging columns: a block holds the same columns of several rows side by side, so that one index and one access of up to
// 8 bytes serve them all. As many as leave two blocks on an SM, one loading while the other sums; else as many as fit.
constexpr Tile columns_tile(int64_t n, int64_t item, const Chip& chip) {
    const int64_t limit = chip.shared_per_block - kStatic, columns = ceil_div(n, 2) * 2;
    int64_t rows = 8 / item;
    while (rows > 1 && 2 * (rows * item * columns + kStatic + kReserved) > chip.shared_per_sm) rows /= 2;
    if (rows * item * columns > limit) rows = 0;
    const int64_t threads = threads_for(n), shared = rows * item * columns, block = shared + kStatic + kReserved;
    return Tile{threads, rows, shared, larger(1, smaller(chip.threads_per_sm / threads, chip.shared_per_sm / block))};
}

}  // namespace cuda
}  // namespace pyfold
