// The command line of `sweep`.
#ifndef HYBRIDATTN_EXAMPLES_SWEEP_OPTIONS_HPP
#define HYBRIDATTN_EXAMPLES_SWEEP_OPTIONS_HPP

#include "../options.hpp"
#include "settings.hpp"

namespace sweep {

inline Settings parse(int argc, char const* const* argv) {
  Settings s;
  program::Options options{
      "sweep", "Trains layer patterns of Gated DeltaNet (L or G), full (F or *) and sparse (D) attention on one text and ranks them."};
  options.size("--steps", s.steps, "training steps of each pattern");
  options.app().add_option("--patterns", s.patterns, "which of the compiled patterns, e.g. 'LFFL,LDDL'")->capture_default_str();
  options.app().add_option("--data", s.data, "text files or pipes, or the word synthetic; Debian's `anarchism` without it");
  options.size("--seq-len", s.seq_len, "tokens of a window, a token and its target at least", 2);
  options.size("--batch", s.batch, "windows of a step");
  options.size("--validation", s.validation, "windows that a trained pattern is judged by, at most");
  options.seed(s.seed);
  options.threads(s.threads);
  options.backend();
  options.dtype(s.dtype);
  options.out(s.out, "folder of the results; a run that stopped there goes on");
  options.real("--checkpoint-every", s.checkpoint_every, "seconds between checkpoints; 0: after every step");
  options.app().add_flag("--fresh", s.fresh, "forget what an earlier run left in the folder");
  options.parse(argc, argv);
  return s;
}

}  // namespace sweep
#endif
