// The means of k-means: a block sums kPiece members of a cluster in fp32, then the pieces of a cluster are summed in fp64.
// Long clusters spread over many blocks, and no sum in fp32 is longer than kPiece, so clusters of 10^6 members lose nothing.
// Every order is fixed: the same bits on every run.
#include "cuda/floats.h"
#include "cuda/merge.h"

namespace pyfold {
namespace cuda {

namespace {

constexpr int kThreads = 256, kWarp = 32, kBatch = 4;

// The cluster, of n, that piece number `piece` belongs to.
__device__ int cluster_of(const int* pieces, int64_t n, int piece) {
    int64_t low = 0, high = n;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (pieces[middle] <= piece ? low : high) = middle;
    }
    return static_cast<int>(low);
}

// blockDim.x threads share a row of x, V columns each; the blockDim.y rows of threads share the members.
template <typename In, int V>
__global__ void __launch_bounds__(kThreads, 4)
    sum_pieces(const UpdateProblem* problems, Segments clusters, const int* pieces, double* mass) {
    __shared__ float sums[kThreads * V];
    const UpdateProblem problem = problems[blockIdx.z];
    pieces += problem.cluster;
    const int piece = pieces[0] + static_cast<int>(blockIdx.x);
    if (piece >= pieces[problem.n_clusters]) return;  // the grid is a bound
    const int64_t column = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * V;
    if (blockIdx.y > 0 && static_cast<int64_t>(blockIdx.y) * blockDim.x * V >= problem.d) return;
    const int c = cluster_of(pieces, problem.n_clusters, piece);
    const int64_t begin = clusters.offsets[problem.cluster + c] + (piece - pieces[c]) * kPiece;
    const int64_t left = clusters.offsets[problem.cluster + c + 1] - begin;
    const int count = static_cast<int>(left < kPiece ? left : kPiece);
    const int* const members = clusters.members + begin;
    const In* const x = global(static_cast<const In*>(problem.x));
    const double* const weights = problem.weights ? global(problem.weights) : nullptr;
    float sum[V] = {};
    if (column < problem.d) {
        // kBatch rows on their way before the first is used: left to itself the compiler waits for each.
        for (int first = threadIdx.y; first < count; first += kBatch * blockDim.y) {
            Pack<In, V> packs[kBatch];
            float w[kBatch];
#pragma unroll
            for (int b = 0; b < kBatch; b++) {
                const int m = first + b * blockDim.y;
                const int64_t member = members[m < count ? m : first] - problem.point;
                packs[b] = load<Pack<In, V>>(x + member * problem.ld + column);
                w[b] = weights ? static_cast<float>(weights[member]) : 1.0f;
            }
#pragma unroll
            for (int b = 0; b < kBatch; b++) {
                if (first + b * blockDim.y >= count) break;
#pragma unroll
                for (int v = 0; v < V; v++) sum[v] = fmaf(w[b], widen(packs[b].v[v]), sum[v]);
            }
        }
    }
    float* const mine = sums + threadIdx.y * blockDim.x * V + threadIdx.x;
#pragma unroll
    for (int v = 0; v < V; v++) mine[v * blockDim.x] = sum[v];
    __syncthreads();
    // One thread a column: kThreads x V partial sums, of which blockDim.y make one.
    const int width = blockDim.x * V, thread = threadIdx.y * blockDim.x + threadIdx.x;
    for (int j = thread; j < width; j += kThreads) {
        float total = 0;
        for (int y = 0; y < blockDim.y; y++) total += sums[y * width + j];
        const int64_t at = static_cast<int64_t>(blockIdx.y) * width + j % blockDim.x * V + j / blockDim.x;
        if (at < problem.d) global(problem.sums)[blockIdx.x * problem.d + at] = total;
    }
    if (blockIdx.y == 0 && thread < kWarp) {
        double weight = 0;
        for (int m = thread; m < count; m += kWarp) weight += weights ? weights[members[m] - problem.point] : 1.0;
#pragma unroll
        for (int lane = kWarp / 2; lane > 0; lane /= 2) weight += __shfl_xor_sync(0xffffffffu, weight, lane);
        if (thread == 0) mass[piece] = weight;
    }
}

__global__ void __launch_bounds__(kThreads) mean_pieces(const UpdateProblem* problems, const int* pieces, const double* mass) {
    const UpdateProblem problem = problems[blockIdx.y];
    const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (index >= problem.n_clusters * problem.d) return;
    const int64_t c = problem.cluster + index / problem.d, column = index % problem.d;
    const int first = pieces[problem.cluster];
    double sum = 0, weight = 0;
    for (int piece = pieces[c]; piece < pieces[c + 1]; piece++) {
        sum += global(problem.sums)[(piece - first) * problem.d + column];
        weight += mass[piece];
    }
    global(problem.out)[index] = static_cast<float>(sum / weight);
}

template <typename In, int V>
cudaError_t launch_pieces(const UpdateProblem* problems, int64_t n_problems, int64_t max_d, int64_t max_pieces,
                          const Segments& clusters, const int* pieces, double* mass, cudaStream_t stream) {
    int64_t lanes = kThreads;
    while (lanes > 1 && lanes / 2 * V >= max_d) lanes /= 2;
    const dim3 block(static_cast<unsigned>(lanes), static_cast<unsigned>(kThreads / lanes));
    const dim3 grid(static_cast<unsigned>(max_pieces), static_cast<unsigned>(ceil_div(max_d, lanes * V)),
                    static_cast<unsigned>(n_problems));
    return launch(sum_pieces<In, V>, grid, block, 0, stream, problems, clusters, pieces, mass);
}

}  // namespace

cudaError_t update(const UpdateProblem* problems, int64_t n_problems, DType in, bool vector, int64_t max_d, int64_t max_pieces,
                   int64_t max_clusters, const Segments& clusters, const int* pieces, double* mass, cudaStream_t stream) {
    const cudaError_t error = with_dtype(nullptr, in, [&](auto* x) {
        using In = std::remove_const_t<std::remove_pointer_t<decltype(x)>>;
        if (vector)
            return launch_pieces<In, 16 / sizeof(In)>(problems, n_problems, max_d, max_pieces, clusters, pieces, mass, stream);
        return launch_pieces<In, 1>(problems, n_problems, max_d, max_pieces, clusters, pieces, mass, stream);
    });
    if (error) return error;
    const dim3 grid(static_cast<unsigned>(ceil_div(max_clusters * max_d, kThreads)), static_cast<unsigned>(n_problems));
    return launch(mean_pieces, grid, dim3(kThreads), 0, stream, problems, pieces, mass);
}

}  // namespace cuda
}  // namespace pyfold
