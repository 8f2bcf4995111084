// Folding a weight: producer rows become the weighted mean of their cluster, consumer columns the sum. Bound by memory: each
// input is read once, rows 16 bytes a thread where they begin on 16, columns staged in shared memory, converted in registers,
// summed in fp32 in ascending order of the members, and rounded once. A cluster of one keeps its bits.
#include "cuda/merge.h"

#include "cuda/floats.h"

namespace pyfold {
namespace cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kPacks = 2;  // of V columns a thread: twice the bytes on their way for one read of the member list

// A row of threads per cluster, V columns at a time. Four blocks an SM leave 64 registers: told nothing, the compiler spilled
// to keep to 40 (sm_100).
template <typename In, int V>
__global__ void __launch_bounds__(kThreads, 4)
    mean_rows(const In* x, int64_t d, int64_t ld, Segments clusters, const double* weights, void* out, DType to) {
    const int64_t c = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
    if (c >= clusters.n_clusters) return;
    const int begin = clusters.offsets[c], end = clusters.offsets[c + 1];
    const int64_t column = (static_cast<int64_t>(blockIdx.y) * kPacks * blockDim.x + threadIdx.x) * V;
    const int64_t step = static_cast<int64_t>(blockDim.x) * V;
    const bool alone = end - begin == 1;
    float sum[kPacks][V] = {};
    double total = 0;
#pragma unroll 2
    for (int m = begin; m < end; m++) {
        const int64_t member = clusters.members[m];
        const double weight = weights ? weights[member] : 1.0;
        const float w = alone ? 1.0f : static_cast<float>(weight);
        total += weight;
#pragma unroll
        for (int p = 0; p < kPacks; p++) {
            if (column + p * step >= d) continue;
            const Pack<In, V> pack = load<Pack<In, V>>(x + member * ld + column + p * step);
#pragma unroll
            for (int v = 0; v < V; v++) {  // the first member is assigned, not added to 0: −0 stays −0
                const float value = w * widen(pack.v[v]);
                sum[p][v] = m == begin ? value : sum[p][v] + value;
            }
        }
    }
    const float divisor = alone ? 1.0f : static_cast<float>(total);
#pragma unroll
    for (int p = 0; p < kPacks; p++) {
        if (column + p * step >= d) continue;
#pragma unroll
        for (int v = 0; v < V; v++) sum[p][v] /= divisor;
        store_floats(out, to, c * d + column + p * step, sum[p]);
    }
}

template <typename In, int V>
cudaError_t launch_rows(const In* x, int64_t d, int64_t ld, const Segments& clusters, const double* weights, void* out,
                        DType to, cudaStream_t stream) {
    int64_t lanes = kThreads;
    while (lanes > 1 && lanes / 2 * kPacks * V >= d) lanes /= 2;
    const dim3 block(static_cast<unsigned>(lanes), static_cast<unsigned>(kThreads / lanes));
    const dim3 grid(static_cast<unsigned>(ceil_div(clusters.n_clusters, block.y)),
                    static_cast<unsigned>(ceil_div(d, lanes * kPacks * V)));
    return launch(mean_rows<In, V>, grid, block, 0, stream, x, d, ld, clusters, weights, out, to);
}

// Rows side by side in shared memory: memory[column].v[row], so that one index and one access serve them all.
// `pairs`: two columns at a time, 128 bytes a warp and row.
template <typename In, int kRows>
__device__ void stage(Pack<In, kRows>* memory, const In* x, int rows, int n, int64_t ld, bool pairs) {
    const int even = pairs ? n / 2 * 2 : 0;
    for (int j = 2 * threadIdx.x; j < even; j += 2 * blockDim.x) {
        Pack<Pack<In, kRows>, 2> columns;
#pragma unroll
        for (int r = 0; r < kRows; r++) {
            const Pack<In, 2> pair = load<Pack<In, 2>>(x + (r < rows ? r : 0) * ld + j);
            columns.v[0].v[r] = pair.v[0];
            columns.v[1].v[r] = pair.v[1];
        }
        store(memory + j, columns);
    }
    for (int j = even + threadIdx.x; j < n; j += blockDim.x)
#pragma unroll
        for (int r = 0; r < kRows; r++) memory[j].v[r] = x[(r < rows ? r : 0) * ld + j];
}

// Where kStaged is false a row does not fit shared memory, and members are read in place.
template <typename In, int kRows, bool kStaged>
__global__ void __launch_bounds__(1024, kStaged ? 2 : 1)
    sum_columns(const In* x, int64_t h, int n, int64_t ld, Segments clusters, const float* scale, bool pairs, void* out,
                DType to) {
    const int64_t first = static_cast<int64_t>(blockIdx.x) * kRows;
    const int rows = h - first < kRows ? static_cast<int>(h - first) : kRows;
    x += first * ld;
    Pack<In, kRows>* const memory = dynamic_shared<Pack<In, kRows>>();
    if (kStaged) {
        stage(memory, x, rows, n, ld, pairs);
        __syncthreads();
    }
    for (int64_t c = threadIdx.x; c < clusters.n_clusters; c += blockDim.x) {
        const int begin = clusters.offsets[c], end = clusters.offsets[c + 1];
        float sum[kRows] = {};
        for (int m = begin; m < end; m++) {
            const int j = clusters.members[m];
            const Pack<In, kRows> values = load<Pack<In, kRows>>(kStaged ? static_cast<const void*>(memory + j) : x + j);
            const float s = scale ? scale[j] : 1.0f;
#pragma unroll
            for (int r = 0; r < kRows; r++) {
                const float value = s * widen(values.v[r]);
                sum[r] = m == begin ? value : sum[r] + value;
            }
        }
#pragma unroll
        for (int r = 0; r < kRows; r++) {
            const float one[1] = {sum[r]};
            if (r < rows) store_floats(out, to, (first + r) * clusters.n_clusters + c, one);
        }
    }
}

template <typename In, int kRows, bool kStaged>
cudaError_t launch_columns(const In* x, int64_t h, int64_t n, int64_t ld, const Segments& clusters, const float* scale,
                           void* out, DType to, const Tile& tile, cudaStream_t stream) {
    const bool pairs = aligned(x, 2 * sizeof(In)) && (ld % 2 == 0 || h == 1);
    const dim3 grid(static_cast<unsigned>(ceil_div(h, kRows))), block(static_cast<unsigned>(tile.threads));
    return launch(sum_columns<In, kRows, kStaged>, grid, block, static_cast<size_t>(tile.shared), stream, x, h, n, ld, clusters,
                  scale, pairs, out, to);
}

}  // namespace

