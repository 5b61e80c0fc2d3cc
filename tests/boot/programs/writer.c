// Writes numbered blocks to a disk and makes each durable: "writer DEVICE FIRST". Block number N goes to place N modulo
// PLACES and holds N in each of its words. A line "durable N" says that all up to N are there. It never ends.
#define _GNU_SOURCE
#include "check.h"
#include <fcntl.h>
#include <unistd.h>

#define BLOCK 4096
#define PLACES 1024

int main(int argc, char **argv) {
  if (argc != 3)
    return 2;
  int fd = open(argv[1], O_RDWR | O_DIRECT);
  uint64_t *block = must(aligned_alloc(BLOCK, BLOCK), "memory");
  if (fd < 0) {
    perror(argv[1]);
    return 3;
  }
  for (uint64_t n = strtoull(argv[2], NULL, 10);; n++) {
    for (unsigned i = 0; i < BLOCK / sizeof *block; i++)
      block[i] = n;
    if (pwrite(fd, block, BLOCK, (off_t)(n % PLACES) * BLOCK) != BLOCK || fdatasync(fd)) {
      perror("write");
      return 3;
    }
    if (n % 8 == 0) {
      printf("durable %llu\n", (unsigned long long)n);
      fflush(stdout);
    }
  }
}
