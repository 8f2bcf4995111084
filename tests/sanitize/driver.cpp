// Every kernel at every SIMD level of this CPU, on random data and 1, 2 and 3 threads, whose results must be equal bit for bit.
//
// Built with sanitizers by `run`. With an argument it does what they must report instead: "overrun" writes a Gram matrix into
// memory that is one row too small, "race" has two threads merge into the same memory.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cpu/batch.h"
#include "cpu/hartigan.h"
#include "cpu/kernels.h"
#include "cpu/lloyd.h"
#include "cpu/memory.h"
#include "cpu/partition.h"
#include "cpu/ward_rows.h"

using namespace pyfold;

namespace {

constexpr DType kDTypes[] = {DType::f32, DType::f16, DType::bf16};

int64_t item_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// Exactly as many bytes as the elements take, so that the first one past the end is known.
using Bytes = std::vector<char>;

Bytes random_matrix(DType dtype, int64_t count, std::mt19937& random) {
    Bytes x(count * item_size(dtype));
    for (int64_t i = 0; i < count; i++) {
        const uint32_t bits = random();
        const float f = static_cast<float>(bits >> 8) / (1 << 23) - 1;
        const uint16_t half = static_cast<uint16_t>((bits & 0x8000) | 0x3000 | (bits & 0x7ff));  // normal in either format
        if (dtype == DType::f32)
            memcpy(&x[4 * i], &f, 4);
        else
            memcpy(&x[2 * i], &half, 2);
    }
    return x;
}

// K non-empty clusters of N points in no order.
std::vector<int64_t> random_labels(int64_t n, int64_t n_clusters, std::mt19937& random) {
    std::vector<int64_t> labels(n);
    for (int64_t i = 0; i < n; i++) labels[i] = i < n_clusters ? i : random() % n_clusters;
    std::shuffle(labels.begin(), labels.end(), random);
    return labels;
}

std::vector<double> random_weights(int64_t n, std::mt19937& random) {
    std::vector<double> weights(n);
    for (double& w : weights) w = (1 + random() % 1000) / 1000.0;
    return weights;
}

// What one level computes on some number of threads, as bytes.
struct Run {
    const Kernels& kernels;
    const int threads;
    std::mt19937 random{1};
    Bytes results{};

    template <class T>
    void keep(const std::vector<T>& values) {
        const char* bytes = reinterpret_cast<const char*>(values.data());
        results.insert(results.end(), bytes, bytes + sizeof(T) * values.size());
    }

    std::vector<float> gram(DType dtype, int64_t n, int64_t d, bool transposed) {
        const Bytes x = random_matrix(dtype, n * d, random);
        std::vector<float> g;
        for (const int64_t n_rows : {n / 3 + 1, n}) {
            const Scratch scratch(kernels.products->gram_scratch(n, n_rows, d, dtype, threads));
            g.assign(n_rows * n, 0);
            for (const bool accumulate : {false, true})
                kernels.products->gram(x.data(), dtype, n, n_rows, d, transposed ? n : d, transposed, accumulate, g.data(),
                                       scratch.data(), threads);
            kernels.mirror(g.data(), n_rows, n, threads);
            keep(g);
        }
        return g;
    }

    void cluster(const std::vector<float>& given, int64_t n, int64_t n_clusters) {
        std::vector<float> g = given;
        const std::vector<double> weights = random_weights(n, random);
        std::vector<int64_t> lo(n - n_clusters), hi(n - n_clusters), near(n);
        std::vector<double> height(n - n_clusters), weight = weights;
        std::vector<float> key(n), distances(n);
        kernels.ward(g.data(), n, n_clusters, weight.data(), lo.data(), hi.data(), height.data(), key.data(), near.data(),
                     threads);
        kernels.mirror(g.data(), n, n, threads);
        std::vector<int64_t> labels = random_labels(n, n_clusters, random), moved(n);
        lloyd(kernels, g.data(), n, n_clusters, labels.data(), weights.data(), moved.data(), distances.data(), threads);
        const std::vector<int64_t> start = labels;
        keep(hartigan(kernels, GramRows(g.data(), n), n_clusters, labels.data(), weights.data(), 200, threads));
        keep(lo), keep(hi), keep(height), keep(g), keep(moved), keep(distances), keep(labels);
        in_file(g, n, n_clusters, weights, start);
        // More rows than a move sums, for this loop to run on several threads.
        std::vector<const float*> rows(3000);
        std::vector<double> row_weights = random_weights(3000, random), sums(n);
        for (const float*& row : rows) row = g.data() + random() % n * n;
        kernels.sum_rows(rows.data(), row_weights.data(), 3000, n, sums.data(), threads);
        keep(sums);
    }

    // The same from a file.
    void in_file(const std::vector<float>& g, int64_t n, int64_t n_clusters, const std::vector<double>& weights,
                 std::vector<int64_t> labels) {
        FILE *rows = tmpfile(), *scratch = tmpfile();
        if (!rows || !scratch) abort();
        const RowFile file{fileno(rows), 4 * n, "rows"};
        std::vector<float> diagonal(n);
        for (int64_t i = 0; i < n; i++) {
            file.write(i, n, g.data() + i * n);
            diagonal[i] = g[i * n + i];
        }
        const GramRows gram(file, diagonal.data(), n);
        std::vector<int64_t> lo(n - n_clusters), hi(n - n_clusters);
        std::vector<double> height(n - n_clusters);
        ward_rows(kernels, gram, RowFile{fileno(scratch), 4 * n, "scratch"}, n_clusters, weights.data(), lo.data(), hi.data(),
                  height.data(), threads);
        keep(hartigan(kernels, gram, n_clusters, labels.data(), weights.data(), 200, threads));
        keep(lo), keep(hi), keep(height), keep(labels);
        fclose(rows), fclose(scratch);
    }

