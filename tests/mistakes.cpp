// Mistakes of users. -DMISTAKE=0 compiles. Every other number makes one mistake that must not compile. The first error says what to do.
#include <hybridattn/hybridattn.hpp>

#include <algorithm>

namespace ha = hybridattn;

#if MISTAKE == 1  // a letter that does not exist
using Layers = ha::Pattern<"LXFL">;
#elif MISTAKE == 2  // no layer
using Layers = ha::Stack<>;
#elif MISTAKE == 11  // fewer layers than none
using Layers = ha::Repeat<-1, ha::GDN>;
#elif MISTAKE == 12  // no layer, by another way
using Layers = ha::Repeat<0, ha::GDN>;
#else
using Layers = ha::Pattern<"LDFL">;
#endif
static_assert(Layers::depth == 4);

// A policy of the user, in which a token sees itself alone.
struct Mine : ha::PolicyDefaults {
  struct Config {
    ha::Index num_heads = 0, head_dim = 0;
  };
  template <class S> struct Inputs {
    ha::Held<S, 3> v;  // [N, H, D]
    HYBRIDATTN_FIELDS(v)
  };
  template <class S> struct Outputs {
    ha::Held<S, 3> o;  // [N, H, D]
    HYBRIDATTN_FIELDS(o)
  };
  template <class S> struct Saved {
    ha::Wide<S, 2> sums, norms;  // [N, H]
#if MISTAKE == 3  // a member that no loop over members would see
    HYBRIDATTN_FIELDS(sums)
#else
    HYBRIDATTN_FIELDS(sums, norms)
#endif
  };

  static Config complete(Config c, ha::Index model_dim, ha::Index num_heads) {
    return {num_heads, ha::default_head_dim(c.head_dim, model_dim, num_heads)};
  }
  static Inputs<ha::Shapes> inputs(Config const& c, ha::Sequences const& s) { return {{s.tokens(), c.num_heads, c.head_dim}}; }
  static Outputs<ha::Shapes> outputs(Config const& c, ha::Sequences const& s) { return {{s.tokens(), c.num_heads, c.head_dim}}; }
  static Saved<ha::Shapes> saved(Config const&, ha::Sequences const&) { return {}; }
};
template <> struct ha::On<Mine, ha::Cpu> {
#if MISTAKE == 4  // the wrong role: forward would write into what it reads
  template <class T> using Read = Out<T>;
#else
  template <class T> using Read = In<T>;
#endif
  template <class T>
  static void forward(Cpu&, Mine::Config const&, Sequences const&, Mine::Inputs<Read<T>> x, Mine::Outputs<Out<T>> y, Mine::Saved<Out<T>>) {
    std::copy_n(x.v.data, x.v.count(), y.o.data);
  }
#if MISTAKE != 5  // no backward
  template <class T>
  static void backward(Cpu&, Mine::Config const&, Sequences const&, Mine::Inputs<In<T>>, Mine::Outputs<In<T>>, Mine::Saved<In<T>>,
                       Mine::Outputs<In<T>> d_y, Mine::Inputs<Out<T>> d_x) {
    std::copy_n(d_y.o.data, d_y.o.count(), d_x.v.data);
  }
#endif
};

using Model = ha::LanguageModel<ha::Stack<Mine>>;
void both_passes(ha::Cpu& cpu, Model const& model, ha::TokenBatch<ha::Cpu> const& batch) {
#if MISTAKE == 6  // the wrong role: sizes where parameters are wanted
  auto const params = model.params();
#else
  auto const params = model.initialize<float>(cpu, ha::Seed{1});
#endif
  auto saved = model.forward(cpu, params, batch);
#if MISTAKE == 7  // saved is not given away
  auto const gradients = model.backward(cpu, params, batch, saved, 1);
#else
  auto const gradients = model.backward(cpu, params, batch, std::move(saved), 1);
#endif
}

#if MISTAKE == 8  // decoding with a policy that has no cache
using Decoding = Model;
#else
using Decoding = ha::LanguageModel<ha::Pattern<"LF">>;
#endif
auto decoding(ha::Cpu& cpu, Decoding const& model) { return ha::make_cache<float>(cpu, model, {.batch = 1, .capacity = 8}); }

#if MISTAKE == 9  // sizes of a policy that the stack has not
using Asked = ha::DSA;
#elif MISTAKE == 10  // with other options than it has there
using Asked = ha::FullAttention<ha::FullOptions{.window = 8}>;
#else
using Asked = ha::Full;
#endif
void sizes(Decoding::Config& config, Decoding const& model) { config.policy<Asked>().num_heads = model.config().policy<ha::GDN>().num_heads; }
