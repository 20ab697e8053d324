// The training curves as pictures.
#ifndef HYBRIDATTN_EXAMPLES_SWEEP_PLOTS_HPP
#define HYBRIDATTN_EXAMPLES_SWEEP_PLOTS_HPP

#include "../gnuplot.hpp"
#include "report.hpp"

namespace sweep {

using gnuplot::Column, gnuplot::data_file;

struct Picture {
  std::string file;    // without extension
  std::string title;
  std::string data;    // what data_file made
  int legend_rows = 1;
  std::vector<std::string> lines = {};   // gnuplot's plot elements, of columns of the data
  std::size_t steps = 1;
};

// Left the whole run, right its last quarter with an axis of its own, under both the legend: it covers no curve.
// Both are 14 x 8 inches: the PNG at 300 dots an inch, the SVG at 100.
inline constexpr std::string_view script_template = R"(set encoding utf8
set datafile separator '\t' missing '?'
data = @DATA@
set border 3 lw 1 lc rgb '#555555'
set tics nomirror out textcolor rgb '#333333'
set grid lt 1 lw 0.5 lc rgb '#dcdcdc' dt solid
set tmargin at screen 0.89
set bmargin at screen @BOTTOM@
set xlabel 'step'

do for [format in 'png svg'] {
  if (format eq 'png') { set terminal pngcairo size 4200,2400 font 'DejaVu Sans,10' fontscale 4.1667 linewidth 4.1667 noenhanced }
  if (format eq 'svg') { set terminal svg size 1400,800 font 'DejaVu Sans,15' linewidth 1.4 background rgb 'white' noenhanced }
  set output @FILE@.'.'.format
  set multiplot title @TITLE@ font (format eq 'png' ? ',14' : ',20')

  set lmargin at screen 0.075
  set rmargin at screen 0.545
  set title 'whole run'
  set ylabel 'training loss, mean since step 1 (nats)' offset 1
  set xrange [1:@LAST@]
  set key at screen 0.52,0.02 center bottom maxrows @ROWS@ Left reverse samplen 4 width -3 spacing 1.3 textcolor rgb '#222222'
  plot @LINES@

  set lmargin at screen 0.61
  set rmargin at screen 0.97
  set title 'last quarter, enlarged'
  unset ylabel
  set xrange [@ZOOM@:@LAST@]
  unset key
  plot @LINES@

  unset multiplot
  set output
}
)";

inline std::string gnuplot_script(Picture const& picture) {
  std::string lines;
  for (auto const& line : picture.lines) lines += (lines.empty() ? "" : ", \\\n    ") + line;
  std::size_t const last = std::max<std::size_t>(picture.steps, 2), zoom = last - std::max<std::size_t>(last / 4, 1);
  std::string script{script_template};
  gnuplot::put(script, "@DATA@", gnuplot::quoted(picture.file + ".tsv"));
  gnuplot::put(script, "@FILE@", gnuplot::quoted(picture.file));
  gnuplot::put(script, "@TITLE@", gnuplot::quoted(picture.title));
  gnuplot::put(script, "@BOTTOM@", formatted("%.3f", 0.15 + 0.037 * picture.legend_rows));
  gnuplot::put(script, "@ROWS@", std::to_string(picture.legend_rows));
  gnuplot::put(script, "@ZOOM@", std::to_string(zoom));
  gnuplot::put(script, "@LAST@", std::to_string(last));
  gnuplot::put(script, "@LINES@", lines);
  return script;
}

// Patterns of one arrangement share a hue, dashed with sparse attention in the place of full.
inline std::string line_style(RunResult const& run) {
  static constexpr std::array arrangements = {std::pair{"LFFL", "#0072b2"}, std::pair{"FLFL", "#d55e00"}, std::pair{"LLFF", "#009e73"},
                                              std::pair{"FFLL", "#b0468f"}, std::pair{"LLLL", "#000000"}, std::pair{"FFFF", "#888888"}};
  std::string letters = run.letters, color = "#a6761d";
  std::ranges::replace(letters, 'D', 'F');
  for (auto const& [arrangement, its_color] : arrangements)
    if (letters == arrangement) color = its_color;
  return std::string("lw 2 lc rgb '") + color + "' dt " + (run.uses_dsa() ? "(8,5)" : "solid");
}

