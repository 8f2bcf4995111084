// One block of device memory, cut into arrays: run once with a null base for the size, once with the base for the pointers.
#pragma once

#include <cstddef>

namespace pyfold {
namespace cuda {

class Workspace {
  public:
    explicit Workspace(void* base = nullptr) : base_(static_cast<char*>(base)) {}

    template <typename T>
    T* take(size_t count) {
        T* array = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
        used_ += (count * sizeof(T) + 255) / 256 * 256;
        return array;
    }
    size_t used() const { return used_; }

  private:
    char* base_;
    size_t used_ = 0;
};

}  // namespace cuda
}  // namespace pyfold
