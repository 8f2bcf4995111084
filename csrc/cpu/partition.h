// A partition of N points into K clusters, and what a Gram matrix says of it: cluster weights W_c, totals T_c = w_cᵀ G w_c.
#pragma once

#include <cstdint>
#include <vector>

#include "gram_rows.h"
#include "kernels.h"
#include "parallel.h"

namespace pyfold {

struct Partition {
    std::vector<int64_t> offsets, members;  // compressed sparse rows, members ascending

    Partition(const int64_t* labels, int64_t n, int64_t n_clusters) : offsets(n_clusters + 1), members(n) {
        for (int64_t i = 0; i < n; i++) offsets[labels[i] + 1]++;
        for (int64_t c = 0; c < n_clusters; c++) offsets[c + 1] += offsets[c];
        std::vector<int64_t> next(offsets.begin(), offsets.end() - 1);
        for (int64_t i = 0; i < n; i++) members[next[labels[i]]++] = i;
    }

    int64_t n_clusters() const { return static_cast<int64_t>(offsets.size()) - 1; }
    Clusters clusters() const { return {n_clusters(), offsets.data(), members.data()}; }

    // W_c and T_c of every cluster, in fp64.
    void measure(const GramRows& gram, const double* weights, double* weight, double* total, int threads) const {
        std::vector<GramRows::Buffer> rows = gram.buffers(threads);
        parallel_for(n_clusters(), 64, threads, [&](int64_t c, int thread) {
            weight[c] = total[c] = 0;
            for (int64_t a = offsets[c]; a < offsets[c + 1]; a++) {
                const int64_t i = members[a];
                const float* row = gram.row(i, rows[thread], members[offsets[c]], members[offsets[c + 1] - 1] + 1);
                double sum = 0;
                for (int64_t b = offsets[c]; b < offsets[c + 1]; b++) sum += weights[members[b]] * row[members[b]];
                weight[c] += weights[i];
                total[c] += weights[i] * sum;
            }
        });
    }
};

}  // namespace pyfold
