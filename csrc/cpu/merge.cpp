// Folding a weight: producer rows become the weighted mean of their cluster, consumer columns the sum.
//
// Each input is read once, converted in registers, summed in fp32 in ascending order of the members, and rounded once.
// A cluster of one keeps its bits.
#include "simd.h"

namespace pyfold {
namespace PYFOLD_SIMD {

void merge_rows(const void* x, DType in, int64_t d, int64_t ld, const Clusters& clusters, const double* weights, void* out,
                DType to, int threads) {
    constexpr int64_t kChunk = 1024;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t c = 0; c < clusters.n_clusters; c++) {
        const int64_t* member = clusters.members + clusters.offsets[c];
        const int64_t count = clusters.offsets[c + 1] - clusters.offsets[c];
        if (count == 1 && in == to) {
            const int64_t bytes = d * item_size(in);
            memcpy(static_cast<char*>(out) + c * bytes, static_cast<const char*>(x) + *member * ld * item_size(in), bytes);
            continue;
        }
        double total = 0;
        for (int64_t m = 0; m < count; m++) total += weights ? weights[member[m]] : 1.0;
        const float divisor = static_cast<float>(total);
        float sum[kChunk], line[kChunk];
        for (int64_t begin = 0; begin < d; begin += kChunk) {
            const int64_t width = min_of(kChunk, d - begin);
            read_floats(x, in, member[0] * ld + begin, width, sum);
            if (count > 1) {
                const float w0 = weights ? static_cast<float>(weights[member[0]]) : 1.0f;
                for (int64_t k = 0; k < width; k++) sum[k] *= w0;
                for (int64_t m = 1; m < count; m++) {
                    const float w = weights ? static_cast<float>(weights[member[m]]) : 1.0f;
                    read_floats(x, in, member[m] * ld + begin, width, line);
                    for (int64_t k = 0; k < width; k++) sum[k] += w * line[k];
                }
                for (int64_t k = 0; k < width; k++) sum[k] /= divisor;
            }
            write_floats(sum, width, out, to, c * d + begin);
        }
    }
}

void merge_columns(const void* x, DType in, int64_t h, int64_t n, int64_t ld, const Clusters& clusters, const float* scale,
                   void* out, DType to, float* scratch, int threads) {
    const int64_t n_clusters = clusters.n_clusters, n_rest = n - n_clusters;
    // Each cluster's first member, one vector gather a row; then the other members, as (cluster, column) pairs in order.
    int32_t* first = reinterpret_cast<int32_t*>(scratch);
    int32_t* rest = first + n_clusters;
    for (int64_t c = 0, at = 0; c < n_clusters; c++) {
        first[c] = static_cast<int32_t>(clusters.members[clusters.offsets[c]]);
        for (int64_t m = clusters.offsets[c] + 1; m < clusters.offsets[c + 1]; m++, at++) {
            rest[2 * at] = static_cast<int32_t>(c);
            rest[2 * at + 1] = static_cast<int32_t>(clusters.members[m]);
        }
    }
    float* lines = scratch + n_clusters + 2 * n_rest;
    const int64_t share = (h + threads - 1) / threads;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < threads; t++) {
        float* __restrict line = lines + t * (n + n_clusters);
        float* __restrict sums = line + n;
        for (int64_t r = t * share; r < min_of((t + 1) * share, h); r++) {
            read_floats(x, in, r * ld, n, line);
            if (scale)
                for (int64_t j = 0; j < n; j++) line[j] *= scale[j];
            gather(line, first, n_clusters, sums);
            for (int64_t m = 0; m < n_rest; m++) sums[rest[2 * m]] += line[rest[2 * m + 1]];
            write_floats(sums, n_clusters, out, to, r * n_clusters);
        }
    }
}

int64_t first_nonfinite(const void* x, DType dtype, int64_t count, int threads) {
    constexpr int64_t kChunk = 1 << 16;
    int64_t first = count;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(min : first) if (count > kChunk)
    for (int64_t begin = 0; begin < count; begin += kChunk) {
        const int64_t end = min_of(begin + kChunk, count);
        uint32_t found = 0;
        if (dtype == DType::f32) {
            const uint32_t* p = static_cast<const uint32_t*>(x);
            for (int64_t i = begin; i < end; i++) found |= (p[i] & 0x7f800000u) == 0x7f800000u;
            for (int64_t i = begin; found && i < end; i++)
                if ((p[i] & 0x7f800000u) == 0x7f800000u && i < first) first = i;
        } else {
            const uint16_t mask = dtype == DType::f16 ? 0x7c00 : 0x7f80;
            const uint16_t* p = static_cast<const uint16_t*>(x);
            for (int64_t i = begin; i < end; i++) found |= (p[i] & mask) == mask;
            for (int64_t i = begin; found && i < end; i++)
                if ((p[i] & mask) == mask && i < first) first = i;
        }
    }
    return first == count ? -1 : first;
}

}  // namespace PYFOLD_SIMD
}  // namespace pyfold
