/* Memory that runs out: the n-th allocation after `fail_at(n)` fails, counted from 0. For LD_PRELOAD
   with PYTHONMALLOC=malloc, in processes of one thread. Where such a process crashes, `crashed_in`
   says whose code it was, in the process that has forked it. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <execinfo.h>
#include <signal.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>

enum { MOST_FRAMES = 64, MOST_CHARACTERS = 4096 };

void *__libc_malloc(size_t);
void *__libc_calloc(size_t, size_t);
void *__libc_realloc(void *, size_t);
void *__libc_memalign(size_t, size_t);

static long remaining = -1; /* until one fails; negative: none does */
static long failed;
static char *library; /* shared with forked processes */

/* Those that only pass on what others do. */
static const char *const between[] = {"outage",    "libc.so",   "libgcc_s",
                                      "libstdc++", "libpython", "python"};

static int is_between(const char *path) {
  const char *name = strrchr(path, '/') ? strrchr(path, '/') + 1 : path;
  for (size_t i = 0; i < sizeof between / sizeof *between; i++)
    if (strncmp(name, between[i], strlen(between[i])) == 0) return 1;
  return 0;
}

static void note_crash(int number) {
  void *frames[MOST_FRAMES];
  Dl_info info;
  int n = backtrace(frames, MOST_FRAMES);
  for (int i = 0; i < n; i++) {
    if (!dladdr(frames[i], &info) || is_between(info.dli_fname)) continue;
    strncpy(library, info.dli_fname, MOST_CHARACTERS - 1);
    break;
  }
  signal(number, SIG_DFL);
  raise(number);
}

/* Called once, before processes are forked. */
int watch(void) {
  void *frame;
  const int signals[] = {SIGSEGV, SIGABRT, SIGBUS, SIGFPE, SIGILL};
  backtrace(&frame, 1); /* which allocates memory the first time */
  library = mmap(NULL, MOST_CHARACTERS, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (library == MAP_FAILED) return -1;
  for (size_t i = 0; i < sizeof signals / sizeof *signals; i++) signal(signals[i], note_crash);
  return 0;
}

const char *crashed_in(void) { return library; }

void fail_at(long n) {
  library[0] = '\0';
  failed = 0;
  remaining = n;
}

long stop_failing(void) {
  remaining = -1;
  return failed;
}

static int fails(void) {
  if (remaining < 0 || remaining-- > 0) return 0;
  failed++;
  errno = ENOMEM;
  return 1;
}

void *malloc(size_t n) { return fails() ? NULL : __libc_malloc(n); }
void *calloc(size_t n, size_t size) { return fails() ? NULL : __libc_calloc(n, size); }
void *realloc(void *old, size_t n) { return fails() ? NULL : __libc_realloc(old, n); }
void *memalign(size_t at, size_t n) { return fails() ? NULL : __libc_memalign(at, n); }
void *aligned_alloc(size_t at, size_t n) { return fails() ? NULL : __libc_memalign(at, n); }
int posix_memalign(void **out, size_t at, size_t n) {
  if (fails()) return ENOMEM;
  *out = __libc_memalign(at, n);
  return *out == NULL ? ENOMEM : 0;
}
