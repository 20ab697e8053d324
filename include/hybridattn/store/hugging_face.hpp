// Reads and writes released models in folders of the Hugging Face layout: config.json, and safetensors files with the parameters under
// their released names. The library knows Qwen3-Next and the text models of Qwen3.5, Stacks of Gated DeltaNet and full attention:
//
//   using Letters = Alphabet<Letter<'L', GDN>, Letter<'F', Full>>;
//   using Model = LanguageModel<Pattern<"LLLF", Letters>>;
//   Model const model{hugging_face::config<Model>(folder)};
//   auto params = hugging_face::load<float>(cpu, model, folder);
//   hugging_face::save(cpu, model, params, another_folder);
//
// The tables in hugging_face/qwen.hpp, qwen3_next.hpp and qwen3_5.hpp say which name is which field.
#ifndef HYBRIDATTN_STORE_HUGGING_FACE_HPP
#define HYBRIDATTN_STORE_HUGGING_FACE_HPP

#include <hybridattn/nn/language_model.hpp>
#include <hybridattn/store/checkpoint.hpp>
#include <hybridattn/store/hugging_face/config_file.hpp>
#include <hybridattn/store/hugging_face/table.hpp>
#include <hybridattn/store/hugging_face/types.hpp>
#include <hybridattn/store/hugging_face/weights.hpp>

#include <deque>

namespace hybridattn::inline HYBRIDATTN_ABI::hugging_face {

// Returns one letter for each layer of the folder: L for linear_attention (Gated DeltaNet), F for full_attention. The default is
// "LLLF...". Like all functions here it throws if it does not fully understand config.json, and names the field and its value. Fields
// in options.ignore are read as if they were absent.
inline std::string pattern(std::filesystem::path const& folder, ReadOptions const& options = {}) {
  return read_settings(folder, options).pattern;
}

namespace detail {
inline Format format_of(Settings const& settings, Weights const& weights) {
  Format result{.family = settings.family};
  for (RowGroup const& group : settings.family->tensors)
    for (Row const& row : group.rows)
      if (group.experts == RowGroup::Experts::fused)
        result.fused_experts |= weights.contains_part("." + std::string(group.name) + std::string(row.name));
  if (weights.contains_part("model.language_model.")) result.prefix = "model.language_model.";
  return result;
}
}  // namespace detail

// Returns how the folder's parameters are named. `save` with this Format names others in the same way.
inline Format format(std::filesystem::path const& folder, ReadOptions const& options = {}) {
  return detail::format_of(read_settings(folder, options), Weights{folder});
}

// Returns the folder's sizes for a model of this type. Throws if the type has other layers, another convolution width or rotary share,
// or other norms or gates than the folder; the error names field, value and what is supported.
// If output_router_logits is true in the folder, the loss includes the load-balancing loss, pooled over the layers. Otherwise set
// feed_forward.balance_coefficient to train with it.
template <class Model> typename Model::Config config(std::filesystem::path const& folder, ReadOptions const& options = {}) {
  Settings const s = read_settings(folder, options);
  check_types<typename Model::Stack>(s);
  return checkpoint::configuration<Model>(detail::description(s), s.where);
}

namespace detail {

// The tensors of a group of parameters, by path. An absent tensor has no bytes.
using Memory = std::map<std::string, checkpoint::StoredTensor>;
inline Memory memory_of(std::vector<checkpoint::StoredTensor> const& tensors) {
  Memory result;
  for (auto const& tensor : tensors) result[tensor.name] = tensor;
  return result;
}
template <class T> Index elements_at(Memory const& memory, std::string const& path) {
  return static_cast<Index>(memory.at(path).bytes / sizeof(T));
}
// Calls f(T{}) with the scalar of an entry's tensors, in a group of parameters in T: T or the wide scalar. All of them have the same.
template <class T, class F> void with_scalar(Entry const& entry, Memory const& memory, F f) {
  if (memory.at(entry.fields.front()).info.dtype == safetensors::dtype_of<T>()) f(T{});
  else f(wide_t<T>{});
}

template <class T, class B> std::vector<std::vector<T>> download_fields(B& backend, Entry const& entry, Memory const& memory) {
  std::vector<std::vector<T>> fields;
  for (auto const& path : entry.fields) {
    auto& field = fields.emplace_back();
    resize(field, elements_at<T>(memory, path), "a copy of a tensor");
    if (!field.empty()) backend.download(field.data(), memory.at(path).data, memory.at(path).bytes);
  }
  return fields;
}
template <class T, class B> void load_entry(B& backend, Entry const& entry, Weights const& weights, Memory const& memory) {
  auto const released = weights.read<T>(entry);
  std::vector<std::vector<T>> fields;
  for (auto const& path : entry.fields) resize(fields.emplace_back(), elements_at<T>(memory, path), "a copy of a tensor");
  auto next = released.begin();
  for_each_share(entry.groups, fields, [&](std::span<T> share) {
    std::copy_n(next, share.size(), share.begin());
    next += static_cast<Index>(share.size());
  });
  for (std::size_t i = 0; i < fields.size(); ++i)
    if (!fields[i].empty())
      backend.upload(const_cast<void*>(memory.at(entry.fields[i]).data), fields[i].data(), fields[i].size() * sizeof(T));
}

}  // namespace detail

// Returns the folder's parameters for this model, in float, double or bf16. Its tensors may be F32, BF16, F16 or F64, in one file or several.
// Throws, before it takes memory, if a tensor is missing, superfluous or of another shape, and names the tensor and both shapes. Skips
// draft heads (mtp.*) and image encoders (model.visual.*). If the model ties its head to the embedding, a head in the folder must equal
// the embedding.
template <class T, class B, class Model>
auto load(B& backend, Model const& model, std::filesystem::path const& folder, ReadOptions const& options = {}) {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double> || std::is_same_v<T, bf16>,
                "parameters are loaded as float, double or bf16");
  Settings const settings = read_settings(folder, options);
  check_types<typename Model::Stack>(settings);
  check_norm_placement(settings, checkpoint::describe(model));
  Weights const weights{folder};
  Format const format = detail::format_of(settings, weights);
  Outline const wanted = outline(model, *settings.family);
  bool const is_apart =
      detail::is_mixed(model.config().feed_forward, std::ssize(settings.pattern)) && !format.fused_experts;  // a name for each expert
  check(!is_apart || wanted.experts <= weights.count(), settings.where, "num_experts is ", wanted.experts, ", but the folder has ",
        weights.count(), " tensors");
  auto const entries = table(wanted, format);
  weights.check_against(entries, model.config().tie_embedding ? format.prefix + "embed_tokens.weight" : "");
  auto params = allocate_together<T>(backend, model.params());
  auto const memory = detail::memory_of(checkpoint::tensors_of(params));
  for (Entry const& entry : entries)
    detail::with_scalar<T>(entry, memory, [&]<class Own>(Own) { detail::load_entry<Own>(backend, entry, weights, memory); });
  return params;
}

