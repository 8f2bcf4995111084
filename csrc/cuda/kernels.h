// Host entry points of the clustering kernels over G: plain pointers and sizes in, everything enqueued on `stream`, no wait.
//
// Each takes a list of problems in host memory and solves them together. Matrices, labels and results live on the device;
// so does `workspace`, of the size that the function's twin says, 256-byte aligned.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace pyfold {
namespace cuda {

struct WardProblem {
    float* gram;            // N x N, symmetric; equal to its upper triangle afterwards
    const double* weights;  // N, positive
    int64_t n, n_clusters;
    int64_t *lo, *hi;  // N - K joins in height order: lo[s] enters hi[s], lo < hi
    double* height;
};

struct HartiganProblem {
    const float* gram;      // N x N, symmetric
    const double* weights;  // N, positive
    int64_t n, n_clusters, max_moves;
    int64_t* labels;  // N, in [0, K), every cluster non-empty; refined in place
    double* gains;    // max_moves: what each move took off the inertia, in order
    int64_t* moves;   // 1: how many moves were made; fewer than max_moves at a fixed point, else call again to go on
};

extern "C" {
size_t pyfold_cuda_ward_workspace(const WardProblem* problems, int64_t count);
cudaError_t pyfold_cuda_ward(const WardProblem* problems, int64_t count, void* workspace, cudaStream_t stream);
size_t pyfold_cuda_hartigan_workspace(const HartiganProblem* problems, int64_t count);
cudaError_t pyfold_cuda_hartigan(const HartiganProblem* problems, int64_t count, void* workspace, cudaStream_t stream);
}

}  // namespace cuda
}  // namespace pyfold
