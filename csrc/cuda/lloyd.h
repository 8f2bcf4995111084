// One Lloyd pass over Gram matrices: for every point its nearest cluster, in one read of G.
#pragma once

#include <cstdint>

#include "cuda/launch.h"
#include "cuda/tiles.h"

namespace pyfold {
namespace cuda {

// One problem of a batch: 64-bit words, laid out by pyfold/ops/cuda.py. The points and the clusters of all problems are
// numbered through: problem p has points [point, point + n) and clusters [cluster, cluster + n_clusters).
struct LloydProblem {
    const float* gram;      // (N, N)
    const double* weights;  // (N,)
    const int64_t* labels;  // (N,) in [0, K)
    int64_t* nearest;       // (N,) out
    float* distances;       // (N,) out
    char* workspace;        // lloyd_workspace(n, n_clusters) bytes, aligned to 16
    int64_t n, n_clusters, point, cluster;
};

int64_t lloyd_workspace(int64_t n, int64_t n_clusters);

// members: points sorted by cluster, ascending within each; offsets[c] .. offsets[c + 1] are those of cluster c.
// share: scratch, one double per point. n_points and n_clusters are totals; `tile` is that of the largest problem.
cudaError_t lloyd(const LloydProblem* problems, int64_t n_problems, int64_t n_points, int64_t n_clusters, const int* members,
                  const int* offsets, double* share, const Tile& tile, int64_t multiprocessors, cudaStream_t stream);

}  // namespace cuda
}  // namespace pyfold
