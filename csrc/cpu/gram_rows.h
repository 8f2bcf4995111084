// The rows of a symmetric matrix, in memory or in a file. A file is read and written by position: pages mapped from it would
// count in the process's memory.
#pragma once

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include <unistd.h>

namespace pyfold {

// What the system refused, as errno says it.
struct FileError : std::runtime_error {
    FileError(int code, const std::string& what, const std::string& path)
        : std::runtime_error(what + strerror(code)), code(code), path(path) {}
    int code;
    std::string path;
};

// Rows of floats in an open file, `stride` bytes apart. `path` is for messages.
struct RowFile {
    int file;
    int64_t stride;
    std::string path;

    // Entries [begin, end) of row i, to the same places of `row`.
    void read(int64_t i, int64_t begin, int64_t end, float* row) const { transfer(pread, "cannot read: ", i, begin, end, row); }
    void write(int64_t i, int64_t n, const float* row) const { transfer(pwrite, "cannot write: ", i, 0, n, row); }

  private:
    template <class Call, class Float>
    void transfer(Call call, const char* what, int64_t i, int64_t begin, int64_t end, Float* row) const {
        int64_t left = 4 * (end - begin), at = i * stride + 4 * begin;
        auto memory = reinterpret_cast<uintptr_t>(row + begin);
        while (left > 0) {
            const ssize_t done = call(file, reinterpret_cast<void*>(memory), left, at);
            if (done < 0 && errno == EINTR) continue;
            if (done <= 0) throw FileError(done < 0 ? errno : EIO, what, path);  // 0: the file ends here
            left -= done, at += done, memory += done;
        }
    }
};

class GramRows {
  public:
    GramRows(const float* gram, int64_t n) : gram_(gram), n_(n) {}
    // diagonal: N, of the matrix in the file.
    GramRows(RowFile file, const float* diagonal, int64_t n) : file_(std::move(file)), diagonal_(diagonal), n_(n) {}

    bool in_memory() const { return gram_; }
    int64_t n() const { return n_; }
    float diagonal(int64_t i) const { return gram_ ? gram_[i * n_ + i] : diagonal_[i]; }

    // What `row` needs for each row in use at a time.
    using Buffer = std::vector<float>;
    std::vector<Buffer> buffers(int64_t count) const { return std::vector<Buffer>(count, Buffer(gram_ ? 0 : n_)); }

    // Row i, of which entries [begin, end) may be used, and only until the buffer is used again.
    const float* row(int64_t i, Buffer& buffer, int64_t begin, int64_t end) const {
        if (gram_) return gram_ + i * n_;
        if (begin == i && end == i + 1)
            buffer[i] = diagonal_[i];
        else
            file_.read(i, begin, end, buffer.data());
        return buffer.data();
    }
    const float* row(int64_t i, Buffer& buffer) const { return row(i, buffer, 0, n_); }

  private:
    const float* gram_ = nullptr;
    RowFile file_{};
    const float* diagonal_ = nullptr;
    int64_t n_;
};

}  // namespace pyfold
