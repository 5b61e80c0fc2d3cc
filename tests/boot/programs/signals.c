// Signals: nesting, machine and FPU state across handlers, alternate stacks, recovery from faults.
#define _GNU_SOURCE
#include "check.h"
#include <immintrin.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <ucontext.h>
#include <unistd.h>

static void handle(int signal, void (*handler)(int, siginfo_t *, void *), int flags) {
  struct sigaction action = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO | flags};
  if (sigaction(signal, &action, NULL))
    exit(3);
}

static volatile int depth, deepest, count;

static void nest(int signal, siginfo_t *info, void *context) {
  (void)info, (void)context;
  count++;
  if (++depth > deepest)
    deepest = depth;
  if (depth < 20)
    raise(signal);
  depth--;
}

static void nested(void) {
  handle(SIGUSR1, nest, SA_NODEFER);
  raise(SIGUSR1);
  check("signal-nested", count == 20 && deepest == 20 && depth == 0, "%d handlers, depth %d", count, deepest);
}

static void clobber(int signal, siginfo_t *info, void *context) {
  (void)signal, (void)info, (void)context;
  count++;
  __asm__ volatile("vpcmpeqd %%ymm0,%%ymm0,%%ymm0; vpcmpeqd %%ymm7,%%ymm7,%%ymm7; vpcmpeqd %%ymm15,%%ymm15,%%ymm15;"
                   "fninit; fldpi; fldl2e; std; cld" ::
                       : "xmm0", "xmm7", "xmm15", "memory");
  _mm_setcsr(0x1f80 | 0x6000);
}

// A timer's signals hit a loop whose state is all in registers.
static void state_survives(void) {
  count = 0;
  handle(SIGALRM, clobber, SA_RESTART);
  struct itimerval often = {{0, 1500}, {0, 1500}}, never = {{0, 0}, {0, 0}};
  int good = 1, control = 1;
  uint32_t csr = _mm_getcsr();
  setitimer(ITIMER_REAL, &often, NULL);
  for (double end = now() + 20; count < 60 && good && now() < end;) {
    uint64_t seeds[4] = {random64(), random64(), random64(), random64()}, out[12];
    long double st = 1, wanted = 1;
    for (int i = 0; i < 1000; i++)
      wanted = wanted * 1.0001L;
    __asm__ volatile("vmovdqu %2,%%ymm0; vmovdqa %%ymm0,%%ymm7; vmovdqa %%ymm0,%%ymm15; fldt %3; mov $1000,%%ecx\n"
                     "1: fmul %%st,%%st(1); dec %%ecx; jnz 1b; fstp %%st\n"
                     "vmovdqu %%ymm0,%1; vmovdqu %%ymm7,32+%1; vmovdqu %%ymm15,64+%1; vzeroupper"
                     : "+t"(st), "=m"(out)
                     : "m"(seeds), "m"((long double){1.0001L})
                     : "ecx", "xmm0", "xmm7", "xmm15", "cc", "st(7)");
    good &= st == wanted;
    for (int i = 0; i < 12; i++)
      good &= out[i] == seeds[i % 4];
    control &= _mm_getcsr() == csr || (_mm_getcsr() & 0xffc0) == (csr & 0xffc0);
  }
  setitimer(ITIMER_REAL, &never, NULL);
  check("signal-timer", count >= 60, "%d signals in 20 s", count);
  check("signal-keeps-vector-and-x87", good, "registers differ after %d signals", count);
  check("signal-keeps-mxcsr", control, "MXCSR differs");
}

static sigjmp_buf back;
static volatile int code;
static void *volatile address;
static volatile uintptr_t handler_stack;

static void jump_back(int signal, siginfo_t *info, void *context) {
  (void)signal, (void)context;
  int here;
  handler_stack = (uintptr_t)&here;
  code = info->si_code;
  address = info->si_addr;
  siglongjmp(back, 1);
}

static volatile int zero;

