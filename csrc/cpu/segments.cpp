// The inner loops of Hartigan's refinement: sums of Gram entries by cluster, in fp64.
#include "simd.h"

namespace pyfold {
namespace PYFOLD_SIMD {

void sum_rows(const float* const* rows, const double* weights, int64_t count, int64_t n, double* sums, int threads) {
    constexpr int64_t kChunk = 2048;
    // A move sums a few rows: waking a second thread costs more than it saves, ten times more where the core is busy.
#pragma omp parallel for num_threads(threads) schedule(static) if (n * count > (1 << 20))
    for (int64_t begin = 0; begin < n; begin += kChunk) {
        const int64_t end = min_of(begin + kChunk, n);
        for (int64_t m = 0; m < count; m++)
            for (int64_t j = begin; j < end; j++) sums[j] += weights[m] * rows[m][j];
    }
}

void segment_sum(const float* row, const Clusters& clusters, const double* weights, double* out) {
    for (int64_t c = 0; c < clusters.n_clusters; c++) {
        double sum = 0;
        for (int64_t m = clusters.offsets[c]; m < clusters.offsets[c + 1]; m++)
            sum += weights[clusters.members[m]] * row[clusters.members[m]];
        out[c] = sum;
    }
}

void cheapest(const double* sums, const double* total, const double* weight, int64_t n_clusters, int64_t own, double self,
              double w, double* cost, double* second, int64_t* target) {
    double best = __builtin_inf(), next = __builtin_inf();
    int64_t at = -1;
    for (int64_t c = 0; c < n_clusters; c++) {
        const double mean = 1.0 / weight[c];
        double distance = self - 2.0 * sums[c] * mean + total[c] * mean * mean;
        distance = distance > 0 ? distance : 0;
        const double entry = w * weight[c] / (weight[c] + w) * distance;
        if (entry < next && c != own) {
            if (entry < best) {
                next = best;
                best = entry;
                at = c;
            } else {
                next = entry;
            }
        }
    }
    *cost = best;
    *second = next;
    *target = at;
}

void nearest(const double* sums, const double* total, const double* weight, int64_t n_clusters, int64_t own, double self,
             double* distance, int64_t* target) {
    double best = __builtin_inf(), stay = 0;
    int64_t at = own;
    for (int64_t c = 0; c < n_clusters; c++) {
        const double mean = 1.0 / weight[c];
        double d = self - 2.0 * sums[c] * mean + total[c] * mean * mean;
        d = d > 0 ? d : 0;
        if (c == own) stay = d;
        if (d < best) {
            best = d;
            at = c;
        }
    }
    *distance = best;
    *target = best < stay ? at : own;
}

}  // namespace PYFOLD_SIMD
}  // namespace pyfold
