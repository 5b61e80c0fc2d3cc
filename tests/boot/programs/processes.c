// Processes: fork, vfork, exec, exit codes, pipes.
#define _GNU_SOURCE
#include "check.h"
#include <poll.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

static char *self;

static void forks(void) {
  int good = 1;
  for (int i = 0; i < 150; i++) {
    pid_t child = fork();
    if (child == 0)
      _exit(i % 100);
    int status = -1;
    good &= waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == i % 100;
  }
  check("fork", good, "a wrong exit code");
}

// Each process starts two more, four times over.
static int tree(int levels) {
  pid_t children[2];
  if (levels == 0)
    return 1;
  for (int i = 0; i < 2; i++) {
    children[i] = fork();
    if (children[i] == 0)
      _exit(tree(levels - 1));
  }
  int sum = 1;
  for (int i = 0; i < 2; i++) {
    int status;
    waitpid(children[i], &status, 0);
    sum += WEXITSTATUS(status);
  }
  return sum;
}

// Starts this program once more; it exits with `code`.
static pid_t start_self(char *code, int with_vfork) {
  char *arguments[] = {self, "exit", code, NULL};
  pid_t child = with_vfork ? vfork() : fork();
  if (child == 0) {
    execv("/proc/self/exe", arguments);
    _exit(1);
  }
  return child;
}

static void execs(void) {
  int good = 1;
  for (int i = 0; i < 120; i++) {
    char code[8];
    snprintf(code, sizeof code, "%d", 40 + i % 50);
    pid_t child = start_self(code, i % 2);
    int status;
    waitpid(child, &status, 0);
    good &= WIFEXITED(status) && WEXITSTATUS(status) == 40 + i % 50;
  }
  check("exec", good, "a wrong exit code");
}

static void killed(void) {
  int good = 1;
  for (int i = 0; i < 30; i++) {
    pid_t child = fork();
    if (child == 0)
      for (;;)
        if (i % 2)
          pause();
    kill(child, i % 3 ? SIGKILL : SIGTERM);
    int status;
    waitpid(child, &status, 0);
    good &= WIFSIGNALED(status) && WTERMSIG(status) == (i % 3 ? SIGKILL : SIGTERM);
  }
  check("kill", good, "a wrong status");
}

static void ping_pong(const char *name, int to[2], int from[2]) {
  pid_t child = fork();
  uint64_t n;
  if (child == 0) {
    while (read(to[0], &n, 8) == 8 && n != 1000000) {
      n++;
      if (write(from[1], &n, 8) != 8)
        _exit(1);
    }
    _exit(0);
  }
  uint64_t sum = 0;
  for (uint64_t i = 1; i <= 3000; i++) {
    n = i;
    if (write(to[1], &n, 8) != 8 || read(from[0], &n, 8) != 8)
      break;
    sum += n;
  }
  n = 1000000;
  if (write(to[1], &n, 8) != 8)
    sum = 0;
  int status;
  waitpid(child, &status, 0);
  check(name, status == 0 && sum == 3000 * 3001 / 2 + 3000, "sum %ld", (long)sum);
}

static void streams(void) {
  int ends[2];
  if (pipe(ends))
    exit(3);
  pid_t child = fork();
  if (child == 0) {
    close(ends[0]);
    uint32_t out[3000];
    for (int i = 0; i < 200; i++) {
      for (int k = 0; k < 3000; k++)
        out[k] = i * 3000 + k;
      if (write(ends[1], out, sizeof out) != sizeof out)
        _exit(1);
    }
    _exit(0);
  }
  close(ends[1]);
  uint32_t next = 0, in[1111];
  uint8_t rest[4444 + 4];
  size_t kept = 0;
  ssize_t got;
  int good = 1;
  while ((got = read(ends[0], rest + kept, 4444)) > 0) {
    size_t have = kept + got, words = have / 4;
    memcpy(in, rest, words * 4);
    for (size_t k = 0; k < words; k++)
      good &= in[k] == next++;
    kept = have % 4;
    memmove(rest, rest + words * 4, kept);
  }
  int status;
  waitpid(child, &status, 0);
  check("pipe-stream", good && next == 600000 && status == 0, "%u words", next);
}

int main(int argc, char **argv) {
  if (argc == 3)
    return atoi(argv[2]);
  self = argv[0];
  forks();
  int processes = tree(5);
  check("fork-tree", processes == 63, "%d", processes);
  execs();
  killed();
  int a[2], b[2], c[2];
  if (pipe(a) || pipe(b) || socketpair(AF_UNIX, SOCK_STREAM, 0, c))
    return 3;
  ping_pong("pipe-ping-pong", a, b);
  int d[2];
  if (socketpair(AF_UNIX, SOCK_STREAM, 0, d))
    return 3;
  ping_pong("socket-ping-pong", c, d);
  streams();
  return failures != 0;
}
