// A full symmetric Gram matrix -> the cheapest N - K Ward joins, in height order.
//
// The lower triangle becomes the cost matrix C_ij = W_i W_j / (W_i + W_j) ‖c_i − c_j‖² (inertia added by joining i and j),
// updated by Lance and Williams (1967): C_(ab)c = ((W_a+W_c) C_ac + (W_b+W_c) C_bc − W_c C_ab) / (W_a+W_b+W_c).
// Costs rather than joint sums, because exact duplicates then stay exactly 0 and errors are relative to distances, not norms.
//
// Each row keeps its nearest neighbour among *lower* indices, so a scan is one contiguous run (Müllner 2011, the generic
// algorithm). Ward is reducible: a join never brings a third cluster closer, so the kept cost of a row whose neighbour died
// is a lower bound, and the row is scanned again only when it reaches the front. Joins come in height order.
//
// ward_rows.cpp does the same for a matrix in a file, row by row; what both compute is here, once.
//
// No contraction to FMA here: (W_a+W_c) C_ac + (W_b+W_c) C_bc must be symmetric in a and b for the result not to depend on
// the order of the points (compiled with -ffp-contract=off).
#include "simd.h"

namespace pyfold {
namespace PYFOLD_SIMD {
namespace {

constexpr float kInfinity = __builtin_inff();

inline float joined(float a, float b, float wa, float wb, float wc, float ab) {
    const float cost = ((wa + wc) * a + (wb + wc) * b - wc * ab) / (wa + wb + wc);
    return cost > 0 ? cost : 0.0f;
}

}  // namespace

// Looks for the index in the winning chunk only.
float argmin(const float* x, int64_t n, int64_t* index) {
    constexpr int64_t kChunk = 512;
    float least = kInfinity;
    int64_t begin = 0;
    for (int64_t at = 0; at < n; at += kChunk) {
        const int64_t end = min_of(at + kChunk, n);
        vfloat best = splat(kInfinity);
        int64_t i = at;
        for (; i + kLanes <= end; i += kLanes) {
            const vfloat v = load(x + i);
            best = v < best ? v : best;
        }
        float chunk = kInfinity;
        for (int l = 0; l < kLanes; l++) chunk = best[l] < chunk ? best[l] : chunk;
        for (; i < end; i++) chunk = x[i] < chunk ? x[i] : chunk;
        if (chunk < least) {
            least = chunk;
            begin = at;
        }
    }
    *index = 0;
    if (!(least < kInfinity)) return least;
    while (x[begin] != least) begin++;
    *index = begin;
    return least;
}

// Symmetric in i and j bit for bit: the cost of a pair is the same from either row.
void ward_costs(float* row, int64_t end, int64_t i, const float* diagonal, const double* weights) {
    const double self = diagonal[i], wi = weights[i];
    for (int64_t j = 0; j < end; j++) {
        const double wj = weights[j];
        const double cost = wi * wj / (wi + wj) * (self + static_cast<double>(diagonal[j]) - 2.0 * row[j]);
        row[j] = cost > 0 ? static_cast<float>(cost) : 0.0f;
    }
    if (i < end) row[i] = kInfinity;
}

void ward_replay(float* row, int64_t end, float w, const WardJoin* joins, int64_t count) {
    for (const WardJoin* join = joins; join < joins + count; join++) {
        if (join->lo >= end) continue;
        if (join->hi < end)
            row[join->hi] = joined(row[join->lo], row[join->hi], join->lo_weight, join->hi_weight, w, join->cost);
        row[join->lo] = kInfinity;
    }
}

// Clusters that are no more are infinitely far from both, and so are the two themselves.
void ward_join(const float* lo_row, float* hi_row, int64_t n, const float* weights, const WardJoin& join) {
    const float wl = join.lo_weight, wh = join.hi_weight, cost = join.cost;
    for (int64_t c = 0; c < n; c++) hi_row[c] = joined(lo_row[c], hi_row[c], wl, wh, weights[c], cost);
}

void ward(float* g, int64_t n, int64_t n_clusters, double* weights, int64_t* out_lo, int64_t* out_hi, double* height,
          float* key, int64_t* near, int threads) {
    constexpr int64_t kStale = -1;
    // Row i of the lower triangle from its mirror image; the diagonal is read, never written. The keys come later.
    for (int64_t i = 0; i < n; i++) key[i] = g[i * n + i];
#pragma omp parallel for num_threads(threads) schedule(dynamic, 16)
    for (int64_t i = 1; i < n; i++) ward_costs(g + i * n, i, i, key, weights);
    key[0] = kInfinity;
    near[0] = kStale;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 16)
    for (int64_t i = 1; i < n; i++) key[i] = argmin(g + i * n, i, &near[i]);

    for (int64_t step = 0; step < n - n_clusters;) {
        int64_t hi;
        const float cost = argmin(key, n, &hi);
        float* hi_row = g + hi * n;
        if (near[hi] == kStale) {
            key[hi] = argmin(hi_row, hi, &near[hi]);
            continue;
        }
        const int64_t lo = near[hi];
        const float* lo_row = g + lo * n;
        const float wl = static_cast<float>(weights[lo]), wh = static_cast<float>(weights[hi]);
        out_lo[step] = lo;
        out_hi[step] = hi;
        height[step++] = cost;

        // The joined cluster takes slot hi (its longer row is contiguous); slot lo dies: infinite in every row and column.
        for (int64_t c = 0; c < lo; c++) {
            const float v = joined(lo_row[c], hi_row[c], wl, wh, static_cast<float>(weights[c]), cost);
            hi_row[c] = hi_row[c] < kInfinity ? v : kInfinity;
        }
        for (int64_t c = lo + 1; c < hi; c++) {
            float* in_lo = g + c * n + lo;
            if (hi_row[c] < kInfinity) {
                hi_row[c] = joined(*in_lo, hi_row[c], wl, wh, static_cast<float>(weights[c]), cost);
                *in_lo = kInfinity;
                if (near[c] == lo) near[c] = kStale;
            }
        }
        hi_row[lo] = kInfinity;
        key[lo] = kInfinity;
        for (int64_t c = hi + 1; c < n; c++) {
            if (key[c] == kInfinity) continue;
            float* row = g + c * n;
            const float v = joined(row[lo], row[hi], wl, wh, static_cast<float>(weights[c]), cost);
            row[lo] = kInfinity;
            row[hi] = v;
            if (near[c] == lo || near[c] == hi) near[c] = kStale;
            if (v < key[c]) {  // only by rounding: keep the key a lower bound
                key[c] = v;
                near[c] = hi;
            }
        }
        weights[hi] += weights[lo];
        key[hi] = argmin(hi_row, hi, &near[hi]);
        if (!(key[hi] < kInfinity)) near[hi] = kStale;
    }
}

}  // namespace PYFOLD_SIMD
}  // namespace pyfold
