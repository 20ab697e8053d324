// Trains a language model on the bytes of a text and keeps it in a checkpoint: train book.txt --out book.safetensors
// Started again with the same arguments it goes on where it stopped. `generate` continues texts with what it leaves.
#include "new_model.hpp"
#include "program.hpp"
#include "train_options.hpp"

#include <hybridattn/io/text.hpp>
#include <hybridattn/train/schedule.hpp>

#include <chrono>

namespace train {
namespace {

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

double validation_loss(models::Run& run, std::vector<ha::Batch> const& batches) {
  ha::LossSum total;
  for (auto const& windows : batches) total += run.loss(windows);
  return total.mean();
}

// What neither the model nor the text tells: a run goes on with the windows and the backend that it began with.
std::string note(Settings const& s) {
  return "--batch " + std::to_string(s.batch) + " --seq-len " + std::to_string(s.seq_len) + " --backend " + std::string(program::backend) +
         " --dtype " + s.dtype;
}

// Returns the exit code.
int train(Settings const& s) {
  models::Sizes const sizes{.vocab_size = ha::ByteText::vocab_size, .model_dim = s.model_dim, .num_heads = s.num_heads};
  auto const model = models::new_model(s.pattern, sizes, s.dtype);
  auto machine = program::make_machine(s.threads);   // complains at once where there is none
  program::check_writable(s.out);
  ha::Windows text{ha::ByteText(ha::read_text(s.text)), ha::Seed{s.seed}, program::text_name(s.text)};
  double const bytes = static_cast<double>(model->parameter_count()) * sizeof(float);
  bool const is_bf16 = s.dtype == "bf16";   // with masters, and gradients in both scalars
  program::check_memory((is_bf16 ? 5 : 4) * bytes, "training " + std::to_string(model->parameter_count()) + " parameters",
                        program::memory_limit(machine));   // gradients, two moments
  program::check_writable(s.out, (is_bf16 ? 3.5 : 3) * bytes);
  program::watch_for_interrupt();
  program::InUse const lock{s.out};
  auto const run = model->start(machine, ha::Seed{s.seed}, {.learning_rate = s.learning_rate});
  ha::Schedule const schedule{.warmup_steps = s.steps / 20, .total_steps = s.steps, .min_rate = 0.1};
  ha::Progress done;
  if (std::filesystem::exists(s.out)) {
    done = run->load(s.out);
    ha::check(done.note.empty() || done.note == note(s), "checkpoint ", s.out.string(), ": it was trained with ", done.note,
              ", this run has ", note(s), "; take another --out");
    text.restore(done.data);
    program::say("%s: going on after step %td\n", program::one_line(s.out.string()).c_str(), done.step);
  }
  auto const begin = text.state();
  text.next_batch(s.batch, s.seq_len);   // complains of a text that is too short
  text.restore(begin);
  auto const validation = text.validation_batches(s.batch, s.seq_len);
  program::say("%s\n%td parameters, %s\n", text.description().c_str(), model->parameter_count(), program::place_of(machine).c_str());

  if (done.step < s.steps) program::flush_stdout();   // before work that would be lost where nobody can be told

  double const start = seconds();
  ha::Index const first = done.step;
  while (done.step < s.steps && !program::interrupted()) {
    run->start_step(text.next_batch(s.batch, s.seq_len), schedule(done.step));
    bool const last = ++done.step == s.steps || program::interrupted();
    if (last || done.step % s.save_every == 0) {
      auto const result = run->read();   // waits for the steps up to here; throws if one of them was bad
      double const speed = static_cast<double>((done.step - first) * s.batch * s.seq_len) / (seconds() - start);
      run->save(s.out, {.step = done.step, .data = text.state(), .note = note(s)});
      program::say("step %td/%td  loss %.3f  %.0f tokens/s, saved\n", done.step, s.steps, result.loss.mean(), speed);
      program::flush_stdout();
    }
  }
  if (done.step < s.steps) {
    program::say("interrupted: the same command goes on after step %td\n", done.step);
    return program::interrupted_code();
  }
  program::say("validation loss %.3f; the model is in %s\n", validation_loss(*run, validation), program::one_line(s.out.string()).c_str());
  return 0;
}

}  // namespace
}  // namespace train

int main(int argc, char** argv) {
  return program::run("train", argc, argv, [&] { return train::train(train::parse(argc, argv)); });
}
