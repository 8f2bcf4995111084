// Memory for matrices: huge pages where the system has them (a 462 MiB Gram matrix is 118,000 page faults of 4 KiB).
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pyfold {

inline constexpr uintptr_t kHugePage = uintptr_t{2} << 20;

// Asks for huge pages under memory that nothing has touched yet; where it was touched, or is small, nothing changes.
inline void prefer_huge_pages(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kHugePage - 1) & ~(kHugePage - 1);
    const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) & ~(kHugePage - 1);
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    static_cast<void>(memory), static_cast<void>(bytes);
#endif
}

// Uninitialised, aligned to a cache line; freed at the end of the scope.
class Scratch {
  public:
    explicit Scratch(int64_t floats) {
        const size_t bytes = sizeof(float) * floats, alignment = bytes < kHugePage ? 64 : kHugePage;
        data_ = static_cast<float*>(std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment));
        if (!data_) throw std::bad_alloc();
        prefer_huge_pages(data_, bytes);
    }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() { std::free(data_); }
    float* data() const { return data_; }

  private:
    float* data_;
};

}  // namespace pyfold
