// The C library's string functions, which it chooses by CPUID, at all alignments and up to a page's end.
#include "check.h"
#include <sys/mman.h>

#define PAGE 4096

// `size` bytes that end where an unmapped page begins.
static uint8_t *before_hole(size_t size) {
  uint8_t *p = must(mmap(0, 3 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), "mmap");
  if (munmap(p + 2 * PAGE, PAGE))
    exit(3);
  return p + 2 * PAGE - size;
}

int main(void) {
  int length = 1, find = 1, compare = 1, copy = 1, move = 1, set = 1, substring = 1, span = 1;
  uint8_t *end_a = before_hole(0), *end_b = before_hole(0);
  for (int n = 0; n < 300; n++) {
    uint8_t *a = end_a - n - 1, *b = end_b - n - 1;
    memset(a, 'x', n);
    memset(b, 'x', n);
    a[n] = b[n] = 0;
    length &= strlen((char *)a) == (size_t)n && strnlen((char *)a, n + 1) == (size_t)n;
    find &= memchr(a, 'y', n + 1) == NULL && strchr((char *)a, 'y') == NULL && memchr(a, 0, n + 1) == a + n;
    compare &= strcmp((char *)a, (char *)b) == 0 && memcmp(a, b, n + 1) == 0;
    if (n == 0)
      continue;
    int at = random64() % n;
    b[at] = 'y';
    find &= memchr(b, 'y', n) == b + at && strchr((char *)b, 'y') == (char *)b + at &&
            strrchr((char *)b, 'y') == (char *)b + at;
    compare &= strcmp((char *)a, (char *)b) < 0 && memcmp(b, a, n) > 0 &&
               strncmp((char *)a, (char *)b, at) == 0;
    span &= strcspn((char *)b, "zy") == (size_t)at && strspn((char *)b, "x") == (size_t)at;
    substring &= strstr((char *)b, "yx") == (at + 1 < n ? (char *)b + at : NULL);
  }
  static uint8_t from[70000], to[70000], model[70000];
  for (size_t i = 0; i < sizeof from; i++)
    from[i] = random64();
  for (int i = 0; i < 1500; i++) {
    size_t n = i < 1400 ? random64() % 700 : random64() % 60000, s = random64() % 4200, d = random64() % 4200;
    memset(to, 1, sizeof to);
    memcpy(to + d, from + s, n);
    for (size_t k = 0; k < n; k++)
      copy &= to[d + k] == from[s + k];
    copy &= to[d + n] == 1 && (d == 0 || to[d - 1] == 1);
    for (size_t k = 0; k < sizeof to; k++)
      model[k] = to[k] = from[k];
    for (size_t k = 0; k < n; k++)
      model[d + k] = from[s + k];
    memmove(to + d, to + s, n);
    move &= memcmp(to, model, sizeof to) == 0;
    memset(to + d, i, n);
    for (size_t k = 0; k < n; k++)
      set &= to[d + k] == (uint8_t)i;
  }
  check("strlen", length, "wrong");
  check("memchr", find, "wrong");
  check("strcmp", compare, "wrong");
  check("memcpy", copy, "wrong");
  check("memmove", move, "wrong");
  check("memset", set, "wrong");
  check("strstr", substring, "wrong");
  check("strspn", span, "wrong");
  return failures != 0;
}
