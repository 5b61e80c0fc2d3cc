// Prints where pages of its own are, as this kernel's /proc/self/pagemap says, and stays there. Frame 0: nowhere.
#include "check.h"
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096
#define PRESENT (1ULL << 63)
#define FRAME ((1ULL << 55) - 1)

static void show(int pagemap, const char *what, const volatile void *page) {
  uint64_t entry = 0;
  off_t at = (off_t)((uintptr_t)page / PAGE * sizeof entry);
  if (pread(pagemap, &entry, sizeof entry, at) != sizeof entry) {
    perror("pagemap");
    exit(3);
  }
  printf("where: %s pid %d virtual 0x%lx frame 0x%llx\n", what, (int)getpid(), (unsigned long)(uintptr_t)page,
         entry & PRESENT ? (unsigned long long)(entry & FRAME) : 0ULL);
}

int main(void) {
  int pagemap = open("/proc/self/pagemap", O_RDONLY);
  if (pagemap < 0) {
    perror("pagemap");
    return 3;
  }
  int flags = MAP_PRIVATE | MAP_ANONYMOUS;
  char *data = must(mmap(NULL, PAGE, PROT_READ | PROT_WRITE, flags | MAP_LOCKED, -1, 0), "data");
  char *nothing = must(mmap(NULL, PAGE, PROT_READ, flags, -1, 0), "nothing");
  strcpy(data, "a page of data");
  munmap(nothing, PAGE);
  show(pagemap, "data", data);
  show(pagemap, "code", (const void *)main);
  show(pagemap, "nothing", nothing);
  puts("all said");
  fflush(stdout);
  for (;;)
    pause();
}
