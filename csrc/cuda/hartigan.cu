// Gram matrices and partitions -> the partitions refined by Hartigan's moves, best first: csrc/cpu/hartigan.cpp on the device.
//
//     gain = w_i W_a / (W_a − w_i) d²(i, a) − w_i W_b / (W_b + w_i) d²(i, b),     d²(i, c) = G_ii − 2 S_ic / W_c + T_c / W_c²
//
// One pass over G evaluates every point; then all moves of all problems are made by one cooperative kernel, in rounds of two
// phases with a grid sync after each; the device decides when it is done. A tile is 32 points of one problem.
//   propose  Every tile finds its problem's best point from the tiles' bests. Where that point's target is known to be its
//            cheapest, it moves: the tile sums the rows of the two changed clusters at its points, and writes its part of the
//            new member lists. Then, or where the target is only a bound, the tiles share out the point's evaluation, clusters
//            32 to a warp.
//   settle   Every tile compares the two changed clusters with what its points know, and finds its best point.
// Each point keeps its target, the cost to enter it, and a lower bound on entering any other; a point whose bound undercuts its
// target is evaluated when it comes first. Sums are fp64 in fixed orders; equal gains go to the lowest index.
#include <cooperative_groups.h>

#include <algorithm>
#include <climits>
#include <vector>

#include "kernels.h"
#include "launch.h"
#include "workspace.h"

namespace pyfold {
namespace cuda {
namespace {

constexpr double kThreshold = 1e-6, kRounding = 1e-9;  // a move must gain this much of w_i G_ii and of what leaving saves
constexpr int kThreads = 256, kWarps = kThreads / 32, kTile = 32;
constexpr int kRows = 2;    // that a block evaluates at once: they share the member lists' traffic
constexpr int kShort = 32;  // members a thread sums alone; longer clusters are a warp's
constexpr unsigned kFull = 0xffffffffu;

__device__ double infinity() { return __longlong_as_double(0x7ff0000000000000ll); }

struct Task {
    HartiganProblem problem;
    int first, first_cluster, first_tile, n_tiles;
};

// Members of cluster c: order[offsets[c]] .. order[offsets[c + 1] - 1], ascending.
struct Members {
    const int *order, *offsets;
};

struct Entry {  // cheapest cluster to enter, the lowest index among equals, and the second cheapest
    double cost, second;
    int target;
};

struct Best {
    double gain;
    int point;
};

enum class Kind : int { none, evaluate, move };
struct Decision {
    Kind kind;
    int point, from, to;
    int list;  // which of the two member lists holds from here on
    int64_t moves;
};

struct State {
    const Task* tasks;
    int n_tasks, n_tiles, n_points, n_clusters;
    int* task_of_tile;
    int *order[2], *offsets[2];  // per point; per cluster and one more per problem
    // Per point.
    int *label, *target;
    double *saved, *entry, *others, *own, *sum_from, *sum_to;
    // Per cluster.
    double *weight, *total;
    // Per tile.
    Best* best;
    Entry* part;
    Decision* decisions;  // two per problem, by the round's parity
    int* active;          // two
};

// A problem's view of the state.
struct View {
    const State& s;
    const Task& t;
    int n, k;

