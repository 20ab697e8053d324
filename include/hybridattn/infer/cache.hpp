// A model's memory of earlier tokens, so that a new token costs the work of one token: each layer's cache, and the number of each
// sequence's tokens in it. The caller owns the cache; the model keeps no part of it.
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

// The shapes of a cache. bytes<float>(cache_shapes(model, size)) are the bytes of a cache of floats. Throws Error unless both sizes
// are in 1 .. 2^31 - 1.
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

  // Throws Error, with the number of bytes, where memory is short.
  Cache(B& backend, LanguageModel<Stack> const& model, CacheSize size)
      : layers_(allocated(backend, cache_shapes(model, size), size)), capacity_(size.capacity) {
    resize(lengths_, size.batch, "the lengths of sequences");
  }

  Group const& layers() const { return layers_; }
  Group& layers() { return layers_; }
  Index capacity() const { return capacity_; }
  Index batch() const { return std::ssize(lengths_); }
  // The number of each sequence's tokens in the cache.
  std::span<Index const> lengths() const { return lengths_; }

  // Discards the tokens of sequence i, or of all sequences.
  void forget(Index i) { lengths_.at(static_cast<std::size_t>(i)) = 0; }
  void forget() { std::fill(lengths_.begin(), lengths_.end(), 0); }

  // For extend: next() lists the new tokens of all sequences, one sequence after the other, and throws Error if they do not fit.
  // commit() counts them as tokens of the cache.
  struct Call {
    SequencesOn<B> sequences;
    std::vector<std::int32_t> tokens;
  };
  Call const& next(B& backend, TokenLists const& tokens) {
    check(std::ssize(tokens) == batch(), "cache: new tokens of ", tokens.size(), " sequences, but the cache was made for ", batch());
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
  Call call_;   // its memory is used again by each call
};

template <class T, class B, class Stack> Cache<Stack, T, B> make_cache(B& backend, LanguageModel<Stack> const& model, CacheSize size) {
  return {backend, model, size};
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
