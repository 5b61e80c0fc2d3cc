// Code that programs write while they run: each result shows whether old code was executed.
#define _GNU_SOURCE
#include "check.h"
#include <pthread.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096

typedef uint32_t function(void);

// mov eax, value; ret
static void write_function(uint8_t *at, uint32_t value) {
  at[0] = 0xb8;
  memcpy(at + 1, &value, 4);
  at[5] = 0xc3;
}

static uint32_t call(const void *at) { return ((function *)(uintptr_t)at)(); }

static uint8_t *map(int rights, int flags, int fd) {
  return must(mmap(0, 2 * PAGE, rights, flags, fd, 0), "mmap");
}

static void write_and_execute(void) {
  uint8_t *p = map(PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1);
  int good = 1;
  for (uint32_t i = 0; i < 3000; i++) {
    uint8_t *at = p + i * 37 % (2 * PAGE - 6); // also across the page boundary
    uint32_t value = i * 2654435761u;
    write_function(at, value);
    good &= call(at) == value;
    at[1]++; // one byte of it
    good &= (uint8_t)call(at) == (uint8_t)(value + 1);
  }
  check("code-written-and-run", good, "old code ran");

  // Data beside code, in the same page.
  volatile uint32_t *data = (volatile uint32_t *)p;
  write_function(p + 2048, 7);
  good = 1;
  for (uint32_t i = 0; i < 3000; i++) {
    data[i % 100] = i;
    good &= call(p + 2048) == 7 && data[i % 100] == i;
  }
  check("data-beside-code", good, "wrong");
}

static void flip_protection(void) {
  uint8_t *p = map(PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
  int good = 1;
  for (uint32_t i = 0; i < 300; i++) {
    good &= mprotect(p, 2 * PAGE, PROT_READ | PROT_WRITE) == 0;
    write_function(p + PAGE - 3, i); // half of it in each page
    good &= mprotect(p, 2 * PAGE, PROT_READ | PROT_EXEC) == 0;
    good &= call(p + PAGE - 3) == i;
  }
  check("code-mprotect", good, "old code ran");
}

static void two_views(void) {
  int fd = memfd_create("code", 0);
  if (fd < 0 || ftruncate(fd, 2 * PAGE))
    exit(3);
  uint8_t *write = map(PROT_READ | PROT_WRITE, MAP_SHARED, fd);
  uint8_t *run = map(PROT_READ | PROT_EXEC, MAP_SHARED, fd);
  int good = 1;
  for (uint32_t i = 0; i < 2000; i++) {
    write_function(write + i % 64, i);
    __asm__ volatile("" ::: "memory");
    good &= call(run + i % 64) == i;
  }
  check("code-in-two-views", good, "old code ran");
  // By a system call: the kernel is the writer.
  good = 1;
  for (uint32_t i = 0; i < 300; i++) {
    uint8_t bytes[6];
    write_function(bytes, i ^ 0x5555);
    good &= pwrite(fd, bytes, 6, 128) == 6 && call(run + 128) == (i ^ 0x5555);
  }
  check("code-by-write", good, "old code ran");
}

// An instruction that changes the one after it, and a loop that changes its own body.
static void self_modifying(void) {
  static const uint8_t code[] = {
      0x31, 0xc0,                         // xor eax, eax
      0xb9, 200,  0,    0,    0,          // mov ecx, 200
      0xfe, 0x05, 1,    0,    0,    0,    // inc byte [rip + 1]: the immediate of the add
      0x04, 0,                            // add al, 0
      0xff, 0xc9, 0x75, 0xf4,             // dec ecx; jnz to the inc
      0xc3};
  uint8_t *p = map(PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1);
  memcpy(p, code, sizeof code);
  uint32_t got = call(p), wanted = 0;
  for (int i = 1; i <= 200; i++)
    wanted += i;
  check("self-modifying-loop", (uint8_t)got == (uint8_t)wanted, "%u", got);
}

static uint8_t *patched;
static atomic_uint version;
static atomic_int stop;
static atomic_long bad, calls;
// The value is one aligned word: another CPU sees the old or the new one, and after a serialising instruction
// the new one (SDM volume 3A, 9.1.3).
static void *caller(void *unused) {
  while (!atomic_load(&stop)) {
    uint32_t at_least = atomic_load(&version), a = 0, b, c = 0, d;
    __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d)::"memory");
    bad += call(patched) < at_least;
    calls++;
  }
  return unused;
}

static void cross_modifying(void) {
  patched = map(PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1) + 3;
  write_function(patched, 0);
  pthread_t threads[3];
  for (int i = 0; i < 3; i++)
    if (pthread_create(&threads[i], NULL, caller, NULL))
      exit(3);
  for (uint32_t i = 1; i <= 3000; i++) {
    atomic_store((_Atomic uint32_t *)(uintptr_t)(patched + 1), i);
    atomic_store(&version, i);
    if (i % 64 == 0)
      usleep(100);
  }
  stop = 1;
  for (int i = 0; i < 3; i++)
    pthread_join(threads[i], NULL);
  check("cross-modifying", bad == 0 && calls > 0, "%ld of %ld calls ran old code", (long)bad, (long)calls);
}

int main(void) {
  write_and_execute();
  flip_protection();
  two_views();
  self_modifying();
  cross_modifying();
  return failures != 0;
}
