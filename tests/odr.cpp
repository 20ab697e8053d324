// A part of a program, compiled as the function PART. It trains a model of every policy and returns the bits of the loss, the number of
// threads, and whether indices are checked.
#include <hybridattn/hybridattn.hpp>

#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <bit>
#include <cstdio>
#include <string>

namespace ha = hybridattn;

namespace {

// The loss after two steps of training.
double trained() {
  ha::Cpu cpu{1};
  ha::LanguageModel<ha::Stack<ha::GDN, ha::Full, ha::DSA>> const model{
      {.vocab_size = 32, .model_dim = 40, .num_heads = 2, .feed_forward = {}, .layers = {}}};
  auto params = model.initialize<float>(cpu, ha::Seed{1});
  ha::AdamW optimizer{cpu, params};
  ha::RecallTask task{ha::Seed{2}, {.vocab_size = 32, .pairs = 8}};
  auto const batch = make_batch(cpu, task.next_batch(2, 70));
  for (int step = 0; step < 2; ++step) train_step(cpu, model, params, optimizer, batch);
  return model.loss(cpu, params, batch).loss;
}

// Whether reading beside a view ends the program. The read is in a child process without a core file. There is memory beside the view.
bool checks_indices() {
  pid_t const child = fork();
  if (child == 0) {
    rlimit const none{};
    setrlimit(RLIMIT_CORE, &none);
    float const numbers[4] = {1, 2, 3, 4};
    ha::View<float const, 1> const view{numbers, {2}};
    float volatile const beside = view(3);
    _exit(beside == 4 ? 0 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFSIGNALED(status);
}

}  // namespace

std::string PART() {
  std::string const checks = checks_indices() ? "checks indices" : "checks nothing";   // before there are threads
  char found[100];
  std::snprintf(found, sizeof found, "%016llx, %d threads, %s", std::bit_cast<unsigned long long>(trained()), ha::Cpu{}.threads(),
                checks.c_str());
  return found;
}
