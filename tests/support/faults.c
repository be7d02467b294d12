/* Fails the n-th call of one kind with an error of the system, in place of the C library: LD_PRELOAD.

   Kinds, of which one is armed at a time:
     change      a file below one folder is made, written, cut, synchronised or renamed
     open        a file or a folder below it is opened without being made
     read        a file below it is read, other than by a mapping
     allocation  memory of a least size is allocated, except by the C library for itself (stdio, threads)
   Calls are counted from fault_arm on; all others are passed through. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char armed, root[PATH_MAX];
static size_t least;
static long target;
static int lasting, error;
static atomic_long *count;

/* The kind's first letter; a folder, or a least size; the number of the call, 0 for none; whether all later ones fail, too;
   the error; and the counter. */
void fault_arm(char kind, const char *folder, size_t bytes, long number, int is_lasting, int value, atomic_long *counter) {
    strncpy(root, folder, sizeof root - 1);
    least = bytes;
    target = number;
    lasting = is_lasting;
    error = value;
    count = counter;
    armed = kind;
}

static int counted(void) {
    long number = atomic_fetch_add(count, 1) + 1;
    if (!target || (number != target && !(lasting && number > target)))
        return 0;
    errno = error;
    return 1;
}

static int fails(const char *path) {
    size_t length = strlen(root);
    return length && !strncmp(path, root, length) && path[length] == '/' && counted();
}

static int name_fails(char kind, int folder, const char *name) {
    char path[2 * PATH_MAX], start[PATH_MAX] = "", link[64];
    if (armed != kind)
        return 0;
    if (name[0] != '/') {
        ssize_t size = -1;
        if (folder == AT_FDCWD)
            size = getcwd(start, sizeof start) ? (ssize_t)strlen(start) : -1;
        else {
            snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
            size = readlink(link, start, sizeof start - 1);
        }
        if (size < 0)
            return 0;
        start[size] = 0;
    }
    snprintf(path, sizeof path, "%s%s%s", start, start[0] ? "/" : "", name);
    return fails(path);
}

static int file_fails(char kind, int file) {
    char path[PATH_MAX], link[64];
    if (armed != kind)
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0)
        return 0;
    path[size] = 0;
    return fails(path);
}

