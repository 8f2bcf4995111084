// The kernel table of one SIMD level.
#include "kernels.h"

namespace pyfold {
namespace PYFOLD_SIMD {

extern const Products products;
void mirror(float*, int64_t, int64_t, int);
void ward(float*, int64_t, int64_t, double*, int64_t*, int64_t*, double*, float*, int64_t*, int);
float argmin(const float*, int64_t, int64_t*);
void ward_costs(float*, int64_t, int64_t, const float*, const double*);
void ward_replay(float*, int64_t, float, const WardJoin*, int64_t);
void ward_join(const float*, float*, int64_t, const float*, const WardJoin&);
void sum_rows(const float* const*, const double*, int64_t, int64_t, double*, int);
void segment_sum(const float*, const Clusters&, const double*, double*);
void cheapest(const double*, const double*, const double*, int64_t, int64_t, double, double, double*, double*, int64_t*);
void nearest(const double*, const double*, const double*, int64_t, int64_t, double, double*, int64_t*);
void merge_rows(const void*, DType, int64_t, int64_t, const Clusters&, const double*, void*, DType, int);
int64_t merge_columns_scratch(int64_t, int64_t, int);
void merge_columns(const void*, DType, int64_t, int64_t, int64_t, const Clusters&, const float*, void*, DType, float*, int);
int64_t first_nonfinite(const void*, DType, int64_t, int);

const Kernels kernels = {&products,      mirror,      ward,     argmin,  ward_costs, ward_replay,           ward_join,
                         sum_rows,       segment_sum, cheapest, nearest, merge_rows, merge_columns_scratch, merge_columns,
                         first_nonfinite};

}  // namespace PYFOLD_SIMD
}  // namespace pyfold
