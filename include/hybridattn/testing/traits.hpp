// What the laws need to know of a policy besides the policy. Every template here has a default that fits a plain policy;
// specialise what does not fit yours. policies.hpp does it for the library's own.
#ifndef HYBRIDATTN_TESTING_TRAITS_HPP
#define HYBRIDATTN_TESTING_TRAITS_HPP

#include <hybridattn/attention/policy.hpp>
#include <hybridattn/backend/cpu/cpu.hpp>
#include <hybridattn/testing/host_tensor.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI::testing {

// The sizes at which a policy is judged, and the inputs. Specialise as `struct Samples<Mine> : PlainSamples<Mine>`.
template <class P> struct PlainSamples {
  using Config = typename P::Config;

  static std::vector<Config> sizes() { return {Config{}}; }   // a 0 stands for the default at model_dim 32, num_heads 2
  // Inputs and outputs with all tensors, also those that a batch of training leaves out.
  static auto inputs(Config const& c, Sequences const& s) { return P::inputs(c, s); }
  static auto outputs(Config const& c, Sequences const& s) { return P::outputs(c, s); }
  // False if the policy's options make Saved grow faster than the number of tokens.
  static constexpr bool saved_is_linear = true;
  // True if a kernel sums large numbers in the order of the reference, so that it is NaN or infinite, sign included, where that is.
  static constexpr bool overflows_like_loops = false;

  // Kinds of inputs; the first one is ordinary and smooth.
  static std::vector<std::string> kinds() { return {"noise"}; }
  static void draw(std::string_view, Random& random, HostGroup& inputs) {
    for (HostTensor& tensor : inputs) set_normal(tensor, random);
  }
  // Whether the gradient of an input [N, H] is judged head by head, each against its own largest element.
  static bool by_head(std::string_view) { return false; }
};
template <class P> struct Samples : PlainSamples<P> {};

// The equations as loops, in any scalar: P::Reference if there is one, otherwise On<P, Cpu>. When forward begins, the whole numbers of
// `saved` hold the kernel's choices. A reference uses these choices and does not change them.
template <class P> struct PlainReference {
  static constexpr double tolerance = 1e-11;   // of a result in double

  template <class... Args> static void forward(Args const&... args) {
    if constexpr (requires { typename P::Reference; }) {
      P::Reference::forward(args...);
    } else {
      Cpu cpu{1};
      On<P, Cpu>::forward(cpu, args...);
    }
  }
  template <class... Args> static void backward(Args const&... args) {
    if constexpr (requires { typename P::Reference; }) {
      P::Reference::backward(args...);
    } else {
      Cpu cpu{1};
      On<P, Cpu>::backward(cpu, args...);
    }
  }
};
template <class P> struct Reference : PlainReference<P> {};

// A policy that makes choices specialises this with a static std::string wrong(config, sequences, inputs, saved, eps). It returns what is
// wrong with the choices in `saved`, made in a scalar with this eps, or "" if they are right. The tensors are in double.
template <class P> struct Choices {};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::testing
#endif
