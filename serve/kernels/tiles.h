// AMX tiles: eight of 16 rows by 64 bytes, always whole. Without AMX, with PAWL_EMULATE_TILES, the same in plain C++,
// so that the code above them is tested on any machine.
#pragma once
#include <cstdint>

#if defined(PAWL_EMULATE_TILES)

#include <cstring>

namespace pawl {
namespace PAWL_ISA {

struct Tiles {
  alignas(64) uint8_t bytes[8][1024];
  template <class A, class B> __attribute__((no_sanitize("address", "undefined"))) void dot(int c, int a, int b) {
    for (int m = 0; m < 16; m++) {
      int32_t* sum = (int32_t*)bytes[c] + m * 16;
      const A* row = (const A*)bytes[a] + m * 64;
      const B* column = (const B*)bytes[b];
      for (int k = 0; k < 64; k += 4, column += 64)
        for (int n = 0; n < 16; n++)
          for (int i = 0; i < 4; i++) sum[n] += row[k + i] * column[n * 4 + i];
    }
  }
};
static thread_local Tiles tiles;

struct TileScope {
  TileScope() {}
};
#define TILE_ZERO(t) memset(tiles.bytes[t], 0, 1024)
#define TILE_LOAD(t, p, stride) \
  for (int row_ = 0; row_ < 16; row_++) memcpy(tiles.bytes[t] + row_ * 64, (const char*)(p) + row_ * (long)(stride), 64)
#define TILE_STORE(t, p, stride) \
  for (int row_ = 0; row_ < 16; row_++) memcpy((char*)(p) + row_ * (long)(stride), tiles.bytes[t] + row_ * 64, 64)
#define TILE_DOT_US(c, a, b) tiles.dot<uint8_t, int8_t>(c, a, b)
#define TILE_DOT_SU(c, a, b) tiles.dot<int8_t, uint8_t>(c, a, b)

}  // namespace PAWL_ISA
}  // namespace pawl

#else

#include <immintrin.h>

namespace pawl {
namespace PAWL_ISA {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The configuration belongs to the thread: loaded for a task, released after it, since ONNX Runtime's own products use
// tiles of other shapes in the same threads. gcc's tile intrinsics do not tell it that they touch memory.
struct TileScope {
  TileScope() {
    static const TileConfig config;
    asm volatile("" ::"r"(&config) : "memory");
    _tile_loadconfig(&config);
  }
  ~TileScope() { _tile_release(); }
};
#define TILE_FENCE asm volatile("" ::: "memory")
#define TILE_ZERO(t) _tile_zero(t)
#define TILE_LOAD(t, p, stride) do { TILE_FENCE; _tile_loadd(t, p, stride); } while (0)
#define TILE_STORE(t, p, stride) do { _tile_stored(t, p, stride); TILE_FENCE; } while (0)
#define TILE_DOT_US(c, a, b) _tile_dpbusd(c, a, b)
#define TILE_DOT_SU(c, a, b) _tile_dpbsud(c, a, b)

}  // namespace PAWL_ISA
}  // namespace pawl

#endif
