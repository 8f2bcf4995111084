// Best move first: of all moves of one point i from its cluster a to another b, make the one that lowers the inertia most,
//     gain = w_i W_a / (W_a − w_i) d²(i, a) − w_i W_b / (W_b + w_i) d²(i, b),     d²(i, c) = G_ii − 2 S_ic / W_c + T_c / W_c²
// with S_ic = sum_{j in c} w_j G_ij and T_c = sum_{i in c} w_i S_ic (Hartigan 1975), until none gains more than
// 1e-6 w_i G_ii, which is above fp32 noise.
// The order does not depend on indices, so permuting the points permutes the partition.
//
// Each point keeps its cheapest entry. A move changes two clusters, so the others compare two new costs with the kept one;
// only points inside the two clusters, or whose kept target became dearer, are evaluated in full (O(N + K)).
#include "hartigan.h"

#include <algorithm>
#include <limits>

namespace pyfold {

namespace {

constexpr double kThreshold = 1e-6;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Refinement {
    const Kernels& kernels;
    const float* gram;
    const int64_t n, n_clusters;
    int64_t* labels;
    const double* weights;
    const int threads;

    std::vector<double> diagonal = std::vector<double>(n);
    std::vector<std::vector<int64_t>> members{static_cast<size_t>(n_clusters)};
    std::vector<int64_t> offsets = std::vector<int64_t>(n_clusters + 1), order = std::vector<int64_t>(n);
    std::vector<double> weight = std::vector<double>(n_clusters), total = std::vector<double>(n_clusters);
    // Per point: cost of the cheapest entry into another cluster, and what leaving its own saves.
    std::vector<double> entry = std::vector<double>(n, kInfinity), saved = std::vector<double>(n, 0.0);
    std::vector<int64_t> target = std::vector<int64_t>(n, -1);

    double self(int64_t i) const { return diagonal[i]; }

    double distance(int64_t i, double sum, int64_t c) const {
        return std::max(0.0, self(i) - 2.0 * sum / weight[c] + total[c] / (weight[c] * weight[c]));
    }

    double entry_cost(int64_t i, double sum, int64_t c) const {
        return weights[i] * weight[c] / (weight[c] + weights[i]) * distance(i, sum, c);
    }

    double leave_saving(int64_t i, double sum) const {
        const int64_t a = labels[i];
        return weights[i] * weight[a] / (weight[a] - weights[i]) * distance(i, sum, a);
    }

    bool alone(int64_t i) const { return members[labels[i]].size() == 1; }

    // All sums of point i, from its Gram row and the current members.
    void evaluate(int64_t i, std::vector<double>& sums) {
        if (alone(i)) {
            saved[i] = 0;
            entry[i] = kInfinity;
            target[i] = -1;
            return;
        }
        kernels.segment_sum(gram + i * n, Clusters{n_clusters, offsets.data(), order.data()}, weights, sums.data());
        saved[i] = leave_saving(i, sums[labels[i]]);
        kernels.cheapest(sums.data(), total.data(), weight.data(), n_clusters, labels[i], self(i), weights[i], &entry[i],
                         &target[i]);
    }

    void sort_members() {
        int64_t at = 0;
        for (int64_t c = 0; c < n_clusters; c++) {
            offsets[c] = at;
            for (const int64_t i : members[c]) order[at++] = i;
        }
        offsets[n_clusters] = at;
    }

    // Fresh W, T and S[:] of one cluster.
    void measure(int64_t c, std::vector<double>& sums) {
        kernels.sum_rows(gram, n, members[c].data(), static_cast<int64_t>(members[c].size()), weights, sums.data(), threads);
        weight[c] = total[c] = 0;
        for (const int64_t i : members[c]) {
            weight[c] += weights[i];
            total[c] += weights[i] * sums[i];
        }
    }

    void start() {
        for (int64_t i = 0; i < n; i++) diagonal[i] = gram[i * n + i];
        for (int64_t i = 0; i < n; i++) members[labels[i]].push_back(i);
        sort_members();
#pragma omp parallel for num_threads(threads) schedule(dynamic, 64)
        for (int64_t c = 0; c < n_clusters; c++) {
            for (const int64_t i : members[c]) {
                double sum = 0;
                for (const int64_t j : members[c]) sum += weights[j] * gram[i * n + j];
                weight[c] += weights[i];
                total[c] += weights[i] * sum;
            }
        }
#pragma omp parallel num_threads(threads)
        {
            std::vector<double> sums(n_clusters);
#pragma omp for schedule(dynamic, 64)
            for (int64_t i = 0; i < n; i++) evaluate(i, sums);
        }
    }

    // The point whose move gains most, or -1; the first of equals.
    int64_t best() const {
        int64_t at = -1;
        double most = 0;
        for (int64_t i = 0; i < n; i++) {
            const double gain = saved[i] - entry[i];
            if (gain > most && gain > kThreshold * weights[i] * self(i)) {
                most = gain;
                at = i;
            }
        }
        return at;
    }

    void move(int64_t i, std::vector<double>& in_a, std::vector<double>& in_b, std::vector<double>& sums) {
        const int64_t a = labels[i], b = target[i];
        members[a].erase(std::lower_bound(members[a].begin(), members[a].end(), i));
        members[b].insert(std::lower_bound(members[b].begin(), members[b].end(), i), i);
        labels[i] = b;
        sort_members();
        measure(a, in_a);
        measure(b, in_b);
        for (int64_t j = 0; j < n; j++) {
            if (labels[j] == a || labels[j] == b) {
                evaluate(j, sums);
                continue;
            }
            if (alone(j)) continue;
            const double to_a = entry_cost(j, in_a[j], a), to_b = entry_cost(j, in_b[j], b);
            const bool kept = target[j] == a || target[j] == b;
            if (std::min(to_a, to_b) <= entry[j]) {
                entry[j] = std::min(to_a, to_b);
                target[j] = to_a < to_b || (to_a == to_b && a < b) ? a : b;
            } else if (kept) {
                evaluate(j, sums);
            }
        }
    }
};

}  // namespace

std::vector<double> hartigan(const Kernels& kernels, const float* gram, int64_t n, int64_t n_clusters, int64_t* labels,
                             const double* weights, int64_t max_moves, int threads) {
    std::vector<double> gains;
    if (n_clusters < 2 || n_clusters == n) return gains;
    Refinement refinement{kernels, gram, n, n_clusters, labels, weights, threads};
    refinement.start();
    std::vector<double> in_a(n), in_b(n), sums(n_clusters);
    for (int64_t i; static_cast<int64_t>(gains.size()) < max_moves && (i = refinement.best()) >= 0;) {
        gains.push_back(refinement.saved[i] - refinement.entry[i]);
        refinement.move(i, in_a, in_b, sums);
    }
    return gains;
}

}  // namespace pyfold