// Calls f(released name, shape, elements) for every tensor of a group of parameters or of their gradients. Skips tensors that the group
// does not have, such as gradients of parameters that are not trained.
template <class B, class Model, class Params, class F>
void for_each_tensor(B& backend, Model const& model, Params const& params, F f, Format const& format = {}) {
  using T = std::remove_cvref_t<decltype(*in(params.embedding).data)>;
  auto const memory = detail::memory_of(checkpoint::tensors_of(params));
  for (Entry const& entry : table(outline(model, *format.family), format))
    detail::with_scalar<T>(entry, memory, [&]<class Own>(Own) {
      auto fields = detail::download_fields<Own>(backend, entry, memory);
      std::vector<Own> released;
      for_each_share(entry.groups, fields, [&](std::span<Own> share) { released.insert(released.end(), share.begin(), share.end()); });
      Index const each = TensorInfo{"", entry.shape}.count();
      if (static_cast<Index>(released.size()) != each * std::ssize(entry.names)) return;
      for (std::size_t i = 0; i < entry.names.size(); ++i) {
        auto const first = released.begin() + static_cast<Index>(i) * each;
        f(entry.names[i], entry.shape, std::vector<Own>(first, first + each));
      }
    });
}

// Writes config.json and model.safetensors as released models have them, each under a temporary name first. Tensors in bf16 are written
// as BF16, all others as F32. Throws if an
// option of the model is in no released model of the family, or if the folder has shards, and names the option or the folder.
template <class B, class Model, class Params>
void save(B& backend, Model const& model, Params const& params, std::filesystem::path const& folder, Format const& format = {}) {
  using Scalar = scalar_of<Params>;
  std::string const config = config_text(settings_of(model, *format.family), std::is_same_v<Scalar, bf16> ? "bfloat16" : "float32");
  std::error_code ignored;
  check(!std::filesystem::exists(folder / "model.safetensors.index.json", ignored), "cannot save the model in ", one_line(folder.string()),
        ": it holds the shards of another one, and their model.safetensors.index.json. Choose another folder");
  SafetensorsWriter writer;
  std::tuple<std::deque<std::vector<float>>, std::deque<std::vector<bf16>>> kept;  // the writer only refers to the elements
  for_each_tensor(
      backend, model, params,
      [&]<class T>(std::string const& name, Extents const& shape, std::vector<T> const& elements) {
        using Written = std::conditional_t<std::is_same_v<T, bf16>, bf16, float>;
        auto& copy = std::get<std::deque<std::vector<Written>>>(kept).emplace_back();
        resize(copy, std::ssize(elements), "a copy of a tensor");
        std::ranges::transform(elements, copy.begin(), [](T element) { return static_cast<Written>(element); });
        writer.add(name, shape, copy);
      },
      format);
  writer.add_metadata("format", "pt");  // the layout's readers expect this
  std::filesystem::create_directories(folder);
  writer.write(folder / "model.safetensors");
  write_file_atomically(folder / "config.json", config);
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::hugging_face
#endif
