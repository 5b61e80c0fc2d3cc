// Clocks and sleeps. The bounds are wide: the host may be busy, but nothing may fire early or stand still.
#define _GNU_SOURCE
#include "check.h"
#include <errno.h>
#include <poll.h>
#include <sys/time.h>
#include <sys/timerfd.h>
#include <unistd.h>
#include <x86intrin.h>

static double clock_of(clockid_t id) {
  struct timespec t;
  clock_gettime(id, &t);
  return t.tv_sec + t.tv_nsec * 1e-9;
}

int main(void) {
  double shortest = 1, longest = 0;
  for (int i = 0; i < 30; i++) {
    struct timespec wait = {0, 5000000};
    double start = now();
    nanosleep(&wait, NULL);
    double took = now() - start;
    shortest = took < shortest ? took : shortest;
    longest = took > longest ? took : longest;
  }
  check("nanosleep", shortest >= 0.005 && shortest < 0.02 && longest < 2, "5 ms took %g to %g s", shortest, longest);

  int fd = timerfd_create(CLOCK_MONOTONIC, 0);
  struct itimerspec every = {{0, 2000000}, {0, 2000000}};
  double start = now();
  timerfd_settime(fd, 0, &every, NULL);
  uint64_t ticks = 0, n;
  while (ticks < 100 && read(fd, &n, 8) == 8)
    ticks += n;
  double took = now() - start;
  check("timerfd", took >= 0.002 * ticks && took < 0.002 * ticks + 2, "%ld ticks in %g s", (long)ticks, took);

  start = now();
  poll(NULL, 0, 30);
  took = now() - start;
  check("poll-timeout", took >= 0.03 && took < 2, "30 ms took %g s", took);

  double a = clock_of(CLOCK_MONOTONIC), b = clock_of(CLOCK_BOOTTIME), c = clock_of(CLOCK_MONOTONIC_RAW);
  check("clocks-agree", b - a >= 0 && b - a < 0.1 && c - a < 1 && a - c < 1, "%g %g %g", a, b, c);
  check("clock-is-set", clock_of(CLOCK_REALTIME) > 1.7e9, "%g", clock_of(CLOCK_REALTIME));

  int forward = 1;
  double last = now();
  for (int i = 0; i < 200000; i++) {
    double t = now();
    forward &= t >= last;
    last = t;
  }
  check("monotonic", forward, "went back");

  uint64_t tsc = __rdtsc();
  start = now();
  usleep(50000);
  double rate1 = (__rdtsc() - tsc) / (now() - start);
  tsc = __rdtsc();
  start = now();
  usleep(50000);
  double rate2 = (__rdtsc() - tsc) / (now() - start);
  check("tsc-rate", rate1 > 1e8 && rate1 / rate2 > 0.99 && rate1 / rate2 < 1.01, "%g and %g Hz", rate1, rate2);

  start = now();
  double cpu = clock_of(CLOCK_PROCESS_CPUTIME_ID);
  while (now() - start < 0.2)
    ;
  cpu = clock_of(CLOCK_PROCESS_CPUTIME_ID) - cpu;
  took = now() - start;
  // The kernel's accounting may be coarse: a tick is 4 ms.
  check("cpu-time", cpu > 0.01 && cpu < took + 0.02, "%g s of CPU in %g s", cpu, took);
  return failures != 0;
}
