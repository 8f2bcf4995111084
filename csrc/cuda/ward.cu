// Full symmetric Gram matrices -> each one's cheapest N - K Ward joins, in height order: reciprocal nearest neighbours join in
// parallel rounds, all rounds of all problems in one cooperative kernel.
//
// The costs C_ij = W_i W_j / (W_i + W_j) ‖c_i − c_j‖² are kept in full, so that a row is contiguous: the lower half in the
// lower triangle of G, the upper half packed in the workspace (6 N² bytes in all; G's upper triangle stays and restores the
// lower). Costs straight from G, by summing members, would need no updates, but a row scan would cost as many rows of G as the
// cluster has members, and dead units make one giant cluster. An update reads two rows and writes a row and a column.
//
// A round:  select | scan | match | update, with a grid sync after each. The device decides when it is done.
//   key[i] is a lower bound on the cost of i's nearest neighbour, exact while near[i] >= 0. Ward is reducible: a join brings no
//   third cluster closer, so bounds stay bounds when near[i] dies; `update` clamps rounding to that. A row is scanned again
//   only when it is at the front: with near-orthogonal rows every row's neighbour dies in every round, and scanning them all
//   would read the whole matrix once per join. match joins i and j if near[i] == j, near[j] == i and the cost is surely below
//   the cut: with M joins to go, the M-th smallest key is a lower bound on the cut (M rows must still be retired, each at no
//   less than its key). So none is made that the cut does not need, except between exact ties in the last round; the sort drops
//   those. The smallest cost of all always joins. Equal costs prefer the smallest i ^ j, the same for both sides: no cycles,
//   and N equal costs pair up in log N rounds.
// No contraction to FMA in `joined`: it must be symmetric, or the result would depend on the order of the points.
#include <cooperative_groups.h>

#include <cfloat>
#include <climits>
#include <vector>

#include "kernels.h"
#include "launch.h"
#include "workspace.h"

namespace pyfold {
namespace cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kStale = -1;              // near: not known
constexpr int kAlone = -1, kDead = -2;  // role: not in a join of this round; retired
constexpr int kBuckets = 448;           // of a 32-bit distance: 16 per octave
constexpr int kScansPerBlock = 2;       // rows a round scans at the front: what the device does in one or two waves
constexpr unsigned kFull = 0xffffffffu;

struct Task {
    WardProblem problem;
    float* upper;  // packed rows of the upper half of the costs
    int first;     // its rows are first .. first + n of the arrays below
};

struct State {
    const Task* tasks;
    int n_tasks, n_rows, chunks;  // chunks: of kThreads columns, in the largest problem
    // Per row, all problems in a line. A row is a cluster; neighbours and partners are rows of this line too.
    int* task_of;
    float* diagonal;
    double* weight;
    unsigned* key;  // bits of a non-negative float: they compare alike
    int *near, *role, *tied, *scan, *fresh;
    // Joins as recorded, from the problem's first row on: height and round, and the rows.
    unsigned long long* order;
    int *lo, *hi;
    // Per problem: histograms of the distance of all keys and of the stale ones from `least`, and what follows from them.
    int *of_all, *of_stale;
    unsigned* least;  // two per problem: this round's smallest key, and the last round's
    unsigned* sure;   // costs below this are below the cut
    int *left, *recorded;
    int *n_scan, *n_fresh, *active;
};

__device__ float* row_below(const Task& t, int64_t i) { return t.problem.gram + i * t.problem.n; }
__device__ float* row_above(const Task& t, int64_t i) { return t.upper + i * (2 * t.problem.n - i - 1) / 2 - (i + 1); }
// C_ij, or the diagonal of G for i == j.
__device__ float* cost_at(const Task& t, int i, int j) { return (j <= i ? row_below(t, i) : row_above(t, i)) + j; }

__device__ int joins_to_go(const State& s, int task) {
    const WardProblem& p = s.tasks[task].problem;
    return static_cast<int>(p.n - p.n_clusters) - s.recorded[task];
}

__device__ int bucket_of(unsigned distance) {
    if (distance < 16) return static_cast<int>(distance);
    const int e = 31 - __clz(static_cast<int>(distance));
    return (e - 3) * 16 + static_cast<int>((distance >> (e - 4)) & 15);
}
__device__ unsigned bucket_begin(int bucket) { return bucket < 16 ? bucket : (16u + bucket % 16) << (bucket / 16 - 1); }

// The bucket that holds the rank-th smallest (from 1), or kBuckets. A warp's work.
__device__ int quantile(const int* histogram, int rank) {
    constexpr int kEach = kBuckets / 32;
    const int lane = threadIdx.x % 32;
    int mine = 0;
    for (int b = 0; b < kEach; b++) mine += histogram[lane * kEach + b];
    int before = mine;
    for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(kFull, before, step);
        if (lane >= step) before += other;
    }
    before -= mine;
    const bool here = before < rank && rank <= before + mine;
    int bucket = kBuckets;
    if (here)
        for (bucket = lane * kEach; before + histogram[bucket] < rank; bucket++) before += histogram[bucket];
    const unsigned found = __ballot_sync(kFull, here);
    return found ? __shfl_sync(kFull, bucket, __ffs(static_cast<int>(found)) - 1) : kBuckets;
}

