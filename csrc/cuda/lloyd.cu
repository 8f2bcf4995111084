// One Lloyd pass: d²(i, c) = G_ii − 2 S_ic / W_c + T_c / W_c², S_ic = Σ_{j∈c} w_j G_ij, T_c = Σ_{i∈c} w_i S_ic, and the argmin.
//
// The pass is bound by the one read of G (4 N² bytes), so everything else has to stay out of its way. Four kernels:
//   shares   a warp per point: w_i S_i,own in fp64 (the diagonal blocks of G)
//   rank     a block per problem: clusters by size, so that 32 of equal size make a group that a warp sums in step
//   place    a warp per cluster: W_c and T_c in fp64, and its members into the group's slots
//   nearest  blocks that stay, a row of G at a time: the next row travels to shared memory while this one is summed there,
//            a lane per cluster (a warp per cluster of more than kLong), and each lane keeps its nearest
// Every cluster is summed by one fixed chain (or tree), whatever its rank: no float atomics, the same bits on every run.
#include "cuda/lloyd.h"

#include "cuda/floats.h"

namespace pyfold {
namespace cuda {

namespace {

constexpr int kWarp = 32;
constexpr int kLong = 32;  // members; above, a group of 32 such clusters would leave most warps of a block idle

struct Header {
    int n_long, n_units, weighted, unused;
};

// A cluster summed by a warp, or 32 clusters summed by a lane each: slots from `begin`, `length` each.
struct Unit {
    int begin, length;
};

// A problem's workspace. Clusters are in order of rank: the long ones, then the others, longest first.
struct Layout {
    Header* header;
    float2* terms;  // by rank: distance = G_ii + y − x Σ
    Unit* units;
    int* rank;     // by cluster
    int* cluster;  // by rank
    int* slots;    // columns of G; −1 where a cluster is shorter than its group
    float* parts;  // w_j / W_c of each slot

    __host__ __device__ static int64_t slot_count(int64_t n) { return 2 * n + kWarp * kLong; }

    __host__ __device__ static int64_t bytes(int64_t n, int64_t k) {
        return sizeof(Header) + k * (sizeof(float2) + sizeof(Unit) + 2 * sizeof(int)) +
               slot_count(n) * (sizeof(int) + sizeof(float));
    }

