// Best move first: of all moves of one point i from its cluster a to another b, make the one that lowers the inertia most,
//     gain = w_i W_a / (W_a − w_i) d²(i, a) − w_i W_b / (W_b + w_i) d²(i, b),     d²(i, c) = G_ii − 2 S_ic / W_c + T_c / W_c²
// with S_ic = sum_{j in c} w_j G_ij and T_c = sum_{i in c} w_i S_ic (Hartigan 1975), until none gains more than
// 1e-6 w_i G_ii + 1e-9 of what leaving saves, which is above fp32 noise in G and fp64 noise in the sums.
// The order does not depend on indices, so permuting the points permutes the partition.
//
// Each point keeps its target, what entering it costs, and a lower bound on entering any other cluster. A move changes two
// clusters, so every point compares two new costs with these; where the bound undercuts the target the best is not known, and
// the point is evaluated in full (O(N + K)) only when it reaches the front. Exact, and one pass over N a move.
#include "hartigan.h"

#include <algorithm>
#include <limits>
#include <unordered_map>

#include "partition.h"

namespace pyfold {

namespace {

constexpr double kThreshold = 1e-6;
constexpr double kRounding = 1e-9;  // of what leaving saves: far above fp64 noise, and all that bounds a point at the origin
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr size_t kLarge = 16;  // members from which a cluster's sums are kept

struct Refinement {
    const Kernels& kernels;
    const GramRows& gram;
    const int64_t n, n_clusters;
    int64_t* labels;
    const double* weights;
    const int threads;

    std::vector<double> diagonal = std::vector<double>(n);
    std::vector<std::vector<int64_t>> members{static_cast<size_t>(n_clusters)};
    std::vector<int64_t> offsets = std::vector<int64_t>(n_clusters + 1), order = std::vector<int64_t>(n);
    std::vector<double> weight = std::vector<double>(n_clusters), total = std::vector<double>(n_clusters);
    std::unordered_map<int64_t, std::vector<double>> large{};  // S[:] of the large clusters that have changed
    bool sorted = false;                                       // offsets and order say what members says
    std::vector<GramRows::Buffer> rows = gram.buffers(std::max<int64_t>(threads, kLarge));
    // Per point: what leaving its cluster saves, what entering the target costs, and at least what entering any other costs.
    std::vector<double> saved = std::vector<double>(n, 0.0), entry = std::vector<double>(n, kInfinity),
                        others = std::vector<double>(n, kInfinity);
    std::vector<int64_t> target = std::vector<int64_t>(n, -1);

    double self(int64_t i) const { return diagonal[i]; }

    double distance(int64_t i, double sum, int64_t c) const {
        const double mean = 1.0 / weight[c];
        return std::max(0.0, self(i) - 2.0 * sum * mean + total[c] * mean * mean);
    }

    double entry_cost(int64_t i, double sum, int64_t c) const {
        return weights[i] * weight[c] / (weight[c] + weights[i]) * distance(i, sum, c);
    }

    double leave_saving(int64_t i, double sum) const {
        const int64_t a = labels[i];
        return weights[i] * weight[a] / (weight[a] - weights[i]) * distance(i, sum, a);
    }

    bool alone(int64_t i) const { return members[labels[i]].size() == 1; }

    // Everything about point i, from its Gram row and the current members. A point alone in its cluster never moves.
    void evaluate(int64_t i, std::vector<double>& sums, GramRows::Buffer& row) {
        saved[i] = 0;
        entry[i] = others[i] = kInfinity;
        target[i] = -1;
        if (alone(i)) return;
        kernels.segment_sum(gram.row(i, row), Clusters{n_clusters, offsets.data(), order.data()}, weights, sums.data());
        saved[i] = leave_saving(i, sums[labels[i]]);
        kernels.cheapest(sums.data(), total.data(), weight.data(), n_clusters, labels[i], self(i), weights[i], &entry[i],
                         &others[i], &target[i]);
    }

    void sort_members() {
        if (sorted) return;
        sorted = true;
        int64_t at = 0;
        for (int64_t c = 0; c < n_clusters; c++) {
            offsets[c] = at;
            for (const int64_t i : members[c]) order[at++] = i;
        }
        offsets[n_clusters] = at;
    }

    void sum_members(const std::vector<int64_t>& of, std::vector<double>& sums) {
        sums.assign(n, 0.0);
        std::vector<const float*> row(of.size());
        std::vector<double> w(of.size());
        const size_t together = gram.in_memory() ? of.size() : rows.size();
        for (size_t begin = 0; begin < of.size(); begin += together) {
            const size_t count = std::min(together, of.size() - begin);
            for (size_t m = 0; m < count; m++) {
                row[m] = gram.row(of[begin + m], rows[gram.in_memory() ? 0 : m]);
                w[m] = weights[of[begin + m]];
            }
            kernels.sum_rows(row.data(), w.data(), static_cast<int64_t>(count), n, sums.data(), threads);
        }
    }

