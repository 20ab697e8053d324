// Types of released models for tests, and a comparison of two folders' tensors.
#ifndef HYBRIDATTN_TESTS_RELEASED_HPP
#define HYBRIDATTN_TESTS_RELEASED_HPP

#include "compare.hpp"

#include <hybridattn/hybridattn.hpp>
#include <hybridattn/io/safetensors.hpp>
#include <hybridattn/store/hugging_face/config_file.hpp>

#include <filesystem>
#include <string>

template <int rotary_percent, hybridattn::Text text>
using ModelOf = hybridattn::LanguageModel<hybridattn::Pattern<
    text,
    hybridattn::Alphabet<hybridattn::Letter<'L', hybridattn::GDN>,
                         hybridattn::Letter<'F', hybridattn::FullAttention<hybridattn::FullOptions{.rotary_percent = rotary_percent}>>>>>;

// The share of a head that a folder's full attention turns, in percent.
inline double rotary_percent_of(hybridattn::hugging_face::Settings const& settings) {
  return 100 * settings.of_family.at(hybridattn::hugging_face::qwen::rotary_share).get<double>();
}

// Names the first tensor that is not the same in both folders, bit for bit, or returns "".
inline std::string differing_tensor(std::filesystem::path const& ours, std::filesystem::path const& theirs) {
  hybridattn::Safetensors const a{ours / "model.safetensors"}, b{theirs / "model.safetensors"};
  for (auto const& [name, info] : b.tensors()) {
    bool const same = a.contains(name) && a.info(name).dtype == info.dtype && a.info(name).shape == info.shape;
    if (!same || !same_bits<float>({a.read_floats(name)}, {b.read_floats(name)})) return name;
  }
  return a.tensors().size() == b.tensors().size() ? "" : "the number of tensors";
}

#endif