// Smallest over the block, for thread 0. Ends with a barrier.
__device__ unsigned long long block_min(unsigned long long value) {
    __shared__ unsigned long long of_warp[kWarps];
    for (int step = 16; step > 0; step /= 2) {
        const unsigned long long other = __shfl_xor_sync(kFull, value, step);
        value = other < value ? other : value;
    }
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
    __syncthreads();
    if (threadIdx.x == 0)
        for (int w = 1; w < kWarps; w++) value = of_warp[w] < value ? of_warp[w] : value;
    __syncthreads();
    return value;
}

__device__ unsigned long long candidate(float cost, int i, int j) {
    return static_cast<unsigned long long>(__float_as_uint(cost)) << 32 | static_cast<unsigned>(i ^ j);
}

__device__ void keep_nearest(const State& s, int row, unsigned long long nearest) {
    const int first = s.tasks[s.task_of[row]].first, i = row - first;
    s.key[row] = static_cast<unsigned>(nearest >> 32);
    s.near[row] = first + (i ^ static_cast<int>(nearest & kFull));
}

// Row i of G -> row i of both halves of the costs, and its nearest neighbour. Both triangles of G hold the same bits, and the
// expression is symmetric: so are the costs.
__device__ void begin_row(const State& s, int row) {
    const Task& t = s.tasks[s.task_of[row]];
    const int i = row - t.first, n = static_cast<int>(t.problem.n);
    const double self = s.diagonal[row], wi = s.weight[row];
    const float* gram = row_below(t, i);
    unsigned long long nearest = ULLONG_MAX;
    for (int j = threadIdx.x; j < n; j += kThreads) {
        if (j == i) continue;
        const double wj = s.weight[t.first + j];
        const double cost = wi * wj / (wi + wj) * ((self + s.diagonal[t.first + j]) - 2.0 * gram[j]);
        const float rounded = cost > 0 ? fminf(static_cast<float>(cost), FLT_MAX) : 0.0f;
        *cost_at(t, i, j) = rounded;
        nearest = min(nearest, candidate(rounded, i, j));
    }
    nearest = block_min(nearest);
    if (threadIdx.x != 0) return;
    if (n == 1) nearest = static_cast<unsigned long long>(__float_as_uint(FLT_MAX)) << 32;
    keep_nearest(s, row, nearest);
    atomicMin(&s.least[2 * s.task_of[row]], s.key[row]);
}

