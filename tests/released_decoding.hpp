// Released models decode as the published implementation does. Compared are the cache after a prompt and the logits of each later token.
#ifndef HYBRIDATTN_TESTS_RELEASED_DECODING_HPP
#define HYBRIDATTN_TESTS_RELEASED_DECODING_HPP

#include "released_models.hpp"

namespace released {

inline ha::TokenLists lists(ha::Safetensors const& file, std::string const& name) {
  auto const ids = file.read_int64s(name);
  auto const length = static_cast<std::size_t>(file.info(name).shape[1]);
  ha::TokenLists result;
  for (std::size_t i = 0; i < ids.size(); i += length) result.emplace_back(&ids[i], &ids[i] + length);
  return result;
}

// Reorders [batch, rows, ...] to the order of the file, in which heads or channels come before positions.
inline std::vector<double> in_released_order(std::vector<double> const& ours, Index batch, Index rows, Index outer, Index inner,
                                             Index count) {
  std::vector<double> result;
  for (Index b = 0; b < batch; ++b)
    for (Index h = 0; h < outer; ++h)
      for (Index p = 0; p < count; ++p) {
        auto const from = ours.begin() + ((b * rows + p) * outer + h) * inner;
        result.insert(result.end(), from, from + inner);
      }
  return result;
}
// The last W - 1 inputs of channels first .. first + count of a tensor [B, channels, W].
inline std::vector<double> conv_of(ha::Safetensors const& file, std::string const& name, Index first, Index count) {
  auto const all = file.read_doubles(name);
  auto const shape = file.info(name).shape;
  std::vector<double> result;
  for (Index b = 0; b < shape[0]; ++b)
    for (Index c = first; c < first + count; ++c) {
      auto const from = all.begin() + (b * shape[1] + c) * shape[2];
      result.insert(result.end(), from + 1, from + shape[2]);
    }
  return result;
}

// The error of a layer's cache.
template <class B>
double cache_error(B& backend, ha::full::Cache<ha::Owned<double, B>> const& layer, ha::Safetensors const& file, std::string const& prefix,
                   Index length) {
  auto const shape = layer.keys.shape();
  auto const part = [&](auto const& tensor, char const* name) {
    return difference(in_released_order(download(backend, tensor), shape[0], shape[1], shape[2], shape[3], length),
                      file.read_doubles(prefix + name));
  };
  return std::max(part(layer.keys, "keys"), part(layer.values, "values"));
}
template <class B>
double cache_error(B& backend, ha::gdn::Cache<ha::Owned<double, B>> const& layer, ha::Safetensors const& file, std::string const& prefix,
                   Index) {
  double worst = difference(download(backend, layer.state), file.read_doubles(prefix + "recurrent"));
  Index channel = 0;
  for (auto const* conv : {&layer.conv_q, &layer.conv_k, &layer.conv_v}) {
    auto const shape = conv->shape();
    auto const ours = in_released_order(download(backend, *conv), shape[0], shape[1], shape[2], 1, shape[1]);
    worst = std::max(worst, difference(ours, conv_of(file, prefix + "conv", channel, shape[2])));
    channel += shape[2];
  }
  return worst;
}

template <class Model, class B> void check_decoding(fs::path const& folder) {
  ha::Safetensors const file{folder / "decode.safetensors"};
  Model const model{hf::config<Model>(folder)};
  B backend = ha::testing::Machine<B>::make(2);
  auto const params = hf::load<double>(backend, model, folder);
  auto const prompt = lists(file, "prompt"), tokens = lists(file, "tokens");
  auto const shape = file.info("logits").shape;   // [B, steps, V]
  Index const batch = shape[0], steps = shape[1], V = shape[2], length = std::ssize(prompt[0]);
  auto const expected = file.read_doubles("logits");

  auto cache = ha::make_cache<double>(backend, model, {.batch = batch, .capacity = length + steps});
  ha::TokenLists next = prompt;
  double logits_error = 0, remembered_error = 0;
  for (Index step = 0; step < steps; ++step) {
    auto const logits = download(backend, ha::extend_to_last(backend, model, params, next, cache));
    if (step == 0)
      cache.layers().for_each_layer(
          [&](int i, auto const& layer) {
            auto const prefix = "cache_after_prompt.layer" + std::to_string(i) + ".";
            remembered_error = std::max(remembered_error, cache_error(backend, layer, file, prefix, length));
          },
          cache.layers());
    for (Index b = 0; b < batch; ++b) {
      auto const ours = logits.begin() + b * V, theirs = expected.begin() + (b * steps + step) * V;
      logits_error = std::max(logits_error, difference<double>({ours, ours + V}, {theirs, theirs + V}));
      auto const likeliest = static_cast<std::int32_t>(std::max_element(ours, ours + V) - ours);
      CHECK(likeliest == tokens[static_cast<std::size_t>(b)][static_cast<std::size_t>(length + step)]);
      next[static_cast<std::size_t>(b)] = {likeliest};
    }
  }
  std::printf("%-20s cache after the prompt %7.1e   logits of %td steps %7.1e\n", folder.filename().c_str(), remembered_error, steps,
              logits_error);
  CHECK(remembered_error <= 1e-11);
  CHECK(logits_error <= 1e-11);

  auto const generated = generate(backend, model, params, prompt, {.max_new_tokens = steps, .sampling = {.temperature = 0}});
  for (std::size_t b = 0; b < tokens.size(); ++b) {
    auto all = prompt[b];
    all.insert(all.end(), generated.tokens[b].begin(), generated.tokens[b].end());
    CHECK(all == tokens[b]);
  }
}

}  // namespace released

#endif
