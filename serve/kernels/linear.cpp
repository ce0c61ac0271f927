// Matrix products with packed 8- and 4-bit weights, and what is fused around them: norm and quantization of each row
// before; bias, activation and residual after. And the norm of products that are added to the residual by themselves.
#include <algorithm>
#include <cmath>

#include "dots.h"

namespace pawl {
namespace PAWL_ISA {
namespace {

constexpr float kLevels = 127.f;              // of a symmetric 8-bit activation
constexpr float kTiny = 1e-30f;               // instead of a row's largest magnitude when the row is zero
constexpr int kShared = 8;                    // from this many rows on they are quantized once, before the product
constexpr int kSlabBytes = 384 << 10;         // quantized rows that a task goes over for each panel: they stay in L2

// ---- rows: norm and quantization

// The normed row into `v` [depth], zeros behind; returns the factor that was left out.
float norm_row(const Linear& l, const float* x, float* v) {
  int K = l.inputs;
  F mean = set(0.f), square = set(0.f);
  if (l.norm == kLayerNorm) {
    for (int k = 0; k < K; k += kLanes) mean = add(mean, load_upto(x + k, K - k));
    mean = set(reduce_add(mean) / K);
  }
  for (int k = 0; k < K; k += kLanes) {
    F u = load_upto(x + k, K - k);
    if (l.norm == kLayerNorm) u = sub(u, mean);
    if (l.norm && K - k < kLanes) u = first(K - k, u, set(0.f));
    square = fma(u, u, square);
    store(v + k, l.norm ? mul(u, load_upto(l.norm_weight + k, K - k)) : u);
  }
  for (int k = round_up(K, kLanes); k < l.depth(); k += kLanes) store(v + k, set(0.f));
  float factor = l.norm ? 1 / std::sqrt(reduce_add(square) / K + l.epsilon) : 1;
  if (!l.norm_bias) return factor;
  for (int k = 0; k < K; k += kLanes) store(v + k, fma(load(v + k), set(factor), load_upto(l.norm_bias + k, K - k)));
  return 1;
}

// A row as the products read it.
//   8 bits: depth() unsigned bytes, level + 128.
//   4 bits: depth() signed levels, even ones of each eight before the odd ones; then each group's sum, int32.
struct Rows {
  uint8_t* levels;
  float* scale;  // [rows]
  int stride;    // bytes from one row to the next