__device__ void scan_row(const State& s, int row) {
    const Task& t = s.tasks[s.task_of[row]];
    const int i = row - t.first, n = static_cast<int>(t.problem.n);
    const float *below = row_below(t, i), *above = row_above(t, i);
    const int* role = s.role + t.first;
    unsigned long long nearest = ULLONG_MAX;
#pragma unroll 4
    for (int j = threadIdx.x; j < n; j += kThreads) {
        const float cost = (j <= i ? below : above)[j];
        if (role[j] != kDead && j != i) nearest = min(nearest, candidate(cost, i, j));
    }
    nearest = block_min(nearest);
    if (threadIdx.x == 0) keep_nearest(s, row, nearest);
}

// Ends the joins of the last round, then lists the stale rows at the front.
__device__ void select(const State& s, int round) {
    const int lane = threadIdx.x % 32, step = static_cast<int>(gridDim.x) * kThreads;
    for (int begin = static_cast<int>(blockIdx.x) * kThreads + threadIdx.x - lane; begin < s.n_rows; begin += step) {
        const int row = begin + lane, last = min(begin + 31, s.n_rows - 1);
        const bool valid = row < s.n_rows;
        const int mine = valid ? s.task_of[row] : -1;
        bool wanted = false;
        for (int task = s.task_of[begin]; task <= s.task_of[last]; task++) {
            const int left = joins_to_go(s, task);
            if (row == s.tasks[task].first) s.left[task] = left;
            if (left <= 0) continue;
            const Task& t = s.tasks[task];
            const int n = static_cast<int>(t.problem.n);
            const unsigned base = s.least[2 * task + ((round + 1) & 1)], least = s.least[2 * task + (round & 1)];
            const int cut = quantile(s.of_all + task * kBuckets, left);
            const int budget = max(32, static_cast<int>(kScansPerBlock * static_cast<int64_t>(gridDim.x) * n / s.n_rows));
            const int front = min(cut, quantile(s.of_stale + task * kBuckets, budget + 1) - 1);
            if (mine != task) continue;
            if (row == t.first) s.sure[task] = base + bucket_begin(cut);
            const int partner = s.role[row];
            if (partner > row) {
                s.role[row] = kDead;
                s.near[row] = kStale;
            } else if (partner >= 0) {
                s.weight[row] += s.weight[partner];
                s.role[row] = kAlone;
            }
            if (s.role[row] == kDead) continue;
            if (s.tied[row]) {
                s.tied[row] = 0;
                s.near[row] = kStale;
            }
            const unsigned key = s.key[row];
            wanted = s.near[row] == kStale && (key == least || bucket_of(key - base) <= front);
        }
        const unsigned voters = __ballot_sync(kFull, wanted);
        int at = lane == 0 && voters ? atomicAdd(s.n_scan, __popc(voters)) : 0;
        at = __shfl_sync(kFull, at, 0) + __popc(voters & ((1u << lane) - 1));
        if (wanted) s.scan[at] = row;
    }
}

__device__ void match(const State& s, int round) {
    const int thread = static_cast<int>(blockIdx.x) * kThreads + threadIdx.x, step = static_cast<int>(gridDim.x) * kThreads;
    for (int row = thread; row < s.n_rows; row += step) {
        const int other = s.near[row], task = s.task_of[row];
        if (other < 0 || other > row || s.near[other] != row) continue;
        const Task& t = s.tasks[task];
        const unsigned cost = s.key[row];
        if (s.left[task] <= 0) continue;
        if (cost >= s.sure[task] && cost != s.least[2 * task + (round & 1)]) continue;
        s.role[row] = other;
        s.role[other] = row;
        const int at = t.first + atomicAdd(&s.recorded[task], 1);
        s.order[at] = static_cast<unsigned long long>(cost) << 32 | static_cast<unsigned>(round);
        s.lo[at] = other - t.first;
        s.hi[at] = row - t.first;
        s.fresh[atomicAdd(s.n_fresh, 1)] = row;
    }
}

__device__ void zero_histograms(const State& s) {
    const int thread = static_cast<int>(blockIdx.x) * kThreads + threadIdx.x, step = static_cast<int>(gridDim.x) * kThreads;
    for (int b = thread; b < s.n_tasks * kBuckets; b += step) s.of_all[b] = s.of_stale[b] = 0;
}

