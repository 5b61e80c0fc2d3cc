// Threads: mutexes, condition variables, futexes and atomic instructions that count exactly.
#define _GNU_SOURCE
#include "check.h"
#include <linux/futex.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/syscall.h>
#include <unistd.h>

#define THREADS 6
#define ROUNDS 20000

static void run(void *(*body)(void *)) {
  pthread_t threads[THREADS];
  for (long i = 0; i < THREADS; i++)
    if (pthread_create(&threads[i], NULL, body, (void *)i))
      exit(3);
  for (int i = 0; i < THREADS; i++)
    pthread_join(threads[i], NULL);
}

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static long plain;
static void *with_mutex(void *unused) {
  for (int i = 0; i < ROUNDS; i++) {
    pthread_mutex_lock(&mutex);
    plain++;
    pthread_mutex_unlock(&mutex);
  }
  return unused;
}

static pthread_spinlock_t spin;
static void *with_spinlock(void *unused) {
  for (int i = 0; i < ROUNDS / 4; i++) {
    pthread_spin_lock(&spin);
    plain++;
    pthread_spin_unlock(&spin);
  }
  return unused;
}

static struct {
  atomic_long add, exchange_sum, or_sum;
  atomic_char byte;
  atomic_short word;
  _Alignas(64) atomic_ulong compare;
  char gap[53];
  uint64_t split __attribute__((packed));
} shared __attribute__((aligned(64)));
static atomic_ulong slot;
static __int128 wide __attribute__((aligned(16)));
static atomic_uint bits;

static void *with_atomics(void *argument) {
  long me = (long)argument, sum = 0, flips = 0;
  for (int i = 0; i < ROUNDS; i++) {
    atomic_fetch_add(&shared.add, 3);
    atomic_fetch_add(&shared.byte, 1);
    atomic_fetch_add(&shared.word, 1);
    sum += atomic_exchange(&slot, me * ROUNDS + i + 1);
    unsigned long old = atomic_load(&shared.compare);
    while (!atomic_compare_exchange_weak(&shared.compare, &old, old * 2862933555777941757 + 3037000493))
      ;
    __int128 before = wide;
    while (!__sync_bool_compare_and_swap(&wide, before, before + ((__int128)1 << 64) + 1))
      before = wide;
    __asm__ volatile("lock incq %0" : "+m"(shared.split)::"cc");
    uint8_t was;
    __asm__ volatile("lock btcl %2,%0; setc %1" : "+m"(bits), "=r"(was) : "r"(7) : "cc");
    flips += was ? -1 : 1;
  }
  atomic_fetch_add(&shared.exchange_sum, sum);
  atomic_fetch_add(&shared.or_sum, flips);
  return NULL;
}

static void atomics(void) {
  run(with_atomics);
  long n = (long)THREADS * ROUNDS;
  check("lock-add", shared.add == 3 * n, "%ld", (long)shared.add);
  check("lock-add-narrow", shared.byte == (char)n && shared.word == (short)n, "%d %d", shared.byte, shared.word);
  check("xchg", shared.exchange_sum + (long)slot == n * (n + 1) / 2, "%ld", (long)shared.exchange_sum);
  unsigned long model = 0;
  for (long i = 0; i < n; i++)
    model = model * 2862933555777941757 + 3037000493;
  check("cmpxchg", shared.compare == model, "%lx", (long)shared.compare);
  check("cmpxchg16b", (long)wide == n && (long)(wide >> 64) == n, "%ld %ld", (long)wide, (long)(wide >> 64));
  check("lock-split", (long)shared.split == n, "%ld across a cache line", (long)shared.split);
  check("lock-btc", shared.or_sum == (long)(bits >> 7 & 1), "%ld", (long)shared.or_sum);
}

// Each thread waits for its turn.
static pthread_cond_t turn_changed = PTHREAD_COND_INITIALIZER;
static long turn;
static void *with_condition(void *argument) {
  for (int i = 0; i < 300; i++) {
    pthread_mutex_lock(&mutex);
    while (turn % THREADS != (long)argument)
      pthread_cond_wait(&turn_changed, &mutex);
    turn++;
    pthread_cond_broadcast(&turn_changed);
    pthread_mutex_unlock(&mutex);
  }
  return NULL;
}

// The mutex of Drepper's "Futexes Are Tricky": 0 free, 1 taken, 2 taken and waited for.
static atomic_int lock;
static void *with_futex(void *unused) {
  for (int i = 0; i < ROUNDS; i++) {
    int seen = 0;
    if (!atomic_compare_exchange_strong(&lock, &seen, 1)) {
      if (seen != 2)
        seen = atomic_exchange(&lock, 2);
      while (seen != 0) {
        syscall(SYS_futex, &lock, FUTEX_WAIT_PRIVATE, 2, NULL, NULL, 0);
        seen = atomic_exchange(&lock, 2);
      }
    }
    plain++;
    if (atomic_fetch_sub(&lock, 1) != 1) {
      atomic_store(&lock, 0);
      syscall(SYS_futex, &lock, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
    }
  }
  return unused;
}

// Stores that the x86 memory model lets nobody see in the wrong order.
static atomic_int published, stop;
static volatile long payload;
static void *with_order(void *argument) {
  static atomic_long bad;
  if ((long)argument == 0) {
    for (int i = 1; i <= 200000; i++) {
      payload = i;
      atomic_store_explicit(&published, i, memory_order_release);
    }
    atomic_store(&stop, 1);
  } else
    while (!atomic_load(&stop)) {
      long seen = atomic_load_explicit(&published, memory_order_acquire);
      if (payload < seen)
        atomic_fetch_add(&bad, 1);
    }
  return (void *)(long)bad;
}

static __thread long mine = 5;
static atomic_long tls_bad;
static void *with_tls(void *argument) {
  for (int i = 0; i < 2000; i++) {
    mine += (long)argument;
    if (i % 100 == 0)
      sched_yield();
  }
  if (mine != 5 + 2000 * (long)argument)
    tls_bad++;
  return NULL;
}

static void *nothing(void *argument) { return argument; }

int main(void) {
  run(with_mutex);
  check("mutex", plain == (long)THREADS * ROUNDS, "%ld", plain);
  plain = 0;
  pthread_spin_init(&spin, 0);
  run(with_spinlock);
  check("spinlock", plain == (long)THREADS * (ROUNDS / 4), "%ld", plain);
  atomics();
  run(with_condition);
  check("condition-variable", turn == THREADS * 300, "%ld", turn);
  plain = 0;
  run(with_futex);
  check("futex", plain == (long)THREADS * ROUNDS && lock == 0, "%ld", plain);

  pthread_t threads[THREADS];
  long bad = 0;
  for (long i = 0; i < THREADS; i++)
    if (pthread_create(&threads[i], NULL, with_order, (void *)i))
      exit(3);
  for (int i = 0; i < THREADS; i++) {
    void *seen;
    pthread_join(threads[i], &seen);
    bad += (long)seen;
  }
  check("store-order", bad == 0, "%ld times", bad);
  run(with_tls);
  check("thread-local", tls_bad == 0, "%ld threads", (long)tls_bad);
  for (int i = 0; i < 40; i++)
    run(nothing);
  check("thread-storm", 1, " ");
  return failures != 0;
}
