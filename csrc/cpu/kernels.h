// The CPU kernels' C interface: plain pointers and sizes in, nothing owned, nothing thrown.
//
// Every kernel is compiled once per SIMD level from the same source into its own namespace; dispatch.cpp picks a table.
// Shapes: B batch, N points, D features, K clusters, H hidden. All matrices are row-major.
#pragma once

#include <cstdint>

namespace pyfold {

enum class DType : int { f32 = 0, f16 = 1, bf16 = 2 };

inline constexpr int64_t kPanel = 512;  // feature columns per Gram partial sum: part of the definition of the result

// Clusters as compressed sparse rows: cluster c holds members[offsets[c] .. offsets[c + 1]), in ascending order.
struct Clusters {
    int64_t n_clusters;
    const int64_t* offsets;
    const int64_t* members;
};

// One join of Ward's: the weights before it, and its cost.
struct WardJoin {
    int64_t lo, hi;
    float lo_weight, hi_weight, cost;
};

// The kernels that multiply points by points. Some levels have units of their own for them.
struct Products {
    // Floats of scratch, aligned to 64 bytes, that `gram` needs.
    int64_t (*gram_scratch)(int64_t n, int64_t n_rows, int64_t d, DType dtype, int threads);
    // The first n_rows rows, of the upper block triangle, of gram (N x N) = or += sum over panels of P Pᵀ. x is (N, D), or
    // (D, N) when `transposed`, with `ld` elements between rows.
    void (*gram)(const void* x, DType dtype, int64_t n, int64_t n_rows, int64_t d, int64_t ld, bool transposed, bool accumulate,
                 float* gram, float* scratch, int threads);
    // Floats of scratch, aligned to 64 bytes, that `assign` needs.
    int64_t (*assign_scratch)(int64_t d, int64_t n_clusters, int threads);
    // Nearest of the centroids (K, D) for every row of x (N, D), and the squared distance to it. K < 2^31.
    void (*assign)(const void* x, DType dtype, int64_t n, int64_t d, int64_t ld, const float* centroids, int64_t n_clusters,
                   int64_t* labels, float* distances, float* scratch, int threads);
};

struct Kernels {
    const Products* products;
    // Lower triangle <- upper triangle, of N rows of length ld.
    void (*mirror)(float* gram, int64_t n, int64_t ld, int threads);
    // Greedy Ward on a full symmetric Gram matrix, in height order, until n_clusters are left. Consumes the lower
    // triangle (Ward costs); the upper one and the diagonal stay. weights: N, becomes the cluster weights.
    // lo/hi/height: N - K joins; the joined cluster keeps index hi.
    // scratch_key: N floats; scratch_near: N ints.
    void (*ward)(float* gram, int64_t n, int64_t n_clusters, double* weights, int64_t* lo, int64_t* hi, double* height,
                 float* scratch_key, int64_t* scratch_near, int threads);
    // The same by whole rows of costs (ward_rows.h). Smallest of x and its first index; (inf, 0) where all are infinite.
    float (*argmin)(const float* x, int64_t n, int64_t* index);
    // The first `end` entries of row i of a Gram matrix -> costs of joining i with each; infinite with itself.
    void (*ward_costs)(float* row, int64_t end, int64_t i, const float* diagonal, const double* weights);
    // The first `end` costs of a cluster of weight w -> after `count` joins of others.
    void (*ward_replay)(float* row, int64_t end, float w, const WardJoin* joins, int64_t count);
    // The costs of the two that join -> in hi_row those of the cluster they become. weights: N, before the join.
    void (*ward_join)(const float* lo_row, float* hi_row, int64_t n, const float* weights, const WardJoin& join);
    // sums[j] += sum over rows of w_i * row_i[j].
    void (*sum_rows)(const float* const* rows, const double* weights, int64_t count, int64_t n, double* sums, int threads);
    // out[c] = sum over j in c of w_j row[j]; `order` sorts the columns by cluster, offsets[K + 1] delimits them.
    void (*segment_sum)(const float* row, const Clusters& clusters, const double* weights, double* out);
    // Cheapest and second cheapest cluster for a point of weight w to enter: w W_c / (W_c + w) d²(i, c) over c != own.
    void (*cheapest)(const double* sums, const double* total, const double* weight, int64_t n_clusters, int64_t own,
                     double self, double w, double* cost, double* second, int64_t* target);
    // Nearest cluster by d²(i, c), c = own unless another is strictly nearer; the lowest index among equals.
    void (*nearest)(const double* sums, const double* total, const double* weight, int64_t n_clusters, int64_t own, double self,
                    double* distance, int64_t* target);
    // Weighted mean of each cluster's rows: x (N, D) -> out (K, D). weights may be null.
    void (*merge_rows)(const void* x, DType in, int64_t d, int64_t ld, const Clusters& clusters, const double* weights,
                       void* out, DType to, int threads);
    // Floats of scratch, aligned to 64 bytes, that `merge_columns` needs.
    int64_t (*merge_columns_scratch)(int64_t n, int64_t n_clusters, int threads);
    // Sum of each cluster's scaled columns: x (H, N) -> out (H, K). scale may be null.
    void (*merge_columns)(const void* x, DType in, int64_t h, int64_t n, int64_t ld, const Clusters& clusters,
                          const float* scale, void* out, DType to, float* scratch, int threads);
    // Index of the first NaN or infinity in x, or -1.
    int64_t (*first_nonfinite)(const void* x, DType dtype, int64_t count, int threads);
};

namespace baseline {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512bf16 {
extern const Products products;
}
namespace amx {
extern const Products products;
}

// The table of a SIMD level by name ("baseline", "avx2", "avx512", "avx512bf16", "amx"), or null where this build or this CPU
// lacks it.
const Kernels* kernels_for(const char* level);

}  // namespace pyfold
