// LD_PRELOAD: every call that changes files below one folder is counted, and can be logged, made to fail, or be the last.
//
// A log record is a line of text, and for a write the bytes:  write INODE OFFSET LENGTH | truncate INODE LENGTH | sync INODE |
// create INODE PATH | mkdir INODE PATH | rename PATH\tPATH | exchange PATH\tPATH | unlink PATH
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static char root[PATH_MAX];  // empty: not armed
static long count, at;
static int failure;  // at call number `at`: an errno, or -1 to be killed
static FILE* logged;

// Arm: from now on count calls below `folder`; call `n` (from 1; 0: none) fails with `error`, or kills if it is -1.
void crash_arm(const char* folder, long n, int error, const char* log) {
    at = n, failure = error, count = 0;
    logged = *log ? fopen(log, "wb") : NULL;
    strcpy(root, folder);
}

long crash_count(void) { return count; }

static int below(const char* path) { return *root && !strncmp(path, root, strlen(root)); }

static int path_of(int fd, char* path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    const ssize_t length = readlink(link, path, PATH_MAX - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return below(path);
}

// Whether the call goes ahead; if not, errno is set.
static int step(void) {
    if (++count != at) return 1;
    if (failure < 0) raise(SIGKILL);
    errno = failure;
    return 0;
}

static unsigned long inode_of(const char* path) {
    struct stat s;
    return stat(path, &s) ? 0 : s.st_ino;
}

static unsigned long inode_of_fd(int fd) {
    struct stat s;
    return fstat(fd, &s) ? 0 : s.st_ino;
}

static void note(const char* format, ...) {
    if (!logged) return;
    va_list arguments;
    va_start(arguments, format);
    vfprintf(logged, format, arguments);
    va_end(arguments);
    fflush(logged);
}

static void note_data(int fd, long offset, const void* data, long length) {
    if (!logged || length <= 0) return;
    fprintf(logged, "write %lu %ld %ld\n", inode_of_fd(fd), offset, length);
    fwrite(data, 1, length, logged);
    fflush(logged);
}

static int open_as(int (*real)(int, const char*, int, ...), int folder, const char* path, int flags, mode_t mode) {
    const int creates = (flags & O_CREAT) && below(path) && access(path, F_OK);
    const int truncates = !creates && (flags & O_TRUNC) && below(path);
    if ((creates || truncates) && !step()) return -1;
    const int fd = real(folder, path, flags, mode);
    if (fd >= 0 && creates) note("create %lu %s\n", inode_of_fd(fd), path);
    if (fd >= 0 && truncates) note("truncate %lu 0\n", inode_of_fd(fd));
    return fd;
}

#define OPEN(name, at_name)                                        \
    int name(const char* path, int flags, ...) {                   \
        va_list arguments;                                         \
        va_start(arguments, flags);                                \
        const mode_t mode = va_arg(arguments, mode_t);             \
        va_end(arguments);                                         \
        return open_as(REAL(at_name), AT_FDCWD, path, flags, mode); \
    }                                                              \
    int at_name(int folder, const char* path, int flags, ...) {    \
        va_list arguments;                                         \
        va_start(arguments, flags);                                \
        const mode_t mode = va_arg(arguments, mode_t);             \
        va_end(arguments);                                         \
        return open_as(REAL(at_name), folder, path, flags, mode);  \
    }
OPEN(open, openat)
OPEN(open64, openat64)

// A write that kills leaves half of its bytes.
static ssize_t write_at(int fd, const void* data, size_t length, long offset) {
    char path[PATH_MAX];
    const int counts = path_of(fd, path);
    if (counts && count + 1 == at && failure < 0) REAL(pwrite64)(fd, data, length / 2, offset);
    if (counts && !step()) return -1;
    const ssize_t done = REAL(pwrite64)(fd, data, length, offset);
    if (counts) note_data(fd, offset, data, done);
    return done;
}

ssize_t pwrite64(int fd, const void* data, size_t length, off64_t offset) { return write_at(fd, data, length, offset); }
ssize_t pwrite(int fd, const void* data, size_t length, off_t offset) { return write_at(fd, data, length, offset); }

ssize_t write(int fd, const void* data, size_t length) {
    char path[PATH_MAX];
    if (!*root || !path_of(fd, path)) return REAL(write)(fd, data, length);
    const ssize_t done = write_at(fd, data, length, lseek(fd, 0, SEEK_CUR));
    if (done > 0) lseek(fd, done, SEEK_CUR);
    return done;
}

// shutil.copyfile falls back to write.
ssize_t sendfile64(int out, int in, off64_t* offset, size_t length) {
    char path[PATH_MAX];
    if (!path_of(out, path)) return REAL(sendfile64)(out, in, offset, length);
    errno = ENOTSOCK;
    return -1;
}
ssize_t sendfile(int out, int in, off_t* offset, size_t length) { return sendfile64(out, in, offset, length); }

int ftruncate64(int fd, off64_t length) {
    char path[PATH_MAX];
    const int counts = path_of(fd, path);
    if (counts && !step()) return -1;
    const int result = REAL(ftruncate64)(fd, length);
    if (counts && !result) note("truncate %lu %ld\n", inode_of_fd(fd), (long)length);
    return result;
}
int ftruncate(int fd, off_t length) { return ftruncate64(fd, length); }

int fsync(int fd) {
    char path[PATH_MAX];
    const int counts = path_of(fd, path);
    if (counts && !step()) return -1;
    if (counts) note("sync %lu\n", inode_of_fd(fd));
    return 0;  // to the model of a disk; the real one is spared
}
int fdatasync(int fd) { return fsync(fd); }

int rename(const char* from, const char* to) {
    if (below(to) && !step()) return -1;
    const int result = REAL(rename)(from, to);
    if (below(to) && !result) note("rename %s\t%s\n", from, to);
    return result;
}

int renameat2(int from_folder, const char* from, int to_folder, const char* to, unsigned flags) {
    if (below(to) && !step()) return -1;
    const int result = REAL(renameat2)(from_folder, from, to_folder, to, flags);
    if (below(to) && !result) note("exchange %s\t%s\n", from, to);
    return result;
}

static int changes(const char* path, const char* what, int result_of_real) {
    if (!result_of_real && below(path)) note("%s %s\n", what, path);
    return result_of_real;
}

int unlink(const char* path) { return below(path) && !step() ? -1 : changes(path, "unlink", REAL(unlink)(path)); }
int rmdir(const char* path) { return below(path) && !step() ? -1 : changes(path, "unlink", REAL(rmdir)(path)); }

// shutil.rmtree goes by folder descriptors.
int unlinkat(int folder, const char* name, int flags) {
    char path[PATH_MAX] = "";
    if (*name == '/' || folder == AT_FDCWD || !path_of(folder, path)) {
        strcpy(path, name);
    } else {
        strcat(path, "/");
        strcat(path, name);
    }
    if (below(path) && !step()) return -1;
    return changes(path, "unlink", REAL(unlinkat)(folder, name, flags));
}

int mkdir(const char* path, mode_t mode) {
    if (below(path) && access(path, F_OK) && !step()) return -1;
    const int result = REAL(mkdir)(path, mode);
    if (below(path) && !result) note("mkdir %lu %s\n", inode_of(path), path);
    return result;
}
