// Points (N, D) in any dtype, centroids (K, D) in fp32 -> the nearest centroid of every point, and the distance to it.
//
// argmin_c ‖c‖² − 2 x·c, block by block of products, so no N x K matrix exists. Where the engine has coarse products, each off
// by at most ε ‖x‖ ‖c‖ <= ε (‖x‖² + ‖c‖²) / 2, the scores are the lower bounds (1 − ε) ‖c‖² − 2 x·c: the least is the nearest
// where the second is above it by more than 2 ε (‖x‖² + ‖c‖²), c being the one of the least; other points are decided by their
// distances to all centroids, in fp32. The distance reported is Σ (x_k − c_k)² of the one chosen, free of the cancellation in
// ‖x‖² − 2 x·c + ‖c‖².
#include <omp.h>

#include "engine.h"

namespace pyfold {
namespace PYFOLD_SIMD {
namespace {

constexpr float kInfinity = __builtin_inff();
// Points that a thread works on at a time: enough for the centroids, which are read for each of them, to be read rarely.
constexpr int64_t kRows = kTile * kBlock;
// Blocks of centroids whose sums a thread keeps between panels.
constexpr int64_t kSpan = 128;
static_assert(kBlock % kLanes == 0, "a row of products is whole vectors");

// The two best scores of a row so far and the place of the best, per lane.
struct Best {
    float score[kLanes], second[kLanes];
    int32_t centroid[kLanes];
};

inline int64_t right_floats(int64_t d, int64_t n_clusters) {
    return panels_of(d) * blocks_of(n_clusters) * block_floats(DType::f32, Precision::coarse, min_of(d, kPanel));
}

// What one thread works with: packed points of one panel, sums between panels, the engine's buffer, the best so far, a line.
struct Workspace {
    int64_t left, sums, buffer, best, line, total;
    Workspace(int64_t d, int64_t n_clusters) {
        left = lines_of(kTile * block_floats(DType::f32, Precision::coarse, min_of(d, kPanel)));
        sums = panels_of(d) > 1 ? lines_of(kRows * min_of(kSpan, blocks_of(n_clusters)) * kBlock) : 0;
        buffer = lines_of(buffer_floats());
        best = lines_of(kRows * sizeof(Best) / sizeof(float));
        line = lines_of(d);
        total = left + sums + buffer + best + line;
    }
};

// Scores of `rows` points against one block of centroids, into the best of each point.
inline void scan(const float* products, int64_t rows, int64_t j, const float* norms, Best* best) {
    vint place;
    for (int l = 0; l < kLanes; l++) place[l] = static_cast<int32_t>(j + l);
    for (int64_t r = 0; r < rows; r++, products += kBlock) {
        vfloat score = load(best[r].score), second = load(best[r].second);
        vint centroid;
        memcpy(&centroid, best[r].centroid, sizeof centroid);
        for (int64_t k = 0; k < kBlock; k += kLanes) {
            const vfloat s = load(norms + j + k) - 2.0f * load(products + k);
            const vfloat loser = s < score ? score : s;
            second = loser < second ? loser : second;
            centroid = s < score ? place + static_cast<int32_t>(k) : centroid;
            score = s < score ? s : score;
        }
        store(best[r].score, score);
        store(best[r].second, second);
        memcpy(best[r].centroid, &centroid, sizeof centroid);
    }
}

// Best and second best over the lanes; the lowest index among equals.
inline void reduce(const Best& best, float* score, float* second, int64_t* centroid) {
    *score = *second = kInfinity;
    *centroid = 0;
    for (int l = 0; l < kLanes; l++) {
        const bool better = best.score[l] < *score || (best.score[l] == *score && best.centroid[l] < *centroid);
        const float loser = better ? *score : best.score[l];
        if (loser < *second) *second = loser;
        if (best.second[l] < *second) *second = best.second[l];
        if (better) {
            *score = best.score[l];
            *centroid = best.centroid[l];
        }
    }
}

inline float squared_distance(const float* a, const float* b, int64_t d) {
    vfloat sum = {};
    int64_t k = 0;
    for (; k + kLanes <= d; k += kLanes) {
        const vfloat difference = load(a + k) - load(b + k);
        sum += difference * difference;
    }
    float total = 0;
    for (int l = 0; l < kLanes; l++) total += sum[l];
    for (; k < d; k++) total += (a[k] - b[k]) * (a[k] - b[k]);
    return total;
}

inline float squared_norm(const float* a, int64_t d) {
    double total = 0;
    for (int64_t k = 0; k < d; k++) total += static_cast<double>(a[k]) * a[k];
    return static_cast<float>(total);
}

}  // namespace

int64_t assign_scratch(int64_t d, int64_t n_clusters, int threads) {
    return lines_of(blocks_of(n_clusters) * kBlock) + right_floats(d, n_clusters) + threads * Workspace(d, n_clusters).total;
}

void assign(const void* x, DType dtype, int64_t n, int64_t d, int64_t ld, const float* centroids, int64_t n_clusters,
            int64_t* labels, float* distances, float* scratch, int threads) {
    const int64_t n_blocks = blocks_of(n_clusters), n_panels = panels_of(d), stride = right_floats(d, n_clusters) / n_panels;
    float* norms = scratch;
    float* packed = norms + lines_of(n_blocks * kBlock);
    float* workspaces = packed + n_panels * stride;
    const Workspace sizes(d, n_clusters);
    const Operand none{nullptr, 0};
    const auto right = [&](int64_t panel) { return Operand{packed + panel * stride, n_blocks}; };

#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t b = 0; b < n_blocks; b++) {
        for (int64_t c = b * kBlock; c < (b + 1) * kBlock; c++)
            norms[c] = c < n_clusters ? (1 - kCoarseError) * squared_norm(centroids + c * d, d) : kInfinity;
        for (int64_t panel = 0; panel < n_panels; panel++)
            pack(centroids, DType::f32, Precision::coarse, n_clusters, d, false, b * kBlock, panel * kPanel,
                 min_of(kPanel, d - panel * kPanel), kTwoForms ? none : right(panel), right(panel), b);
    }
    // Tiles flush what is below fp32's normal numbers.
    const float flushed = 4 * static_cast<float>(d) * __FLT_MIN__;

#pragma omp parallel num_threads(threads)
    {
        const Session session;
        float* left_data = workspaces + omp_get_thread_num() * sizes.total;
        float* sums = left_data + sizes.left;
        float* buffer = sums + sizes.sums;
        Best* best = reinterpret_cast<Best*>(buffer + sizes.buffer);
        float* line = buffer + sizes.buffer + sizes.best;
#pragma omp for schedule(dynamic)
        for (int64_t first = 0; first < n; first += kRows) {
            const int64_t rows = min_of(kRows, n - first), i_end = blocks_of(rows);
            for (int64_t r = 0; r < kRows; r++)
                for (int l = 0; l < kLanes; l++) best[r].score[l] = best[r].second[l] = kInfinity, best[r].centroid[l] = 0;
            const Operand left{left_data, i_end};
            const int64_t span = n_panels > 1 ? kSpan : n_blocks;
            for (int64_t j0 = 0; j0 < n_blocks; j0 += span) {
                const int64_t j1 = min_of(j0 + span, n_blocks);
                for (int64_t panel = 0; panel < n_panels; panel++) {
                    const int64_t column = panel * kPanel, width = min_of(kPanel, d - column);
                    for (int64_t i = 0; i < i_end; i++)
                        pack(x, dtype, Precision::coarse, n, ld, false, first + i * kBlock, column, width, left, none, i);
                    for (int64_t j = j0; j < j1; j += kTile)
                        multiply(left, 0, i_end, right(panel), j, min_of(j + kTile, j1), DType::f32, Precision::coarse, width,
                                 false, buffer, [&](int64_t i, int64_t c, int64_t count, const float* products) {
                                     float* sum = sums + ((c / kBlock - j0) * kRows + i) * kBlock;
                                     const bool last = panel == n_panels - 1;
                                     if (panel > 0 || !last)
                                         for (int64_t k = 0; k < count * kBlock; k += kLanes)
                                             store(sum + k,
                                                   panel > 0 ? load(sum + k) + load(products + k) : load(products + k));
                                     if (last) scan(panel > 0 ? sum : products, count, c, norms, best + i);
                                 });
                }
            }
            for (int64_t r = 0; r < rows; r++) {
                float score, second;
                reduce(best[r], &score, &second, &labels[first + r]);
                read_floats(x, dtype, (first + r) * ld, d, line);
                distances[first + r] = squared_distance(line, centroids + labels[first + r] * d, d);
                if (kCoarseError == 0) continue;
                const float energy = squared_norm(line, d) + norms[labels[first + r]] / (1 - kCoarseError);
                if (second - score > 2 * kCoarseError * energy + flushed) continue;
                float nearest = kInfinity;
                for (int64_t c = 0; c < n_clusters; c++) {
                    const float distance = squared_distance(line, centroids + c * d, d);
                    if (distance < nearest) {
                        nearest = distance;
                        labels[first + r] = c;
                    }
                }
                distances[first + r] = nearest;
            }
        }
    }
}

}  // namespace PYFOLD_SIMD
}  // namespace pyfold
