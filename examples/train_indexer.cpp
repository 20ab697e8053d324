// How DeepSeek makes a dense model sparse (arXiv 2512.02556), on a small scale: train_indexer [TEXT_FILE]
// A model with full attention is trained on the bytes of a text, its parameters move into one with sparse attention, the
// dense warm-up trains the indexers alone, and sparse training goes on with everything. On the way recall is measured: the
// share of the dense attention's mass that k selected keys carry.
#include "gnuplot.hpp"
#include "options.hpp"
#include "sweep/anarchism.hpp"
#include "sweep/report.hpp"

#include <hybridattn/attention/dsa/reference.hpp>
#include <hybridattn/hybridattn.hpp>

#include <nlohmann/json.hpp>

#include <map>
#include <numeric>

namespace {

namespace ha = hybridattn;
using ha::Index;
using ha::Stage;

constexpr int top_k = 32;
using Sparse = ha::SparseAttention<ha::SparseOptions{.top_k = top_k, .index_rotary_percent = 50, .index_norm = true}>;
using DenseModel = ha::LanguageModel<ha::Stack<ha::GDN, ha::Full, ha::Full, ha::GDN>>;
using SparseModel = ha::LanguageModel<ha::Stack<ha::GDN, Sparse, Sparse, ha::GDN>>;
using Params = SparseModel::Params<ha::Owned<float, ha::Cpu>>;

struct Settings {
  std::string text;
  std::filesystem::path out = "indexer";
  Index dense_steps = 300, warm_up_steps = 100, sparse_steps = 100, measure_every = 20, seq_len = 512, batch = 4, windows = 8;
  Index model_dim = 128, num_heads = 4;
  double learning_rate = 1e-3, warm_up_rate = 5, sparse_rate = 0.1;
  std::uint64_t seed = 1;
  int threads = 0;
};

// Mean over the queries that see more keys than they may select: what share of their dense attention the selected keys carry.
struct Recall {
  double indexer = 0, random = 0, local = 0, best = 0;
};
struct Measurement {
  Index step;
  Stage stage;
  Recall trained, untrained;
  double divergence;                 // the indexer's loss per token and layer, over all visible keys
  double dense_loss, sparse_loss;    // of the same parameters, with all keys and with the selected ones
  double sparse_loss_untrained;      // with those that an untrained indexer selects
};

// The share of p that the `top_k` largest scores select.
double selected_mass(std::vector<float> const& scores, std::vector<float> const& p) {
  std::vector<std::int32_t> keys(top_k);
  ha::dsa::reference::select(scores, top_k, keys.data());
  double mass = 0;
  for (auto key : keys) mass += static_cast<double>(p[static_cast<std::size_t>(key)]);
  return mass;
}
// Of one layer, from what it saved in the dense stage. k keys drawn from t + 1 carry k / (t + 1) on average.
void add_recall(ha::dsa::Config const& c, ha::Sequences const& s, ha::dsa::Inputs<ha::In<float>> const& x, ha::View<float const, 2> lse,
                Recall& sum, Index& count) {
  for (ha::Sequence const sequence : s)
    for (Index t = top_k; t < sequence.length; ++t, ++count) {
      std::vector<Index> keys(static_cast<std::size_t>(t + 1));
      std::iota(keys.begin(), keys.end(), sequence.start);
      auto const p = ha::dsa::reference::shares_of<float>(c, x, lse, sequence.start + t, keys);
      sum.indexer += selected_mass(ha::dsa::reference::scores_of<float>(c, x, sequence.start + t, keys), p);
      sum.best += selected_mass(p, p);
      sum.random += static_cast<double>(top_k) / static_cast<double>(t + 1);
      sum.local += std::accumulate(p.end() - top_k, p.end(), 0.0);
    }
}

class Study {
 public:
  explicit Study(Settings const& s)
      : s_(s), text_(open_text(s)), validation_(text_.validation_batches(s.batch, s.seq_len, s.windows)), cpu_(s.threads) {
    text_.next_batch(s.batch, s.seq_len);   // complains of a text that is too short
    text_.restart();
    auto const parameters = model_.parameter_count();
    program::check_memory(4.0 * 4 * static_cast<double>(parameters), "training " + std::to_string(parameters) + " parameters");
  }

