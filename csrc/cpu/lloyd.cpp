// d²(i, c) = G_ii − 2 S_ic / W_c + T_c / W_c² for every cluster c: the row of G in the order of the clusters gives S_i, so one
// read of G is a pass whatever K is.
#include "lloyd.h"

#include <omp.h>

#include "partition.h"

namespace pyfold {

void lloyd(const Kernels& kernels, const float* gram, int64_t n, int64_t n_clusters, const int64_t* labels,
           const double* weights, int64_t* moved, float* distances, int threads) {
    const Partition partition(labels, n, n_clusters);
    std::vector<double> weight(n_clusters), total(n_clusters);
    partition.measure(GramRows(gram, n), weights, weight.data(), total.data(), threads);
    std::vector<double> sums(threads * n_clusters);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 64)
    for (int64_t i = 0; i < n; i++) {
        double* own = sums.data() + omp_get_thread_num() * n_clusters;
        kernels.segment_sum(gram + i * n, partition.clusters(), weights, own);
        double distance;
        kernels.nearest(own, total.data(), weight.data(), n_clusters, labels[i], gram[i * n + i], &distance, &moved[i]);
        distances[i] = static_cast<float>(distance);
    }
}

}  // namespace pyfold