inline Picture all_patterns(std::vector<RunResult> const& results) {
  Picture picture{"loss_comparison", "Training loss by pattern", {}, results.size() > 4 ? 4 : 2};
  std::vector<Column> columns;
  for (auto const& run : results) {
    columns.push_back({run.name, run.running_mean()});
    picture.steps = std::max(picture.steps, run.losses.size());
    picture.lines.push_back(formatted("data using 1:%zu with lines ", columns.size() + 1) + line_style(run) + " title " +
                            gnuplot::quoted(run.name + ": " + arrows(run.letters)));
  }
  picture.data = data_file(columns);
  return picture;
}

// Mean, lowest and highest curve of a category, pointwise, as far as all its runs go; three empty columns without runs.
inline std::array<Column, 3> category_curves(std::vector<RunResult> const& results, bool uses_dsa, std::string const& name) {
  std::vector<std::vector<double>> curves;
  for (auto const& run : results)
    if (run.is_studied() && run.uses_dsa() == uses_dsa) curves.push_back(run.running_mean());
  std::array<Column, 3> columns{Column{name, {}}, Column{name + " lowest", {}}, Column{name + " highest", {}}};
  if (curves.empty()) return columns;
  std::size_t const steps = std::ranges::min(curves, {}, &std::vector<double>::size).size();
  for (std::size_t i = 0; i < steps; ++i) {
    double sum = 0, lowest = curves[0][i], highest = curves[0][i];
    for (auto const& curve : curves) {
      sum += curve[i];
      lowest = std::min(lowest, curve[i]);
      highest = std::max(highest, curve[i]);
    }
    columns[0].values.push_back(sum / static_cast<double>(curves.size()));
    columns[1].values.push_back(lowest);
    columns[2].values.push_back(highest);
  }
  return columns;
}

inline Picture category_means(std::vector<RunResult> const& results) {
  Picture picture{"loss_comparison_average", "Training loss by category: mean and range of its patterns", {}, 1};
  std::vector<Column> columns;
  std::vector<std::string> means;   // drawn after both bands
  for (bool const uses_dsa : {false, true}) {
    int const runs = category(results, uses_dsa).count;
    std::string const name = uses_dsa ? "DSA" : "Original", style = uses_dsa ? "lc rgb '#d55e00' dt (8,5)" : "lc rgb '#0072b2' dt solid";
    std::string const legend = name + (uses_dsa ? " (sparse + linear attention), " : " (full + linear attention), ");
    for (auto& column : category_curves(results, uses_dsa, name)) columns.push_back(std::move(column));
    if (runs == 0) continue;
    auto const first = columns.size() - 1;   // the file's first column is the step
    picture.steps = std::max(picture.steps, columns[first - 2].values.size());
    picture.lines.push_back(formatted("data using 1:%zu:%zu with filledcurves fs transparent solid 0.15 noborder ", first + 1, first + 2) +
                            style + " notitle");
    means.push_back(formatted("data using 1:%zu with lines lw 2.5 ", first) + style + " title " +
                    gnuplot::quoted(legend + std::to_string(runs) + " of 4 patterns"));
  }
  picture.lines.insert(picture.lines.end(), means.begin(), means.end());
  picture.data = data_file(columns);
  return picture;
}

inline std::string draw(std::filesystem::path const& folder, Picture const& picture) {
  return gnuplot::draw(folder, picture.file, picture.data, gnuplot_script(picture));
}

// Both comparisons as PNG and SVG; the average only where the study's patterns are. Returns at most one line of trouble.
inline std::string draw_plots(std::filesystem::path const& folder, std::vector<RunResult> const& results) {
  if (results.empty()) return "";
  auto const trouble = draw(folder, all_patterns(results));
  bool const any_studied = std::ranges::any_of(results, &RunResult::is_studied);
  return trouble.empty() && any_studied ? draw(folder, category_means(results)) : trouble;
}

}  // namespace sweep
#endif