  void run() {
    program::say("%s\n%d threads, windows of %td bytes, %d keys selected\n", text_.description().c_str(), cpu_.threads(), s_.seq_len,
                 top_k);
    program::flush_stdout();
    start_from(train_dense());
    ha::AdamW optimizer{cpu_, params_, {.learning_rate = s_.learning_rate}};
    program::say("\n%-8s %5s | %s | %6s | loss: %6s %6s %9s\n", "stage", "step", "recall: indexer untrained random  local   best", "KL",
                 "dense", "sparse", "untrained");
    measure(0, Stage::dense_warm_up);
    Index const all = s_.warm_up_steps + s_.sparse_steps;
    for (Index step = 1; step <= all; ++step) {
      Stage const stage = step <= s_.warm_up_steps ? Stage::dense_warm_up : Stage::sparse;
      double const rate = stage == Stage::sparse ? s_.sparse_rate : s_.warm_up_rate;
      train_step(cpu_, model_, params_, optimizer, next_batch(), {.rate = rate, .stage = stage});
      if (step % s_.measure_every == 0 || step == s_.warm_up_steps || step == all) measure(step, stage);
    }
    report();
  }

 private:
  static ha::Windows open_text(Settings const& s) {
    auto const windows = [&](std::string_view text, std::string name) { return ha::Windows{ha::ByteText(text), ha::Seed{s.seed}, name}; };
    if (!s.text.empty()) return windows(ha::read_text(s.text), program::text_name(s.text));
    auto const text = sweep::anarchism_text(HYBRIDATTN_TEXT_DIR);
    ha::check(text.has_value(), "Debian's package `anarchism` cannot be had here: name a text file");
    return windows(*text, "anarchism");
  }
  template <class Model> Model configured() const {
    typename Model::Config config;
    config.vocab_size = text_.vocab_size();
    config.model_dim = s_.model_dim;
    config.num_heads = s_.num_heads;
    return Model{config};
  }
  ha::TokenBatch<ha::Cpu> next_batch() { return make_batch(cpu_, text_.next_batch(s_.batch, s_.seq_len)); }
  template <class Model, class P> double validation_loss(Model const& model, P const& params) {
    ha::LossSum total;
    for (auto const& batch : validation_) total += model.loss(cpu_, params, make_batch(cpu_, batch));
    return total.mean();
  }

  DenseModel::Params<ha::Owned<float, ha::Cpu>> train_dense() {
    auto const model = configured<DenseModel>();
    auto params = model.initialize<float>(cpu_, ha::Seed{s_.seed});
    ha::AdamW optimizer{cpu_, params, {.learning_rate = s_.learning_rate}};
    ha::Schedule const schedule{.warmup_steps = s_.dense_steps / 20, .total_steps = s_.dense_steps, .min_rate = 0.1};
    for (Index step = 0; step < s_.dense_steps; ++step) {
      auto const result = train_step(cpu_, model, params, optimizer, next_batch(), {.rate = schedule(step)});
      if ((step + 1) % 100 != 0) continue;
      program::say("dense    %5td | training loss %.3f\n", step + 1, result.loss.mean());
      program::flush_stdout();
    }
    program::say("validation loss %.4f with full attention\n", validation_loss(model, params));
    return params;
  }
  // What both models have goes by its path; the indexers start fresh.
  void start_from(DenseModel::Params<ha::Owned<float, ha::Cpu>> const& dense) {
    std::map<std::string, std::vector<float>> values;
    ha::zip([&](ha::Path const& path, auto const& tensor) { values[path.str()] = download(cpu_, tensor); }, dense);
    params_ = model_.initialize<float>(cpu_, ha::Seed{s_.seed});
    fresh_ = model_.initialize<float>(cpu_, ha::Seed{s_.seed});
    ha::zip(
        [&](ha::Path const& path, auto& tensor) {
          if (auto const found = values.find(path.str()); found != values.end()) upload(cpu_, found->second, tensor);
        },
        params_);
  }
  // The model's present parameters with the indexers it began with.
  Params const& untrained() {
    ha::zip(
        [&](ha::Path const& path, auto const& present, auto& tensor) {
          if (!path.name.starts_with("index_")) upload(cpu_, download(cpu_, present), tensor);
        },
        params_, fresh_);
    return fresh_;
  }