    void assign(DType dtype, int64_t n, int64_t d, int64_t n_clusters) {
        const Bytes x = random_matrix(dtype, n * d, random), centroids = random_matrix(DType::f32, n_clusters * d, random);
        std::vector<int64_t> labels(n);
        std::vector<float> distances(n);
        const Scratch scratch(kernels.products->assign_scratch(d, n_clusters, threads));
        kernels.products->assign(x.data(), dtype, n, d, d, reinterpret_cast<const float*>(centroids.data()), n_clusters,
                                 labels.data(), distances.data(), scratch.data(), threads);
        keep(labels), keep(distances);
    }

    // N rows or columns of length d into K.
    void merge(DType in, DType to, int64_t n, int64_t d, int64_t n_clusters, bool weighted) {
        const Bytes x = random_matrix(in, n * d, random);
        const std::vector<int64_t> labels = random_labels(n, n_clusters, random);
        const std::vector<double> weights = random_weights(n, random);
        const std::vector<float> scale(weights.begin(), weights.end());
        const Partition partition(labels.data(), n, n_clusters);
        const Scratch scratch(kernels.merge_columns_scratch(n, n_clusters, threads));
        Bytes out(n_clusters * d * item_size(to));
        kernels.merge_rows(x.data(), in, d, d, partition.clusters(), weighted ? weights.data() : nullptr, out.data(), to,
                           threads);
        keep(out);
        kernels.merge_columns(x.data(), in, d, n, n, partition.clusters(), weighted ? scale.data() : nullptr, out.data(), to,
                              scratch.data(), threads);
        keep(out);
    }

    void first_nonfinite(DType dtype) {
        constexpr int64_t kCount = 200'001, kBad = 70'001;
        Bytes x = random_matrix(dtype, kCount, random);
        keep(std::vector<int64_t>{kernels.first_nonfinite(x.data(), dtype, kCount, threads)});
        for (const int64_t at : {kBad, kCount - 1}) memset(&x[at * item_size(dtype)], 0x7f, item_size(dtype));
        if (dtype == DType::f32) memset(&x[kBad * 4], 0xff, 4);
        keep(std::vector<int64_t>{kernels.first_nonfinite(x.data(), dtype, kCount, threads)});
    }

    void everything() {
        for (const DType dtype : kDTypes) {
            gram(dtype, 1, 1, false), gram(dtype, 49, 7, true), gram(dtype, 401, 521, false);
            assign(dtype, 1, 1, 1), assign(dtype, 301, 67, 50), assign(dtype, 70, 521, 3);
            for (const DType to : kDTypes) merge(dtype, to, 131, 77, 70, false), merge(dtype, to, 50, 33, 50, true);
            merge(dtype, DType::f32, 400, 129, 2, true);
            first_nonfinite(dtype);
        }
        merge(DType::f16, DType::f16, 1100, 2503, 1003, false);  // a result past the caches
        cluster(gram(DType::f32, 1, 3, false), 1, 1);
        cluster(gram(DType::f32, 403, 30, false), 403, 201);
        cluster(gram(DType::bf16, 129, 40, true), 129, 2);
        std::vector<int64_t> sizes(7, 20), solved(7);
        sizes[3] = 2000;
        for_each_problem(sizes, threads, [&](int64_t problem, int) { solved[problem] = sizes[problem]; });
        keep(solved);
    }
};

void overrun(const Kernels& kernels) {
    const std::vector<float> x(8);
    std::vector<float> out(7 * 8);
    const Scratch scratch(kernels.products->gram_scratch(8, 8, 1, DType::f32, 1));
    kernels.products->gram(x.data(), DType::f32, 8, 8, 1, 1, false, false, out.data(), scratch.data(), 1);
}

void race(const Kernels& kernels) {
    const std::vector<float> x(4096);
    std::vector<float> out(2048);
    const std::vector<int64_t> labels{0, 0};
    const Partition partition(labels.data(), 2, 1);
#pragma omp parallel for num_threads(2) schedule(static)
    for (int i = 0; i < 2; i++)
        kernels.merge_rows(x.data(), DType::f32, 2048, 2048, partition.clusters(), nullptr, out.data(), DType::f32, 1);
}

}  // namespace

int main(int argc, char** argv) {
    const std::string planted = argc > 1 ? argv[1] : "";
    if (planted == "overrun") return overrun(*kernels_for("baseline")), 0;
    if (planted == "race") return race(*kernels_for("baseline")), 0;
    for (const char* level : {"amx", "avx512bf16", "avx512", "avx2", "baseline"}) {
        const Kernels* kernels = kernels_for(level);
        if (!kernels) continue;
        Bytes expected;
        for (const int threads : {1, 2, 3}) {
            Run run{*kernels, threads};
            run.everything();
            if (threads == 1) expected = run.results;
            if (run.results != expected) return printf("%s: another result on %d threads\n", level, threads), 1;
        }
        printf("%s: %zu bytes of results, the same on 1, 2 and 3 threads\n", level, expected.size());
    }
}
