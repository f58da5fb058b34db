// Threads that share the neurons of a job: they wait for work, spinning for a moment, then asleep. One job runs at a time.
// A forked child begins without any. How sums are parted follows from the number of threads alone.
#include <immintrin.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
enum { MOST_THREADS = 64, SPINS = 4000 };

typedef void (*Work)(const void *job, int me, int all);
static pthread_mutex_t busy = PTHREAD_MUTEX_INITIALIZER, sleeping = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
static atomic_uint turn, done, arrived, phase;
static int workers, parties;
static Work work;
static const void *work_on;

static inline void wait_while(atomic_uint *what, unsigned is) {
    for (int i = 0; atomic_load_explicit(what, memory_order_acquire) == is; i++)
        if (i < SPINS) _mm_pause(); else sched_yield();
}
static void meet(int all) {  // until all threads are here
    if (all == 1) return;
    unsigned now = atomic_load(&phase);
    if (atomic_fetch_add(&arrived, 1) != (unsigned)all - 1) { wait_while(&phase, now); return; }
    atomic_store(&arrived, 0);
    atomic_fetch_add(&phase, 1);
}
static void *worker(void *number) {
    int me = (int)((uintptr_t)number & 0xff);
    for (unsigned last_turn = (unsigned)((uintptr_t)number >> 8);; last_turn++) {
        for (int i = 0; i < SPINS && atomic_load(&turn) == last_turn; i++) _mm_pause();
        pthread_mutex_lock(&sleeping);
        while (atomic_load(&turn) == last_turn) pthread_cond_wait(&wake, &sleeping);
        pthread_mutex_unlock(&sleeping);
        if (me < parties) work(work_on, me, parties);
        atomic_fetch_add(&done, 1);  // also of a thread that had nothing to do: nobody reads an old job
    }
    return NULL;
}
static void before_fork(void) { pthread_mutex_lock(&busy); }
static void in_parent(void) { pthread_mutex_unlock(&busy); }
static void in_child(void) {
    pthread_mutex_init(&busy, NULL);
    pthread_mutex_init(&sleeping, NULL);
    pthread_cond_init(&wake, NULL);
    workers = 0;
}
__attribute__((constructor)) static void begin(void) { pthread_atfork(before_fork, in_parent, in_child); }

static void run(Work what, const void *job, int threads) {
    pthread_mutex_lock(&busy);
    threads = threads < 1 ? 1 : threads > MOST_THREADS ? MOST_THREADS : threads;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are for the threads of the process
    for (pthread_t id; workers < threads - 1; workers++) {
        uintptr_t number = (uintptr_t)atomic_load(&turn) << 8 | (unsigned)(workers + 1);
        if (pthread_create(&id, NULL, worker, (void *)number)) break;
        pthread_detach(id);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    threads = workers + 1 < threads ? workers + 1 : threads;
    if (threads > 1) {
        parties = threads, work = what, work_on = job;
        atomic_store(&done, 0);
        pthread_mutex_lock(&sleeping);
        atomic_fetch_add(&turn, 1);
        pthread_cond_broadcast(&wake);
        pthread_mutex_unlock(&sleeping);
    }
    what(job, 0, threads);
    for (unsigned now; threads > 1 && (now = atomic_load(&done)) != (unsigned)workers;) wait_while(&done, now);
    pthread_mutex_unlock(&busy);
}
