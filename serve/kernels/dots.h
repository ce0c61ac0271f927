// The one integer product that everything uses: rows of bytes times packed blocks.
//
// A block is [depth / 4][16 outputs][4]: the layout of packed weights, of the cache's keys (16 positions by the head's
// dimensions) and of its values (16 dimensions by positions). One of the two sides is unsigned, the other signed.
#pragma once
#include <algorithm>

#include "kernels.h"
#include "simd.h"
#if defined(PAWL_AMX)
#include "tiles.h"
#endif

namespace pawl {
namespace PAWL_ISA {

// Registers hold kSums sums of rows by blocks, beside the blocks' bytes and one broadcast.
#if defined(__AVX512F__)
constexpr int kSums = 24;
#else
constexpr int kSums = 4;
#endif
constexpr int kPrefetch = 1024;  // bytes ahead, where a single row streams through the blocks

enum Sign { kUnsignedRows, kSignedRows };

// out[r * out_stride + 16 b + n] = (or +=, if `accumulate`) the sum over k < depth of the k-th byte of row r times that
// of output n in block b.
struct Product {
  const uint8_t* rows;
  int stride, count;
  int depth;
  int32_t* out;
  int out_stride;
  bool accumulate;
};

template <Sign SIGN, int ROWS, int BLOCKS>
INLINE void dots_in_registers(const Product& p, int row, const uint8_t* const* blocks, int at) {
  const uint8_t* rows = p.rows + (size_t)row * p.stride;
  int32_t* out = p.out + (size_t)row * p.out_stride + at * kLanes;
  I sum[ROWS][BLOCKS];
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
    for (int b = 0; b < BLOCKS; b++) sum[r][b] = p.accumulate ? load(out + r * p.out_stride + b * kLanes) : set(0);
  for (int k = 0; k < p.depth; k += 4) {
    I packed[BLOCKS];
#pragma GCC unroll 4
    for (int b = 0; b < BLOCKS; b++) {
      packed[b] = load_bytes(blocks[at + b] + k * kLanes);
      if (ROWS == 1) _mm_prefetch((const char*)blocks[at + b] + k * kLanes + kPrefetch, _MM_HINT_T0);
    }
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; r++) {
      I four = set4(rows + r * p.stride + k);
#pragma GCC unroll 4
      for (int b = 0; b < BLOCKS; b++)
        sum[r][b] = SIGN == kUnsignedRows ? dot4(sum[r][b], four, packed[b]) : dot4(sum[r][b], packed[b], four);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
    for (int b = 0; b < BLOCKS; b++) store(out + r * p.out_stride + b * kLanes, sum[r][b]);
}

template <Sign SIGN, int BLOCKS, int ROWS>
INLINE void dots_of_rows(const Product& p, int row, int rows, const uint8_t* const* blocks, int at) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS) return dots_in_registers<SIGN, ROWS, BLOCKS>(p, row, blocks, at);
    dots_of_rows<SIGN, BLOCKS, ROWS - 1>(p, row, rows, blocks, at);
  }
}

template <Sign SIGN, int BLOCKS> void dots_of_panel(const Product& p, const uint8_t* const* blocks, int at) {
  constexpr int most = std::min(kSums / BLOCKS, 12);
  int groups = (p.count + most - 1) / most;  // of nearly equal size: a small rest would leave the units idle
  for (int g = 0; g < groups; g++) {
    int row = p.count * g / groups;
    dots_of_rows<SIGN, BLOCKS, most>(p, row, p.count * (g + 1) / groups - row, blocks, at);
  }
}

// Blocks at a time. Rows that fit the registers at once read the blocks from memory and compute in the same pass.
INLINE int panel_width(int count) {
#if defined(__AVX512F__)
  return count > kSums / 4 && count <= kSums / 3 ? 3 : 4;
#else
  return count > kSums / 2 && count <= kSums ? 1 : 2;
#endif
}

#if defined(PAWL_AMX)
// One or two blocks, 32 rows at a time: sums in tiles 0 to 3, rows in 4 and 5, blocks in 6 and 7. Reads whole groups of
// 16 rows: the memory must be there.
template <Sign SIGN> void dots_in_tiles(const Product& p, const uint8_t* const* blocks, int at, int width) {
#define TILE_DOT(c, a, b) do { if (SIGN == kUnsignedRows) TILE_DOT_US(c, a, b); else TILE_DOT_SU(c, a, b); } while (0)
  alignas(64) int32_t sums[16 * kLanes];
  auto put = [&](int row, int b) {  // a tile's sums to where they belong; only of rows that exist
    for (int r = 0; r < std::min(16, p.count - row); r++) {
      int32_t* out = p.out + (size_t)(row + r) * p.out_stride + (at + b) * kLanes;
      I sum = load(sums + r * kLanes);
      store(out, p.accumulate ? add(load(out), sum) : sum);
    }
  };
  const uint8_t *first = blocks[at], *second = blocks[at + width - 1];
  const bool pair = width > 1;
  for (int row = 0; row < p.count; row += 32) {
    const uint8_t *low = p.rows + (size_t)row * p.stride, *high = low + (size_t)16 * p.stride;
    const bool both = row + 16 < p.count;
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
    for (int k = 0; k < p.depth; k += kDepth) {
      TILE_LOAD(4, low + k, p.stride);
      TILE_LOAD(6, first + k * kLanes, 64);
      TILE_DOT(0, 4, 6);
      if (both) {
        TILE_LOAD(5, high + k, p.stride);
        TILE_DOT(2, 5, 6);
      }
      if (pair) {
        TILE_LOAD(7, second + k * kLanes, 64);
        TILE_DOT(1, 4, 7);
        if (both) TILE_DOT(3, 5, 7);
      }
    }
#define TILE_PUT(t, row, b) do { TILE_STORE(t, sums, 64); put(row, b); } while (0)
    TILE_PUT(0, row, 0);
    if (pair) TILE_PUT(1, row, 1);
    if (both) TILE_PUT(2, row + 16, 0);
    if (both && pair) TILE_PUT(3, row + 16, 1);
  }
}
#else
struct TileScope {
  TileScope() {}  // so that a variable of it counts as used
};
#endif

constexpr int kRowPadding = 32;  // rows that must be readable behind the last one

// The product with `num_blocks` blocks. With AMX the caller holds a TileScope.
template <Sign SIGN> void dots(const Product& p, const uint8_t* const* blocks, int num_blocks) {
#if defined(PAWL_AMX)
  if (p.count > 1) {
    for (int at = 0; at < num_blocks; at += 2) dots_in_tiles<SIGN>(p, blocks, at, std::min(2, num_blocks - at));
    return;
  }
#endif
  for (int at = 0, width; at < num_blocks; at += width) {
    width = std::min(panel_width(p.count), num_blocks - at);
    switch (width) {
      case 1: dots_of_panel<SIGN, 1>(p, blocks, at); break;
      case 2: dots_of_panel<SIGN, 2>(p, blocks, at); break;
#if defined(__AVX512F__)
      case 3: dots_of_panel<SIGN, 3>(p, blocks, at); break;
      case 4: dots_of_panel<SIGN, 4>(p, blocks, at); break;
#endif
    }
  }
}

}  // namespace PAWL_ISA
}  // namespace pawl
