// The product kernels of one SIMD level.
#include "kernels.h"

namespace pyfold {
namespace PYFOLD_SIMD {

int64_t gram_scratch(int64_t, int64_t, int64_t, DType, int);
void gram(const void*, DType, int64_t, int64_t, int64_t, int64_t, bool, bool, float*, float*, int);
int64_t assign_scratch(int64_t, int64_t, int);
void assign(const void*, DType, int64_t, int64_t, int64_t, const float*, int64_t, int64_t*, float*, float*, int);

extern const Products products;
const Products products = {gram_scratch, gram, assign_scratch, assign};

}  // namespace PYFOLD_SIMD
}  // namespace pyfold
