// The lower triangle of a Gram matrix from the upper one, through 32 x 32 tiles in shared memory: both sides in whole lines.
#include "cuda/floats.h"
#include "cuda/merge.h"

namespace pyfold {
namespace cuda {

namespace {

constexpr int kTile = 32, kRowsAtOnce = 8;

__global__ void __launch_bounds__(kTile* kRowsAtOnce) mirror_tiles(const MirrorProblem* problems) {
    __shared__ float tile[kTile][kTile + 1];  // a column of it touches every bank once
    const MirrorProblem problem = problems[blockIdx.y];
    // Tiles of the upper triangle, column by column: blockIdx.x = column (column + 1) / 2 + row.
    int64_t column = static_cast<int64_t>((sqrt(8.0 * blockIdx.x + 1.0) - 1.0) / 2.0);
    while ((column + 1) * (column + 2) / 2 <= blockIdx.x) column++;
    while (column * (column + 1) / 2 > blockIdx.x) column--;
    const int64_t row = blockIdx.x - column * (column + 1) / 2, n = problem.n, ld = problem.ld;
    float* const gram = global(problem.gram);
    if (column * kTile >= n) return;
    const int64_t from_row = row * kTile, from_column = column * kTile;
    for (int y = threadIdx.y; y < kTile; y += kRowsAtOnce)
        if (from_row + y < n && from_column + threadIdx.x < n)
            tile[y][threadIdx.x] = gram[(from_row + y) * ld + from_column + threadIdx.x];
    __syncthreads();
    for (int y = threadIdx.y; y < kTile; y += kRowsAtOnce) {
        const int64_t i = from_column + y, j = from_row + threadIdx.x;
        if (i < n && j < i) gram[i * ld + j] = tile[threadIdx.x][y];
    }
}

}  // namespace

cudaError_t mirror(const MirrorProblem* problems, int64_t n_problems, int64_t max_n, cudaStream_t stream) {
    const int64_t tiles = ceil_div(max_n, kTile);
    const dim3 grid(static_cast<unsigned>(tiles * (tiles + 1) / 2), static_cast<unsigned>(n_problems));
    return launch(mirror_tiles, grid, dim3(kTile, kRowsAtOnce), 0, stream, problems);
}

}  // namespace cuda
}  // namespace pyfold
