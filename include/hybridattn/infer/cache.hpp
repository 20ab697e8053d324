// What a model remembers of the tokens it has seen, so that the next one costs one token: for each layer its policy's cache,
// and how many tokens of each sequence stand there. A value in the caller's hands; the model holds none of it.
#ifndef HYBRIDATTN_INFER_CACHE_HPP
#define HYBRIDATTN_INFER_CACHE_HPP

#include <hybridattn/nn/language_model.hpp>

#include <limits>
#include <span>

namespace hybridattn::inline HYBRIDATTN_ABI {

using TokenLists = std::vector<std::vector<std::int32_t>>;   // one list for each sequence

struct CacheSize {
  Index batch = 1;      // sequences
  Index capacity = 0;   // tokens of each
};

namespace infer {
template <class... Ps> constexpr bool all_have_caches(Types<Ps...>) { return (HasCache<Ps> && ...); }
template <class B, class T, class... Ps> constexpr bool all_decode(Types<Ps...>) { return (Decodes<Ps, B, T> && ...); }
}  // namespace infer

// The caches of a stack's layers.
template <class Stack> struct LayerCaches {
  static_assert(infer::all_have_caches(typename Stack::Kinds{}),
                "this policy cannot decode: give it Cache<S> and cache(config, batch, capacity), see attention/policy.hpp");
  template <class S> struct OfRole {
    template <class Block> using Type = typename Block::Policy::template Cache<S>;
  };
  template <class S> struct Group : Layers<typename Stack::Blocks, OfRole<S>::template Type> {};
};

// bytes<float>(cache_shapes(model, size)) is what a cache of floats takes.
template <class Stack> typename LayerCaches<Stack>::template Group<Shapes> cache_shapes(LanguageModel<Stack> const& model, CacheSize size) {
  check(1 <= size.batch && size.batch <= largest_int32, "cache: batch ", size.batch, " is not allowed; it must be in 1 .. ", largest_int32);
  check(1 <= size.capacity && size.capacity <= largest_int32, "cache: capacity ", size.capacity, " is not allowed; it must be in 1 .. ",
        largest_int32);
  typename LayerCaches<Stack>::template Group<Shapes> shapes;
  shapes.for_each(
      [&](auto block, std::size_t, auto& layer) {
        using Block = typename decltype(block)::type;
        layer = Block::Policy::cache(Stack::template layer_config<Block>(model.stack_config()).policy, size.batch, size.capacity);
      },
      shapes);
  return shapes;
}

template <class Stack, class T, class B> class Cache {
 public:
  using Group = typename LayerCaches<Stack>::template Group<Owned<T, B>>;
  static_assert(infer::all_decode<B, T>(typename Stack::Kinds{}),
                "this policy cannot decode on this backend: write On<Policy, Backend>::extend, see attention/policy.hpp");

  // Throws Error, and says how much was asked, where there is no memory for it.
  Cache(B& backend, LanguageModel<Stack> const& model, CacheSize size)
      : layers_(allocated(backend, cache_shapes(model, size), size)), capacity_(size.capacity) {
    resize(lengths_, size.batch, "the lengths of sequences");
  }

  Group const& layers() const { return layers_; }
  Group& layers() { return layers_; }
  Index capacity() const { return capacity_; }
  Index batch() const { return std::ssize(lengths_); }
  // How many tokens of each sequence stand here.
  std::span<Index const> lengths() const { return lengths_; }

  // Sequence i, or all of them, begin anew.
  void forget(Index i) { lengths_.at(static_cast<std::size_t>(i)) = 0; }
  void forget() { std::fill(lengths_.begin(), lengths_.end(), 0); }

  // For extend: the new tokens of each sequence, one after the other; throws if they do not fit. After commit() they stand here.
  struct Call {
    SequencesOn<B> sequences;
    std::vector<std::int32_t> tokens;
  };
  Call const& next(B& backend, TokenLists const& tokens) {
    check(std::ssize(tokens) == batch(), "cache: tokens of ", tokens.size(), " sequences, but it was made for ", batch());
    new_lengths_.clear();
    call_.tokens.clear();
    for (auto const& of_sequence : tokens) {
      new_lengths_.push_back(std::ssize(of_sequence));
      call_.tokens.insert(call_.tokens.end(), of_sequence.begin(), of_sequence.end());
    }
    call_.sequences.assign(backend, lengths_, new_lengths_);
    check_fits(call_.sequences, batch(), capacity_);
    return call_;
  }
  void commit() {
    for (std::size_t i = 0; i < lengths_.size(); ++i) lengths_[i] += new_lengths_[i];
  }

 private:
  static Group allocated(B& backend, typename LayerCaches<Stack>::template Group<Shapes> const& shapes, CacheSize size) {
    try {
      return allocate<T>(backend, shapes);
    } catch (Error const& error) {
      fail("cache: capacity ", size.capacity, " for ", size.batch, " sequences is ", bytes<T>(shapes), " bytes: ", error.what());
    }
  }

  Group layers_;
  Index capacity_;
  std::vector<Index> lengths_, new_lengths_;
  Call call_;   // whose memory serves one call after the other
};

template <class T, class B, class Stack> Cache<Stack, T, B> make_cache(B& backend, LanguageModel<Stack> const& model, CacheSize size) {
  return {backend, model, size};
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
