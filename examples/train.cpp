// Trains a language model on the bytes of a text and keeps it in a checkpoint: train book.txt --out book.safetensors
// Started again with the same arguments it goes on where it stopped. `generate` continues texts with what it leaves.
#include "models.hpp"

#include <hybridattn/io.hpp>

#include <CLI/CLI.hpp>

#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdio>

namespace {

namespace ha = hybridattn;

struct Settings {
  std::string text, pattern = "LFFL", out = "model.safetensors";
  ha::Index steps = 1000, batch = 4, seq_len = 128, model_dim = 128, num_heads = 4, save_every = 100;
  double learning_rate = 1e-3;
  std::uint64_t seed = 1;
};

std::atomic<bool> interrupted = false;   // by Ctrl-C or a polite kill: the current step is finished and saved

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

template <class Model, class Params> double validation_loss(ha::Cpu& cpu, Model const& model, Params const& params, ha::Windows const& text,
                                                            Settings const& s) {
  ha::LossSum total;
  for (auto const& windows : text.validation_batches(s.batch, s.seq_len)) total += model.loss(cpu, params, make_batch(cpu, windows));
  return total.mean();
}

template <class Stack> void train(Settings const& s) {
  ha::Windows text{ha::ByteText(ha::read_text(s.text)), ha::Seed{s.seed}, s.text};
  ha::Cpu cpu;
  ha::LanguageModel<Stack> const model{
      {.vocab_size = text.vocab_size(), .model_dim = s.model_dim, .num_heads = s.num_heads, .feed_forward = {}, .mixers = {}}};
  auto params = model.template initialize<float>(cpu, ha::Seed{s.seed});
  ha::AdamW optimizer{cpu, params, {.learning_rate = s.learning_rate}};
  ha::Schedule const schedule{.warmup_steps = s.steps / 20, .total_steps = s.steps, .min_rate = 0.1};
  ha::Progress done;
  if (std::filesystem::exists(s.out)) {
    done = load_checkpoint(cpu, s.out, model, params, optimizer);
    text.restore(done.data);
    std::printf("%s: going on after step %td\n", s.out.c_str(), done.step);
  }
  std::printf("%s\n%td parameters, %d threads\n", text.description().c_str(), model.parameter_count(), cpu.threads());

  double const start = seconds();
  ha::Index const first = done.step;
  while (done.step < s.steps && !interrupted) {
    auto const batch = make_batch(cpu, text.next_batch(s.batch, s.seq_len));
    auto const result = train_step(cpu, model, params, optimizer, batch, {.rate = schedule(done.step)});
    bool const last = ++done.step == s.steps || interrupted;
    if (last || done.step % s.save_every == 0) {
      double const speed = static_cast<double>((done.step - first) * s.batch * s.seq_len) / (seconds() - start);
      save_checkpoint(cpu, s.out, model, params, optimizer, {.step = done.step, .data = text.state()});
      std::printf("step %td/%td  loss %.3f  %.0f tokens/s, saved\n", done.step, s.steps, result.loss.mean(), speed);
      std::fflush(stdout);
    }
  }
  if (interrupted && done.step < s.steps) std::printf("interrupted: the same command goes on after step %td\n", done.step);
  else std::printf("validation loss %.3f; the model is in %s\n", validation_loss(cpu, model, params, text, s), s.out.c_str());
}

}  // namespace

int main(int argc, char** argv) try {
  Settings s;
  CLI::App app{"Trains a language model on the bytes of a text, with checkpoints"};
  app.add_option("text", s.text, "a text file")->required();
  app.add_option("--pattern", s.pattern, "layers: L Gated DeltaNet, F full, D sparse attention")->capture_default_str();
  app.add_option("--out", s.out, "the checkpoint; an unfinished one is continued")->capture_default_str();
  app.add_option("--steps", s.steps)->capture_default_str();
  app.add_option("--batch", s.batch)->capture_default_str();
  app.add_option("--seq-len", s.seq_len)->capture_default_str();
  app.add_option("--model-dim", s.model_dim)->capture_default_str();
  app.add_option("--heads", s.num_heads)->capture_default_str();
  app.add_option("--learning-rate", s.learning_rate)->capture_default_str();
  app.add_option("--save-every", s.save_every, "steps between two checkpoints")->capture_default_str();
  app.add_option("--seed", s.seed)->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  ha::check(s.steps > 0 && s.save_every > 0, "--steps ", s.steps, " and --save-every ", s.save_every, " must be positive");
  for (int signal : {SIGINT, SIGTERM}) std::signal(signal, [](int) { interrupted = true; });
  models::with_pattern(models::Trained{}, s.pattern, [&](auto choice) {
    train<typename decltype(choice)::Stack>(s);
    return true;
  });
  return interrupted ? 130 : 0;
} catch (std::exception const& error) {
  std::fprintf(stderr, "train: %s\n", error.what());
  return 2;
}
