// A released model on the emulator of a GPU, compared with all that the published implementation computes from it.
#include "released_decoding.hpp"
#include "gpu.hpp"


namespace ha = hybridattn;
using namespace released;

namespace {

Released tiny() { return Released{golden::folder().parent_path() / "models/qwen3_next_tiny"}; }
using Model = ModelOf<50, "LFFL">;

}  // namespace

TEST_CASE("a released model gives its own logits, losses and gradients on the emulator", "[released]") {
  Errors e;
  ModelIn<Model, double, Gpu> in_double{tiny().folder()};
  ModelIn<Model, float, Gpu> in_float{tiny().folder()};
  compare_passes(tiny(), in_double, e);
  compare_auxiliary(tiny(), in_double, e);
  compare_in_float(tiny(), in_float, e);
  check_worst("logits", e.logits, 1e-11);
  check_worst("hidden states", e.hidden, 1e-11);
  check_worst("router probabilities", e.router, 1e-11);
  check_worst("loss", e.loss, 1e-11);
  check_worst("gradients", e.gradients, 1e-10);
  check_worst("auxiliary loss", e.auxiliary_loss, 1e-11);
  check_worst("gradients with the auxiliary loss", e.auxiliary_gradients, 1e-10);
  check_worst("logits in float", e.float_logits, e.float_logits_allowed);
  check_worst("gradients in float", e.float_gradients, e.float_gradients_allowed);
  CHECK(e.experts_differ == 0);
}
TEST_CASE("a released model decodes on the emulator what the published implementation does", "[released]") {
  check_decoding<Model, Gpu>(tiny().folder());
}