    __device__ View(const State& s, int task)
        : s(s), t(s.tasks[task]), n(static_cast<int>(t.problem.n)), k(static_cast<int>(t.problem.n_clusters)) {}
    __device__ const float* row(int64_t i) const { return t.problem.gram + i * t.problem.n; }
    __device__ double w(int i) const { return t.problem.weights[i]; }
    __device__ double self(int i) const { return row(i)[i]; }
    __device__ int* order(int list) const { return s.order[list] + t.first; }
    __device__ int* offsets(int list) const { return s.offsets[list] + t.first_cluster + (&t - s.tasks); }
    __device__ Members members(int list) const { return {order(list), offsets(list)}; }
    __device__ int& label(int i) const { return s.label[t.first + i]; }
    __device__ int& target(int i) const { return s.target[t.first + i]; }
    __device__ double& saved(int i) const { return s.saved[t.first + i]; }
    __device__ double& entry(int i) const { return s.entry[t.first + i]; }
    __device__ double& others(int i) const { return s.others[t.first + i]; }
    __device__ double& weight(int c) const { return s.weight[t.first_cluster + c]; }
    __device__ double& total(int c) const { return s.total[t.first_cluster + c]; }
};

__device__ double distance(double self, double sum, double weight, double total) {
    const double mean = 1.0 / weight;
    return fmax(0.0, self - 2.0 * sum * mean + total * mean * mean);
}
__device__ double entry_cost(double w, double self, double sum, double weight, double total) {
    return w * weight / (weight + w) * distance(self, sum, weight, total);
}
__device__ double leave_saving(double w, double self, double sum, double weight, double total) {
    return w * weight / (weight - w) * distance(self, sum, weight, total);
}

__device__ double warp_sum(double value) {
    for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kFull, value, step);
    return value;
}

__device__ Entry merged(const Entry& a, const Entry& b) {
    const bool first = a.cost < b.cost || (a.cost == b.cost && a.target <= b.target);
    // Once settled, a point's second is a bound that may be below its cost: both count.
    return {first ? a.cost : b.cost, fmin(fmin(a.second, b.second), first ? b.cost : a.cost), first ? a.target : b.target};
}
__device__ Entry no_entry() { return {infinity(), infinity(), INT_MAX}; }
__device__ Entry warp_merge(Entry e) {
    for (int step = 16; step > 0; step /= 2)
        e = merged(e, {__shfl_xor_sync(kFull, e.cost, step), __shfl_xor_sync(kFull, e.second, step),
                       __shfl_xor_sync(kFull, e.target, step)});
    return e;
}

__device__ Best better(const Best& a, const Best& b) {
    const bool first = a.gain > b.gain || (a.gain == b.gain && a.point <= b.point);
    return {first ? a.gain : b.gain, first ? a.point : b.point};
}
__device__ Best warp_best(Best b) {
    for (int step = 16; step > 0; step /= 2)
        b = better(b, {__shfl_xor_sync(kFull, b.gain, step), __shfl_xor_sync(kFull, b.point, step)});
    return b;
}

// sums[r] = sum over the members of cluster c of w_j rows[r][j]; lane's cluster, a warp's work. c < 0: none.
template <int kCount>
__device__ void cluster_sums(const Members& m, const double* weights, const float* const (&rows)[kCount], int c,
                             double (&sums)[kCount]) {
    const int lane = threadIdx.x % 32, begin = c < 0 ? 0 : m.offsets[c], end = c < 0 ? 0 : m.offsets[c + 1];
    for (int r = 0; r < kCount; r++) sums[r] = 0;
    const bool is_long = end - begin > kShort;
    if (!is_long)
        for (int p = begin; p < end; p++) {
            const int j = m.order[p];
            for (int r = 0; r < kCount; r++) sums[r] += weights[j] * rows[r][j];
        }
    for (unsigned rest = __ballot_sync(kFull, is_long); rest; rest &= rest - 1) {
        const int owner = __ffs(static_cast<int>(rest)) - 1;
        const int from = __shfl_sync(kFull, begin, owner), to = __shfl_sync(kFull, end, owner);
        double part[kCount] = {};
        for (int p = from + lane; p < to; p += 32) {
            const int j = m.order[p];
            for (int r = 0; r < kCount; r++) part[r] += weights[j] * rows[r][j];
        }
        for (int r = 0; r < kCount; r++) {
            part[r] = warp_sum(part[r]);
            if (lane == owner) sums[r] = part[r];
        }
    }
}

// The point's entry with cluster c considered as well; most clusters are dismissed without a division.
__device__ void consider(const View& v, Entry& e, double w, double self, double sum, int c) {
    const double weight = v.weight(c), d = distance(self, sum, weight, v.total(c));
    if (w * weight * d > e.second * (weight + w) * (1 + 1e-12)) return;
    e = merged(e, {w * weight / (weight + w) * d, infinity(), c});
}

// The partition in member lists: a point's place is the number of points before it by (label, index).
__global__ void __launch_bounds__(kThreads) list_members(State s) {
    __shared__ long long labels[kThreads];
    const View v(s, blockIdx.y);
    const int i = blockIdx.x * kThreads + threadIdx.x;
    if (static_cast<int>(blockIdx.x) * kThreads >= v.n) return;
    const long long mine = i < v.n ? v.t.problem.labels[i] : -1;
    int place = 0;
    for (int begin = 0; begin < v.n; begin += kThreads) {
        __syncthreads();
        if (begin + static_cast<int>(threadIdx.x) < v.n) labels[threadIdx.x] = v.t.problem.labels[begin + threadIdx.x];
        __syncthreads();
        const int size = min(kThreads, v.n - begin);
        for (int k = 0; k < size; k++) place += labels[k] < mine || (labels[k] == mine && begin + k < i);
    }
    if (i >= v.n) return;
    v.order(0)[place] = i;
    v.label(i) = static_cast<int>(mine);
}

__global__ void __launch_bounds__(kThreads) find_offsets(State s) {
    const View v(s, blockIdx.y);
    const int p = blockIdx.x * kThreads + threadIdx.x;
    if (p == 0) v.offsets(0)[v.k] = v.offsets(1)[v.k] = v.n;
    if (p % kTile == 0 && p < v.n) s.task_of_tile[v.t.first_tile + p / kTile] = blockIdx.y;
    if (p == 0) s.decisions[2 * blockIdx.y] = s.decisions[2 * blockIdx.y + 1] = {Kind::none, -1, -1, -1, 0, 0};
    if (p < 2) s.active[p] = 0;
    if (p >= v.n) return;
    const int c = v.label(v.order(0)[p]);
    if (p == 0 || v.label(v.order(0)[p - 1]) != c) v.offsets(0)[c] = p;
}

// own[i] = S of point i with its own cluster; then W and T of every cluster. A warp each.
__global__ void __launch_bounds__(kThreads) sum_own(State s) {
    const View v(s, blockIdx.y);
    const int i = blockIdx.x * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (i >= v.n) return;
    const Members m = v.members(0);
    double sum = 0;
    for (int p = m.offsets[v.label(i)] + lane; p < m.offsets[v.label(i) + 1]; p += 32)
        sum += v.w(m.order[p]) * v.row(i)[m.order[p]];
    sum = warp_sum(sum);
    if (lane == 0) s.own[v.t.first + i] = sum;
}
__global__ void __launch_bounds__(kThreads) sum_clusters(State s) {
    const View v(s, blockIdx.y);
    const int c = blockIdx.x * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (c >= v.k) return;
    const Members m = v.members(0);
    double weight = 0, total = 0;
    for (int p = m.offsets[c] + lane; p < m.offsets[c + 1]; p += 32) {
        weight += v.w(m.order[p]);
        total += v.w(m.order[p]) * s.own[v.t.first + m.order[p]];
    }
    weight = warp_sum(weight);
    total = warp_sum(total);
    if (lane == 0) {
        v.weight(c) = weight;
        v.total(c) = total;
    }
}

// Everything about kRows points, from their rows of G: in shared memory where they fit, since members are scattered.
__global__ void __launch_bounds__(kThreads) evaluate(State s, bool staged) {
    __shared__ Entry of_warp[kRows][kWarps];
    const View v(s, blockIdx.y);
    const int i0 = blockIdx.x * kRows, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (i0 >= v.n) return;
    const float* rows[kRows];
    int points[kRows];
    double w[kRows], self[kRows];
    for (int r = 0; r < kRows; r++) {
        points[r] = min(i0 + r, v.n - 1);
        rows[r] = v.row(points[r]);
        w[r] = v.w(points[r]);
        self[r] = rows[r][points[r]];
        if (!staged) continue;
        float* copy = dynamic_shared<float>() + static_cast<int64_t>(r) * v.n;
#pragma unroll 4
        for (int j = threadIdx.x; j < v.n; j += kThreads) copy[j] = rows[r][j];
        rows[r] = copy;
    }
    __syncthreads();
    const Members m = v.members(0);
    Entry entry[kRows];
    for (int r = 0; r < kRows; r++) entry[r] = no_entry();
    for (int begin = warp * 32; begin < v.k; begin += kThreads) {
        const int c = begin + lane < v.k ? begin + lane : -1;
        double sums[kRows];
        cluster_sums(m, v.t.problem.weights, rows, c, sums);
        for (int r = 0; r < kRows; r++)
            if (c >= 0 && c != v.label(points[r])) consider(v, entry[r], w[r], self[r], sums[r], c);
    }
    for (int r = 0; r < kRows; r++) {
        entry[r] = warp_merge(entry[r]);
        if (lane == 0) of_warp[r][warp] = entry[r];
    }
    __syncthreads();
    const int r = threadIdx.x, i = i0 + r;
    if (r >= kRows || i >= v.n) return;
    Entry e = of_warp[r][0];
    for (int k = 1; k < kWarps; k++) e = merged(e, of_warp[r][k]);
    const int own = v.label(i);
    const bool alone = m.offsets[own + 1] - m.offsets[own] == 1;
    v.saved(i) = alone ? 0 : leave_saving(v.w(i), v.self(i), s.own[v.t.first + i], v.weight(own), v.total(own));
    v.entry(i) = alone ? infinity() : e.cost;
    v.others(i) = alone ? infinity() : e.second;
    v.target(i) = alone ? -1 : e.target;
}

// A tile's best point, by its first warp, lane by point.
__device__ void find_best(const View& v, int tile, int i) {
    Best best{0, INT_MAX};
    if (i < v.n) {
        const double saved = v.saved(i), gain = saved - fmin(v.entry(i), v.others(i));
        if (gain > 0 && gain > kThreshold * v.w(i) * v.self(i) + kRounding * saved) best = {gain, i};
    }
    best = warp_best(best);
    if (threadIdx.x % 32 == 0) v.s.best[v.t.first_tile + tile] = best;
}

__device__ Decision decide(const View& v, const Decision& last) {
    Best best{0, INT_MAX};
    for (int tile = threadIdx.x % 32; tile < v.t.n_tiles; tile += 32) best = better(best, v.s.best[v.t.first_tile + tile]);
    best = warp_best(best);
    const int i = best.point;
    if (i == INT_MAX || last.moves >= v.t.problem.max_moves) return {Kind::none, -1, -1, -1, last.list, last.moves};
    if (v.entry(i) > v.others(i)) return {Kind::evaluate, i, -1, -1, last.list, last.moves};
    return {Kind::move, i, v.label(i), v.target(i), last.list ^ 1, last.moves + 1};
}

// First place in order[begin, end) whose point is not below i.
__device__ int place_of(const int* order, int begin, int end, int i) {
    while (begin < end) {
        const int middle = (begin + end) / 2;
        if (order[middle] < i)
            begin = middle + 1;
        else
            end = middle;
    }
    return begin;
}

// This tile's part of the lists after the move, by its first warp: 32 places and 32 clusters.
__device__ void write_lists(const View& v, const Decision& d, int at) {
    const Members m = v.members(d.list ^ 1);
    const int leaves = place_of(m.order, m.offsets[d.from], m.offsets[d.from + 1], d.point);
    const int enters = place_of(m.order, m.offsets[d.to], m.offsets[d.to + 1], d.point) - (d.from < d.to);
    if (at < v.n) {
        int place = at;
        if (at >= leaves && at < enters) place++;
        if (at > enters && at <= leaves) place--;
        v.order(d.list)[at] = at == enters ? d.point : m.order[place];
    }
    if (at < v.k) v.offsets(d.list)[at] = m.offsets[at] - (at > d.from) + (at > d.to);
}

// First phase of a round at one tile; see the head of the file. The tile's warps: sums, and then lists and evaluation.
__device__ void propose(const View& v, const Decision& d, int tile) {
    __shared__ double parts[2][kWarps][kTile];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, i = tile * kTile + lane;
    const Members m = v.members(d.kind == Kind::move ? d.list ^ 1 : d.list);
    if (d.kind == Kind::move) {
        __syncthreads();  // the last tile's sums are read
        for (int side = 0; side < 2; side++) {
            const int c = side ? d.to : d.from, end = m.offsets[c + 1];
            double sum = 0;
            for (int p = m.offsets[c] + warp; p < end + side; p += kWarps) {
                const int j = p < end ? m.order[p] : d.point;
                if (i < v.n && (side || j != d.point)) sum += v.w(j) * v.row(j)[i];
            }
            parts[side][warp][lane] = sum;
        }
        __syncthreads();
        if (warp < 2 && i < v.n) {
            double sum = 0;
            for (int k = 0; k < kWarps; k++) sum += parts[warp][k][lane];
            (warp ? v.s.sum_to : v.s.sum_from)[v.t.first + i] = sum;
        }
        if (warp == 2) write_lists(v, d, i);
    }
    if (warp == 3 && tile * 32 < v.k) {
        const float* const row[1] = {v.row(d.point)};
        const int c = i < v.k ? i : -1;
        double sum[1];
        Entry e = no_entry();
        cluster_sums(m, v.t.problem.weights, row, c, sum);
        if (c >= 0 && c != v.label(d.point) && c != d.to) consider(v, e, v.w(d.point), v.self(d.point), sum[0], c);
        e = warp_merge(e);
        if (lane == 0) v.s.part[v.t.first_tile + tile] = e;
    }
}

// Second phase of a round at one tile.
__device__ void settle(const View& v, const Decision& d, int tile) {
    __shared__ double weight[2], total[2];
    __shared__ Entry evaluated;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, i = tile * kTile + lane;
    const bool owner = d.point / kTile == tile, moves = d.kind == Kind::move;
    if (!moves && !owner) return;
    const Members m = v.members(d.list);
    __syncthreads();  // the last tile's are read
    if (moves && warp < 2) {
        const int c = warp ? d.to : d.from;
        const double* sums = (warp ? v.s.sum_to : v.s.sum_from) + v.t.first;
        double mass = 0, mean = 0;
        for (int p = m.offsets[c] + lane; p < m.offsets[c + 1]; p += 32) {
            mass += v.w(m.order[p]);
            mean += v.w(m.order[p]) * sums[m.order[p]];
        }
        mass = warp_sum(mass);
        mean = warp_sum(mean);
        if (lane == 0) {
            weight[warp] = mass;
            total[warp] = mean;
        }
        if (lane == 0 && tile == 0) {
            v.weight(c) = mass;
            v.total(c) = mean;
        }
    }
    if (owner && warp == 2) {
        Entry e = no_entry();
        for (int part = lane; part * 32 < v.k; part += 32) e = merged(e, v.s.part[v.t.first_tile + part]);
        e = warp_merge(e);
        if (lane == 0) evaluated = e;
    }
    __syncthreads();
    if (warp != 0) return;
    if (i < v.n && !moves && i == d.point) {
        v.entry(i) = evaluated.cost;
        v.others(i) = evaluated.second;
        v.target(i) = evaluated.target;
    }
    if (i < v.n && moves) {
        const int own = i == d.point ? d.to : v.label(i), target = v.target(i);
        const double w = v.w(i), self = v.self(i), in_from = v.s.sum_from[v.t.first + i], in_to = v.s.sum_to[v.t.first + i];
        const double to_a = own == d.from ? infinity() : entry_cost(w, self, in_from, weight[0], total[0]);
        const double to_b = own == d.to ? infinity() : entry_cost(w, self, in_to, weight[1], total[1]);
        const bool left_alone = own == d.from && m.offsets[d.from + 1] - m.offsets[d.from] == 1;
        const bool joined = own == d.to && m.offsets[d.to + 1] - m.offsets[d.to] == 2 && i != d.point;
        if (own == d.from && !left_alone) v.saved(i) = leave_saving(w, self, in_from, weight[0], total[0]);
        if (own == d.to) v.saved(i) = leave_saving(w, self, in_to, weight[1], total[1]);
        Entry e{v.entry(i), v.others(i), target};
        if (i == d.point) {
            v.label(i) = d.to;
            e = merged(evaluated, {to_a, infinity(), d.from});
        } else if (left_alone) {
            v.saved(i) = 0;
            e = {infinity(), infinity(), -1};
        } else if (joined) {  // alone until now: nothing is known, and 0 is a bound
            e = {infinity(), 0, -1};
        } else if (target == d.from || target == d.to) {
            const bool a = target == d.from;
            e = {a ? to_a : to_b, fmin(e.second, a ? to_b : to_a), target};
        } else if (target >= 0) {
            e = merged(merged({to_a, infinity(), d.from}, {to_b, infinity(), d.to}), e);
        }
        v.entry(i) = e.cost;
        v.others(i) = e.second;
        v.target(i) = e.target;
    }
    find_best(v, tile, i);
}

__global__ void __launch_bounds__(kThreads) find_bests(State s) {
    const int tile = blockIdx.x * kWarps + threadIdx.x / 32;
    if (tile >= s.n_tiles) return;
    const View v(s, s.task_of_tile[tile]);
    const int mine = tile - v.t.first_tile;
    find_best(v, mine, mine * kTile + threadIdx.x % 32);
}

__global__ void __launch_bounds__(kThreads, 2) refine(State s) {
    const auto grid = cooperative_groups::this_grid();
    const int blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x), thread = threadIdx.x;
    for (int round = 0;; round++) {
        for (int at = block; at < s.n_tiles; at += blocks) {
            const int task = s.task_of_tile[at];
            const View v(s, task);
            const Decision d = decide(v, s.decisions[2 * task + ((round + 1) & 1)]);
            if (at == v.t.first_tile && thread == 0) {
                s.decisions[2 * task + (round & 1)] = d;
                if (d.kind != Kind::none) s.active[round & 1] = 1;
                if (d.kind == Kind::move) v.t.problem.gains[d.moves - 1] = v.saved(d.point) - v.entry(d.point);
                *v.t.problem.moves = d.moves;
            }
            if (d.kind != Kind::none) propose(v, d, at - v.t.first_tile);
        }
        grid.sync();
        if (!s.active[round & 1]) break;
        if (block == 0 && thread == 0) s.active[(round + 1) & 1] = 0;
        for (int at = block; at < s.n_tiles; at += blocks) {
            const int task = s.task_of_tile[at];
            const Decision d = s.decisions[2 * task + (round & 1)];
            const View v(s, task);
            if (d.kind != Kind::none) settle(v, d, at - v.t.first_tile);
        }
        grid.sync();
    }
    for (int at = block; at < s.n_tiles; at += blocks) {
        const View v(s, s.task_of_tile[at]);
        const int i = (at - v.t.first_tile) * kTile + thread;
        if (thread < kTile && i < v.n) v.t.problem.labels[i] = v.label(i);
    }
}

State lay_out(Workspace& space, const HartiganProblem* problems, int64_t count, std::vector<Task>& tasks) {
    State s{};
    for (int64_t p = 0; p < count; p++) {
        const int tiles = static_cast<int>((problems[p].n + kTile - 1) / kTile);
        tasks.push_back({problems[p], s.n_points, s.n_clusters, s.n_tiles, tiles});
        s.n_points += static_cast<int>(problems[p].n);
        s.n_clusters += static_cast<int>(problems[p].n_clusters);
        s.n_tiles += tiles;
    }
    s.n_tasks = static_cast<int>(count);
    s.tasks = space.take<Task>(count);
    s.task_of_tile = space.take<int>(s.n_tiles);
    for (int list = 0; list < 2; list++) {
        s.order[list] = space.take<int>(s.n_points);
        s.offsets[list] = space.take<int>(s.n_clusters + count);
    }
    for (int** array : {&s.label, &s.target}) *array = space.take<int>(s.n_points);
    for (double** array : {&s.saved, &s.entry, &s.others, &s.own, &s.sum_from, &s.sum_to})
        *array = space.take<double>(s.n_points);
    for (double** array : {&s.weight, &s.total}) *array = space.take<double>(s.n_clusters);
    s.best = space.take<Best>(s.n_tiles);
    s.part = space.take<Entry>(s.n_tiles);
    s.decisions = space.take<Decision>(2 * count);
    s.active = space.take<int>(2);
    return s;
}

}  // namespace

