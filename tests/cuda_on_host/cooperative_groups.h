// The part of cooperative groups that kernels use: grid-wide sync.
#pragma once

#include <cuda_runtime.h>

namespace cooperative_groups {
struct grid_group {
    void sync(CUDA_ON_HOST_SITE) const { cuda_on_host::wait(cuda_on_host::Scope::grid, {file, line}, 0, 0); }
};
inline grid_group this_grid() { return {}; }
}  // namespace cooperative_groups
