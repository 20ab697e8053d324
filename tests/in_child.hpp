// A part of a test in a process of its own.
#ifndef HYBRIDATTN_TESTS_IN_CHILD_HPP
#define HYBRIDATTN_TESTS_IN_CHILD_HPP

#include <sys/wait.h>
#include <unistd.h>

// The exit code of f in a child process, or -1 if the child hangs or crashes.
template <class F> int in_child(F f) {
  pid_t const child = fork();
  if (child == 0) {
    alarm(1800);   // ends a child that hangs; even the slowest machine needs less
    int code = 99;
    try {
      code = f();
    } catch (...) {
    }
    _exit(code);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

#endif
