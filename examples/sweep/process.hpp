// Running another program, without a shell: no argument is ever interpreted.
#ifndef HYBRIDATTN_EXAMPLES_SWEEP_PROCESS_HPP
#define HYBRIDATTN_EXAMPLES_SWEEP_PROCESS_HPP

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <vector>

namespace sweep {

inline constexpr int no_such_program = 127;

// The exit status of `words` run in `folder`, silently; no_such_program when it is not installed, -1 when it was killed or
// could not be started.
inline int run_program(std::vector<std::string> words, std::filesystem::path const& folder) {
  std::vector<char*> arguments;
  for (auto& word : words) arguments.push_back(word.data());
  arguments.push_back(nullptr);
  pid_t const child = ::fork();
  if (child == 0) {   // only calls that are safe between fork and exec
    int const nothing = ::open("/dev/null", O_RDWR);
    for (int stream : {0, 1, 2}) ::dup2(nothing, stream);
    ::signal(SIGPIPE, SIG_DFL);   // our programs ignore it
    if (::chdir(folder.c_str()) == 0) ::execvp(arguments[0], arguments.data());
    ::_exit(errno == ENOENT ? no_such_program : 126);
  }
  int status = 0;
  while (child > 0 && ::waitpid(child, &status, 0) < 0)
    if (errno != EINTR) return -1;
  return child > 0 && WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

// Whether PATH leads to it.
inline bool is_installed(std::string const& name) {
  char const* const path = std::getenv("PATH");
  std::string const folders = path == nullptr ? "/bin:/usr/bin" : path;
  for (std::size_t start = 0; start <= folders.size();) {
    auto const end = std::min(folders.find(':', start), folders.size());
    if (::access((folders.substr(start, end - start) + "/" + name).c_str(), X_OK) == 0) return true;
    start = end + 1;
  }
  return false;
}

}  // namespace sweep
#endif
