// Points (N, D) in any dtype, centroids (K, D) in fp32 -> the nearest centroid of every point, and the distance to it.
//
// argmin_c ‖c‖² − 2 x·c, block by block of products, so no N x K matrix exists. A product is off by at most ε ‖x‖ ‖c‖ <=
// ε (‖x‖² + ‖c‖²) / 2, so the scores are lower bounds, (1 − ε) ‖c‖² − 2 x·c: what is above that of the least, b, by more than
// 2 ε (‖x‖² + ‖b‖²) is farther away than b. The others are compared by Σ (x_k − c_k)², free of the cancellation in ‖x‖² − 2 x·c
// + ‖c‖², which is also the distance reported.
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
    return panels_of(Form::fp32, d) * blocks_of(n_clusters) * block_floats(Form::fp32, min_of(d, kPanel));
}

// What one thread works with: packed points of one panel, sums between panels, the engine's buffer, the best so far, a line.
struct Workspace {
    int64_t left, sums, buffer, best, line, total;
    Workspace(int64_t d, int64_t n_clusters) {
        left = lines_of(kTile * block_floats(Form::fp32, min_of(d, kPanel)));
        sums = panels_of(Form::fp32, d) > 1 ? lines_of(kRows * min_of(kSpan, blocks_of(n_clusters)) * kBlock) : 0;
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

// The lane of the best; of the lowest centroid among equals.
inline int reduce(const Best& best) {
    int lane = 0;
    for (int l = 1; l < kLanes; l++)
        if (best.score[l] < best.score[lane] || (best.score[l] == best.score[lane] && best.centroid[l] < best.centroid[lane]))
            lane = l;
    return lane;
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

// The nearest centroid of a point and the distance to it: of those whose scores leave it open, the least distance; the lowest
// index among equals. A lane that holds more than one of them is looked through.
inline int64_t decide(const float* point, int64_t d, const float* centroids, int64_t n_clusters, const float* norms,
                      float error, const Best& best, float* distance) {
    const int lane = reduce(best);
    const float score = best.score[lane];
    int64_t nearest = best.centroid[lane];
    *distance = squared_distance(point, centroids + nearest * d, d);
    const float energy = *distance - score + norms[nearest];  // ‖x‖² + ‖b‖²
    const float limit = score + 2 * error * energy;
    const auto compare = [&](int64_t c) {
        const float other = squared_distance(point, centroids + c * d, d);
        if (other < *distance || (other == *distance && c < nearest)) *distance = other, nearest = c;
    };
    for (int l = 0; l < kLanes; l++) {
        if (best.score[l] > limit) continue;
        if (best.second[l] > limit) {
            if (l != lane) compare(best.centroid[l]);
        } else
            for (int64_t c = l; c < n_clusters; c += kLanes) compare(c);
    }
    return nearest;
}

}  // namespace

int64_t assign_scratch(int64_t d, int64_t n_clusters, int threads) {
    return lines_of(blocks_of(n_clusters) * kBlock) + right_floats(d, n_clusters) + threads * Workspace(d, n_clusters).total;
}

void assign(const void* x, DType dtype, int64_t n, int64_t d, int64_t ld, const float* centroids, int64_t n_clusters,
            int64_t* labels, float* distances, float* scratch, int threads) {
    const int64_t n_blocks = blocks_of(n_clusters), n_panels = panels_of(Form::fp32, d),
                  stride = right_floats(d, n_clusters) / n_panels;
    float* norms = scratch;
    float* packed = norms + lines_of(n_blocks * kBlock);
    float* workspaces = packed + n_panels * stride;
    const Workspace sizes(d, n_clusters);
    const auto right = [&](int64_t panel) { return packed + panel * stride; };
    const float error = kProductError + static_cast<float>(n_panels + 3) * kRounding;  // sums of panels; norms and scores

#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t b = 0; b < n_blocks; b++) {
        for (int64_t c = b * kBlock; c < (b + 1) * kBlock; c++)
            norms[c] = c < n_clusters ? (1 - error) * squared_norm(centroids + c * d, d) : kInfinity;
        for (int64_t panel = 0; panel < n_panels; panel++)
            pack(centroids, DType::f32, Form::fp32, n_clusters, d, false, b * kBlock, panel * kPanel,
                 min_of(kPanel, d - panel * kPanel), kTwoForms ? nullptr : right(panel), right(panel), b);
    }

#pragma omp parallel num_threads(threads)
    {
        const Session session;
        float* left = workspaces + omp_get_thread_num() * sizes.total;
        float* sums = left + sizes.left;
        float* buffer = sums + sizes.sums;
        Best* best = reinterpret_cast<Best*>(buffer + sizes.buffer);
        float* line = buffer + sizes.buffer + sizes.best;
#pragma omp for schedule(dynamic)
        for (int64_t first = 0; first < n; first += kRows) {
            const int64_t rows = min_of(kRows, n - first), i_end = blocks_of(rows);
            for (int64_t r = 0; r < kRows; r++)
                for (int l = 0; l < kLanes; l++) best[r].score[l] = best[r].second[l] = kInfinity, best[r].centroid[l] = 0;
            const int64_t span = n_panels > 1 ? kSpan : n_blocks;
            for (int64_t j0 = 0; j0 < n_blocks; j0 += span) {
                const int64_t j1 = min_of(j0 + span, n_blocks);
                for (int64_t panel = 0; panel < n_panels; panel++) {
                    const int64_t column = panel * kPanel, width = min_of(kPanel, d - column);
                    for (int64_t i = 0; i < i_end; i++)
                        pack(x, dtype, Form::fp32, n, ld, false, first + i * kBlock, column, width, left, nullptr, i);
                    for (int64_t j = j0; j < j1; j += kTile)
                        multiply(left, 0, i_end, right(panel), j, min_of(j + kTile, j1), Form::fp32, width, false, buffer,
                                 [&](int64_t i, int64_t c, int64_t count, const float* products) {
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
                read_floats(x, dtype, (first + r) * ld, d, line);
                labels[first + r] = decide(line, d, centroids, n_clusters, norms, error, best[r], &distances[first + r]);
            }
        }
    }
}

}  // namespace PYFOLD_SIMD
}  // namespace pyfold