  // Attention is dense here, so the parameters alone decide what attention there is to find.
  Recall recall(Params const& params, double& divergence) {
    auto const dense = model_.at(Stage::dense_warm_up);
    Recall sum;
    Index rows = 0;
    double loss = 0, tokens = 0;
    for (auto const& host : validation_) {
      auto const batch = make_batch(cpu_, host);
      auto const saved = dense.forward(cpu_, params, batch);
      saved.blocks.for_each(
          [&](auto block, std::size_t, auto const& kept) {
            using Policy = typename decltype(block)::type::Policy;
            if constexpr (ha::HasAuxiliaryLoss<Policy>) {
              auto const& attention = kept.attention;
              loss += static_cast<double>(download(cpu_, attention.outputs.auxiliary_loss)[0]);
              tokens += static_cast<double>(batch.sequences.tokens());
              add_recall(dense.stack_config().layers.template get<Policy>().policy, batch.sequences, in(attention.inputs),
                         in(attention.policy.lse), sum, rows);
            }
          },
          saved.blocks);
    }
    divergence = loss / tokens;
    double const n = static_cast<double>(rows);
    return {sum.indexer / n, sum.random / n, sum.local / n, sum.best / n};
  }
  void measure(Index step, Stage stage) {
    Measurement m{.step = step,
                  .stage = stage,
                  .trained = {},
                  .untrained = {},
                  .divergence = 0,
                  .dense_loss = 0,
                  .sparse_loss = 0,
                  .sparse_loss_untrained = 0};
    double unused;
    m.trained = recall(params_, m.divergence);
    m.untrained = recall(untrained(), unused);
    m.dense_loss = validation_loss(model_.at(Stage::dense_warm_up), params_);
    m.sparse_loss = validation_loss(model_, params_);
    m.sparse_loss_untrained = validation_loss(model_, fresh_);
    program::say("%-8s %5td |         %6.3f    %6.3f  %6.3f %6.3f %6.3f | %6.3f |       %6.4f %6.4f    %6.4f\n",
                 stage == Stage::sparse ? "sparse" : "warm-up", step, m.trained.indexer, m.untrained.indexer, m.trained.random,
                 m.trained.local, m.trained.best, m.divergence, m.dense_loss, m.sparse_loss, m.sparse_loss_untrained);
    program::flush_stdout();
    measured_.push_back(m);
  }
  void report() const;

  Settings const& s_;
  ha::Windows text_;
  std::vector<ha::Batch> validation_;
  ha::Cpu cpu_;
  SparseModel model_ = configured<SparseModel>();
  Params params_, fresh_;
  std::vector<Measurement> measured_;
};

constexpr std::string_view plot_script = R"(set encoding utf8
set datafile separator '\t' missing '?'
data = 'recall.tsv'
set border 3 lw 1 lc rgb '#555555'
set tics nomirror out textcolor rgb '#333333'
set grid lt 1 lw 0.5 lc rgb '#dcdcdc' dt solid
set title @TITLE@
set xlabel 'step'
set ylabel 'recall: share of the dense attention'
set xrange [0:@LAST@]
set yrange [0:1]
set key outside right top Left reverse samplen 3 spacing 1.4 textcolor rgb '#222222'
set arrow from @BOUNDARY@, graph 0 to @BOUNDARY@, graph 1 nohead dt (4,4) lc rgb '#999999'
set label 'dense warm-up ' at @BOUNDARY@, graph 0.04 right textcolor rgb '#777777'
set label ' sparse training' at @BOUNDARY@, graph 0.04 left textcolor rgb '#777777'

do for [format in 'png svg'] {
  if (format eq 'png') { set terminal pngcairo size 3000,1800 font 'DejaVu Sans,10' fontscale 3.5 linewidth 3.5 noenhanced }
  if (format eq 'svg') { set terminal svg size 1000,600 font 'DejaVu Sans,13' linewidth 1.4 background rgb 'white' noenhanced }
  set output 'recall.'.format
  plot data using 1:6 with lines lw 1.5 lc rgb '#888888' dt (8,5) title 'the best keys', \
       data using 1:2 with linespoints lw 2.5 pt 7 ps 0.6 lc rgb '#0072b2' title 'indexer', \
       data using 1:5 with lines lw 2 lc rgb '#009e73' title 'the last keys', \
       data using 1:3 with lines lw 2 lc rgb '#d55e00' title 'untrained indexer', \
       data using 1:4 with lines lw 2 lc rgb '#b0468f' title 'random keys'
  set output
}
)";

