// One line a check: "ok NAME" or "FAIL NAME: why". A program's exit status is 1 if a check failed.
#pragma once
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static int failures;

// Says how the check `name` went; `format` explains a failure.
__attribute__((format(printf, 3, 4), unused)) static void check(const char *name, int good, const char *format,
                                                                ...) {
  char line[300];
  int n = snprintf(line, sizeof line, good ? "ok %s" : "FAIL %s: ", name);
  if (!good) {
    failures++;
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line + n, sizeof line - n, format, arguments);
    va_end(arguments);
  }
  puts(line);
  fflush(stdout);
}

// For what cannot go on: a system call that must work did not.
__attribute__((unused)) static void *must(void *p, const char *what) {
  if (p == (void *)-1 || p == NULL) {
    perror(what);
    exit(3);
  }
  return p;
}

// Pseudo-random numbers that are the same in each run (xorshift64*).
static uint64_t random_state = 0x9e3779b97f4a7c15;
__attribute__((unused)) static uint64_t random64(void) {
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return random_state * 0x2545f4914f6cdd1d;
}

// Monotonic time in seconds.
__attribute__((unused)) static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + t.tv_nsec * 1e-9;
}
