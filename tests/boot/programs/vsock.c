// Sockets to the host. "vsock listen PORT" echoes what one host program sends; "vsock connect PORT" echoes what the
// host's listener sends. Both end when the host has sent all.
#define _GNU_SOURCE
#include "check.h"
#include <linux/vm_sockets.h>
#include <sys/socket.h>
#include <unistd.h>

int main(int argc, char **argv) {
  if (argc != 3)
    return 2;
  int s = socket(AF_VSOCK, SOCK_STREAM, 0);
  struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_port = (unsigned)atoi(argv[2])};
  if (strcmp(argv[1], "listen") == 0) {
    address.svm_cid = VMADDR_CID_ANY;
    if (s < 0 || bind(s, (void *)&address, sizeof address) || listen(s, 1)) {
      perror("listen");
      return 3;
    }
    puts("vsock listens");
    fflush(stdout);
    s = accept(s, NULL, NULL);
  } else {
    address.svm_cid = VMADDR_CID_HOST;
    if (s < 0 || connect(s, (void *)&address, sizeof address)) {
      perror("connect");
      return 3;
    }
  }
  static char data[65536];
  unsigned long long total = 0;
  for (;;) {
    ssize_t n = read(s, data, sizeof data);
    if (n < 0) {
      perror("read");
      return 3;
    }
    if (n == 0)
      break;
    for (ssize_t done = 0; done < n;) {
      ssize_t w = write(s, data + done, n - done);
      if (w <= 0) {
        perror("write");
        return 3;
      }
      done += w;
    }
    total += n;
  }
  close(s);
  printf("echoed %llu\n", total);
  return 0;
}