    __device__ explicit Layout(const LloydProblem& problem) {
        const int64_t k = problem.n_clusters;
        header = reinterpret_cast<Header*>(global(problem.workspace));
        terms = reinterpret_cast<float2*>(header + 1);
        units = reinterpret_cast<Unit*>(terms + k);
        rank = reinterpret_cast<int*>(units + k);
        cluster = rank + k;
        slots = cluster + k;
        parts = reinterpret_cast<float*>(slots + slot_count(problem.n));
    }
};

template <typename T>
__device__ T warp_sum(T value) {
#pragma unroll
    for (int lane = kWarp / 2; lane > 0; lane /= 2) value += __shfl_xor_sync(0xffffffffu, value, lane);
    return value;
}

// The problem that the point or cluster numbered `index` belongs to.
template <int64_t LloydProblem::* kFirst>
__device__ const LloydProblem& problem_of(const LloydProblem* problems, int64_t n_problems, int64_t index) {
    int64_t low = 0, high = n_problems;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (problems[middle].*kFirst <= index ? low : high) = middle;
    }
    return problems[low];
}

__global__ void __launch_bounds__(256) shares(const LloydProblem* problems, int64_t n_problems, int64_t n_points,
                                              const int* members, const int* offsets, double* share) {
    const int64_t point = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
    if (point >= n_points) return;
    const LloydProblem& problem = problem_of<&LloydProblem::point>(problems, n_problems, point);
    const int64_t i = point - problem.point, c = problem.cluster + problem.labels[i];
    const float* row = global(problem.gram) + i * problem.n;
    double sum = 0;
    for (int64_t m = offsets[c] + threadIdx.x % kWarp; m < offsets[c + 1]; m += kWarp) {
        const int64_t j = members[m] - problem.point;
        sum += global(problem.weights)[j] * row[j];
    }
    sum = warp_sum(sum);
    if (threadIdx.x % kWarp == 0) share[point] = problem.weights[i] * sum;
}

// Counting sort by size, longest first. Equal sizes come in any order: no result depends on it.
__global__ void __launch_bounds__(1024) rank(const LloydProblem* problems, const int* offsets) {
    __shared__ int count[kLong + 2];   // of clusters by size; the last bin is the long ones
    __shared__ int first[kLong + 2];   // rank of the first of each size
    __shared__ int before[kLong + 2];  // members of all longer (not long) clusters
    __shared__ int next[kLong + 2];
    __shared__ int weighted;
    const LloydProblem& problem = problems[blockIdx.x];
    const Layout space(problem);
    const int thread = threadIdx.x, k = static_cast<int>(problem.n_clusters);
    offsets += problem.cluster;
    if (thread < kLong + 2) count[thread] = 0;
    if (thread == 0) weighted = 0;
    __syncthreads();
    const auto size_of = [&](int c) { return static_cast<int>(offsets[c + 1] - offsets[c]); };
    for (int c = thread; c < k; c += blockDim.x) {
        const int size = size_of(c);
        atomicAdd(&count[size > kLong ? kLong + 1 : size], 1);
    }
    for (int64_t i = thread; i < problem.n; i += blockDim.x)
        if (problem.weights[i] != 1.0) weighted = 1;
    __syncthreads();
    if (thread == 0) {
        for (int size = kLong + 1, ranks = 0, members = 0; size >= 0; size--) {
            first[size] = next[size] = ranks;
            before[size] = members;
            ranks += count[size];
            if (size <= kLong) members += count[size] * size;
        }
    }
    __syncthreads();
    const int n_long = count[kLong + 1], n_short = k - n_long, n_groups = (n_short + kWarp - 1) / kWarp;
    for (int c = thread; c < k; c += blockDim.x) {
        const int size = size_of(c), at = atomicAdd(&next[size > kLong ? kLong + 1 : size], 1);
        space.rank[c] = at;
        space.cluster[at] = c;
        if (size > kLong) space.units[at] = Unit{static_cast<int>(offsets[c] - problem.point), size};
    }
    for (int group = thread; group < n_groups; group += blockDim.x) {
        const int at = n_long + group * kWarp;
        int size = kLong;
        while (size > 1 && first[size] + count[size] <= at) size--;
        // Beyond the long clusters' N slots: the members of all longer clusters, and room for what earlier groups left empty,
        // 32 (kLong − size) at most since the empty slots of a group are where sizes change within it.
        const int begin = static_cast<int>(problem.n) + before[size] + (at - first[size]) * size + kWarp * (kLong - size);
        space.units[n_long + group] = Unit{begin, size};
    }
    if (thread == 0) *space.header = Header{n_long, n_long + n_groups, weighted, 0};
}

__global__ void __launch_bounds__(256) place(const LloydProblem* problems, int64_t n_problems, int64_t n_clusters,
                                             const int* members, const int* offsets, const double* share) {
    const int64_t numbered = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
    if (numbered >= n_clusters) return;
    const LloydProblem& problem = problem_of<&LloydProblem::cluster>(problems, n_problems, numbered);
    const Layout space(problem);
    const int64_t begin = offsets[numbered];
    const int lane = threadIdx.x % kWarp, size = static_cast<int>(offsets[numbered + 1] - begin);
    double weight = 0, total = 0;
    for (int m = lane; m < size; m += kWarp) {
        const int64_t j = members[begin + m];
        weight += global(problem.weights)[j - problem.point];
        total += share[j];
    }
    weight = warp_sum(weight);
    total = warp_sum(total);
    const int c = static_cast<int>(numbered - problem.cluster), at = space.rank[c], n_long = space.header->n_long;
    // A group's slots are [member][lane], so that a warp reads 32 neighbours.
    const bool alone = at < n_long;
    const int column = (at - n_long) % kWarp, step = alone ? 1 : kWarp;
    const Unit unit = space.units[alone ? at : n_long + (at - n_long) / kWarp];
    const int slot = unit.begin + (alone ? 0 : column);
    for (int m = lane; m < unit.length; m += kWarp) {
        const int64_t j = m < size ? members[begin + m] - problem.point : -1;
        space.slots[slot + m * step] = static_cast<int>(j);
        space.parts[slot + m * step] = j < 0 ? 0.0f : static_cast<float>(problem.weights[j] / weight);
    }
    if (lane == 0) {
        const double x = space.header->weighted ? 2.0 : 2.0 / weight;
        space.terms[at] = make_float2(static_cast<float>(x), static_cast<float>(total / (weight * weight)));
    }
}

// The nearest cluster so far, by rank. Among equally near ones the point's own goes first, then the lowest index.
struct Nearest {
    float distance = INFINITY;
    int at = -1;

