// Products of many heads with the keys that they share. The lanes of a tile are keys, so no sum goes across lanes. For this the chosen rows
// are transposed, which is worth while from some number of heads on.
#ifndef HYBRIDATTN_ATTENTION_DSA_CPU_PANELS_HPP
#define HYBRIDATTN_ATTENTION_DSA_CPU_PANELS_HPP

#include <hybridattn/attention/dsa/cpu_rows.hpp>
#include <hybridattn/backend/cpu/tile.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI::dsa {

inline constexpr int head_rows = cpu::tuning.attention.rows, key_vectors = cpu::tuning.attention.vectors;
template <class T> inline constexpr Index tile_keys = key_vectors * cpu::lanes<T>;

// Whether this number of heads goes by tiles.
constexpr bool go_by_tiles(Index heads) { return heads >= 8 && heads % head_rows == 0; }
// The size of a panel.
template <class T> Index panel_room(Index D) { return round_up(D, cpu::lanes<T>) * tile_keys<T>; }

// panel [D, tile_keys] = the rows of keys j .. j + tile_keys - 1, transposed. The last key stands in for those after it.
template <class T, class Dim, class Keys> HYBRIDATTN_INLINE void gather_panel(Dim D, Rows<T const> rows, Keys keys, Index j, T* panel) {
  constexpr int n = cpu::lanes<T>;
  for (int v = 0; v < key_vectors; ++v) {
    T const* row[std::size_t{n}];
    for (int i = 0; i < n; ++i) row[i] = rows[keys[std::min(j + v * n + i, keys.count - 1)]];
    cpu::for_each_vector<T>(0, D, [&](cpu::Slot<T> slot) HYBRIDATTN_INLINE_LAMBDA {
      cpu::Vec<T> square[std::size_t{n}];
      HYBRIDATTN_UNROLL
      for (int i = 0; i < n; ++i) square[i] = slot.get(row[i]);
      cpu::transpose<T>(square);
      HYBRIDATTN_UNROLL
      for (int i = 0; i < n; ++i) cpu::store(panel + (slot.i + i) * tile_keys<T> + v * n, square[i]);
    });
  }
}

// products[h][j] = x[h] . rows[key j] for all heads and keys. panel is scratch.
template <class T, class Dim>
void dot_rows_by_tiles(Dim D, Rows<T const> x, Index heads, Rows<T const> rows, Keys keys, T* panel, Rows<T> products) {
  for (Index j = 0; j < keys.count; j += tile_keys<T>) {
    gather_panel<T>(D, rows, keys, j, panel);
    for (Index h = 0; h < heads; h += head_rows)
      cpu::tile<head_rows, key_vectors, T>(
          D, {x[h], x.stride, 1}, {panel, tile_keys<T>}, [](int, int) HYBRIDATTN_INLINE_LAMBDA { return cpu::Vec<T>{}; },
          [&](int r, int v, cpu::Vec<T> sum) HYBRIDATTN_INLINE_LAMBDA { cpu::store(products[h + r] + j + v * cpu::lanes<T>, sum); });
  }
  attention::keep_moderate<T>(D, x, heads, rows, keys, products);
}

// deltas[h] = d_o[h] . o[h] for all heads, summed in the order of a tile: where one key has weight 1, d_o . v - delta is then exactly 0.
// Writes numbers for whole tiles of heads. panels is scratch for two panels.
template <class T, class Dim>
void deltas_by_tiles(Dim D, Rows<T const> o, Rows<T const> d_o, Index heads, T* panels, T* deltas) {
  T* const other = panels + panel_room<T>(D);
  for (Index h = 0; h < heads; h += tile_keys<T>) {
    gather_panel<T>(D, o, attention::AllRows{heads}, h, panels);
    gather_panel<T>(D, d_o, attention::AllRows{heads}, h, other);
    for (Index i = 0; i < tile_keys<T>; i += cpu::lanes<T>) {
      cpu::Vec<T> sum{};
      for (Index d = 0; d < D; ++d) sum += cpu::load(panels + d * tile_keys<T> + i) * cpu::load(other + d * tile_keys<T> + i);
      cpu::store(deltas + h + i, sum);
    }
  }
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::dsa
#endif
