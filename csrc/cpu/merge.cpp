// Folding a weight: producer rows become the weighted mean of their cluster, consumer columns the sum.
//
// Each input is read once, converted in registers, summed in fp32 in ascending order of the members, and rounded once.
// A cluster of one keeps its bits. Products are rounded before they are added (-ffp-contract=off), so that every SIMD level
// gives the same bits. A large result is written past the caches: reading its lines first would cost a third of the traffic.
#include "transpose.h"

namespace pyfold {
namespace PYFOLD_SIMD {
namespace {

constexpr int64_t kColumns = 1024;             // of a row, summed at a time
constexpr int64_t kMembers = 128;              // per fp32 sum: larger clusters add such sums in fp64
constexpr int64_t kSlice = 64;                 // bytes of a column in a tile: one cache line
constexpr int64_t kClusters = 128;             // summed at a time from a tile
constexpr int64_t kCached = int64_t{4} << 20;  // bytes of a result that may stay in a cache

inline void write_result(void* out, const void* from, int64_t bytes, bool large) {
    if (large)
        stream(out, from, bytes);
    else
        memcpy(out, from, bytes);
}

// sum[0 .. width) = sum of w_i x_i over members [m, last), in order. Rows lie anywhere, so the same columns of the next row,
// which may be the next cluster's, are fetched meanwhile: hardware prefetch starts anew in every 4 KiB page.
void sum_rows_of(const void* x, DType in, int64_t ld, const int64_t* members, int64_t m, int64_t last, int64_t n,
                 const double* weights, int64_t begin, int64_t width, float* sum) {
    const int64_t item = item_size(in), whole = width - width % kLanes;
    for (bool first = true; m < last; m++, first = false) {
        const int64_t at = members[m] * ld + begin;
        const char* next = static_cast<const char*>(x) + (members[min_of(m + 1, n - 1)] * ld + begin) * item;
        const float w = weights ? static_cast<float>(weights[members[m]]) : 1.0f;
        for (int64_t k = 0; k < whole; k += kLanes) {
            if (k * item % 64 == 0) __builtin_prefetch(next + k * item);
            const vfloat product = w * read_vector(x, in, at + k);
            store(sum + k, first ? product : load(sum + k) + product);
        }
        float tail[kLanes];
        read_floats(x, in, at + whole, width - whole, tail);
        for (int64_t k = whole; k < width; k++) sum[k] = first ? w * tail[k - whole] : sum[k] + w * tail[k - whole];
    }
}

// mean[0 .. width) of the rows of members [first, last), from column `begin` on.
void mean_row(const void* x, DType in, int64_t ld, const int64_t* members, int64_t first, int64_t last, int64_t n,
              const double* weights, int64_t begin, int64_t width, float* mean) {
    if (last - first == 1) return sum_rows_of(x, in, ld, members, first, last, n, nullptr, begin, width, mean);
    double divisor = 0;
    for (int64_t m = first; m < last; m++) divisor += weights ? weights[members[m]] : 1.0;
    if (last - first <= kMembers) {
        sum_rows_of(x, in, ld, members, first, last, n, weights, begin, width, mean);
        for (int64_t k = 0; k < width; k++) mean[k] /= static_cast<float>(divisor);
        return;
    }
    double total[kColumns];
    for (int64_t k = 0; k < width; k++) total[k] = 0;
    for (int64_t m = first; m < last; m += kMembers) {
        sum_rows_of(x, in, ld, members, m, min_of(m + kMembers, last), n, weights, begin, width, mean);
        for (int64_t k = 0; k < width; k++) total[k] += mean[k];
    }
    for (int64_t k = 0; k < width; k++) mean[k] = static_cast<float>(total[k] / divisor);
}

}  // namespace

void merge_rows(const void* x, DType in, int64_t d, int64_t ld, const Clusters& clusters, const double* weights, void* out,
                DType to, int threads) {
    const int64_t n_clusters = clusters.n_clusters, n = clusters.offsets[n_clusters];
    const bool large = n_clusters * d * item_size(to) > kCached;
    int64_t largest = 0;
    for (int64_t c = 0; c < n_clusters; c++) {
        const int64_t count = clusters.offsets[c + 1] - clusters.offsets[c];
        largest = count > largest ? count : largest;
    }
    // Rows are cut into so many parts that no task is more than a thread's share, but none under 32 columns.
    const int64_t wanted = (threads * largest + n - 1) / n;
    const int64_t part = ((d + wanted - 1) / wanted + 31) / 32 * 32, n_parts = (d + part - 1) / part;
    const int batch = n_parts == 1 ? static_cast<int>(min_of(8, 1 + n_clusters / (8 * threads))) : 1;
#pragma omp parallel num_threads(threads)
    {
        float mean[kColumns], rounded[kColumns];
#pragma omp for schedule(dynamic, batch)
        for (int64_t task = 0; task < n_clusters * n_parts; task++) {
            const int64_t c = task / n_parts, end = min_of((task % n_parts + 1) * part, d);
            const int64_t first = clusters.offsets[c], last = clusters.offsets[c + 1];
            for (int64_t begin = task % n_parts * part; begin < end; begin += kColumns) {
                const int64_t width = min_of(kColumns, end - begin);
                char* at = static_cast<char*>(out) + (c * d + begin) * item_size(to);
                mean_row(x, in, ld, clusters.members, first, last, n, weights, begin, width, mean);
                write_floats(mean, width, rounded, to, 0);
                write_result(at, rounded, width * item_size(to), large);
            }
        }
        stream_fence();
    }
}

namespace {

// A block's clusters in ascending size, those of 8 and more as they come. The loop over members then mostly ends where it
// did the time before; in order of their labels it would be mispredicted once a cluster.
void sort_by_size(const int64_t* offsets, int64_t width, int32_t* order) {
    constexpr int64_t kSizes = 8;
    int64_t at[kSizes + 2] = {};
    for (int64_t k = 0; k < width; k++) at[min_of(offsets[k + 1] - offsets[k], kSizes) + 1]++;
    for (int64_t size = 0; size < kSizes; size++) at[size + 1] += at[size];
    for (int64_t k = 0; k < width; k++) order[at[min_of(offsets[k + 1] - offsets[k], kSizes)]++] = static_cast<int32_t>(k);
}

template <DType dtype>
struct BitsOf {
    typedef uint16_t type;
};
template <>
struct BitsOf<DType::f32> {
    typedef uint32_t type;
};
template <DType dtype>
using Bits = typename BitsOf<dtype>::type;

// A tile holds kRows rows of x transposed, [column][row]: a cluster is then a few whole cache lines to add.
template <DType in, DType to>
struct Columns {
    static constexpr int64_t kRows = kSlice / item_size(in), kVectors = kRows / kLanes, kItem = item_size(to);
    static constexpr int64_t kStride = kSlice + kClusters * kItem;

