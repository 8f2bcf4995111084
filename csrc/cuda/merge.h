// Clusters of rows or columns -> one row or column each: the folding of a weight, and the means of k-means.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"  // DType
#include "cuda/launch.h"
#include "cuda/tiles.h"

namespace pyfold {
namespace cuda {

// A partition on the device: cluster c holds members[offsets[c] .. offsets[c + 1]), in ascending order. N < 2^31.
struct Segments {
    int64_t n_clusters;
    const int* offsets;
    const int* members;
};

// Weighted mean of each cluster's rows: x (N, D), ld elements between rows, to out (K, D). weights may be null.
cudaError_t merge_rows(const void* x, DType in, int64_t d, int64_t ld, const Segments& clusters, const double* weights,
                       void* out, DType to, cudaStream_t stream);

// Sum of each cluster's scaled columns: x (H, N) to out (H, K). scale may be null.
cudaError_t merge_columns(const void* x, DType in, int64_t h, int64_t n, int64_t ld, const Segments& clusters,
                          const float* scale, void* out, DType to, const Chip& chip, cudaStream_t stream);

// One problem of a batch of updates: 64-bit words, laid out by pyfold/ops/cuda.py. Points and clusters of all problems are
// numbered through: these are from `point` and from `cluster` on.
struct UpdateProblem {
    const void* x;          // (N, D)
    const double* weights;  // (N,) or null
    float* out;             // (K, D)
    float* sums;            // scratch: (pieces of this problem, D)
    int64_t d, ld, n_clusters, point, cluster;
};

inline constexpr int64_t kPiece = 256;  // members summed by one block

// Weighted means in fp32: sums of kPiece members in fp32, sums of these in fp64. Cluster c has the pieces[c] .. pieces[c +
// 1]-th of them (of all problems), at most max_pieces in a problem; mass is scratch, a double per piece. `vector`: every row of
// every problem begins on 16 bytes and is a multiple of 16 bytes long.
cudaError_t update(const UpdateProblem* problems, int64_t n_problems, DType in, bool vector, int64_t max_d, int64_t max_pieces,
                   int64_t max_clusters, const Segments& clusters, const int* pieces, double* mass, cudaStream_t stream);

struct MirrorProblem {
    float* gram;
    int64_t n, ld;
};

// Lower triangle <- upper triangle, of the first n columns of n rows that lie ld elements apart.
cudaError_t mirror(const MirrorProblem* problems, int64_t n_problems, int64_t max_n, cudaStream_t stream);

}  // namespace cuda
}  // namespace pyfold
