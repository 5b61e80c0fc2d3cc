// The x87 unit: instructions against the C library's own code, and its control and status words.
#include "check.h"
#include <math.h>

#define UNARY(name, text)                                                                                       \
  static long double name(long double x) {                                                                      \
    __asm__ volatile(text : "+t"(x));                                                                          \
    return x;                                                                                                  \
  }
UNARY(x87_sin, "fsin")
UNARY(x87_cos, "fcos")
UNARY(x87_sqrt, "fsqrt")
UNARY(x87_round, "frndint")
UNARY(x87_2xm1, "f2xm1")

static void set_control(uint16_t word) { __asm__ volatile("fldcw %0" ::"m"(word)); }
static uint16_t control(void) {
  uint16_t word;
  __asm__ volatile("fnstcw %0" : "=m"(word));
  return word;
}

static void functions(void) {
  double worst[5] = {0};
  for (int i = -300; i <= 300; i++) {
    double x = i / 37.0;
    double got[5] = {x87_sin(x), x87_cos(x), x87_sqrt(fabs(x)), x87_2xm1(i / 301.0), 0};
    double wanted[5] = {sin(x), cos(x), sqrt(fabs(x)), exp2(i / 301.0) - 1, atan2(x, 1.5)};
    long double t = x;
    __asm__ volatile("fldl %1; fpatan" : "+t"(t) : "m"((double){1.5}) : "st(7)");
    got[4] = t;
    for (int k = 0; k < 5; k++)
      worst[k] = fmax(worst[k], fabs(got[k] - wanted[k]));
  }
  static const char *names[5] = {"fsin", "fcos", "fsqrt", "f2xm1", "fpatan"};
  for (int k = 0; k < 5; k++)
    check(names[k], worst[k] < 1e-14, "off by %g", worst[k]);

  double off = 0;
  for (int i = 1; i < 300; i++) {
    long double x = i / 7.0, y = 3, out;
    __asm__ volatile("fyl2x" : "=t"(out) : "0"(x), "u"(y) : "st(1)");
    off = fmax(off, fabs((double)out - 3 * log2(i / 7.0)));
  }
  check("fyl2x", off < 1e-13, "off by %g", off);
}

static void precision(void) {
  volatile long double tiny = 0x1p-63L, one = 1, sum = one + tiny;
  check("extended-precision", sum != one && sum - one == tiny, "1 + 2^-63 is 1");
  uint16_t before = control();
  set_control(before & ~0x300); // 24 bits
  volatile long double narrow = 1;
  narrow = narrow / 3;
  set_control(before);
  check("precision-control", (float)narrow == narrow && narrow != 1.0L / 3, "a third has more than 24 bits");
}

static void rounding(void) {
  static const double wanted[4][4] = {{2, -2, 4, 1}, {2, -3, 3, 0}, {3, -2, 4, 1}, {2, -2, 3, 0}};
  static const double values[4] = {2.5, -2.5, 3.5, 0.75};
  uint16_t before = control();
  int good = 1;
  for (int mode = 0; mode < 4; mode++)
    for (int k = 0; k < 4; k++) {
      set_control((before & ~0xc00) | mode << 10);
      good &= x87_round(values[k]) == wanted[mode][k];
    }
  set_control(before);
  check("frndint-modes", good, "wrong");
}

static void formats(void) {
  uint8_t decimal[10];
  long double n = 987654321012345678.0L, back;
  __asm__ volatile("fbstp %0" : "=m"(decimal) : "t"(n) : "st");
  __asm__ volatile("fbld %1" : "=t"(back) : "m"(decimal));
  check("fbstp", decimal[0] == 0x78 && decimal[8] == 0x98 && back == n, "%02x … %02x", decimal[0], decimal[8]);

  int16_t small;
  int64_t large;
  __asm__ volatile("fistps %0" : "=m"(small) : "t"(-1234.0L) : "st");
  __asm__ volatile("fisttpll %0" : "=m"(large) : "t"(-9007199254740993.75L) : "st");
  check("fistp", small == -1234 && large == -9007199254740993, "%d %ld", small, (long)large);

  long double fraction, exponent;
  __asm__ volatile("fxtract" : "=t"(fraction), "=u"(exponent) : "0"(48.0L));
  check("fxtract", fraction == 1.5L && exponent == 5, "%Lg %Lg", fraction, exponent);

  long double rest = 1e10L, by = 7;
  uint16_t status;
  do
    __asm__ volatile("fprem1; fnstsw %1" : "+t"(rest), "=a"(status) : "u"(by));
  while (status & 0x400);
  check("fprem1", rest == remainder(1e10, 7), "%Lg", rest);
}

static void comparison(void) {
  uint8_t below, equal, unordered;
  __asm__ volatile("fucomip %4, %3; setb %0; sete %1; setp %2"
                   : "=r"(below), "=r"(equal), "=r"(unordered)
                   : "t"(1.0L), "u"(2.0L)
                   : "cc", "st");
  check("fucomip", below && !equal && !unordered, "1 < 2: %d %d %d", below, equal, unordered);
  __asm__ volatile("fucomip %4, %3; setb %0; sete %1; setp %2"
                   : "=r"(below), "=r"(equal), "=r"(unordered)
                   : "t"((long double)NAN), "u"(2.0L)
                   : "cc", "st");
  check("fucomip-nan", below && equal && unordered, "%d %d %d", below, equal, unordered);
}

static void environment(void) {
  uint16_t status;
  long double quotient = 0;
  __asm__ volatile("fnclex; fld1; fldz; fdivrp %%st, %%st(1); fnstsw %1" : "=t"(quotient), "=a"(status));
  check("zero-divide-flag", (status & 4) && isinf(quotient), "status %04x, %Lg", status, quotient);

  uint8_t image[512] __attribute__((aligned(16)));
  long double third = 1.0L / 3, again;
  __asm__ volatile("fldt %1; fxsave %0; fninit; fxrstor %0" : "+m"(image) : "m"(third) : "st");
  __asm__ volatile("fstpt %0" : "=m"(again)::"st");
  check("fxsave", memcmp(&third, &again, 10) == 0 && memcmp(image + 32, &third, 10) == 0, "not restored");
}

int main(void) {
  functions();
  precision();
  rounding();
  formats();
  comparison();
  environment();
  return failures != 0;
}
