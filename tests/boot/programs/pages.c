// Memory that lies idle and must not change: "pages MIB ROUNDS SECONDS" fills so many MiB with patterns, and then waits
// so many seconds and checks all of them, in each round. Every third page is half random, every third one of a few, the
// rest zeros but for a word. Says "filled" and "verified N".
#define _GNU_SOURCE
#include "check.h"
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096
#define WORDS (PAGE / sizeof(uint64_t))

static uint64_t word(uint64_t page, uint64_t round, unsigned i) {
  uint64_t seed = page % 3 == 0 ? page * 1000 + round : page % 3 == 1 ? page % 30 : page;
  if (page % 3 == 2)
    return i == 5 ? seed + round : 0;
  if (i >= WORDS / 2)
    return 0;
  uint64_t x = (seed + 1) * 0x9e3779b97f4a7c15 + i * 0x2545f4914f6cdd1d;
  x ^= x >> 29;
  return x * 0xbf58476d1ce4e5b9;
}

int main(int argc, char **argv) {
  if (argc != 4)
    return 2;
  uint64_t pages = strtoull(argv[1], NULL, 10) << 8, rounds = strtoull(argv[2], NULL, 10);
  unsigned seconds = strtoul(argv[3], NULL, 10);
  uint64_t *memory = must(mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), "memory");
  for (uint64_t page = 0; page < pages; page++)
    for (unsigned i = 0; i < WORDS; i++)
      memory[page * WORDS + i] = word(page, 0, i);
  puts("filled");
  fflush(stdout);
  for (uint64_t round = 0; round < rounds; round++) {
    sleep(seconds);
    double start = now();
    for (uint64_t page = 0; page < pages; page++)
      for (unsigned i = 0; i < WORDS; i++) {
        uint64_t value = memory[page * WORDS + i], wanted = word(page, round, i);
        if (value != wanted) {
          printf("FAIL pages: word %u of page %llu is %llx instead of %llx\n", i, (unsigned long long)page,
                 (unsigned long long)value, (unsigned long long)wanted);
          return 1;
        }
        memory[page * WORDS + i] = word(page, round + 1, i);
      }
    printf("verified %llu in %.2f s\n", (unsigned long long)round, now() - start);
    fflush(stdout);
  }
  puts("ok pages");
  return 0;
}
