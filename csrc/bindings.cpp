// pyfold._C: addresses and sizes from Python (already validated there) to the kernels. The GIL is released in every call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/batch.h"
#include "cpu/gram_rows.h"
#include "cpu/hartigan.h"
#include "cpu/kernels.h"
#ifdef PYFOLD_WITH_CUDA
#include "cuda/bindings.h"
#endif
#include "cpu/lloyd.h"
#include "cpu/memory.h"
#include "cpu/partition.h"
#include "cpu/ward_rows.h"

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

// The number of points of each problem, which is entry `at` of its tuple.
template <size_t at, class Problem>
std::vector<int64_t> sizes_of(const std::vector<Problem>& problems) {
    std::vector<int64_t> sizes;
    for (const Problem& problem : problems) sizes.push_back(std::get<at>(problem));
    return sizes;
}

// x, dtype, n, rows of G, d, ld, out
using GramProblem = std::tuple<Address, int, int64_t, int64_t, int64_t, int64_t, Address>;

void gram(const std::string& simd, const std::vector<GramProblem>& problems, bool accumulate, bool transposed, int threads) {
    const Kernels& kernels = level(simd);
    py::gil_scoped_release release;
    for_each_problem(sizes_of<2>(problems), threads, [&](int64_t problem, int team) {
        const auto& [x, dtype, n, n_rows, d, ld, out] = problems[problem];
        const DType type = static_cast<DType>(dtype);
        const Scratch scratch(kernels.products->gram_scratch(n, n_rows, d, type, team));
        if (!accumulate) prefer_huge_pages(at<void>(out), 4 * n_rows * n);
        kernels.products->gram(at<void>(x), type, n, n_rows, d, ld, transposed, accumulate, at<float>(out), scratch.data(),
                               team);
        kernels.mirror(at<float>(out), n_rows, n, team);
    });
}

// x, dtype, n, d, ld, centroids, n_clusters, labels, distances
using AssignProblem = std::tuple<Address, int, int64_t, int64_t, int64_t, Address, int64_t, Address, Address>;

void assign(const std::string& simd, const std::vector<AssignProblem>& problems, int threads) {
    const Kernels& kernels = level(simd);
    py::gil_scoped_release release;
    for_each_problem(sizes_of<2>(problems), threads, [&](int64_t problem, int team) {
        const auto& [x, dtype, n, d, ld, centroids, n_clusters, labels, distances] = problems[problem];
        const Scratch scratch(kernels.products->assign_scratch(d, n_clusters, team));
        kernels.products->assign(at<void>(x), static_cast<DType>(dtype), n, d, ld, at<float>(centroids), n_clusters,
                                 at<int64_t>(labels), at<float>(distances), scratch.data(), team);
    });
}

// gram, n, n_clusters, weights, lo, hi, height
using WardProblem = std::tuple<Address, int64_t, int64_t, Address, Address, Address, Address>;

void ward(const std::string& simd, const std::vector<WardProblem>& problems, int threads) {
    const Kernels& kernels = level(simd);
    py::gil_scoped_release release;
    for_each_problem(sizes_of<1>(problems), threads, [&](int64_t problem, int team) {
        const auto& [gram, n, n_clusters, weights, lo, hi, height] = problems[problem];
        std::vector<double> weight(at<double>(weights), at<double>(weights) + n);
        std::vector<float> key(n);
        std::vector<int64_t> near(n);
        kernels.ward(at<float>(gram), n, n_clusters, weight.data(), at<int64_t>(lo), at<int64_t>(hi), at<double>(height),
                     key.data(), near.data(), team);
        kernels.mirror(at<float>(gram), n, n, team);
    });
}

// gram, n, n_clusters, labels, weights, moved, distances
using LloydProblem = std::tuple<Address, int64_t, int64_t, Address, Address, Address, Address>;

void lloyd_pass(const std::string& simd, const std::vector<LloydProblem>& problems, int threads) {
    const Kernels& kernels = level(simd);
    py::gil_scoped_release release;
    for_each_problem(sizes_of<1>(problems), threads, [&](int64_t problem, int team) {
        const auto& [gram, n, n_clusters, labels, weights, moved, distances] = problems[problem];
        lloyd(kernels, at<float>(gram), n, n_clusters, at<int64_t>(labels), at<double>(weights), at<int64_t>(moved),
              at<float>(distances), team);
    });
}

// gram, n, n_clusters, labels (refined in place), weights
using HartiganProblem = std::tuple<Address, int64_t, int64_t, Address, Address>;

std::vector<std::vector<double>> refine(const std::string& simd, const std::vector<HartiganProblem>& problems,
                                        int64_t max_moves, int threads) {
    const Kernels& kernels = level(simd);
    py::gil_scoped_release release;
    std::vector<std::vector<double>> gains(problems.size());
    for_each_problem(sizes_of<1>(problems), threads, [&](int64_t problem, int team) {
        const auto& [gram, n, n_clusters, labels, weights] = problems[problem];
        gains[problem] = hartigan(kernels, GramRows(at<float>(gram), n), n_clusters, at<int64_t>(labels), at<double>(weights),
                                  max_moves, team);
    });
    return gains;
}

