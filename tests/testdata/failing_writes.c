/* Makes what a process writes below a folder fail: a stand-in for a disk with a quota or a bad place.

   Loaded by LD_PRELOAD, it counts the calls that change something below FAULT_FOLDER. Those from
   number FAULT_FIRST to FAULT_LAST (from 1) fail with the error number FAULT_ERRNO. Each that fails
   adds a byte to the file FAULT_MARK, which lies elsewhere. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static long calls;

static long number(const char *name, long otherwise) {
    const char *text = getenv(name);
    return text ? atol(text) : otherwise;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static void leave_mark(void) {
    const char *path = getenv("FAULT_MARK");
    int file = path ? REAL(open)(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600) : -1;
    if (file < 0 || REAL(write)(file, "x", 1) != 1) abort(); /* a test without its evidence */
    close(file);
}

static int path_fails(const char *path) {
    const char *folder = getenv("FAULT_FOLDER");
    if (!folder || !path || strncmp(path, folder, strlen(folder)) != 0) return 0;
    long now = __sync_add_and_fetch(&calls, 1);
    if (now < number("FAULT_FIRST", 1) || now > number("FAULT_LAST", LONG_MAX)) return 0;
    leave_mark();
    errno = (int)number("FAULT_ERRNO", EIO);
    return 1;
}

static int file_fails(int file) {
    char link[64], path[PATH_MAX + 1];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, PATH_MAX);
    if (length < 0) return 0;
    path[length] = 0;
    return path_fails(path);
}

ssize_t write(int file, const void *data, size_t size) {
    return file_fails(file) ? -1 : REAL(write)(file, data, size);
}
ssize_t pwrite(int file, const void *data, size_t size, off_t place) {
    return file_fails(file) ? -1 : REAL(pwrite)(file, data, size, place);
}
ssize_t pwrite64(int file, const void *data, size_t size, off64_t place) {
    return file_fails(file) ? -1 : REAL(pwrite64)(file, data, size, place);
}
ssize_t writev(int file, const struct iovec *parts, int n) {
    return file_fails(file) ? -1 : REAL(writev)(file, parts, n);
}
int fsync(int file) { return file_fails(file) ? -1 : REAL(fsync)(file); }
int fdatasync(int file) { return file_fails(file) ? -1 : REAL(fdatasync)(file); }
int rename(const char *from, const char *to) {
    return path_fails(to) ? -1 : REAL(rename)(from, to);
}
int renameat(int a, const char *from, int b, const char *to) {
    return path_fails(to) ? -1 : REAL(renameat)(a, from, b, to);
}
int mkdir(const char *path, mode_t mode) { return path_fails(path) ? -1 : REAL(mkdir)(path, mode); }

#define OPEN(name)                                                      \
    int name(const char *path, int flags, ...) {                        \
        va_list rest;                                                   \
        va_start(rest, flags);                                          \
        mode_t mode = flags & O_CREAT ? va_arg(rest, mode_t) : 0;       \
        va_end(rest);                                                   \
        if ((flags & O_CREAT) && path_fails(path)) return -1;           \
        return REAL(name)(path, flags, mode);                           \
    }
OPEN(open)
OPEN(open64)
