// Ward's joins over a Gram matrix in a file.
#pragma once

#include <cstdint>

#include "gram_rows.h"
#include "kernels.h"

namespace pyfold {

// The joins that `Kernels::ward` makes of the same matrix, bit for bit. scratch: of N rows, to which joined rows are written.
void ward_rows(const Kernels& kernels, const GramRows& gram, const RowFile& scratch, int64_t n_clusters, const double* weights,
               int64_t* lo, int64_t* hi, double* height, int threads);

}  // namespace pyfold