  static int bytes(const Linear& l) {
    return l.bits == 8 ? l.depth() : l.depth() + round_up(l.depth() / l.group * (int)sizeof(int32_t), kDepth);
  }
};

void quantize_row(const Linear& l, const float* x, const Rows& rows, int m) {
  int depth = l.depth();
  float* v = (float*)scratch(kValueScratch, depth * sizeof(float));
  float factor = norm_row(l, x, v);
  if (l.rotate)
    for (int k = 0; k < depth; k += kDepth) rotate64(v + k);
  F largest = set(0.f);
  for (int k = 0; k < depth; k += kLanes) largest = max(largest, abs(load(v + k)));
  float top = std::max(reduce_max(largest), kTiny);
  rows.scale[m] = top / kLevels * factor;
  F inverse = set(kLevels / top);
  uint8_t* q = rows.levels + (size_t)m * rows.stride;
  if (l.bits == 8) {
    for (int k = 0; k < depth; k += kLanes) store_bytes(q + k, add(to_int(mul(load(v + k), inverse)), set(128)));
    return;
  }
  int32_t* sums = (int32_t*)(q + depth);
  for (int k = 0; k < depth; k += kLanes) {
    alignas(16) int8_t level[kLanes];
    store_bytes(level, to_int(mul(load(v + k), inverse)));
    int32_t sum = 0;
    for (int i = 0; i < kLanes; i++) {
      q[k + i / 8 * 8 + i % 2 * 4 + i % 8 / 2] = level[i];
      sum += level[i];
    }
    if (k % l.group == 0) sums[k / l.group] = 0;
    sums[k / l.group] += sum;
  }
}

// ---- products with 4-bit weights: floats [rows, kWidth, 16] that only the scales of row and output still multiply

constexpr int kLeastStep = 16; // of a group, in scales of its output
constexpr int kWidth = 4;   // blocks at a time
constexpr int kHeight = 24; // rows at a time: their sums stay in the first cache

template <int ROWS, int BLOCKS>
INLINE void dot4bit(const Linear& l, const uint8_t* q, int stride, const int* block, float* values) {
  int depth = l.depth(), groups = depth / l.group;
  F total[ROWS][BLOCKS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
    for (int b = 0; b < BLOCKS; b++) total[r][b] = set(0.f);
  I nibble = set(0x0f0f0f0f);
  for (int g = 0; g < groups; g++) {
    I sum[ROWS][BLOCKS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
      for (int b = 0; b < BLOCKS; b++) sum[r][b] = set(0);
    for (int k = g * l.group; k < (g + 1) * l.group; k += 8) {
      I even[BLOCKS], odd[BLOCKS];
#pragma GCC unroll 4
      for (int b = 0; b < BLOCKS; b++) {
        const uint8_t* p = l.weight + ((size_t)block[b] * depth + k) * (kBlock / 2);
        I both = load_bytes(p);
        if (ROWS == 1) _mm_prefetch((const char*)p + kPrefetch, _MM_HINT_T0);
        even[b] = mask(both, nibble), odd[b] = mask(shift_right<4>(both), nibble);
      }
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++) {
        I first = set4(q + r * stride + k), second = set4(q + r * stride + k + 4);
#pragma GCC unroll 4
        for (int b = 0; b < BLOCKS; b++) sum[r][b] = dot4(dot4(sum[r][b], even[b], first), odd[b], second);
      }
    }
#pragma GCC unroll 4
    for (int b = 0; b < BLOCKS; b++) {
      I grid = widen(l.grid + ((size_t)block[b] * groups + g) * kBlock);
      F step = to_float(add(shift_right<4>(grid), set(kLeastStep))), zero = to_float(mask(grid, set(15)));
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++) {
        F of_group = set((float)((const int32_t*)(q + r * stride + depth))[g]);
        total[r][b] = fma(step, fnma(zero, of_group, to_float(sum[r][b])), total[r][b]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
    for (int b = 0; b < BLOCKS; b++) store(values + (r * kWidth + b) * kLanes, total[r][b]);
}

// Sums beside totals: fewer rows and blocks at a time than with 8 bits.
void dots_of_nibbles(const Linear& l, const uint8_t* q, int stride, int rows, const int* block, int width, float* out) {
  for (int b = 0; b < width; b += 2)
    for (int r = 0; r < rows;) {
      const uint8_t* row = q + (size_t)r * stride;
      float* to = out + (r * kWidth + b) * kLanes;
#if defined(__AVX512F__)
      if (r + 2 <= rows && b + 2 <= width) {
        dot4bit<2, 2>(l, row, stride, block + b, to);
        r += 2;
        continue;
      }
#endif
      if (b + 2 <= width)
        dot4bit<1, 2>(l, row, stride, block + b, to);
      else
        dot4bit<1, 1>(l, row, stride, block + b, to);
      r++;
    }
}

// ---- after the product

// One block of one row as real values.
INLINE F value(const Linear& l, const int32_t* out, float scale, int block) {
  F of_output = mul(set(scale), load(l.scale + block * kBlock));
  if (l.bits == 4) return mul(load((const float*)out), of_output);
  I shift = shift_left<7>(load(l.sums + block * kBlock));  // what level + 128 added
  return mul(to_float(sub(load(out), shift)), of_output);
}

INLINE F biased(const Linear& l, F v, int output, int count) {  // `count` of the lanes are outputs
  return l.bias ? add(v, load_upto(l.bias + output, count)) : v;
}

INLINE F gelu(F x) {  // x times the normal distribution, by tanh: 1 + tanh(z) = 2 sigmoid(2 z)
  F z = mul(x, fma(mul(x, x), set(0.044715f), set(1.f)));
  return mul(x, sigmoid(mul(z, set(1.59576912f))));
}

struct Call {
  const Linear& l;
  const float *x, *residual;
  float* y;
  int rows;
};

// Outputs of `block` for one row, from its product `out`; `up` is that of a gated MLP's other part.
INLINE void finish(const Call& c, const int32_t* out, const int32_t* up, float scale, int block, int row) {
  const Linear& l = c.l;
  int output = block * kBlock, count = l.outputs - output;
  F v = biased(l, value(l, out, scale, block), output, count);
  if (l.activation == kSwiGlu)
    v = mul(v, sigmoid(v));
  else if (l.activation != kNoActivation)
    v = gelu(v);
  if (l.parts() == 2) v = mul(v, biased(l, value(l, up, scale, block + l.blocks()), l.outputs + output, count));
  size_t at = (size_t)row * l.outputs + output;
  if (c.residual) v = add(v, load_upto(c.residual + at, count));
  store_upto(c.y + at, v, count);
}

// Rows m0 to m1 of the output blocks b0 to b1.
void compute(const Call& c, const Rows& rows, int m0, int m1, int b0, int b1) {
  const Linear& l = c.l;
  alignas(64) int32_t out[kHeight * kWidth * kLanes];  // or floats, with 4-bit weights
  TileScope scope;
  const int parts = l.parts(), stride = rows.stride;
  const int steps = (m1 - m0 + kHeight - 1) / kHeight, tall = (m1 - m0 + steps - 1) / steps;  // rows at a time
  const int widest = l.bits == 8 ? std::max(panel_width(tall), parts) : kWidth;
  for (int b = b0, width; b < b1; b += width) {
    width = std::min(widest / parts, b1 - b);
    int block[kWidth];
    const uint8_t* packed[kWidth];
    for (int i = 0; i < width * parts; i++) {
      block[i] = b + i % width + i / width * l.blocks();
      packed[i] = l.weight + (size_t)block[i] * l.depth() * kBlock;
    }
    for (int m = m0; m < m1; m += tall) {
      int height = std::min(tall, m1 - m);
      const uint8_t* q = rows.levels + (size_t)m * stride;
      if (l.bits == 8)
        dots<kUnsignedRows>({q, stride, height, l.depth(), out, kWidth * kLanes, false}, packed, width * parts);
      else
        dots_of_nibbles(l, q, stride, height, block, width * parts, (float*)out);
      for (int r = 0; r < height; r++)
        for (int i = 0; i < width; i++) {
          const int32_t* at = out + (r * kWidth + i) * kLanes;
          finish(c, at, at + width * kLanes, rows.scale[m + r], block[i], m + r);
        }
    }
  }
}

}  // namespace

void linear(const Linear& l, const float* x, const float* residual, float* y, int rows, const Pool& pool) {
  if (!rows) return;
  Call call{l, x, residual, y, rows};
  int stride = Rows::bytes(l), blocks = l.blocks();
  size_t levels = (size_t)(rows + kRowPadding) * stride;
  size_t tasks = std::min(blocks, (rows == 1 ? 2 : 4) * processors());
  if (rows < kShared)  // each task quantizes the rows for itself: cheaper than waiting for another
    return parallel(pool, tasks, [&](size_t t) {
      uint8_t* memory = scratch(kRowScratch, levels + rows * sizeof(float));
      Rows own{memory, (float*)(memory + levels), stride};
      for (int m = 0; m < rows; m++) quantize_row(l, x + (size_t)m * l.inputs, own, m);
      compute(call, own, 0, rows, blocks * t / tasks, blocks * (t + 1) / tasks);
    });
  uint8_t* memory = scratch(kRowScratch, levels + rows * sizeof(float));
  Rows shared{memory, (float*)(memory + levels), stride};
  int chunk = std::max(4, rows / (4 * processors()));
  parallel(pool, (rows + chunk - 1) / chunk, [&](size_t t) {
    for (int m = t * chunk; m < std::min<int>(rows, (t + 1) * chunk); m++)
      quantize_row(l, x + (size_t)m * l.inputs, shared, m);
  });
  int fitting = std::max(kHeight, kSlabBytes / stride), slabs = (rows + fitting - 1) / fitting;
  int slab = round_up((rows + slabs - 1) / slabs, kHeight);
  slabs = (rows + slab - 1) / slab;
  parallel(pool, tasks * slabs, [&](size_t t) {
    int m = t / tasks * slab, i = t % tasks;
    compute(call, shared, m, std::min(rows, m + slab), blocks * i / tasks, blocks * (i + 1) / tasks);
  });
}

void add_normed(const RmsNorm& norm, const float* x, const float* residual, float* y, int rows, const Pool& pool) {
  constexpr int chunk = 16;
  parallel(pool, (rows + chunk - 1) / chunk, [&](size_t task) {
    for (size_t m = task * chunk; m < std::min<size_t>(rows, (task + 1) * chunk); m++) {
      const float *row = x + m * norm.size, *to = residual + m * norm.size;
      F square = set(0.f);
      for (int k = 0; k < norm.size; k += kLanes) {
        F u = load_upto(row + k, norm.size - k);
        square = fma(u, u, square);
      }
      F factor = set(1 / std::sqrt(reduce_add(square) / norm.size + norm.epsilon));
      for (int k = 0; k < norm.size; k += kLanes) {
        int count = norm.size - k;
        F normed = mul(load_upto(row + k, count), factor);
        F sum = fma(normed, load_upto(norm.weight + k, count), load_upto(to + k, count));
        store_upto(y + m * norm.size + k, sum, count);
      }
    }
  });
}

}  // namespace PAWL_ISA
}  // namespace pawl
