// Adds the CUDA ops, all named cuda_*, to the extension.
#pragma once

#include <pybind11/pybind11.h>

namespace pyfold {
namespace cuda {

void bind(pybind11::module_& m);

}  // namespace cuda
}  // namespace pyfold
