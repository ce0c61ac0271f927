// Grouped-query attention over a paged int8 cache: norm and rotation of queries and keys, the cache's write, scores,
// softmax, and the weighted sum of values.
//
// Queries and probabilities are 16-bit numbers in two planes of bytes, keys and values are bytes with a scale per
// position, so both products are exact integers. Keys are taken kStep at a time from the start of the context; each
// step's result is merged into the row's running softmax (arXiv:2205.14135) in that order. A row's bits therefore
// depend on its own context alone.
#include <algorithm>
#include <cmath>

#include "dots.h"

namespace pawl {
namespace PAWL_ISA {
namespace {

constexpr int kTile = 16;             // (token, head) rows of one KV head that are computed together
constexpr int kStep = 256;            // keys: 256 * 65535 * 127 still fits int32
constexpr int kMostHead = 256;        // head size
constexpr float kByteLevels = 127.f;
constexpr float kQueryLevels = 32512.f;  // 127 * 256: the high plane fits a signed byte
constexpr float kWeightLevels = 65535.f;
constexpr float kTiny = 1e-20f;       // least scale of a position
constexpr float kNever = -1e30f;      // a running maximum before any key

struct Job {
  const Attention& a;
  const float* qkv;
  const Batch& batch;
  float* y;

  int width() const { return (a.heads + 2 * a.kv_heads) * a.head_size; }  // of a token's row in qkv
  uint8_t* block(int segment, int index, int head) const {
    size_t number = batch.tables[segment * batch.width + index];
    return batch.cache + ((number * batch.layers + a.layer) * a.kv_heads + head) * a.block_bytes();
  }
};

// ---- one head of one token: [head_size] in `x`, zeros behind up to a multiple of 64

void take(const Job& j, const float* from, float* x) {
  memcpy(x, from, j.a.head_size * sizeof(float));
  memset(x + j.a.head_size, 0, (j.a.key_size() - j.a.head_size) * sizeof(float));
}

// The rotary embedding.
void turn(const Attention& a, int position, float* x) {
  int half = a.rotary / 2, step = a.interleaved ? 2 : 1;
  const float *cosine = a.cos + (size_t)position * half, *sine = a.sin + (size_t)position * half;
  alignas(64) float u[kMostHead / 2], v[kMostHead / 2];  // what rotates, apart
  for (int i = 0; i < half; i++) u[i] = x[i * step], v[i] = x[a.interleaved ? 2 * i + 1 : half + i];
  for (int i = 0; i < half; i += kLanes) {
    F c = load_upto(cosine + i, half - i), s = load_upto(sine + i, half - i), p = load(u + i), q = load(v + i);
    store(u + i, fnma(q, s, mul(p, c)));
    store(v + i, fma(p, s, mul(q, c)));
  }
  for (int i = 0; i < half; i++) x[i * step] = u[i], x[a.interleaved ? 2 * i + 1 : half + i] = v[i];
}

// A query or a key. The Hadamard rotation behind the rotary embedding spreads the few large dimensions that keys have
// over 64, so that 8 bits hold them better (arXiv:2404.00456).
void prepare(const Attention& a, const float* weight, int position, float* x) {
  if (weight) {
    F square = set(0.f);
    for (int i = 0; i < a.head_size; i += kLanes) square = fma(load(x + i), load(x + i), square);
    float factor = 1 / std::sqrt(reduce_add(square) / a.head_size + a.epsilon);
    for (int i = 0; i < a.head_size; i++) x[i] *= factor * weight[i];
  }
  if (a.rotary) turn(a, position, x);
  for (int i = 0; i < a.key_size(); i += kDepth) rotate64(x + i);  // of queries and keys alike: scores stay the same
}

float largest(const float* x, int size) {
  F top = set(kTiny);
  for (int i = 0; i < size; i += kLanes) top = max(top, abs(load(x + i)));
  return reduce_max(top);
}

void put_key(const Job& j, int token, int position, int head, uint8_t* block) {
  const Attention& a = j.a;
  alignas(64) float x[kMostHead];
  alignas(64) uint8_t level[kMostHead];
  take(j, j.qkv + (size_t)token * j.width() + (size_t)(a.heads + head) * a.head_size, x);
  prepare(a, a.k_norm, position, x);
  int size = a.key_size(), t = position % kTokens;
  float top = largest(x, size);
  for (int i = 0; i < size; i += kLanes) store_bytes(level + i, add(to_int(mul(load(x + i), set(kByteLevels / top))), set(128)));
  uint8_t* keys = block + (size_t)t / kBlock * size * kBlock + t % kBlock * 4;
  for (int i = 0; i < size; i += 4) memcpy(keys + i * kBlock, level + i, 4);
  ((float*)(block + (size_t)kTokens * (size + a.value_size())))[t] = top / kByteLevels;
}

void put_value(const Job& j, int token, int position, int head, uint8_t* block) {
  const Attention& a = j.a;
  alignas(64) float x[kMostHead];
  alignas(64) uint8_t level[kMostHead];
  take(j, j.qkv + (size_t)token * j.width() + (size_t)(a.heads + a.kv_heads + head) * a.head_size, x);
  int size = a.value_size(), t = position % kTokens;
  float top = largest(x, size);
  for (int i = 0; i < size; i += kLanes) store_bytes(level + i, to_int(mul(load(x + i), set(kByteLevels / top))));
  uint8_t* values = block + (size_t)kTokens * a.key_size() + t / 4 * kDepth + t % 4;
  for (int i = 0; i < size; i++) values[i / kBlock * kTokens * kBlock + i % kBlock * 4] = level[i];
  ((float*)(block + (size_t)kTokens * (a.key_size() + size)))[kTokens + t] = top / kByteLevels;
}

void put(const Job& j, int segment, int index, int head) {
  int position = j.batch.past(segment) + index, token = j.batch.start(segment) + index;
  uint8_t* block = j.block(segment, position / kTokens, head);
  put_key(j, token, position, head, block);
  put_value(j, token, position, head, block);
}

// ---- a tile of rows

struct Query {
  float scale;    // of a score, in powers of two
  int32_t shift;  // what the keys' + 128 added to a score
  int position;
};

// Into two planes of signed bytes.
Query quantize_query(const Attention& a, const float* x, int position, int8_t* high, int8_t* low) {
  float top = largest(x, a.key_size());
  I total = set(0);
  for (int i = 0; i < a.key_size(); i += kLanes) {
    I q = to_int(mul(load(x + i), set(kQueryLevels / top)));
    I l = shift_right<24>(shift_left<24>(q));
    store_bytes(low + i, l);
    store_bytes(high + i, shift_right<8>(sub(q, l)));
    total = add(total, q);
  }
  alignas(64) int32_t part[kLanes];
  store(part, total);
  int32_t sum = 0;
  for (int32_t p : part) sum += p;
  return {top / kQueryLevels * a.scale * kLog2E, 128 * sum, position};
}

// A step's part of one row's softmax. The weights go into two planes of unsigned bytes, each times its value's scale.
struct Part {
  float max = kNever, sum = 0;
  float scale = 0;  // of the weights
};

// `low`, `high`: scores of the step's keys in two planes. `visible` keys from `from` on are seen, of `count` present.
Part soften(const Job& j, const Query& query, const int32_t* high, const int32_t* low, const uint8_t* const* blocks,
            int from, int visible, int count, uint8_t* weight_high, uint8_t* weight_low) {
  const size_t scales = (size_t)kTokens * (j.a.key_size() + j.a.value_size());
  Part part;
  if (from >= visible) {
    memset(weight_high, 0, count), memset(weight_low, 0, count);
    return part;
  }
  F x[kStep / kLanes], value_scale[kStep / kLanes];
  F top = set(kNever), largest_scale = set(kTiny);
  int begin = from / kLanes, end = (visible + kLanes - 1) / kLanes;
  for (int c = begin; c < end; c++) {
    const float* scale = (const float*)(blocks[c * kLanes / kTokens] + scales) + c * kLanes % kTokens;
    I score = sub(add(shift_left<8>(load(high + c * kLanes)), load(low + c * kLanes)), set(query.shift));
    x[c] = mul(to_float(score), mul(set(query.scale), load(scale)));
    value_scale[c] = load(scale + kTokens);
    if (visible < (c + 1) * kLanes) {  // what lies behind may be anything
      x[c] = first(visible - c * kLanes, x[c], set(kNever));
      value_scale[c] = first(visible - c * kLanes, value_scale[c], set(0.f));
    }
    if (from > c * kLanes) {
      x[c] = first(from - c * kLanes, set(kNever), x[c]);
      value_scale[c] = first(from - c * kLanes, set(0.f), value_scale[c]);
    }
    top = max(top, x[c]);
    largest_scale = max(largest_scale, value_scale[c]);
  }
  part.max = reduce_max(top);
  part.scale = reduce_max(largest_scale);
  F sum = set(0.f), factor = set(kWeightLevels / part.scale);
  top = set(part.max);
  for (int c = begin; c < end; c++) {
    F e = exp2(sub(x[c], top));
    if (visible < (c + 1) * kLanes) e = first(visible - c * kLanes, e, set(0.f));
    if (from > c * kLanes) e = first(from - c * kLanes, set(0.f), e);
    sum = add(sum, e);
    I weight = to_int(mul(e, mul(factor, value_scale[c])));
    store_bytes(weight_low + c * kLanes, weight);
    store_bytes(weight_high + c * kLanes, shift_right<8>(weight));
  }
  part.sum = reduce_add(sum);
  part.scale /= kWeightLevels;
  memset(weight_high, 0, begin * kLanes), memset(weight_low, 0, begin * kLanes);
  memset(weight_high + end * kLanes, 0, count - end * kLanes), memset(weight_low + end * kLanes, 0, count - end * kLanes);
  return part;
}

template <_mm_hint LEVEL> INLINE void fetch(const uint8_t* p, size_t bytes) {
  for (size_t at = 0; at < bytes; at += 64) _mm_prefetch((const char*)p + at, LEVEL);
}

// Rows row0 to row0 + 15 of a segment's tokens x group, for one KV head.
void attend_tile(const Job& j, int segment, int row0, int head) {
  const Attention& a = j.a;
  const Batch& batch = j.batch;
  const int group = a.group(), key_size = a.key_size(), value_size = a.value_size(), past = batch.past(segment);
  const int rows = std::min(kTile, batch.tokens(segment) * group - row0);
  alignas(64) int8_t queries[2 * kTile + kRowPadding][kMostHead];  // high planes, then low ones; rows key_size apart
  alignas(64) int32_t scores[2 * kTile][kStep];
  alignas(64) uint8_t weights[2 * kTile + kRowPadding][kStep];
  alignas(64) int32_t sums[2 * kTile][kMostHead];
  alignas(64) float out[kTile][kMostHead], max_so_far[kTile], sum_so_far[kTile];
  Query query[kTile];
  int8_t* high_plane = queries[0];
  for (int r = 0; r < rows; r++) {
    int index = (row0 + r) / group, h = head * group + (row0 + r) % group;
    alignas(64) float x[kMostHead];
    take(j, j.qkv + (size_t)(batch.start(segment) + index) * j.width() + (size_t)h * a.head_size, x);
    prepare(a, a.q_norm, past + index, x);
    query[r] = quantize_query(a, x, past + index, high_plane + r * key_size, high_plane + (rows + r) * key_size);
    memset(out[r], 0, value_size * sizeof(float));
    max_so_far[r] = kNever, sum_so_far[r] = 0;
  }
  auto lowest = [&](int position) { return a.window ? std::max(0, position - a.window + 1) : 0; };
  const int last = query[rows - 1].position;
  TileScope scope;
  for (int k0 = lowest(query[0].position) / kStep * kStep; k0 <= last; k0 += kStep) {
    const int num_blocks = std::min(kStep / kTokens, (last - k0) / kTokens + 1);
    const uint8_t* blocks[kStep / kTokens];
    for (int i = 0; i < num_blocks; i++) {
      blocks[i] = j.block(segment, k0 / kTokens + i, head);
      const uint8_t* keys[kTokens / kBlock];
      for (int g = 0; g < kTokens / kBlock; g++) keys[g] = blocks[i] + g * key_size * kBlock;
      fetch<_MM_HINT_T0>(blocks[i] + kTokens * key_size, a.block_bytes() - kTokens * key_size);  // needed soon
      if (k0 + (i + 1) * kTokens <= last)
        fetch<_MM_HINT_T1>(j.block(segment, k0 / kTokens + i + 1, head), kTokens * key_size);
      dots<kSignedRows>({(const uint8_t*)high_plane, key_size, 2 * rows, key_size, scores[0] + i * kTokens, kStep, false},
                        keys, kTokens / kBlock);
    }
    Part part[kTile];
    for (int r = 0; r < rows; r++)
      part[r] = soften(j, query[r], scores[r], scores[rows + r], blocks, std::max(0, lowest(query[r].position) - k0),
                       std::min(kStep, query[r].position - k0 + 1), num_blocks * kTokens, weights[r], weights[rows + r]);
    for (int i = 0; i < num_blocks; i++) {
      const uint8_t* values[kMostHead / kBlock];
      for (int g = 0; g < value_size / kBlock; g++) values[g] = blocks[i] + kTokens * key_size + g * kTokens * kBlock;
      dots<kUnsignedRows>({weights[0] + i * kTokens, kStep, 2 * rows, kTokens, sums[0], kMostHead, i > 0}, values,
                          value_size / kBlock);
    }
    for (int r = 0; r < rows; r++) {
      float top = std::max(max_so_far[r], part[r].max);
      F before = exp2(set(max_so_far[r] - top)), now = exp2(set(part[r].max - top));
      F factor = mul(now, set(part[r].scale));
      for (int i = 0; i < value_size; i += kLanes) {
        F sum = to_float(add(shift_left<8>(load(sums[r] + i)), load(sums[rows + r] + i)));
        store(out[r] + i, fma(sum, factor, mul(load(out[r] + i), before)));
      }
      alignas(64) float total[kLanes];
      store(total, fma(set(part[r].sum), now, mul(set(sum_so_far[r]), before)));
      max_so_far[r] = top, sum_so_far[r] = total[0];
    }
  }
  for (int r = 0; r < rows; r++) {
    int index = (row0 + r) / group, h = head * group + (row0 + r) % group;
    float* y = j.y + ((size_t)(batch.start(segment) + index) * a.heads + h) * a.head_size;
    F factor = set(1 / sum_so_far[r]);
    for (int i = 0; i < value_size; i += kLanes) store(out[r] + i, mul(load(out[r] + i), factor));
    memcpy(y, out[r], a.head_size * sizeof(float));
  }
}

struct Tile {
  int segment, row, head;
};

}  // namespace

void attend(const Attention& a, const float* qkv, const Batch& batch, float* y, const Pool& pool) {
  Job job{a, qkv, batch, y};
  const int group = a.group();
  size_t num_tiles = 0, num_tokens = 0;
  bool decoding = group <= kTile;  // one token a segment: whoever attends writes the cache first
  for (int s = 0; s < batch.count; s++) {
    num_tiles += (size_t)(batch.tokens(s) * group + kTile - 1) / kTile * a.kv_heads;
    num_tokens += batch.tokens(s);
    decoding &= batch.tokens(s) == 1;
  }
  if (!num_tiles) return;
  Tile* tiles = (Tile*)scratch(kTaskScratch, std::max(num_tiles, num_tokens) * sizeof(Tile));
  if (!decoding) {
    Tile* next = tiles;
    for (int s = 0; s < batch.count; s++)
      for (int t = 0; t < batch.tokens(s); t++) *next++ = {s, t, 0};
    constexpr size_t chunk = 16;
    parallel(pool, (num_tokens + chunk - 1) / chunk, [&](size_t i) {
      for (size_t t = i * chunk; t < std::min(num_tokens, (i + 1) * chunk); t++)
        for (int h = 0; h < a.kv_heads; h++) put(job, tiles[t].segment, tiles[t].row, h);
    });
  }
  Tile* next = tiles;
  for (int s = 0; s < batch.count; s++)  // the longest contexts of a segment first
    for (int row = (batch.tokens(s) * group - 1) / kTile * kTile; row >= 0 && batch.tokens(s); row -= kTile)
      for (int h = 0; h < a.kv_heads; h++) *next++ = {s, row, h};
  parallel(pool, num_tiles, [&](size_t i) {
    const Tile& tile = tiles[i];
    if (decoding) put(job, tile.segment, 0, tile.head);
    attend_tile(job, tile.segment, tile.row, tile.head);
  });
}

}  // namespace PAWL_ISA
}  // namespace pawl