    const Clusters& clusters;
    const int32_t* order;
    const float* scale;
    char* out;
    bool large;

    void sum(const char* tile, int64_t first, int64_t last, char* merged) const {
        if (last - first == 1 && in == to && !scale) {
            memcpy(merged, tile + clusters.members[first] * kSlice, kSlice);
            return;
        }
        const auto slice = [&](int64_t m, int64_t v) {
            const int64_t j = clusters.members[m];
            return (scale ? scale[j] : 1.0f) * read_vector(tile, in, j * kRows + v * kLanes);
        };
        vfloat sum[kVectors];
        for (int64_t v = 0; v < kVectors; v++) sum[v] = slice(first, v);
        for (int64_t m = first + 1; m < last; m++)
            for (int64_t v = 0; v < kVectors; v++) sum[v] += slice(m, v);
        for (int64_t v = 0; v < kVectors; v++) write_vector(sum[v], merged, to, v * kLanes);
    }

    // Rows [row, row + rows) of the result.
    void write(const char* tile, int64_t row, int64_t rows) const {
        const int64_t n_clusters = clusters.n_clusters;
        alignas(64) char merged[kClusters * kRows * kItem], turned[kRows * kStride];
        for (int64_t begin = 0; begin < n_clusters; begin += kClusters) {
            const int64_t width = min_of(kClusters, n_clusters - begin), *offsets = clusters.offsets + begin;
            for (int64_t i = begin; i < begin + width; i++)
                sum(tile, offsets[order[i]], offsets[order[i] + 1], merged + order[i] * kRows * kItem);
            char* block = turned + kSlice;
            transpose(reinterpret_cast<const Bits<to>*>(merged), kRows, width, rows, reinterpret_cast<Bits<to>*>(block),
                      kStride / kItem);
            // Whole cache lines only, but for a row's ends: what a block leaves of its last line goes before the next block.
            const bool last = begin + width == n_clusters;
            for (int64_t r = 0; r < rows; r++, block += kStride) {
                char* at = out + ((row + r) * n_clusters + begin) * kItem;
                const int64_t bytes = width * kItem, before = begin ? reinterpret_cast<uintptr_t>(at) % 64 : 0;
                const int64_t after = last ? 0 : reinterpret_cast<uintptr_t>(at + bytes) % 64;
                write_result(at - before, block - before, before + bytes - after, large);
                if (!last) memcpy(block - 64, block + bytes - 64, 64);
            }
        }
    }
};

template <DType in, DType to>
void merge_columns_as(const void* x, int64_t h, int64_t n, int64_t ld, const Clusters& clusters, const float* scale, void* out,
                      float* scratch, int threads) {
    char* tiles = reinterpret_cast<char*>(scratch);
    int32_t* order = reinterpret_cast<int32_t*>(tiles + threads * n * kSlice);
    for (int64_t begin = 0; begin < clusters.n_clusters; begin += kClusters)
        sort_by_size(clusters.offsets + begin, min_of(kClusters, clusters.n_clusters - begin), order + begin);
    const bool large = h * clusters.n_clusters * item_size(to) > kCached;
    const Columns<in, to> columns{clusters, order, scale, static_cast<char*>(out), large};
    constexpr int64_t kRows = Columns<in, to>::kRows;
    const int64_t share = ((h + kRows - 1) / kRows + threads - 1) / threads * kRows;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < threads; t++) {
        char* tile = tiles + t * n * kSlice;
        for (int64_t r = t * share; r < min_of((t + 1) * share, h); r += kRows) {
            const int64_t rows = min_of(kRows, h - r);
            transpose(static_cast<const Bits<in>*>(x) + r * ld, ld, rows, n, reinterpret_cast<Bits<in>*>(tile), kRows);
            columns.write(tile, r, rows);
        }
        stream_fence();
    }
}

template <DType in>
constexpr auto merge_columns_to(DType to) {
    return to == DType::f32   ? merge_columns_as<in, DType::f32>
           : to == DType::f16 ? merge_columns_as<in, DType::f16>
                              : merge_columns_as<in, DType::bf16>;
}

}  // namespace

int64_t merge_columns_scratch(int64_t n, int64_t n_clusters, int threads) { return threads * n * kSlice / 4 + n_clusters; }

void merge_columns(const void* x, DType in, int64_t h, int64_t n, int64_t ld, const Clusters& clusters, const float* scale,
                   void* out, DType to, float* scratch, int threads) {
    const auto merge = in == DType::f32   ? merge_columns_to<DType::f32>(to)
                       : in == DType::f16 ? merge_columns_to<DType::f16>(to)
                                          : merge_columns_to<DType::bf16>(to);
    merge(x, h, n, ld, clusters, scale, out, scratch, threads);
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
