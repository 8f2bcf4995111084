// A Gram matrix in a file -> the cheapest N - K Ward joins, in height order: ward.cpp for what memory cannot hold.
//
// ward.cpp keeps one cost per pair and at each join updates a column, which in a file would be N writes of 4 bytes. Here every
// row is whole, both sides of the diagonal, so each cost exists twice. A join reads the two rows and writes the joined one;
// the others are brought up to date when they are read: the joins made since are applied in order, with the weights of then.
// That is the same arithmetic on the same numbers, so both copies of a cost and ward.cpp's have the same bits.
#include "ward_rows.h"

#include <limits>

#include "parallel.h"

namespace pyfold {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kStale = -1;

struct Agglomeration {
    const Kernels& kernels;
    const GramRows& gram;
    const RowFile& scratch;
    const double* point_weights;
    const int threads;

    const int64_t n = gram.n();
    std::vector<float> diagonal = std::vector<float>(n), weight = std::vector<float>(n);  // weight: of the clusters
    std::vector<WardJoin> joins{};
    std::vector<int64_t> applied = std::vector<int64_t>(n, 0);  // joins in the row of the scratch file; 0: it has none
    // Nearest neighbour among lower indices: at least its cost, and its index where it is known.
    std::vector<float> key = std::vector<float>(n);
    std::vector<int64_t> near = std::vector<int64_t>(n);

    // The first `end` costs of cluster i, as they are now.
    void read(int64_t i, int64_t end, GramRows::Buffer& row) const {
        if (applied[i]) {
            scratch.read(i, 0, end, row.data());
        } else {
            const float* inner = gram.row(i, row, 0, end);
            if (inner != row.data()) std::copy(inner, inner + end, row.begin());
            kernels.ward_costs(row.data(), end, i, diagonal.data(), point_weights);
        }
        kernels.ward_replay(row.data(), end, weight[i], joins.data() + applied[i],
                            static_cast<int64_t>(joins.size()) - applied[i]);
    }

    void start() {
        for (int64_t i = 0; i < n; i++) {
            diagonal[i] = gram.diagonal(i);
            weight[i] = static_cast<float>(point_weights[i]);
        }
        std::vector<GramRows::Buffer> rows(threads, GramRows::Buffer(n));
        parallel_for(n, 16, threads, [&](int64_t i, int thread) {
            read(i, i, rows[thread]);
            key[i] = kernels.argmin(rows[thread].data(), i, &near[i]);
        });
        near[0] = kStale;
    }

    // After a join, whose cluster has this row: what other rows know of their nearest neighbours.
    void revise(const WardJoin& join, const float* row) {
        key[join.lo] = kInfinity;
        for (int64_t c = join.lo + 1; c < join.hi; c++)
            if (near[c] == join.lo) near[c] = kStale;
        for (int64_t c = join.hi + 1; c < n; c++) {
            if (key[c] == kInfinity) continue;
            if (near[c] == join.lo || near[c] == join.hi) near[c] = kStale;
            if (row[c] < key[c]) {  // only by rounding: keep the key a lower bound
                key[c] = row[c];
                near[c] = join.hi;
            }
        }
        key[join.hi] = kernels.argmin(row, join.hi, &near[join.hi]);
        if (!(key[join.hi] < kInfinity)) near[join.hi] = kStale;
    }
};

}  // namespace

void ward_rows(const Kernels& kernels, const GramRows& gram, const RowFile& scratch, int64_t n_clusters, const double* weights,
               int64_t* out_lo, int64_t* out_hi, double* height, int threads) {
    const int64_t n = gram.n();
    if (n_clusters == n) return;
    Agglomeration state{kernels, gram, scratch, weights, threads};
    state.start();
    state.joins.reserve(n - n_clusters);
    std::vector<double> weight(weights, weights + n);
    GramRows::Buffer lo_row(n), hi_row(n);
    for (int64_t step = 0; step < n - n_clusters;) {
        int64_t hi;
        const float cost = kernels.argmin(state.key.data(), n, &hi);
        if (state.near[hi] == kStale) {
            state.read(hi, hi, hi_row);
            state.key[hi] = kernels.argmin(hi_row.data(), hi, &state.near[hi]);
            continue;
        }
        const int64_t lo = state.near[hi];
        state.read(lo, n, lo_row);
        state.read(hi, n, hi_row);
        const WardJoin join{lo, hi, static_cast<float>(weight[lo]), static_cast<float>(weight[hi]), cost};
        kernels.ward_join(lo_row.data(), hi_row.data(), n, state.weight.data(), join);
        state.revise(join, hi_row.data());
        weight[hi] += weight[lo];
        state.weight[hi] = static_cast<float>(weight[hi]);
        state.joins.push_back(join);
        state.applied[hi] = static_cast<int64_t>(state.joins.size());
        out_lo[step] = lo;
        out_hi[step] = hi;
        height[step++] = cost;
        scratch.write(hi, n, hi_row.data());
    }
}

}  // namespace pyfold