size_t pyfold_cuda_hartigan_workspace(const HartiganProblem* problems, int64_t count) {
    Workspace space;
    std::vector<Task> tasks;
    lay_out(space, problems, count, tasks);
    return space.used();
}

cudaError_t pyfold_cuda_hartigan(const HartiganProblem* problems, int64_t count, void* workspace, cudaStream_t stream) {
    Workspace space(workspace);
    std::vector<Task> tasks;
    const State s = lay_out(space, problems, count, tasks);
    int64_t largest = 0;
    for (int64_t p = 0; p < count; p++) largest = problems[p].n > largest ? problems[p].n : largest;
    const auto grid = [&](int64_t each) {
        return dim3(static_cast<unsigned>((largest + each - 1) / each), static_cast<unsigned>(count));
    };
    int device = 0, most = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (!error) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    size_t shared = kRows * largest * sizeof(float);
    const bool staged = shared + 1024 <= static_cast<size_t>(most);
    if (!staged) shared = 0;
    auto* tasks_there = const_cast<Task*>(s.tasks);
    if (!error) error = cudaMemcpyAsync(tasks_there, tasks.data(), count * sizeof(Task), cudaMemcpyHostToDevice, stream);
    if (!error) error = launch(list_members, grid(kThreads), kThreads, 0, stream, s);
    if (!error) error = launch(find_offsets, grid(kThreads), kThreads, 0, stream, s);
    if (!error) error = launch(sum_own, grid(kWarps), kThreads, 0, stream, s);
    if (!error) error = launch(sum_clusters, grid(kWarps), kThreads, 0, stream, s);
    if (!error) error = launch(evaluate, grid(kRows), kThreads, shared, stream, s, staged);
    if (!error) error = launch(find_bests, dim3((s.n_tiles + kWarps - 1) / kWarps), kThreads, 0, stream, s);
    const int blocks = std::min(resident_blocks(refine, kThreads, 0), s.n_tiles);
    if (!error) error = launch_cooperative(refine, blocks, kThreads, 0, stream, s);
    return error;
}

}  // namespace cuda
}  // namespace pyfold
