/* An OpenMP runtime that ThreadSanitizer understands: a team is made of threads of pthread, which
   are joined at the end. GNU's own waits in ways that the sanitizer does not see. */

#include <pthread.h>
#include <stdlib.h>

static int max_threads = 2;
static __thread int number;

struct member {
  void (*function)(void *);
  void *data;
  int number;
};

static void *run(void *argument) {
  struct member *member = argument;
  number = member->number;
  member->function(member->data);
  return NULL;
}

void GOMP_parallel(void (*function)(void *), void *data, unsigned n, unsigned flags) {
  (void)flags;
  if (n == 0) n = max_threads;
  struct member *members = malloc(n * sizeof *members);
  pthread_t *threads = malloc(n * sizeof *threads);
  if (members == NULL || threads == NULL) abort();
  for (unsigned i = 1; i < n; i++) {
    members[i] = (struct member){function, data, (int)i};
    if (pthread_create(&threads[i], NULL, run, &members[i])) abort();
  }
  function(data);
  for (unsigned i = 1; i < n; i++) pthread_join(threads[i], NULL);
  free(members);
  free(threads);
}

int omp_get_thread_num(void) { return number; }
int omp_get_max_threads(void) { return max_threads; }
void omp_set_num_threads(int n) { max_threads = n; }
int omp_get_num_threads(void) { return max_threads; }