// A table for gnuplot, a picture, and all numbers as JSON.
void Study::report() const {
  std::vector<gnuplot::Column> columns{{"indexer", {}},    {"untrained", {}},   {"random", {}},
                                       {"local", {}},      {"best", {}},        {"kl", {}},
                                       {"dense_loss", {}}, {"sparse_loss", {}}, {"sparse_loss_untrained", {}}};
  std::vector<double> steps;
  auto rows = nlohmann::json::array();
  for (Measurement const& m : measured_) {
    steps.push_back(static_cast<double>(m.step));
    double const values[] = {m.trained.indexer, m.untrained.indexer, m.trained.random, m.trained.local,        m.trained.best,
                             m.divergence,      m.dense_loss,        m.sparse_loss,    m.sparse_loss_untrained};
    nlohmann::json row{{"step", m.step}, {"stage", m.stage == Stage::sparse ? "sparse" : "dense_warm_up"}};
    for (std::size_t i = 0; i < columns.size(); ++i) {
      columns[i].values.push_back(values[i]);
      row[columns[i].name] = values[i];
    }
    rows.push_back(row);
  }
  nlohmann::json const all{
      {"text", text_.description()}, {"seq_len", s_.seq_len}, {"top_k", top_k}, {"seed", s_.seed}, {"measurements", rows}};
  ha::write_file_atomically(s_.out / "recall.json", all.dump(2) + "\n");
  std::string script{plot_script};
  gnuplot::put(script, "@TITLE@", gnuplot::quoted("Recall of " + std::to_string(top_k) + " keys among " + std::to_string(s_.seq_len)));
  gnuplot::put(script, "@LAST@", std::to_string(std::max<Index>(1, s_.warm_up_steps + s_.sparse_steps)));
  gnuplot::put(script, "@BOUNDARY@", std::to_string(s_.warm_up_steps));
  auto const trouble = gnuplot::draw(s_.out, "recall", gnuplot::data_file(columns, steps), script);
  program::say("\n%s%srecall.json, recall.tsv and the pictures are in %s\n", trouble.c_str(), trouble.empty() ? "" : "\n",
               program::one_line(s_.out.string()).c_str());
}

Settings parse(int argc, char const* const* argv) {
  Settings s;
  ha::Index const any = std::numeric_limits<Index>::max();
  program::Options options{
      "train_indexer", "Trains the indexers of sparse attention: dense model, dense warm-up, sparse training; measures what they find."};
  options.app().add_option("text", s.text, "a text file or a pipe; Debian's `anarchism` without it");
  options.out(s.out, "folder of the results");
  options.size("--dense-steps", s.dense_steps, "training steps of the model with full attention", 0);
  options.size("--warm-up-steps", s.warm_up_steps, "steps that train the indexers alone", 0);
  options.size("--sparse-steps", s.sparse_steps, "steps that train everything", 0);
  options.size("--measure-every", s.measure_every, "steps between two measurements", 1, any);
  options.size("--seq-len", s.seq_len, "bytes of a window, more than are selected", top_k + 1);
  options.size("--batch", s.batch, "windows of a step");
  options.size("--windows", s.windows, "held-out windows that are measured");
  options.size("--model-dim", s.model_dim, "width of the model");
  options.size("--heads", s.num_heads, "heads of each layer");
  options.real("--learning-rate", s.learning_rate, "the largest one", true);
  options.real("--warm-up-rate", s.warm_up_rate, "times the learning rate, in the dense warm-up");
  options.real("--sparse-rate", s.sparse_rate, "times the learning rate, in sparse training");
  options.seed(s.seed);
  options.threads(s.threads);
  options.parse(argc, argv);
  return s;
}

int run(Settings const& s) {
  sweep::prepare_folder(s.out);
  for (auto const* file : {"recall.json", "recall.tsv", "recall.gp", "recall.png", "recall.svg"}) program::check_writable(s.out / file);
  Study study{s};
  program::InUse const lock{s.out};
  if (!sweep::is_installed("gnuplot")) program::say("gnuplot is not installed (Debian: gnuplot-nox): there will be no pictures\n");
  study.run();
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  return program::run("train_indexer", argc, argv, [&] { return run(parse(argc, argv)); });
}
