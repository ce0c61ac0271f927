// The kernels as plain functions over plain structures. Compiled once per instruction set; chosen at run time.
#pragma once
#include <cstddef>
#include <cstdint>

namespace pawl {

// Calls task(user, i) for each i below `count`, on several threads, and returns when all are done.
struct Pool {
  void* context;
  void (*run)(void* context, void (*task)(void* user, size_t i), size_t count, void* user);
};

enum Norm { kNoNorm = 0, kRmsNorm = 1, kLayerNorm = 2 };
enum Activation { kNoActivation = 0, kSwiGlu = 1, kGelu = 2, kGeGlu = 3 };

constexpr int kBlock = 16;      // outputs that lie together in a packed weight
constexpr int kDepth = 64;      // a packed weight's K is a multiple of this
constexpr int kTokens = 64;     // positions of a cache block
constexpr int kCandidates = 64; // largest logits that Select returns

constexpr int round_up(int x, int unit) { return (x + unit - 1) / unit * unit; }

// One matrix product with what surrounds it; docs/native.md describes the operators and the packed layouts.
struct Linear {
  int inputs = 0, outputs = 0;       // K, N
  int bits = 8, group = 0;           // of the weight; the group is that of 4 bits
  bool rotate = false;               // each 64 inputs, after the norm
  int norm = kNoNorm, activation = kNoActivation;
  float epsilon = 0;
  const uint8_t* weight = nullptr;
  const float* scale = nullptr;      // of each output
  const int32_t* sums = nullptr;     // 8 bits
  const uint8_t* grid = nullptr;     // 4 bits: of each group
  const float *norm_weight = nullptr, *norm_bias = nullptr, *bias = nullptr;

  int depth() const { return round_up(inputs, kDepth); }
  int blocks() const { return round_up(outputs, kBlock) / kBlock; }  // of y, and of each part of the weight
  int parts() const { return activation == kSwiGlu || activation == kGeGlu ? 2 : 1; }
};

struct RmsNorm {
  int size = 0;
  float epsilon = 0;
  const float* weight = nullptr;
};

struct Embedding {
  int hidden = 0, vocabulary = 0;
  bool rotate = false;                   // the stored rows are rotated
  const int8_t* weight = nullptr;
  const float* scale = nullptr;
  const float* positions = nullptr;  // [context, hidden] or null
  int context = 0;
};

struct Attention {
  int layer = 0, heads = 0, kv_heads = 0, head_size = 0;
  int rotary = 0;                    // dimensions that rotate; 0: none
  bool interleaved = false;
  int window = 0;                    // 0: no limit
  float epsilon = 0, scale = 0;
  const float *cos = nullptr, *sin = nullptr;      // [context, rotary / 2]
  const float *q_norm = nullptr, *k_norm = nullptr;  // [head_size] or null

  int group() const { return heads / kv_heads; }
  int key_size() const { return round_up(head_size, kDepth); }
  int value_size() const { return round_up(head_size, kBlock); }
  size_t block_bytes() const { return (size_t)kTokens * (key_size() + value_size()) + 2 * kTokens * sizeof(float); }
};

// What a run computes: see docs/native.md. `cache` is [blocks, layers, kv_heads, block bytes].
struct Batch {
  const int32_t* segments = nullptr;  // [count, 3]: past, start, tokens
  const int32_t* tables = nullptr;    // [count, width]
  int count = 0, width = 0;
  uint8_t* cache = nullptr;
  int layers = 0;

  int past(int s) const { return segments[3 * s]; }
  int start(int s) const { return segments[3 * s + 1]; }
  int tokens(int s) const { return segments[3 * s + 2]; }
};

#define PAWL_DECLARE(ISA)                                                                                         \
  namespace ISA {                                                                                                 \
  void linear(const Linear&, const float* x, const float* residual, float* y, int rows, const Pool&);             \
  void add_normed(const RmsNorm&, const float* x, const float* residual, float* y, int rows, const Pool&);        \
  void attend(const Attention&, const float* qkv, const Batch&, float* y, const Pool&);                           \
  void embed(const Embedding&, const int64_t* ids, const Batch&, float* x, int tokens, const Pool&);              \
  void select(const float* logits, const float* temperature, int rows, int vocabulary, int32_t* candidates,       \
              float* total, const Pool&);                                                                         \
  }
PAWL_DECLARE(amx)
PAWL_DECLARE(avx512)
PAWL_DECLARE(avxvnni)
PAWL_DECLARE(avx2)
#undef PAWL_DECLARE

// Scratch memory of the calling thread, 64-byte aligned, at least `bytes`; valid until the thread asks again for the
// same purpose. Throws std::bad_alloc.
enum Purpose { kRowScratch, kValueScratch, kTaskScratch, kPurposes };
uint8_t* scratch(Purpose purpose, size_t bytes);
int processors();  // that this process may use

// Runs `task(i)` for each i below `count`.
template <class Task> void parallel(const Pool& pool, size_t count, const Task& task) {
  if (count == 0) return;
  if (count == 1) return task(0);
  pool.run(pool.context, [](void* user, size_t i) { (*(const Task*)user)(i); }, count, (void*)&task);
}

}  // namespace pawl
