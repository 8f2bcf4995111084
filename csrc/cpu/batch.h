// Many problems on one team of threads: the large ones one after another with every thread on each, the small ones side by
// side with one thread each. No kernel's result depends on its number of threads, so neither does this choice.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "parallel.h"

namespace pyfold {

// solve(problem, threads) for every problem; sizes[problem] is its number of points.
template <class Solve>
void for_each_problem(const std::vector<int64_t>& sizes, int threads, Solve solve) {
    constexpr int64_t kLarge = 1500;  // points from which the kernels' own parallel loops pay
    std::vector<int64_t> order(sizes.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return sizes[a] > sizes[b]; });
    const int64_t count = static_cast<int64_t>(order.size());
    int64_t at = 0;
    while (at < count && (sizes[order[at]] >= kLarge || count - at < threads)) solve(order[at++], threads);
    parallel_for(count - at, 1, threads, [&](int64_t i, int) { solve(order[at + i], 1); });
}

}  // namespace pyfold
