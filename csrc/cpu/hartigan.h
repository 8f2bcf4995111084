// Hartigan's refinement over a Gram matrix: move points between clusters while that lowers the inertia.
#pragma once

#include <cstdint>
#include <vector>

#include "gram_rows.h"
#include "kernels.h"

namespace pyfold {

// gram: symmetric. labels: N, in [0, K), every cluster non-empty; refined in place. weights: N, positive.
// Returns the gain of each move, in the order made: the inertia falls by exactly that.
std::vector<double> hartigan(const Kernels& kernels, const GramRows& gram, int64_t n_clusters, int64_t* labels,
                             const double* weights, int64_t max_moves, int threads);

}  // namespace pyfold