static void recovery(void) {
  for (int i = 0; i < 3; i++) {
    static const int signals[] = {SIGFPE, SIGSEGV, SIGILL};
    handle(signals[i], jump_back, 0);
  }
  volatile int good = 1; // a local variable that setjmp leaves alone
  for (int i = 0; i < 200; i++) {
    if (!sigsetjmp(back, 1)) {
      zero = 7 / zero;
      good = 0;
    }
    good &= code == FPE_INTDIV;
    if (!sigsetjmp(back, 1)) {
      *(volatile int *)(uintptr_t)(4096 + i) = 1;
      good = 0;
    }
    good &= code == SEGV_MAPERR && address == (void *)(uintptr_t)(4096 + i);
    if (!sigsetjmp(back, 1)) {
      __asm__ volatile("ud2");
      good = 0;
    }
    good &= code == ILL_ILLOPN;
  }
  check("recover-divide-segv-ill", good, "code %d", code);

  volatile char *page = must(mmap(0, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), "mmap");
  good = 0;
  if (!sigsetjmp(back, 1))
    page[5] = 1;
  else
    good = code == SEGV_ACCERR && address == (void *)(page + 5);
  check("write-protected", good, "code %d", code);

  good = 0;
  if (!sigsetjmp(back, 1))
    ((void (*)(void))(uintptr_t)page)();
  else
    good = code == SEGV_ACCERR && address == (void *)page;
  check("no-execute", good, "code %d at %p", code, address);

  good = 0;
  if (!sigsetjmp(back, 1)) {
    _mm_setcsr(0x1f80 & ~0x200);
    volatile double x = 1;
    x = x / (double)zero;
  } else
    good = code == FPE_FLTDIV;
  _mm_setcsr(0x1f80);
  check("sse-exception", good, "code %d", code);

  good = 0;
  if (!sigsetjmp(back, 1)) {
    uint16_t word = 0x37b;
    __asm__ volatile("fninit; fldcw %0; fld1; fldz; fdivrp; fwait; fstp %%st" ::"m"(word));
  } else
    good = code == FPE_FLTDIV;
  __asm__ volatile("fninit");
  check("x87-exception", good, "code %d", code);

  good = 0;
  if (!sigsetjmp(back, 1))
    *(volatile int *)0x8000000000001000 = 1;
  else
    good = code == SI_KERNEL;
  check("non-canonical", good, "code %d", code);
}

// Until the stack's end: the rlimit is far below this depth.
static int overflow(int n) {
  volatile char frame[4096];
  frame[0] = n;
  return n < 100000 ? overflow(n + 1) + frame[0] : 0;
}

static void alternate_stack(void) {
  static char other[65536];
  stack_t stack = {.ss_sp = other, .ss_size = sizeof other};
  sigaltstack(&stack, NULL);
  handle(SIGSEGV, jump_back, SA_ONSTACK);
  volatile int good = 0;
  if (!sigsetjmp(back, 1))
    overflow(0);
  else
    good = handler_stack > (uintptr_t)other && handler_stack < (uintptr_t)other + sizeof other;
  check("stack-overflow-on-sigaltstack", good, "handler's stack at %lx", (long)handler_stack);
}

static void skip_fault(int signal, siginfo_t *info, void *context) {
  (void)signal, (void)info;
  ucontext_t *u = context;
  u->uc_mcontext.gregs[REG_RIP] += 2;
  u->uc_mcontext.gregs[REG_RAX] = 0x1234567890abcdef;
  count++;
}

static void step(int signal, siginfo_t *info, void *context) {
  (void)signal, (void)info, (void)context;
  count++;
}

static void edit_context(void) {
  count = 0;
  handle(SIGILL, skip_fault, 0);
  uint64_t rax;
  __asm__ volatile("ud2" : "=a"(rax)::"memory");
  check("handler-changes-registers", rax == 0x1234567890abcdef && count == 1, "%lx", (long)rax);

  count = 0;
  handle(SIGTRAP, step, 0);
  __asm__ volatile("lea -128(%%rsp),%%rsp; pushf; orl $0x100,(%%rsp); popf; nop; nop; nop;"
                   "pushf; andl $~0x100,(%%rsp); popf; lea 128(%%rsp),%%rsp" ::
                       : "cc", "memory");
  check("single-step", count == 6, "%d traps", count);
  count = 0;
  __asm__ volatile("int3");
  check("breakpoint", count == 1, "%d traps", count);
}

int main(void) {
  nested();
  state_survives();
  recovery();
  alternate_stack();
  edit_context();
  return failures != 0;
}