// Cost between clusters of weights wa + wb and wc by Lance and Williams (1967), h = C_ab.
__device__ float joined(float ac, float bc, float wa, float wb, float wc, float h) {
    const float sum = __fadd_rn(__fmul_rn(__fadd_rn(wa, wc), ac), __fmul_rn(__fadd_rn(wb, wc), bc));
    const float cost = __fdiv_rn(__fsub_rn(sum, __fmul_rn(wc, h)), __fadd_rn(__fadd_rn(wa, wb), wc));
    return fminf(fmaxf(cost, fminf(ac, bc)), FLT_MAX);
}

// The same for two joins of one round, a with b at height h and c with d at height g: the order of the two does not matter.
__device__ float joined(float ac, float ad, float bc, float bd, float wa, float wb, float wc, float wd, float h, float g) {
    const float one = __fadd_rn(__fmul_rn(__fadd_rn(wa, wc), ac), __fmul_rn(__fadd_rn(wb, wd), bd));
    const float two = __fadd_rn(__fmul_rn(__fadd_rn(wa, wd), ad), __fmul_rn(__fadd_rn(wb, wc), bc));
    const float ab = __fadd_rn(wa, wb), cd = __fadd_rn(wc, wd);
    const float within = __fadd_rn(__fmul_rn(cd, h), __fmul_rn(ab, g));
    const float cost = __fdiv_rn(__fsub_rn(__fadd_rn(one, two), within), __fadd_rn(ab, cd));
    return fminf(fmaxf(cost, fminf(fminf(ac, ad), fminf(bc, bd))), FLT_MAX);
}

// Row and column of a joined cluster, for a chunk of columns. Where the column is a cluster joined in this round too, each of
// the two writes its own row: nothing is read here that another block writes.
__device__ void update_chunk(const State& s, int row, int chunk) {
    const Task& t = s.tasks[s.task_of[row]];
    const int n = static_cast<int>(t.problem.n), hi = row - t.first, lo = s.role[row] - t.first;
    const float wh = static_cast<float>(s.weight[row]), wl = static_cast<float>(s.weight[s.role[row]]);
    const float h = __uint_as_float(s.key[row]);
    for (int c = chunk * kThreads + threadIdx.x; c < min(n, (chunk + 1) * kThreads); c += kThreads) {
        const int other = t.first + c, partner = s.role[other];
        if (c == hi || c == lo || partner == kDead || partner > other) continue;
        const float wc = static_cast<float>(s.weight[other]);
        const float low = *cost_at(t, lo, c), high = *cost_at(t, hi, c);
        if (partner >= 0) {
            const int d = partner - t.first;
            *cost_at(t, hi, c) = joined(low, *cost_at(t, lo, d), high, *cost_at(t, hi, d), wl, wh, wc,
                                        static_cast<float>(s.weight[partner]), h, __uint_as_float(s.key[other]));
        } else {
            const float cost = joined(low, high, wl, wh, wc, h);
            *cost_at(t, hi, c) = *cost_at(t, c, hi) = cost;
            if (__float_as_uint(cost) <= s.key[other]) s.tied[other] = 1;
        }
    }
}

// Rows whose neighbour died become stale; the keys of the next round are counted.
__device__ void take_stock(const State& s, int round) {
    const int lane = threadIdx.x % 32, step = static_cast<int>(gridDim.x) * kThreads;
    for (int begin = static_cast<int>(blockIdx.x) * kThreads + threadIdx.x - lane; begin < s.n_rows; begin += step) {
        const int row = begin + lane, task = s.task_of[min(row, s.n_rows - 1)];
        const int role = row < s.n_rows ? s.role[row] : kDead;
        const bool counts = role != kDead && role <= row && joins_to_go(s, task) > 0;
        const unsigned key = counts ? s.key[row] : kFull;
        if (counts) {
            const int bucket = bucket_of(key - s.least[2 * task + (round & 1)]), near = s.near[row];
            const bool stale = near < 0 || role >= 0 || s.role[near] >= 0;
            if (stale) s.near[row] = kStale;
            atomicAdd(&s.of_all[task * kBuckets + bucket], 1);
            if (stale) atomicAdd(&s.of_stale[task * kBuckets + bucket], 1);
            *s.active = 1;
        }
        // All rows of a problem want this one word, and atomics on a word take turns: one a warp.
        unsigned* const least = &s.least[2 * task + ((round + 1) & 1)];
        if (__all_sync(kFull, task == s.task_of[begin])) {
            const unsigned lowest = __reduce_min_sync(kFull, key);
            if (lane == 0 && lowest != kFull) atomicMin(least, lowest);
        } else if (counts) {
            atomicMin(least, key);
        }
    }
}