cudaError_t merge_rows(const void* x, DType in, int64_t d, int64_t ld, const Segments& clusters, const double* weights,
                       void* out, DType to, cudaStream_t stream) {
    return with_dtype(x, in, [&](auto* rows) {
        using In = std::remove_const_t<std::remove_pointer_t<decltype(rows)>>;
        constexpr int kWide = 16 / sizeof(In);
        if (aligned(rows, 16) && aligned(out, 16) && ld % kWide == 0 && d % kWide == 0)
            return launch_rows<In, kWide>(rows, d, ld, clusters, weights, out, to, stream);
        return launch_rows<In, 1>(rows, d, ld, clusters, weights, out, to, stream);
    });
}

cudaError_t merge_columns(const void* x, DType in, int64_t h, int64_t n, int64_t ld, const Segments& clusters,
                          const float* scale, void* out, DType to, const Chip& chip, cudaStream_t stream) {
    return with_dtype(x, in, [&](auto* rows) {
        using In = std::remove_const_t<std::remove_pointer_t<decltype(rows)>>;
        const Tile tile = columns_tile(n, sizeof(In), chip);
        if (tile.rows == 0) return launch_columns<In, 1, false>(rows, h, n, ld, clusters, scale, out, to, tile, stream);
        if (tile.rows == 1) return launch_columns<In, 1, true>(rows, h, n, ld, clusters, scale, out, to, tile, stream);
        if (tile.rows == 2) return launch_columns<In, 2, true>(rows, h, n, ld, clusters, scale, out, to, tile, stream);
        if constexpr (sizeof(In) == 2)
            return launch_columns<In, 4, true>(rows, h, n, ld, clusters, scale, out, to, tile, stream);
        return cudaErrorInvalidConfiguration;  // columns_tile holds 8 bytes of a column at most
    });
}

}  // namespace cuda
}  // namespace pyfold