    __device__ void offer(float other, int other_at, int own, const int* cluster) {
        if (other_at < 0 || other > distance) return;
        if (other == distance && at >= 0) {
            if (at == own || (other_at != own && cluster[other_at] > cluster[at])) return;
        }
        distance = other;
        at = other_at;
    }
};

template <bool kWeighted>
__device__ Nearest nearest_of(const float* row, float self, int own, int n_clusters, const Layout& space, int n_long,
                              int n_units) {
    const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
    Nearest best;
    for (int u = threadIdx.x / kWarp; u < n_units; u += warps) {
        const Unit unit = space.units[u];
        const bool alone = u < n_long;
        const int at = alone ? u : n_long + (u - n_long) * kWarp + lane;
        if (at >= n_clusters) continue;  // the last group may be short
        const int end = unit.begin + (alone ? unit.length : unit.length * kWarp);
        float sum = 0;
#pragma unroll 4
        for (int s = unit.begin + lane; s < end; s += kWarp) {
            const int j = space.slots[s];
            if (j >= 0) sum = kWeighted ? fmaf(space.parts[s], row[j], sum) : sum + row[j];
        }
        if (alone) sum = warp_sum(sum);
        const float2 term = space.terms[at];
        best.offer(fmaxf(0.0f, fmaf(-term.x, sum, self + term.y)), at, own, space.cluster);
    }
    return best;
}

// Shared memory <- global memory past the registers, kBytes (4 or 16) at a time.
template <int kBytes>
__device__ void copy_async(float* shared, const float* from) {
#ifdef __CUDA_ARCH__
    const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    if (kBytes == 16)  // past the L1 cache too
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
#else
    for (int j = 0; j < kBytes / 4; j++) shared[j] = from[j];
#endif
}

// Copies since the last call are a group; at most kPending groups of this thread are under way after wait_for_copies.
__device__ void end_copies() {
#ifdef __CUDA_ARCH__
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int kPending>
__device__ void wait_for_copies() {
#ifdef __CUDA_ARCH__
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// n floats to shared memory, at the source's own offset from a 16-byte boundary; complete after wait_for_copies.
__device__ const float* begin_copy(float* shared, const float* row, int n) {
    const int shift = static_cast<int>(reinterpret_cast<uintptr_t>(row) / sizeof(float) % 4);
    for (int chunk = threadIdx.x; 4 * chunk < shift + n; chunk += blockDim.x) {
        const int first = 4 * chunk - shift;
        if (first >= 0 && first + 4 <= n) {
            copy_async<16>(shared + 4 * chunk, row + first);
        } else {
            for (int j = first > 0 ? first : 0; j < first + 4 && j < n; j++) copy_async<4>(shared + shift + j, row + j);
        }
    }
    return shared + shift;
}

// kRows of shared memory: 2, 1, or 0 where a row does not fit and is read in place.
template <int kRows>
__global__ void __launch_bounds__(1024)
    nearest(const LloydProblem* problems, int64_t n_problems, int64_t n_points, int stride) {
    __shared__ float warp_distance[kWarp];
    __shared__ int warp_at[kWarp];
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    const LloydProblem* last = problems + n_problems - 1;
    const LloydProblem* problem = problems;       // of the row in use
    const LloydProblem* next_problem = problems;  // of the row on its way
    const auto row_of = [&](int64_t point, const LloydProblem*& p) {
        while (p < last && point >= p[1].point) p++;
        return global(p->gram) + (point - p->point) * p->n;
    };
    float* const shared = dynamic_shared<float>();
    int64_t point = blockIdx.x;
    if (point >= n_points) return;
    const float* coming = nullptr;
    if (kRows == 2) {
        const float* source = row_of(point, next_problem);
        coming = begin_copy(shared, source, static_cast<int>(next_problem->n));
        end_copies();
    }
    for (int turn = 0; point < n_points; point += gridDim.x, turn++) {
        const float* row = row_of(point, problem);
        const int64_t i = point - problem->point;
        if (kRows == 1) {
            row = begin_copy(shared, row, static_cast<int>(problem->n));
            end_copies();
            wait_for_copies<0>();
        }
        if (kRows == 2) {
            row = coming;
            const int64_t next = point + gridDim.x;
            if (next < n_points) {
                const float* source = row_of(next, next_problem);
                coming = begin_copy(shared + (turn % 2 ? 0 : stride), source, static_cast<int>(next_problem->n));
            }
            end_copies();  // an empty group at the end, so that the one before is always the row in use
            wait_for_copies<1>();
        }
        __syncthreads();  // the row is whole, and the last row's result has been read
        const Layout space(*problem);
        const Header header = *space.header;
        const float self = row[i];
        const int k = static_cast<int>(problem->n_clusters), own = space.rank[global(problem->labels)[i]];
        Nearest best = header.weighted ? nearest_of<true>(row, self, own, k, space, header.n_long, header.n_units)
                                       : nearest_of<false>(row, self, own, k, space, header.n_long, header.n_units);
        const auto join_lanes = [&] {
#pragma unroll
            for (int other = kWarp / 2; other > 0; other /= 2) {
                const float distance = __shfl_xor_sync(0xffffffffu, best.distance, other);
                const int at = __shfl_xor_sync(0xffffffffu, best.at, other);
                best.offer(distance, at, own, space.cluster);
            }
        };
        join_lanes();
        if (lane == 0) {
            warp_distance[warp] = best.distance;
            warp_at[warp] = best.at;
        }
        __syncthreads();
        if (warp == 0) {
            best = Nearest{};
            if (lane < warps) best.offer(warp_distance[lane], warp_at[lane], own, space.cluster);
            join_lanes();
            if (lane == 0) {
                problem->nearest[i] = space.cluster[best.at];
                problem->distances[i] = best.distance;
            }
        }
    }
}

}  // namespace

int64_t lloyd_workspace(int64_t n, int64_t n_clusters) { return ceil_div(Layout::bytes(n, n_clusters), 16) * 16; }

cudaError_t lloyd(const LloydProblem* problems, int64_t n_problems, int64_t n_points, int64_t n_clusters, const int* members,
                  const int* offsets, double* share, const Tile& tile, int64_t multiprocessors, cudaStream_t stream) {
    const auto blocks = [](int64_t warps) { return dim3(static_cast<unsigned>(ceil_div(warps, 256 / kWarp))); };
    cudaError_t error =
        launch(shares, blocks(n_points), dim3(256), 0, stream, problems, n_problems, n_points, members, offsets, share);
    if (error) return error;
    error = launch(rank, dim3(static_cast<unsigned>(n_problems)), dim3(1024), 0, stream, problems, offsets);
    if (error) return error;
    error = launch(place, blocks(n_clusters), dim3(256), 0, stream, problems, n_problems, n_clusters, members, offsets, share);
    if (error) return error;
    const auto kernel = tile.rows == 2 ? nearest<2> : tile.rows == 1 ? nearest<1> : nearest<0>;
    const int64_t resident = smaller(n_points, multiprocessors * tile.blocks_per_sm);
    return launch(kernel, dim3(static_cast<unsigned>(resident)), dim3(static_cast<unsigned>(tile.threads)),
                  static_cast<size_t>(tile.shared), stream, problems, n_problems, n_points,
                  tile.rows == 2 ? tile.shared / 2 / sizeof(float) : 0);
}

}  // namespace cuda
}  // namespace pyfold