__global__ void __launch_bounds__(kThreads, 2) agglomerate(State s) {
    const auto grid = cooperative_groups::this_grid();
    const int blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
    for (int row = block; row < s.n_rows; row += blocks) begin_row(s, row);
    grid.sync();
    take_stock(s, 0);
    grid.sync();
    for (int round = 1; *s.active; round++) {
        select(s, round);
        grid.sync();
        const int scans = *s.n_scan;
        for (int at = block; at < scans; at += blocks) scan_row(s, s.scan[at]);
        if (block == 0 && threadIdx.x == 0) *s.n_fresh = 0;
        grid.sync();
        match(s, round);
        zero_histograms(s);
        const int thread = block * kThreads + static_cast<int>(threadIdx.x);
        for (int task = thread; task < s.n_tasks; task += blocks * kThreads) s.least[2 * task + ((round + 1) & 1)] = kFull;
        if (thread == 0) *s.n_scan = *s.active = 0;
        grid.sync();
        const int joins = *s.n_fresh;
        if (scans == 0 && joins == 0) break;  // cannot be, unless G is not symmetric: do not hang
        const int64_t chunks = s.chunks, items = chunks * joins;
        for (int64_t item = block; item < items; item += blocks) {
            const int row = s.fresh[item / chunks];
            if (joins_to_go(s, s.task_of[row]) > 0) update_chunk(s, row, static_cast<int>(item % chunks));
        }
        take_stock(s, round);
        grid.sync();
    }
}

__global__ void begin(State s) {
    const Task& t = s.tasks[blockIdx.y];
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < kBuckets) s.of_all[blockIdx.y * kBuckets + i] = s.of_stale[blockIdx.y * kBuckets + i] = 0;
    if (i < 2) s.least[2 * blockIdx.y + i] = kFull;
    if (i == 0) s.recorded[blockIdx.y] = *s.n_scan = *s.n_fresh = *s.active = 0;
    if (i >= t.problem.n) return;
    const int row = t.first + i;
    s.task_of[row] = blockIdx.y;
    s.diagonal[row] = row_below(t, i)[i];
    s.weight[row] = t.problem.weights[i];
    s.role[row] = kAlone;
    s.tied[row] = 0;
}

// The N - K lowest of the recorded joins to their rank by (height, round, hi): children before parents, the order of recording
// (atomics) forgotten.
__global__ void __launch_bounds__(256) sort_joins(State s) {
    __shared__ unsigned long long orders[256];
    __shared__ int his[256];
    const Task& t = s.tasks[blockIdx.y];
    const int count = s.recorded[blockIdx.y], wanted = static_cast<int>(t.problem.n - t.problem.n_clusters);
    const int mine = blockIdx.x * 256 + threadIdx.x, x = threadIdx.x;
    if (static_cast<int>(blockIdx.x) * 256 >= count) return;
    const unsigned long long order = mine < count ? s.order[t.first + mine] : ULLONG_MAX;
    const int hi = mine < count ? s.hi[t.first + mine] : INT_MAX;
    int rank = 0;
    for (int begin = 0; begin < count; begin += 256) {
        __syncthreads();
        if (begin + x < count) {
            orders[x] = s.order[t.first + begin + x];
            his[x] = s.hi[t.first + begin + x];
        }
        __syncthreads();
        const int size = min(256, count - begin);
        for (int k = 0; k < size; k++) rank += orders[k] < order || (orders[k] == order && his[k] < hi);
    }
    if (mine >= count || rank >= wanted) return;
    t.problem.lo[rank] = s.lo[t.first + mine];
    t.problem.hi[rank] = hi;
    t.problem.height[rank] = __uint_as_float(static_cast<unsigned>(order >> 32));
}

