// One pass of Lloyd's algorithm over a Gram matrix: labels of the nearest centroids, and the squared distances to them.
#pragma once

#include "kernels.h"

namespace pyfold {

void lloyd(const Kernels& kernels, const float* gram, int64_t n, int64_t n_clusters, const int64_t* labels,
           const double* weights, int64_t* moved, float* distances, int threads);

}  // namespace pyfold
