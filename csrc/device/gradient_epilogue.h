// The epilogue of the gradients: sums, each row times a factor, rounded once, and stored by rows.
#pragma once

#include <cstdint>

#include "../ptx/ptx.h"
#include "conv_epilogue.h"
#include "main_loop.h"
#include "vector.h"

namespace resnet_fused {

// Puts the tile together in shared memory that nobody uses any more. factor(row): of the tile.
template <class T, class Stages, class Shape, class FactorOf>
RF_DEVICE void put_rows(const OutputTile<T, Stages>& tile, const Sums<Shape>& sums,
                        const Place<Shape>& place, const FactorOf& factor_of) {
#pragma unroll
  for (int i = 0; i < 2 * Shape::kBlocksM; ++i) {
    const uint32_t row = place.row + place.lane / 4 + i * 8;
    const float factor = factor_of(row);
#pragma unroll
    for (int j = 0; j < 2 * Shape::kBlocksN; ++j) {
      const uint32_t column = place.column + j * 8 + place.lane % 4 * 2;
      const float first = sums.value[i / 2][j][i % 2 * 2] * factor;
      const float second = sums.value[i / 2][j][i % 2 * 2 + 1] * factor;
      ptx::store_shared(tile.element_at(row, column), Pair<T>{narrow<T>(first), narrow<T>(second)});
    }
  }
}

// Stores a tile that is complete. address_of(row, column): of an element, null where there is none.
// wide: 16 bytes at a time; else element by element, and with `rows_together` neighbouring threads
// take neighbouring rows.
template <class T, class Shape, class AddressOf>
RF_DEVICE void store_rows(const OutputTile<T, Shape>& tile, bool wide, bool rows_together,
                          uint32_t thread, const AddressOf& address_of) {
  constexpr uint32_t kChunks = OutputTile<T, Shape>::kChunks;
  if (wide) {
#pragma unroll 2
    for (uint32_t i = thread; i < Shape::kM * kChunks; i += Shape::kThreads) {
      const uint32_t row = i / kChunks;
      const uint32_t chunk = i % kChunks;
      T* to = address_of(row, chunk * kVectorLength<T>);
      if (to == nullptr) continue;
      ptx::store_global(reinterpret_cast<Vector<T>*>(to),
                        ptx::load_shared<Vector<T>>(tile.chunk_at(row, chunk)));
    }
  } else {
#pragma unroll 1
    for (uint32_t i = thread; i < Shape::kM * Shape::kN; i += Shape::kThreads) {
      const uint32_t row = rows_together ? i % Shape::kM : i / Shape::kN;
      const uint32_t column = rows_together ? i / Shape::kM : i % Shape::kN;
      T* to = address_of(row, column);
      if (to == nullptr) continue;
      ptx::store_global(to, ptx::load_shared<T>(tile.element_at(row, column)));
    }
  }
}

}  // namespace resnet_fused
