/* Memory that runs out: the n-th allocation after `fail_at(n)` fails, once, and so do all after it
   if `forever`. For LD_PRELOAD with PYTHONMALLOC=malloc, in processes of one thread. */

#include <errno.h>
#include <stddef.h>

void *__libc_malloc(size_t);
void *__libc_calloc(size_t, size_t);
void *__libc_realloc(void *, size_t);
void *__libc_memalign(size_t, size_t);

static long remaining = -1; /* until one fails; negative: none does */
static long failed;

void fail_at(long n) {
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
void *aligned_alloc(size_t at, size_t n) { return memalign(at, n); }
int posix_memalign(void **out, size_t at, size_t n) {
  void *got = memalign(at, n);
  if (got == NULL) return ENOMEM;
  *out = got;
  return 0;
}
