// Where a block of a scan over tokens works.
#ifndef HYBRIDATTN_ATTENTION_GDN_KERNEL_PLACE_HPP
#define HYBRIDATTN_ATTENTION_GDN_KERNEL_PLACE_HPP

#include <hybridattn/attention/gdn/types.hpp>
#include <hybridattn/backend/gpu/gpu.hpp>
#include <hybridattn/tensor/sequences_on.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI::gdn {

// What a block has: columns from `column` on of the state of a value head.
struct Place {
  Sequence sequence;
  Index number, tile, head, column;

  HYBRIDATTN_DEVICE Place(View<Sequence const, 1> sequences, Index tiles, int columns)
      : sequence(sequences(simt::block_x() / tiles)), number(simt::block_x() / tiles), tile(simt::block_x() % tiles), head(simt::block_y()),
        column(tile * columns) {}
  // How many tokens the piece from token t on has.
  HYBRIDATTN_DEVICE int count(Index t, int tokens) const { return static_cast<int>(simt::smaller<Index>(sequence.length - t, tokens)); }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::gdn
#endif