// Lower triangle <- upper triangle, by tiles.
__global__ void __launch_bounds__(256) mirror(State s) {
    __shared__ float tile[32][33];
    const Task& t = s.tasks[blockIdx.z];
    const int n = static_cast<int>(t.problem.n), x = threadIdx.x, from = blockIdx.y * 32, to = blockIdx.x * 32;
    if (from > to || to >= n) return;
    for (int y = threadIdx.y; y < 32; y += 8)
        if (from + y < n && to + x < n) tile[y][x] = row_below(t, from + y)[to + x];
    __syncthreads();
    for (int y = threadIdx.y; y < 32; y += 8)
        if (to + y < n && from + x < to + y) row_below(t, to + y)[from + x] = tile[x][y];
}

State lay_out(Workspace& space, const WardProblem* problems, int64_t count, std::vector<Task>& tasks) {
    State s{};
    int64_t rows = 0;
    tasks.resize(count);
    for (int64_t p = 0; p < count; p++) {
        const int64_t n = problems[p].n;
        tasks[p] = Task{problems[p], space.take<float>(n * (n - 1) / 2), static_cast<int>(rows)};
        rows += n;
        s.chunks = max(s.chunks, static_cast<int>((n + kThreads - 1) / kThreads));
    }
    s.n_tasks = static_cast<int>(count);
    s.n_rows = static_cast<int>(rows);
    s.tasks = space.take<Task>(count);
    for (int** array : {&s.task_of, &s.near, &s.role, &s.tied, &s.scan, &s.fresh, &s.lo, &s.hi}) *array = space.take<int>(rows);
    s.diagonal = space.take<float>(rows);
    s.weight = space.take<double>(rows);
    s.key = space.take<unsigned>(rows);
    s.order = space.take<unsigned long long>(rows);
    s.of_all = space.take<int>(count * kBuckets);
    s.of_stale = space.take<int>(count * kBuckets);
    s.least = space.take<unsigned>(2 * count);
    s.sure = space.take<unsigned>(count);
    s.left = space.take<int>(count);
    s.recorded = space.take<int>(count);
    for (int** counter : {&s.n_scan, &s.n_fresh, &s.active}) *counter = space.take<int>(1);
    return s;
}

}  // namespace

size_t pyfold_cuda_ward_workspace(const WardProblem* problems, int64_t count) {
    Workspace space;
    std::vector<Task> tasks;
    lay_out(space, problems, count, tasks);
    return space.used();
}

cudaError_t pyfold_cuda_ward(const WardProblem* problems, int64_t count, void* workspace, cudaStream_t stream) {
    Workspace space(workspace);
    std::vector<Task> tasks;
    const State s = lay_out(space, problems, count, tasks);
    const unsigned n_tasks = static_cast<unsigned>(count), largest = s.chunks * kThreads;
    auto* tasks_there = const_cast<Task*>(s.tasks);
    cudaError_t error = cudaMemcpyAsync(tasks_there, tasks.data(), count * sizeof(Task), cudaMemcpyHostToDevice, stream);
    if (!error) error = launch(begin, dim3(s.chunks, n_tasks), kThreads, 0, stream, s);
    const int blocks = min(resident_blocks(agglomerate, kThreads, 0), s.n_rows);
    if (!error) error = launch_cooperative(agglomerate, blocks, kThreads, 0, stream, s);
    if (!error) error = launch(sort_joins, dim3(largest / 256, n_tasks), 256, 0, stream, s);
    if (!error) error = launch(mirror, dim3(largest / 32, largest / 32, n_tasks), dim3(32, 8), 0, stream, s);
    return error;
}

}  // namespace cuda
}  // namespace pyfold