    // W, T and S[:] of a cluster that point i has just joined (sign 1) or left (-1). Small clusters are summed afresh; the
    // sums of large ones are kept and updated, at most N / kLarge rows: an eighth of the Gram matrix.
    const std::vector<double>& measure(int64_t c, int64_t i, double sign, std::vector<double>& scratch) {
        const auto size = members[c].size();
        std::vector<double>* sums = &scratch;
        const bool kept = large.count(c) != 0;
        if (size < kLarge) {
            large.erase(c);
        } else {
            sums = &large[c];
        }
        if (size >= kLarge && kept) {
            const double w = sign * weights[i];
            const float* row = gram.row(i, rows[0]);
            for (int64_t j = 0; j < n; j++) (*sums)[j] += w * row[j];
        } else {
            sum_members(members[c], *sums);
        }
        weight[c] = total[c] = 0;
        for (const int64_t j : members[c]) {
            weight[c] += weights[j];
            total[c] += weights[j] * (*sums)[j];
        }
        return *sums;
    }

    void start() {
        for (int64_t i = 0; i < n; i++) diagonal[i] = gram.diagonal(i);
        for (int64_t i = 0; i < n; i++) members[labels[i]].push_back(i);
        sort_members();
        Partition(labels, n, n_clusters).measure(gram, weights, weight.data(), total.data(), threads);
        std::vector<std::vector<double>> sums(threads, std::vector<double>(n_clusters));
        parallel_for(n, 64, threads, [&](int64_t i, int thread) { evaluate(i, sums[thread], rows[thread]); });
    }

    // The point whose move gains most, or -1; the first of equals.
    int64_t best(std::vector<double>& sums) {
        for (;;) {
            int64_t at = -1;
            double most = 0;
            for (int64_t i = 0; i < n; i++) {
                const double gain = saved[i] - std::min(entry[i], others[i]);
                if (gain > most && gain > kThreshold * weights[i] * self(i) + kRounding * saved[i]) {
                    most = gain;
                    at = i;
                }
            }
            if (at < 0 || entry[at] <= others[at]) return at;
            sort_members();
            evaluate(at, sums, rows[0]);
        }
    }

    void move(int64_t i, std::vector<double>& scratch_a, std::vector<double>& scratch_b, std::vector<double>& sums) {
        const int64_t a = labels[i], b = target[i];
        members[a].erase(std::lower_bound(members[a].begin(), members[a].end(), i));
        members[b].insert(std::lower_bound(members[b].begin(), members[b].end(), i), i);
        labels[i] = b;
        sorted = false;
        const std::vector<double>& in_a = measure(a, i, -1, scratch_a);
        const std::vector<double>& in_b = measure(b, i, 1, scratch_b);
        for (int64_t j = 0; j < n; j++) {
            if (target[j] < 0) continue;  // alone, or the one whose company has just come: below
            const double to_a = labels[j] == a ? kInfinity : entry_cost(j, in_a[j], a);
            const double to_b = labels[j] == b ? kInfinity : entry_cost(j, in_b[j], b);
            if (target[j] == a || target[j] == b) {
                entry[j] = target[j] == a ? to_a : to_b;
                others[j] = std::min(others[j], target[j] == a ? to_b : to_a);
            } else if (std::min(to_a, to_b) < entry[j]) {
                others[j] = std::min({others[j], entry[j], std::max(to_a, to_b)});
                entry[j] = std::min(to_a, to_b);
                target[j] = to_a < to_b || (to_a == to_b && a < b) ? a : b;
            } else {
                others[j] = std::min({others[j], to_a, to_b});
            }
        }
        for (const int64_t j : members[a]) saved[j] = leave_saving(j, in_a[j]);
        for (const int64_t j : members[b]) saved[j] = leave_saving(j, in_b[j]);
        sort_members();
        evaluate(i, sums, rows[0]);
        if (members[a].size() == 1) evaluate(members[a][0], sums, rows[0]);
        if (members[b].size() == 2) evaluate(members[b][members[b][0] == i], sums, rows[0]);
    }
};

}  // namespace

std::vector<double> hartigan(const Kernels& kernels, const GramRows& gram, int64_t n_clusters, int64_t* labels,
                             const double* weights, int64_t max_moves, int threads) {
    std::vector<double> gains;
    const int64_t n = gram.n();
    if (n_clusters < 2 || n_clusters == n) return gains;
    Refinement refinement{kernels, gram, n, n_clusters, labels, weights, threads};
    refinement.start();
    std::vector<double> scratch_a(n), scratch_b(n), sums(n_clusters);
    for (int64_t i; static_cast<int64_t>(gains.size()) < max_moves && (i = refinement.best(sums)) >= 0;) {
        gains.push_back(refinement.saved[i] - refinement.entry[i]);
        refinement.move(i, scratch_a, scratch_b, sums);
    }
    return gains;
}

}  // namespace pyfold
