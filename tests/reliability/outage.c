/* Memory that runs out: after `fail_at(n, library)`, the n-th allocation from then on fails, counted
   from 0, of those made by code of a library whose path has `library` in it. For LD_PRELOAD with
   PYTHONMALLOC=malloc, in processes of one thread. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stddef.h>
#include <string.h>

void *__libc_malloc(size_t);
void *__libc_calloc(size_t, size_t);
void *__libc_realloc(void *, size_t);
void *__libc_memalign(size_t, size_t);

static long remaining = -1; /* until one fails; negative: none does */
static long failed;
static const char *from;

void fail_at(long n, const char *library) {
  failed = 0;
  from = library;
  remaining = n;
}

long stop_failing(void) {
  remaining = -1;
  return failed;
}

static int fails(const void *caller) {
  Dl_info library;
  if (remaining < 0) return 0;
  if (!dladdr(caller, &library) || strstr(library.dli_fname, from) == NULL) return 0;
  if (remaining-- > 0) return 0;
  failed++;
  errno = ENOMEM;
  return 1;
}

#define FAILS fails(__builtin_return_address(0))

void *malloc(size_t n) { return FAILS ? NULL : __libc_malloc(n); }
void *calloc(size_t n, size_t size) { return FAILS ? NULL : __libc_calloc(n, size); }
void *realloc(void *old, size_t n) { return FAILS ? NULL : __libc_realloc(old, n); }
void *memalign(size_t at, size_t n) { return FAILS ? NULL : __libc_memalign(at, n); }
void *aligned_alloc(size_t at, size_t n) { return FAILS ? NULL : __libc_memalign(at, n); }
int posix_memalign(void **out, size_t at, size_t n) {
  if (FAILS) return ENOMEM;
  *out = __libc_memalign(at, n);
  return *out == NULL ? ENOMEM : 0;
}
