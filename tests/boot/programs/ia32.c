// A 32-bit program without a C library: system calls by int 0x80 and by the vDSO's entry, 32-bit code forms.
typedef unsigned int u32;
typedef unsigned long long u64;

static u32 failures;

static int call3(u32 number, u32 a, u32 b, u32 c) {
  int result;
  __asm__ volatile("int $0x80" : "=a"(result) : "0"(number), "b"(a), "c"(b), "d"(c) : "memory");
  return result;
}

static void say(const char *text) {
  u32 n = 0;
  while (text[n])
    n++;
  call3(4, 1, (u32)text, n);
}

static void check(const char *name, int good) {
  say(good ? "ok ia32-" : "FAIL ia32-");
  say(name);
  say("\n");
  failures += !good;
}

static u32 fibonacci(u32 n) { return n < 2 ? n : fibonacci(n - 1) + fibonacci(n - 2); }

static void arithmetic(void) {
  u32 eax = 0x12345678, edx = 0, carry;
  __asm__("mul %3; setc %b2; movzbl %b2, %2" : "+a"(eax), "=d"(edx), "=q"(carry) : "r"(0x1000u) : "cc");
  check("mul", eax == 0x45678000 && edx == 0x123 && carry == 1);
  u32 decimal = 0x38;
  __asm__("addb $0x45, %%al; daa" : "+a"(decimal)::"cc");
  check("daa", (decimal & 0xff) == 0x83);
  u32 adjusted = 0x0f;
  __asm__("aam" : "+a"(adjusted)::"cc");
  check("aam", adjusted == 0x0105);
  u32 count = 0, one = 1;
  __asm__("inc %0; inc %0; dec %0" : "+r"(count)::"cc"); // 0x40…: prefixes in 64-bit mode
  check("inc", count == one);
}

static void stack(void) {
  u32 sum, esp_before, esp_after;
  __asm__ volatile("mov %%esp, %1; pusha; popa; mov %%esp, %2; push $3; push $4; pop %0; add (%%esp), %0; pop %%ecx"
                   : "=&r"(sum), "=&r"(esp_before), "=&r"(esp_after)::"ecx", "cc", "memory");
  check("pusha", sum == 7 && esp_before == esp_after);
  u32 flags;
  __asm__ volatile("stc; pushf; pop %0" : "=r"(flags)::"cc");
  check("pushf", (flags & 3) == 3);
}

static void segments(void) {
  u32 cs, ds;
  __asm__("mov %%cs, %0; mov %%ds, %1" : "=r"(cs), "=r"(ds));
  check("selectors", (cs & 0xffff) == 0x23 && (ds & 0xffff) == 0x2b);
  // A thread-local segment of 16 bytes at `area`: set_thread_area (243).
  static u32 area[4] = {11, 22, 33, 44};
  u32 descriptor[4] = {(u32)-1, (u32)area, 15, 0x51}; // 32-bit, limit in bytes, usable
  int result = call3(243, (u32)descriptor, 0, 0);
  u32 third = 0;
  if (result == 0)
    __asm__ volatile("mov %1, %%gs; mov %%gs:8, %0" : "=r"(third) : "r"(descriptor[0] * 8 + 3));
  check("set-thread-area", result == 0 && third == 33);
}

static void floats(void) {
  double x = 2, y = 0;
  __asm__("fldl %1; fsqrt; fmull %1; fstpl %0" : "=m"(y) : "m"(x));
  check("x87", y > 2.8284 && y < 2.8285);
  static float vector[4] __attribute__((aligned(16))) = {1, 2, 3, 4};
  __asm__("movaps %0, %%xmm7; addps %%xmm7, %%xmm7; movaps %%xmm7, %0" : "+m"(vector));
  check("sse", vector[0] == 2 && vector[3] == 8);
}

// The auxiliary vector's AT_SYSINFO (32) is the vDSO's entry for system calls (sysenter or syscall inside).
static void fast_call(const u32 *start) {
  const u32 *p = start + 1 + start[0] + 1;
  while (*p++)
    ;
  u32 entry = 0;
  for (; p[0]; p += 2)
    if (p[0] == 32)
      entry = p[1];
  int slow = call3(20, 0, 0, 0), fast = 0;
  if (entry)
    for (int i = 0; i < 1000; i++)
      __asm__ volatile("call *%1" : "=a"(fast) : "r"(entry), "0"(20) : "memory", "ecx", "edx");
  check("getpid", slow > 0);
  check("vdso-call", entry && fast == slow);
}

// A signal handler: the kernel makes a 32-bit frame and sigreturn takes it back.
static volatile u32 handled;
static void handler(int signal) { handled += signal; }
static void signals(void) {
  // struct old_sigaction for sigaction (67): handler, mask, flags, restorer.
  u32 action[4] = {(u32)handler, 0, 0, 0};
  int set = call3(67, 10, (u32)action, 0);
  for (int i = 0; i < 50; i++)
    call3(37, call3(20, 0, 0, 0), 10, 0);
  check("signal", set == 0 && handled == 500);
}

__attribute__((used)) static void run(const u32 *start) {
  check("recursion", fibonacci(20) == 6765);
  u64 wide = 0x123456789abcdefull * fibonacci(7);
  check("64-bit-product", wide == 0xeca8641fdb97523ull);
  arithmetic();
  stack();
  segments();
  floats();
  fast_call(start);
  signals();
  call3(1, failures != 0, 0, 0);
}

__asm__(".globl _start\n_start: mov %esp, %eax; and $-16, %esp; sub $12, %esp; push %eax; call run; hlt");
