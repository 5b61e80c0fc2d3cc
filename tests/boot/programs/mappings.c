// mmap, mprotect and munmap while other threads use the memory: stale translations would show.
#define _GNU_SOURCE
#include "check.h"
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096
#define READERS 3

static atomic_int stop;
static __thread sigjmp_buf back;

static void jump_back(int signal) {
  (void)signal;
  siglongjmp(back, 1);
}

static uint8_t *map(size_t pages) {
  return must(mmap(0, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), "mmap");
}

// `generation` grows before the page gets new content: who sees an older content later has a stale translation.
static _Atomic(volatile long *) window;
static atomic_long generation, stale, reads;
static void *reader(void *unused) {
  while (!atomic_load(&stop)) {
    long at_least = atomic_load(&generation);
    if (atomic_load(&window)[0] < at_least)
      atomic_fetch_add(&stale, 1);
    atomic_fetch_add(&reads, 1);
  }
  return unused;
}

static void with_readers(void (*body)(void)) {
  pthread_t threads[READERS];
  stop = 0;
  stale = reads = 0;
  for (int i = 0; i < READERS; i++)
    if (pthread_create(&threads[i], NULL, reader, NULL))
      exit(3);
  body();
  stop = 1;
  for (int i = 0; i < READERS; i++)
    pthread_join(threads[i], NULL);
}

// A new page takes the place of the old one, again and again.
static void replace_page(void) {
  // With one vCPU it would be over before a reader has its turn.
  while (!atomic_load(&reads))
    sched_yield();
  for (long i = 1; i <= 200; i++) {
    long *fresh = (long *)map(1);
    fresh[0] = i;
    must(mremap(fresh, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, (void *)window), "mremap");
    atomic_store(&generation, i);
  }
}

static volatile long *guarded;
static atomic_long wrong_side, faults;
// Writes while the page is being made read-only: no write may land after mprotect returned.
static void *writer(void *unused) {
  while (!atomic_load(&stop)) {
    if (!sigsetjmp(back, 1)) {
      __asm__ volatile("lock incq %0" : "+m"(*(long *)(uintptr_t)guarded));
    } else
      atomic_fetch_add(&faults, 1);
  }
  return unused;
}

static void protection(void) {
  guarded = (long *)map(1);
  struct sigaction action = {.sa_handler = jump_back};
  sigaction(SIGSEGV, &action, NULL);
  pthread_t threads[READERS];
  stop = 0;
  for (int i = 0; i < READERS; i++)
    if (pthread_create(&threads[i], NULL, writer, NULL))
      exit(3);
  for (int i = 0; i < 100; i++) {
    mprotect((void *)(uintptr_t)guarded, PAGE, PROT_READ);
    long before = *guarded;
    for (int k = 0; k < 2000; k++)
      if (*guarded != before) {
        wrong_side++;
        break;
      }
    mprotect((void *)(uintptr_t)guarded, PAGE, PROT_READ | PROT_WRITE);
    if (i % 8 == 0)
      usleep(200);
  }
  stop = 1;
  for (int i = 0; i < READERS; i++)
    pthread_join(threads[i], NULL);
  check("mprotect-shootdown", wrong_side == 0, "%ld times a write came through", (long)wrong_side);
}

// Threads that map, fill, check and unmap their own memory at once.
static atomic_long mapping_bad;
static void *mapper(void *argument) {
  for (int i = 0; i < 60; i++) {
    size_t pages = 1 + (i * 7 + (long)argument) % 24;
    uint8_t *p = map(pages);
    for (size_t k = 0; k < pages; k++) {
      mapping_bad += p[k * PAGE] != 0 || p[k * PAGE + PAGE - 1] != 0;
      p[k * PAGE] = p[k * PAGE + PAGE - 1] = i + k + (long)argument;
    }
    if (pages > 2)
      munmap(p + PAGE, PAGE);
    for (size_t k = 0; k < pages; k++)
      if (!(pages > 2 && k == 1))
        mapping_bad += p[k * PAGE] != (uint8_t)(i + k + (long)argument);
    // The hole may be another thread's by now.
    if (pages > 2)
      munmap(p, PAGE), munmap(p + 2 * PAGE, (pages - 2) * PAGE);
    else
      munmap(p, pages * PAGE);
  }
  return NULL;
}

static void many(void) {
  pthread_t threads[4];
  for (long i = 0; i < 4; i++)
    if (pthread_create(&threads[i], NULL, mapper, (void *)i))
      exit(3);
  for (int i = 0; i < 4; i++)
    pthread_join(threads[i], NULL);
  check("map-unmap-in-threads", mapping_bad == 0, "%ld wrong bytes", (long)mapping_bad);
}

// Parent and child write to pages that both begin with.
static void copy_on_write(void) {
  uint32_t *p = (uint32_t *)map(64), good = 1;
  for (int round = 0; round < 20; round++) {
    for (int i = 0; i < 64 * 1024; i++)
      p[i] = i ^ round;
    pid_t child = fork();
    if (child == 0) {
      for (int i = 0; i < 64 * 1024; i += 3)
        p[i] = ~i;
      for (int i = 0; i < 64 * 1024; i++)
        if (p[i] != (uint32_t)(i % 3 ? i ^ round : ~i))
          _exit(1);
      _exit(0);
    }
    for (int i = 1; i < 64 * 1024; i += 3)
      p[i] = i + 1;
    int status;
    waitpid(child, &status, 0);
    good &= status == 0;
    for (int i = 0; i < 64 * 1024; i++)
      good &= p[i] == (uint32_t)(i % 3 == 1 ? i + 1 : i ^ round);
  }
  check("copy-on-write", good, "a page has the other's content");
}

// Two views of one memory, and accesses that cross from page to page.
static void shared_views(void) {
  int fd = memfd_create("views", 0);
  if (fd < 0 || ftruncate(fd, 2 * PAGE))
    exit(3);
  uint8_t *a = must(mmap(0, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0), "mmap");
  uint8_t *b = must(mmap(0, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0), "mmap");
  uint8_t *swapped = map(2);
  must(mmap(swapped, PAGE, PROT_READ, MAP_SHARED | MAP_FIXED, fd, PAGE), "mmap");
  must(mmap(swapped + PAGE, PAGE, PROT_READ, MAP_SHARED | MAP_FIXED, fd, 0), "mmap");
  int good = 1;
  for (int i = 0; i < 3000; i++) {
    uint64_t x = random64(), y, z;
    int at = PAGE - 8 + i % 17;
    memcpy(a + at, &x, 8);
    memcpy(&y, b + at, 8);
    good &= x == y;
    memcpy(a + 2 * PAGE - 4, &x, 4);
    memcpy(a, (uint8_t *)&x + 4, 4);
    z = *(volatile uint64_t *)(swapped + PAGE - 4);
    good &= z == x;
  }
  check("shared-views", good, "a view shows something else");
}

int main(void) {
  window = (long *)map(1);
  with_readers(replace_page);
  check("remap-shootdown", stale == 0 && reads > 0, "%ld of %ld reads were stale", (long)stale, (long)reads);
  protection();
  many();
  copy_on_write();
  shared_views();
  return failures != 0;
}
