// pyfold._C: addresses and sizes from Python (already validated there) to the kernels. The GIL is released in every call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/hartigan.h"
#include "cpu/kernels.h"

namespace py = pybind11;
using namespace pyfold;

namespace {

using Address = uintptr_t;

template <typename T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

const Kernels& level(const std::string& name) {
    const Kernels* kernels = kernels_for(name.c_str());
    if (!kernels) throw std::invalid_argument("SIMD level '" + name + "' is not in this build or not on this CPU");
    return *kernels;
}

void gram(const std::string& simd, Address x, int dtype, int64_t n, int64_t d, int64_t ld, bool transposed, Address out,
          int threads) {
    const Kernels& kernels = level(simd);
    py::gil_scoped_release release;
    std::vector<float> scratch(kernels.gram_scratch(n) + 16);
    float* aligned = at<float>((reinterpret_cast<Address>(scratch.data()) + 63) & ~Address{63});
    kernels.gram(at<void>(x), static_cast<DType>(dtype), n, d, ld, transposed, at<float>(out), aligned, threads);
}

void mirror(const std::string& simd, Address gram, int64_t n, int threads) {
    const Kernels& kernels = level(simd);
    py::gil_scoped_release release;
    kernels.mirror(at<float>(gram), n, threads);
}

void ward(const std::string& simd, Address gram, int64_t n, int64_t n_clusters, Address weights, Address lo, Address hi,
          Address height, int threads) {
    const Kernels& kernels = level(simd);
    py::gil_scoped_release release;
    std::vector<double> weight(at<double>(weights), at<double>(weights) + n);
    std::vector<float> key(n);
    std::vector<int64_t> near(n);
    kernels.ward(at<float>(gram), n, n_clusters, weight.data(), at<int64_t>(lo), at<int64_t>(hi), at<double>(height),
                 key.data(), near.data(), threads);
    kernels.mirror(at<float>(gram), n, threads);
}

std::vector<double> refine(const std::string& simd, Address gram, int64_t n, int64_t n_clusters, Address labels,
                           Address weights, int64_t max_moves, int threads) {
    const Kernels& kernels = level(simd);
    py::gil_scoped_release release;
    return hartigan(kernels, at<float>(gram), n, n_clusters, at<int64_t>(labels), at<double>(weights), max_moves, threads);
}

// Compressed sparse rows of a partition, by a counting sort.
void sort_labels(Address labels, int64_t n, int64_t n_clusters, Address offsets, Address members) {
    const int64_t* label = at<int64_t>(labels);
    std::vector<int64_t> next(n_clusters + 1);
    for (int64_t i = 0; i < n; i++) next[label[i] + 1]++;
    std::partial_sum(next.begin(), next.end(), next.begin());
    std::copy(next.begin(), next.end(), at<int64_t>(offsets));
    for (int64_t i = 0; i < n; i++) at<int64_t>(members)[next[label[i]]++] = i;
}

void merge_rows(const std::string& simd, Address x, int in, int64_t d, int64_t ld, int64_t n_clusters, Address offsets,
                Address members, Address weights, Address out, int to, int threads) {
    const Kernels& kernels = level(simd);
    py::gil_scoped_release release;
    kernels.merge_rows(at<void>(x), static_cast<DType>(in), d, ld,
                       Clusters{n_clusters, at<int64_t>(offsets), at<int64_t>(members)}, at<double>(weights), at<void>(out),
                       static_cast<DType>(to), threads);
}

void merge_columns(const std::string& simd, Address x, int in, int64_t h, int64_t n, int64_t ld, int64_t n_clusters,
                   Address offsets, Address members, Address scale, Address out, int to, int threads) {
    const Kernels& kernels = level(simd);
    py::gil_scoped_release release;
    // Not a vector, which would fill it, one page fault after the other.
    const std::unique_ptr<void, void (*)(void*)> scratch(std::aligned_alloc(64, (threads * n + n_clusters / 16 + 1) * 64),
                                                         std::free);
    if (!scratch) throw std::bad_alloc();
    kernels.merge_columns(at<void>(x), static_cast<DType>(in), h, n, ld,
                          Clusters{n_clusters, at<int64_t>(offsets), at<int64_t>(members)}, at<float>(scale), at<void>(out),
                          static_cast<DType>(to), scratch.get(), threads);
}

int64_t first_nonfinite(const std::string& simd, Address x, int dtype, int64_t count, int threads) {
    const Kernels& kernels = level(simd);
    py::gil_scoped_release release;
    return kernels.first_nonfinite(at<void>(x), static_cast<DType>(dtype), count, threads);
}

std::vector<std::string> simd_levels() {
    std::vector<std::string> levels;
    for (const char* name : {"avx512", "avx2", "baseline"})
        if (kernels_for(name)) levels.push_back(name);
    return levels;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "pyfold's C++ kernels; call them through pyfold.ops, which validates.";
    m.def("simd_levels", &simd_levels, "SIMD levels of this build that this CPU can run, best first.");
    m.def("gram", &gram);
    m.def("mirror", &mirror);
    m.def("ward", &ward);
    m.def("hartigan", &refine);
    m.def("sort_labels", &sort_labels);
    m.def("merge_rows", &merge_rows);
    m.def("merge_columns", &merge_columns);
    m.def("first_nonfinite", &first_nonfinite);
}
