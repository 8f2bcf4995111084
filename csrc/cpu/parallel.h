// A loop on a team of threads whose body may throw: an exception must not leave a parallel region.
#pragma once

#include <cstdint>
#include <exception>

#include <omp.h>

namespace pyfold {

// body(i, thread) for every i below count, `chunk` at a time. Throws one of the exceptions once every thread has ended.
template <class Body>
void parallel_for(int64_t count, int chunk, int threads, Body body) {
    std::exception_ptr failure;
#pragma omp parallel for num_threads(threads) schedule(dynamic, chunk) if (count > 1)
    for (int64_t i = 0; i < count; i++) {
        try {
            body(i, omp_get_thread_num());
        } catch (...) {
#pragma omp critical
            failure = std::current_exception();
        }
    }
    if (failure) std::rethrow_exception(failure);
}

}  // namespace pyfold