#define REAL(result, name, ...) \
    static result (*real)(__VA_ARGS__); \
    if (!real) real = (result (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

#define OPEN(function, text, folder, parameters, types, arguments) \
    int function parameters { \
        mode_t mode = 0; \
        if (flags & (O_CREAT | __O_TMPFILE)) { va_list list; va_start(list, flags); mode = va_arg(list, mode_t); va_end(list); } \
        static int (*real) types; \
        if (!real) real = (int (*) types)dlsym(RTLD_NEXT, text); \
        if (name_fails(flags & O_CREAT ? 'c' : 'o', folder, path)) return -1; \
        return real arguments; \
    }

OPEN(open, "open", AT_FDCWD, (const char *path, int flags, ...), (const char *, int, ...), (path, flags, mode))
OPEN(open64, "open64", AT_FDCWD, (const char *path, int flags, ...), (const char *, int, ...), (path, flags, mode))
OPEN(openat, "openat", folder, (int folder, const char *path, int flags, ...), (int, const char *, int, ...), (folder, path, flags, mode))
OPEN(openat64, "openat64", folder, (int folder, const char *path, int flags, ...), (int, const char *, int, ...), (folder, path, flags, mode))

FILE *fopen(const char *path, const char *mode) {
    REAL(FILE *, "fopen", const char *, const char *);
    return name_fails(mode[0] == 'r' ? 'o' : 'c', AT_FDCWD, path) ? NULL : real(path, mode);
}
FILE *fopen64(const char *path, const char *mode) {
    REAL(FILE *, "fopen64", const char *, const char *);
    return name_fails(mode[0] == 'r' ? 'o' : 'c', AT_FDCWD, path) ? NULL : real(path, mode);
}
DIR *opendir(const char *path) {
    REAL(DIR *, "opendir", const char *);
    return name_fails('o', AT_FDCWD, path) ? NULL : real(path);
}

ssize_t read(int file, void *data, size_t size) {
    REAL(ssize_t, "read", int, void *, size_t);
    return file_fails('r', file) ? -1 : real(file, data, size);
}
ssize_t readv(int file, const struct iovec *parts, int number) {
    REAL(ssize_t, "readv", int, const struct iovec *, int);
    return file_fails('r', file) ? -1 : real(file, parts, number);
}
ssize_t pread(int file, void *data, size_t size, off_t at) {
    REAL(ssize_t, "pread", int, void *, size_t, off_t);
    return file_fails('r', file) ? -1 : real(file, data, size, at);
}
ssize_t pread64(int file, void *data, size_t size, off64_t at) {
    REAL(ssize_t, "pread64", int, void *, size_t, off64_t);
    return file_fails('r', file) ? -1 : real(file, data, size, at);
}

ssize_t write(int file, const void *data, size_t size) {
    REAL(ssize_t, "write", int, const void *, size_t);
    return file_fails('c', file) ? -1 : real(file, data, size);
}
ssize_t writev(int file, const struct iovec *parts, int number) {
    REAL(ssize_t, "writev", int, const struct iovec *, int);
    return file_fails('c', file) ? -1 : real(file, parts, number);
}
ssize_t pwrite(int file, const void *data, size_t size, off_t at) {
    REAL(ssize_t, "pwrite", int, const void *, size_t, off_t);
    return file_fails('c', file) ? -1 : real(file, data, size, at);
}
ssize_t pwrite64(int file, const void *data, size_t size, off64_t at) {
    REAL(ssize_t, "pwrite64", int, const void *, size_t, off64_t);
    return file_fails('c', file) ? -1 : real(file, data, size, at);
}
int ftruncate(int file, off_t size) {
    REAL(int, "ftruncate", int, off_t);
    return file_fails('c', file) ? -1 : real(file, size);
}
int ftruncate64(int file, off64_t size) {
    REAL(int, "ftruncate64", int, off64_t);
    return file_fails('c', file) ? -1 : real(file, size);
}
int fsync(int file) {
    REAL(int, "fsync", int);
    return file_fails('c', file) ? -1 : real(file);
}
int fdatasync(int file) {
    REAL(int, "fdatasync", int);
    return file_fails('c', file) ? -1 : real(file);
}
int mkdir(const char *path, mode_t mode) {
    REAL(int, "mkdir", const char *, mode_t);
    return name_fails('c', AT_FDCWD, path) ? -1 : real(path, mode);
}
int rename(const char *from, const char *to) {
    REAL(int, "rename", const char *, const char *);
    return name_fails('c', AT_FDCWD, to) ? -1 : real(from, to);
}

static int allocation_fails(size_t size) { return armed == 'a' && size >= least && counted(); }

/* The C library's own names: dlsym, which would find them, allocates itself. */
extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);

void *malloc(size_t size) { return allocation_fails(size) ? NULL : __libc_malloc(size); }
void *calloc(size_t number, size_t size) {
    return allocation_fails(number * size) ? NULL : __libc_calloc(number, size);
}
void *realloc(void *old, size_t size) { return allocation_fails(size) ? NULL : __libc_realloc(old, size); }
void *memalign(size_t alignment, size_t size) { return allocation_fails(size) ? NULL : __libc_memalign(alignment, size); }
void *aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }
int posix_memalign(void **result, size_t alignment, size_t size) {
    void *memory = memalign(alignment, size);
    if (memory)
        *result = memory;
    return memory ? 0 : ENOMEM;
}
void *mmap(void *at, size_t size, int protection, int flags, int file, off_t offset) {
    if (allocation_fails(size))
        return MAP_FAILED;
    return (void *)syscall(SYS_mmap, at, size, protection, flags, file, offset);
}
void *mmap64(void *at, size_t size, int protection, int flags, int file, off64_t offset) {
    return mmap(at, size, protection, flags, file, offset);
}
