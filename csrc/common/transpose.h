// Transposition of small blocks in cache: pixels x channels <-> channels x pixels.
#pragma once

#include <cstdint>

namespace glance {

// to[column * to_pitch + row] = from[row * from_pitch + column] for rows x columns elements.
void transpose(const float* from, int64_t from_pitch, int64_t rows, int64_t columns, float* to,
               int64_t to_pitch);

template <typename T>
void transpose(const T* from, int64_t from_pitch, int64_t rows, int64_t columns, T* to,
               int64_t to_pitch) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      to[column * to_pitch + row] = from[row * from_pitch + column];
    }
  }
}

}  // namespace glance
