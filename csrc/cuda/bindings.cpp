// The CUDA kernels' part of pyfold._C: device addresses, sizes and a stream from Python to the launches. Nothing waits for the
// device; what a launch refuses is raised with the op's name.
#include "cuda/bindings.h"

#include <pybind11/stl.h>

#include <array>
#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/kernels.h"
#include "cuda/lloyd.h"
#include "cuda/merge.h"

namespace py = pybind11;

namespace pyfold {
namespace cuda {

namespace {

using Address = uintptr_t;

template <typename T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

cudaStream_t stream_at(Address stream) { return at<std::remove_pointer_t<cudaStream_t>>(stream); }

void check(cudaError_t error, const char* op) {
    if (error) throw std::runtime_error(std::string("cuda ") + op + ": " + cudaGetErrorString(error));
}

// A device's limits as Python knows them: shared memory of a block and of an SM, threads of an SM.
using Limits = std::tuple<int64_t, int64_t, int64_t>;
Chip chip_of(const Limits& limits) { return {std::get<0>(limits), std::get<1>(limits), std::get<2>(limits)}; }

// These of a device, and its number of SMs.
std::tuple<Limits, int64_t> limits_of(int device) {
    const auto attribute = [device](cudaDeviceAttr which) {
        int value = 0;
        check(cudaDeviceGetAttribute(&value, which, device), "limits");
        return int64_t{value};
    };
    return {Limits{attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin), attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
                   attribute(cudaDevAttrMaxThreadsPerMultiProcessor)},
            attribute(cudaDevAttrMultiProcessorCount)};
}

using Numbers = std::tuple<int64_t, int64_t, int64_t, int64_t>;
Numbers numbers(const Tile& tile) { return {tile.threads, tile.rows, tile.shared, tile.blocks_per_sm}; }

void bind_lloyd(Address problems, int64_t n_problems, int64_t n_points, int64_t n_clusters, int64_t max_n, Address members,
                Address offsets, Address shares, const Limits& limits, int64_t multiprocessors, Address stream) {
    check(lloyd(at<LloydProblem>(problems), n_problems, n_points, n_clusters, at<int>(members), at<int>(offsets),
                at<double>(shares), lloyd_tile(max_n, chip_of(limits)), multiprocessors, stream_at(stream)),
          "lloyd");
}

void bind_merge_rows(Address x, int in, int64_t d, int64_t ld, int64_t n_clusters, Address offsets, Address members,
                     Address weights, Address out, int to, Address stream) {
    check(merge_rows(at<void>(x), static_cast<DType>(in), d, ld, Segments{n_clusters, at<int>(offsets), at<int>(members)},
                     at<double>(weights), at<void>(out), static_cast<DType>(to), stream_at(stream)),
          "merge_rows");
}

void bind_merge_columns(Address x, int in, int64_t h, int64_t n, int64_t ld, int64_t n_clusters, Address offsets,
                        Address members, Address scale, Address out, int to, const Limits& limits, Address stream) {
    check(merge_columns(at<void>(x), static_cast<DType>(in), h, n, ld, Segments{n_clusters, at<int>(offsets), at<int>(members)},
                        at<float>(scale), at<void>(out), static_cast<DType>(to), chip_of(limits), stream_at(stream)),
          "merge_columns");
}

void bind_update(Address problems, int64_t n_problems, int in, bool vector, int64_t max_d, int64_t max_pieces,
                 int64_t max_clusters, int64_t n_clusters, Address offsets, Address members, Address pieces, Address mass,
                 Address stream) {
    check(
        update(at<UpdateProblem>(problems), n_problems, static_cast<DType>(in), vector, max_d, max_pieces, max_clusters,
               Segments{n_clusters, at<int>(offsets), at<int>(members)}, at<int>(pieces), at<double>(mass), stream_at(stream)),
        "update");
}

void bind_mirror(Address problems, int64_t n_problems, int64_t max_n, Address stream) {
    check(mirror(at<MirrorProblem>(problems), n_problems, max_n, stream_at(stream)), "gram");
}

// Rows of so many bytes, each so far from the next; between host and device, whichever way.
void bind_copy_2d(Address to, size_t to_pitch, Address from, size_t from_pitch, size_t row_bytes, size_t rows, Address stream) {
    check(cudaMemcpy2DAsync(at<void>(to), to_pitch, at<void>(from), from_pitch, row_bytes, rows, cudaMemcpyDefault,
                            stream_at(stream)),
          "copy");
}

// A problem as Python gives it: the 64-bit words of the kernels' struct, in its order.
template <typename Problem>
using Words = std::array<Address, sizeof(Problem) / sizeof(Address)>;

template <typename Problem>
std::vector<Problem> problems_of(const std::vector<Words<Problem>>& words) {
    static_assert(sizeof(Problem) == sizeof(Words<Problem>) && std::is_trivially_copyable<Problem>::value, "all words");
    std::vector<Problem> problems(words.size());
    std::memcpy(problems.data(), words.data(), words.size() * sizeof(Problem));
    return problems;
}

template <typename Problem, size_t (*kWorkspace)(const Problem*, int64_t)>
size_t bind_workspace(const std::vector<Words<Problem>>& words) {
    const auto problems = problems_of<Problem>(words);
    return kWorkspace(problems.data(), static_cast<int64_t>(problems.size()));
}

template <typename Problem, cudaError_t (*kSolve)(const Problem*, int64_t, void*, cudaStream_t)>
void bind_solve(const char* op, const std::vector<Words<Problem>>& words, Address workspace, Address stream) {
    const auto problems = problems_of<Problem>(words);
    check(kSolve(problems.data(), static_cast<int64_t>(problems.size()), at<void>(workspace), stream_at(stream)), op);
}

void bind_ward(const std::vector<Words<WardProblem>>& problems, Address workspace, Address stream) {
    bind_solve<WardProblem, pyfold_cuda_ward>("ward", problems, workspace, stream);
}

void bind_hartigan(const std::vector<Words<HartiganProblem>>& problems, Address workspace, Address stream) {
    bind_solve<HartiganProblem, pyfold_cuda_hartigan>("hartigan", problems, workspace, stream);
}

}  // namespace

void bind(py::module_& m) {
    m.attr("CUDA_PIECE") = kPiece;
    m.def("cuda_limits", &limits_of);
    m.def("cuda_lloyd_tile", [](int64_t n, const Limits& limits) { return numbers(lloyd_tile(n, chip_of(limits))); });
    m.def("cuda_columns_tile",
          [](int64_t n, int64_t item, const Limits& limits) { return numbers(columns_tile(n, item, chip_of(limits))); });
    m.def("cuda_lloyd_workspace", &lloyd_workspace);
    const py::call_guard<py::gil_scoped_release> release;
    m.def("cuda_ward_workspace", &bind_workspace<WardProblem, pyfold_cuda_ward_workspace>);
    m.def("cuda_ward", &bind_ward, release);
    m.def("cuda_hartigan_workspace", &bind_workspace<HartiganProblem, pyfold_cuda_hartigan_workspace>);
    m.def("cuda_hartigan", &bind_hartigan, release);
    m.def("cuda_lloyd", &bind_lloyd, release);
    m.def("cuda_merge_rows", &bind_merge_rows, release);
    m.def("cuda_merge_columns", &bind_merge_columns, release);
    m.def("cuda_update", &bind_update, release);
    m.def("cuda_mirror", &bind_mirror, release);
    m.def("cuda_copy_2d", &bind_copy_2d, release);
}

}  // namespace cuda
}  // namespace pyfold