// A Gram matrix in a file: file descriptor, bytes from row to row, what to call it, n, diagonal
using GramFile = std::tuple<int, int64_t, std::string, int64_t, Address>;

GramRows rows_of(const GramFile& gram) {
    const auto& [file, stride, path, n, diagonal] = gram;
    return GramRows(RowFile{file, stride, path}, at<float>(diagonal), n);
}

void ward_file(const std::string& simd, const GramFile& gram, int scratch, int64_t n_clusters, Address weights, Address lo,
               Address hi, Address height, int threads) {
    const Kernels& kernels = level(simd);
    py::gil_scoped_release release;
    ward_rows(kernels, rows_of(gram), RowFile{scratch, std::get<1>(gram), std::get<2>(gram)}, n_clusters, at<double>(weights),
              at<int64_t>(lo), at<int64_t>(hi), at<double>(height), threads);
}

std::vector<double> refine_file(const std::string& simd, const GramFile& gram, int64_t n_clusters, Address labels,
                                Address weights, int64_t max_moves, int threads) {
    const Kernels& kernels = level(simd);
    py::gil_scoped_release release;
    return hartigan(kernels, rows_of(gram), n_clusters, at<int64_t>(labels), at<double>(weights), max_moves, threads);
}

// out[a][b] = G[i[a]][j[b]]; j is ascending.
void gather_file(const GramFile& gram, Address i, int64_t n_i, Address j, int64_t n_j, Address out) {
    py::gil_scoped_release release;
    const GramRows rows = rows_of(gram);
    GramRows::Buffer buffer(rows.n());
    const int64_t* columns = at<int64_t>(j);
    float* to = at<float>(out);
    for (int64_t a = 0; a < n_i; a++) {
        const float* row = rows.row(at<int64_t>(i)[a], buffer, columns[0], columns[n_j - 1] + 1);
        for (int64_t b = 0; b < n_j; b++) *to++ = row[columns[b]];
    }
}

void merge_rows(const std::string& simd, Address x, int in, int64_t n, int64_t d, int64_t ld, Address labels,
                int64_t n_clusters, Address weights, Address out, int to, int threads) {
    const Kernels& kernels = level(simd);
    py::gil_scoped_release release;
    const Partition partition(at<int64_t>(labels), n, n_clusters);
    kernels.merge_rows(at<void>(x), static_cast<DType>(in), d, ld, partition.clusters(), at<double>(weights), at<void>(out),
                       static_cast<DType>(to), threads);
}

void merge_columns(const std::string& simd, Address x, int in, int64_t h, int64_t n, int64_t ld, Address labels,
                   int64_t n_clusters, Address scale, Address out, int to, int threads) {
    const Kernels& kernels = level(simd);
    py::gil_scoped_release release;
    const Partition partition(at<int64_t>(labels), n, n_clusters);
    const Scratch scratch(kernels.merge_columns_scratch(n, n_clusters, threads));
    kernels.merge_columns(at<void>(x), static_cast<DType>(in), h, n, ld, partition.clusters(), at<float>(scale), at<void>(out),
                          static_cast<DType>(to), scratch.data(), threads);
}

int64_t first_nonfinite(const std::string& simd, Address x, int dtype, int64_t count, int threads) {
    const Kernels& kernels = level(simd);
    py::gil_scoped_release release;
    return kernels.first_nonfinite(at<void>(x), static_cast<DType>(dtype), count, threads);
}

std::vector<std::string> simd_levels() {
    std::vector<std::string> levels;
    for (const char* name : {"amx", "avx512bf16", "avx512", "avx2", "baseline"})
        if (kernels_for(name)) levels.push_back(name);
    return levels;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "pyfold's C++ kernels; call them through pyfold.ops, which validates.";
    py::register_exception_translator([](std::exception_ptr thrown) {
        try {
            if (thrown) std::rethrow_exception(thrown);
        } catch (const FileError& error) {
            PyErr_SetObject(PyExc_OSError, py::make_tuple(error.code, error.what(), error.path).ptr());
        }
    });
    m.def("simd_levels", &simd_levels, "SIMD levels of this build that this CPU can run, best first.");
    m.def("gram", &gram);
    m.def("assign", &assign);
    m.def("ward", &ward);
    m.def("lloyd", &lloyd_pass);
    m.def("hartigan", &refine);
    m.def("ward_file", &ward_file);
    m.def("hartigan_file", &refine_file);
    m.def("gather_file", &gather_file);
    m.def("merge_rows", &merge_rows);
    m.def("merge_columns", &merge_columns);
    m.def("first_nonfinite", &first_nonfinite);
#ifdef PYFOLD_WITH_CUDA
    cuda::bind(m);
#endif
}
