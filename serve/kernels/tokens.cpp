// The two ends of the graph: token ids to rows of the embedding, and logits to the largest of them.
#include <algorithm>

#include "kernels.h"
#include "simd.h"

namespace pawl {
namespace PAWL_ISA {

void embed(const Embedding& e, const int64_t* ids, const Batch& batch, float* x, int tokens, const Pool& pool) {
  int depth = round_up(e.hidden, kDepth);
  int32_t* position = (int32_t*)scratch(kTaskScratch, (tokens + 1) * sizeof(int32_t));
  for (int s = 0; s < batch.count; s++)
    for (int t = 0; t < batch.tokens(s); t++) position[batch.start(s) + t] = batch.past(s) + t;
  constexpr int chunk = 16;
  parallel(pool, (tokens + chunk - 1) / chunk, [&](size_t task) {
    for (int t = (int)task * chunk; t < std::min(tokens, ((int)task + 1) * chunk); t++) {
      const int8_t* row = e.weight + (ids[t] / kBlock * depth * kBlock) + ids[t] % kBlock * 4;
      float scale = e.scale[ids[t]], *to = x + (size_t)t * e.hidden;
      const float* learned = e.positions ? e.positions + (size_t)position[t] * e.hidden : nullptr;
      for (int k = 0; k < e.hidden; k += kDepth) {
        alignas(64) float part[kDepth];
        for (int i = 0; i < kDepth; i++) part[i] = row[(k + i) / 4 * kDepth + i % 4] * scale;
        if (e.rotate) rotate64(part);
        for (int i = 0; i < std::min(kDepth, e.hidden - k); i++) to[k + i] = part[i] + (learned ? learned[k + i] : 0.f);
      }
    }
  });
}

namespace {

constexpr int kChunk = 4 * kLanes;  // logits whose maximum is kept

INLINE F load_logits(const float* p, int n) {
  if (n >= kLanes) return load(p);
  alignas(64) float part[kLanes];
  std::fill(part, part + kLanes, -3e38f);
  if (n > 0) memcpy(part, p, n * sizeof(float));
  return load(part);
}

void select_row(const float* logits, float temperature, int vocabulary, int32_t* candidates, float* total) {
  int chunks = (vocabulary + kChunk - 1) / kChunk;
  float* largest = (float*)scratch(kTaskScratch, (2 * chunks + vocabulary) * sizeof(float));
  for (int c = 0; c < chunks; c++) {
    const float* p = logits + c * kChunk;
    int n = vocabulary - c * kChunk;
    F a = max(load_logits(p, n), load_logits(p + kLanes, n - kLanes));
    F b = max(load_logits(p + 2 * kLanes, n - 2 * kLanes), load_logits(p + 3 * kLanes, n - 3 * kLanes));
    largest[c] = reduce_max(max(a, b));
  }
  float top = *std::max_element(largest, largest + chunks);
  std::fill(candidates, candidates + kCandidates, -1);
  if (temperature == 0) {  // greedy: the first of the largest is all that is wanted
    int c = std::find(largest, largest + chunks, top) - largest;
    const float* p = logits + c * kChunk;
    int n = std::min(kChunk, vocabulary - c * kChunk);
    candidates[0] = std::min(c * kChunk + (int)(std::find(p, p + n, top) - p), vocabulary - 1);
    *total = 0;
    return;
  }
  F sum = set(0.f), factor = set(kLog2E / temperature), peak = set(top);
  for (int i = 0; i < vocabulary; i += kLanes) {
    F e = exp2(mul(sub(load_logits(logits + i, vocabulary - i), peak), factor));
    sum = add(sum, vocabulary - i < kLanes ? first(vocabulary - i, e, set(0.f)) : e);
  }
  *total = reduce_add(sum);
  // As many chunks reach the threshold as candidates are wanted, so at least as many logits do.
  float threshold = -3e38f;
  if (chunks > kCandidates) {
    float* sorted = largest + chunks;
    std::copy(largest, largest + chunks, sorted);
    std::nth_element(sorted, sorted + kCandidates - 1, sorted + chunks, [](float a, float b) { return a > b; });
    threshold = sorted[kCandidates - 1];
  }
  int32_t *found = (int32_t*)(largest + 2 * chunks), *end = found;
  for (int c = 0; c < chunks; c++)
    if (largest[c] >= threshold)
      for (int i = c * kChunk; i < std::min(vocabulary, (c + 1) * kChunk); i++)
        if (logits[i] >= threshold) *end++ = i;
  auto before = [&](int32_t a, int32_t b) { return logits[a] > logits[b] || (logits[a] == logits[b] && a < b); };
  int32_t* kept = std::min(end, found + kCandidates);
  std::partial_sort(found, kept, end, before);
  std::copy(found, kept, candidates);
}

}  // namespace

void select(const float* logits, const float* temperature, int rows, int vocabulary, int32_t* candidates, float* total,
            const Pool& pool) {
  if (!rows) return;
  parallel(pool, rows, [&](size_t r) {
    select_row(logits + r * vocabulary, temperature[r], vocabulary, candidates + r * kCandidates, total + r);
  });
}

}  // namespace PAWL_ISA
}  // namespace pawl
