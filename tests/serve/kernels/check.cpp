// Checks the kernels against plain references, and every instruction set, batch, chunking and number of threads against
// each other bit for bit. Run by tests/serve/test_kernels.py, with sanitizers and emulated tiles.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "kernels.h"

using namespace pawl;

static std::mt19937 random_bits(1);
static int pick(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_bits); }
static bool coin() { return pick(0, 1); }
static std::vector<float> normal(size_t n, float scale = 1) {
  std::normal_distribution<float> d(0, scale);
  std::vector<float> v(n);
  for (float& x : v) x = d(random_bits);
  return v;
}

static void run_here(void*, void (*task)(void*, size_t), size_t count, void* user) {
  for (size_t i = 0; i < count; i++) task(user, i);
}
static void run_in_threads(void*, void (*task)(void*, size_t), size_t count, void* user) {
  std::thread other([&] { for (size_t i = 1; i < count; i += 2) task(user, i); });
  for (size_t i = 0; i < count; i += 2) task(user, i);
  other.join();
}
static const Pool kHere{nullptr, run_here}, kThreads{nullptr, run_in_threads};

struct Set {
  const char* name;
  decltype(&avx2::linear) linear;
  decltype(&avx2::add_normed) add_normed;
  decltype(&avx2::attend) attend;
  decltype(&avx2::embed) embed;
  decltype(&avx2::select) select;
};
#define SET(ISA) {#ISA, ISA::linear, ISA::add_normed, ISA::attend, ISA::embed, ISA::select}
static std::vector<Set> usable_sets() {
  std::vector<Set> sets;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) sets.push_back(SET(avx2));
  if (__builtin_cpu_supports("avxvnni")) sets.push_back(SET(avxvnni));
  if (__builtin_cpu_supports("avx512vnni")) sets.push_back(SET(avx512)), sets.push_back(SET(amx));  // tiles are emulated
  return sets;
}
static std::vector<Set> sets = usable_sets();

static int failures = 0;
static void expect(bool holds, const std::string& what) {
  if (!holds && failures++ < 20) printf("FAILED %s\n", what.c_str());
}
static bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && !memcmp(a.data(), b.data(), a.size() * sizeof(float));
}

// ---- products

struct Weights {  // packed, and as real numbers
  std::vector<uint8_t> packed, grid;
  std::vector<float> scale, real;
  std::vector<int32_t> sums;
};

// `parts` of `outputs` rows each, every part padded to whole blocks.
static Weights make_weights(Linear& l, int parts) {
  Weights w;
  int K = l.inputs, depth = l.depth(), blocks = l.blocks() * parts, groups = l.bits == 4 ? depth / l.group : 0;
  w.real.resize((size_t)parts * l.outputs * K);
  w.scale.assign(blocks * kBlock, 1), w.sums.assign(blocks * kBlock, 0);
  w.packed.assign((size_t)blocks * kBlock * depth / (l.bits == 8 ? 1 : 2), 0);
  w.grid.assign((size_t)blocks * kBlock * groups, 0);
  for (int part = 0; part < parts; part++)
    for (int n = 0; n < l.outputs; n++) {
      int row = part * l.blocks() * kBlock + n, b = row / kBlock, lane = row % kBlock;
      float scale = ldexp(1, -pick(6, 8) - (l.bits == 4 ? 4 : 0));
      w.scale[row] = scale;
      for (int k = 0; k < (l.bits == 8 ? K : depth); k++) {
        float ignored, &real = k < K ? w.real[((size_t)part * l.outputs + n) * K + k] : ignored;
        if (l.bits == 8) {
          int level = pick(-127, 127);
          w.packed[((size_t)b * depth + k) * kBlock + 0 - k % 4 * kBlock + lane * 4 + k % 4] = (uint8_t)level;
          w.sums[row] += level;
          real = level * scale;
        } else {
          size_t at = ((size_t)b * groups + k / l.group) * kBlock + lane;
          if (k % l.group == 0) w.grid[at] = pick(0, 255);
          int zero = w.grid[at] & 15, level = k < K ? pick(0, 15) : zero;
          uint8_t& byte = w.packed[((size_t)b * depth / 8 + k / 8) * kBlock * 4 + lane * 4 + k % 8 / 2];
          byte |= level << (k % 2 * 4);
          real = (level - zero) * (16 + (w.grid[at] >> 4)) * scale;
        }
      }
    }
  l.weight = w.packed.data();
  l.scale = w.scale.data(), l.sums = w.sums.data(), l.grid = w.grid.data();
  return w;
}

static std::vector<double> rotated(std::vector<double> v, int depth) {
  v.resize(depth);
  std::vector<double> y(depth);
  for (int i = 0; i < depth; i++)
    for (int k = i / kDepth * kDepth; k < (i / kDepth + 1) * kDepth; k++)
      y[i] += v[k] * (__builtin_parity(i & k & (kDepth - 1)) ? -0.125 : 0.125);
  return y;
}

static void check_linear() {
  Linear l;
  l.inputs = pick(1, 5) == 1 ? pick(1, 15) : pick(16, 300), l.outputs = pick(1, 150);
  l.bits = coin() ? 8 : 4, l.group = coin() ? 32 : 64, l.rotate = pick(0, 2) == 0;
  l.norm = pick(0, 2), l.activation = pick(0, 3), l.epsilon = 1e-5f;
  int rows = coin() ? pick(1, 9) : pick(1, 70), parts = l.parts(), K = l.inputs;
  Weights w = make_weights(l, parts);
  std::vector<float> x = normal((size_t)rows * K), norm = normal(K), norm_bias = normal(K), bias = normal(l.outputs * parts);
  std::vector<float> residual = normal((size_t)rows * l.outputs), first;
  bool on_grid = !l.norm && !l.rotate && coin();  // such rows quantize exactly
  if (on_grid)
    for (int m = 0; m < rows; m++)
      for (int k = 0; k < K; k++) x[(size_t)m * K + k] = k == m % K ? 127 : pick(-127, 127);
  if (pick(0, 9) == 0) std::fill(x.begin(), x.begin() + K, 0.f);
  l.norm_weight = l.norm ? norm.data() : nullptr, l.norm_bias = l.norm == kLayerNorm && coin() ? norm_bias.data() : nullptr;
  l.bias = coin() ? bias.data() : nullptr;
  const float* added = coin() ? residual.data() : nullptr;
  std::string what = "linear K " + std::to_string(K) + " N " + std::to_string(l.outputs) + " rows " + std::to_string(rows) +
                     " bits " + std::to_string(l.bits) + (l.rotate ? " rotated norm " : " norm ") +
                     std::to_string(l.norm) + " activation " + std::to_string(l.activation);
  for (const Set& set : sets)
    for (const Pool* pool : {&kHere, &kThreads}) {
      std::vector<float> y((size_t)rows * l.outputs, 7), alone(l.outputs);
      set.linear(l, x.data(), added, y.data(), rows, *pool);
      if (first.empty()) first = y;
      expect(same(y, first), what + " differs on " + set.name);
      int m = pick(0, rows - 1);
      set.linear(l, &x[(size_t)m * K], added ? added + (size_t)m * l.outputs : nullptr, alone.data(), 1, *pool);
      expect(!memcmp(alone.data(), &y[(size_t)m * l.outputs], l.outputs * sizeof(float)), what + " alone, on " + set.name);
    }
  for (int m = 0; m < rows; m++) {
    std::vector<double> v(x.begin() + (size_t)m * K, x.begin() + (size_t)(m + 1) * K);
    double mean = 0, square = 0, top = 0;
    if (l.norm == kLayerNorm) for (double u : v) mean += u / K;
    for (double& u : v) u -= mean, square += u * u / K;
    for (int k = 0; k < K; k++) {
      if (l.norm) v[k] = v[k] / sqrt(square + l.epsilon) * norm[k] + (l.norm_bias ? norm_bias[k] : 0);
    }
    if (l.rotate) v = rotated(v, l.depth());
    for (double u : v) top = std::max(top, fabs(u));
    for (int n = 0; n < l.outputs; n++) {
      double value[2] = {}, error[2] = {};
      for (int part = 0; part < parts; part++) {
        for (int k = 0; k < K; k++) {
          double real = w.real[((size_t)part * l.outputs + n) * K + k];
          value[part] += real * v[k];
          error[part] += fabs(real) * top * (on_grid ? 1e-6 : 5e-3);  // half a step of each level
        }
        if (l.bias) value[part] += bias[part * l.outputs + n];
      }
      double y = value[0], tolerance = error[0] + 1e-5 * fabs(y) + 1e-5;
      if (l.activation == kSwiGlu) y = y / (1 + exp(-y));
      if (l.activation == kGelu || l.activation == kGeGlu)
        y *= 0.5 * (1 + tanh(0.7978845608 * (y + 0.044715 * y * y * y))), tolerance *= 1.2;
      if (parts == 2) {
        y *= value[1];
        tolerance = 1.1 * tolerance * (fabs(value[1]) + error[1]) + (fabs(value[0]) + error[0]) * error[1] + 1e-5 * fabs(y);
      }
      if (added) y += residual[(size_t)m * l.outputs + n];
      double found = first[(size_t)m * l.outputs + n];
      if (!(fabs(found - y) <= tolerance + 1e-4))
        return expect(false, what + ": " + std::to_string(found) + " instead of " + std::to_string(y));
    }
  }
}

static void check_add_normed() {
  RmsNorm norm;
  norm.size = pick(1, 300), norm.epsilon = 1e-6f;
  int rows = pick(1, 40);
  std::vector<float> x = normal((size_t)rows * norm.size), residual = normal(x.size()), weight = normal(norm.size), first;
  if (pick(0, 9) == 0) std::fill(x.begin(), x.begin() + norm.size, 0.f);
  norm.weight = weight.data();
  for (const Set& set : sets) {
    std::vector<float> y(x.size(), 7);
    set.add_normed(norm, x.data(), residual.data(), y.data(), rows, kThreads);
    if (first.empty()) first = y;
    expect(same(y, first), std::string("the added norm differs on ") + set.name);
  }
  for (int m = 0; m < rows; m++) {
    double square = 0;
    for (int k = 0; k < norm.size; k++) square += pow(x[m * norm.size + k], 2) / norm.size;
    for (int k = 0; k < norm.size; k++) {
      size_t at = (size_t)m * norm.size + k;
      expect(fabs(first[at] - residual[at] - x[at] / sqrt(square + norm.epsilon) * weight[k]) < 1e-4, "the added norm");
    }
  }
}

// ---- attention

struct Sequence {
  int past;  // computed before the plan that is compared
  std::vector<float> qkv;
  std::vector<int32_t> table;
  std::vector<float> y;
};

static void check_attention() {
  Attention a;
  const int sizes[] = {16, 40, 64, 96, 128, 256};
  a.head_size = sizes[pick(0, 5)], a.kv_heads = pick(1, 3), a.heads = a.kv_heads * (pick(0, 5) ? pick(1, 5) : pick(16, 20));
  a.layer = pick(0, 1), a.window = pick(0, 2) ? 0 : pick(1, 300), a.interleaved = coin(), a.epsilon = 1e-5f;
  a.scale = 1 / std::sqrt((float)a.head_size);
  a.rotary = pick(0, 3) ? coin() ? a.head_size : a.head_size / 4 * 2 : 0;
  const int width = (a.heads + 2 * a.kv_heads) * a.head_size, layers = 2, context = 700;
  std::vector<float> cosine((size_t)context * a.rotary / 2), sine(cosine.size());
  for (size_t i = 0; i < cosine.size(); i++) cosine[i] = cos(0.01 * i), sine[i] = sin(0.01 * i);
  std::vector<float> q_norm = normal(a.head_size), k_norm = normal(a.head_size);
  a.cos = cosine.data(), a.sin = sine.data();
  if (coin()) a.q_norm = q_norm.data(), a.k_norm = k_norm.data();
  std::string what = "attention of " + std::to_string(a.heads) + "/" + std::to_string(a.kv_heads) + " heads of " +
                     std::to_string(a.head_size) + ", window " + std::to_string(a.window);

  std::vector<Sequence> sequences(pick(1, 3));
  int num_blocks = 0;
  for (Sequence& s : sequences) {
    int length = pick(0, 3) ? pick(1, 140) : pick(260, 600);
    s.past = pick(0, 2) ? pick(0, length - 1) : length - 1;
    s.qkv = normal((size_t)length * width, 2);
    num_blocks += (length + kTokens - 1) / kTokens;
  }
  std::vector<int32_t> numbers(num_blocks);
  for (int i = 0; i < num_blocks; i++) numbers[i] = i;
  std::shuffle(numbers.begin(), numbers.end(), random_bits);
  int table_width = 0;
  for (Sequence& s : sequences) {
    size_t n = (s.qkv.size() / width + kTokens - 1) / kTokens;
    s.table.assign(numbers.end() - n, numbers.end());
    numbers.resize(numbers.size() - n);
    table_width = std::max<int>(table_width, n);
  }
  const size_t cache_bytes = a.block_bytes() * num_blocks * layers * a.kv_heads;
  uint8_t* cache = (uint8_t*)aligned_alloc(64, cache_bytes);

  // Runs tokens [from, to) of each sequence as one plan.
  auto run = [&](const Set& set, const Pool& pool, std::vector<std::pair<int, int>> ranges) {
    std::vector<int32_t> segments, tables;
    std::vector<float> qkv;
    int start = 0;
    for (size_t i = 0; i < sequences.size(); i++) {
      auto [from, to] = ranges[i];
      segments.insert(segments.end(), {from, start, to - from});
      start += to - from;
      qkv.insert(qkv.end(), &sequences[i].qkv[0] + (size_t)from * width, &sequences[i].qkv[0] + (size_t)to * width);
      tables.insert(tables.end(), sequences[i].table.begin(), sequences[i].table.end());
      tables.resize((i + 1) * table_width, -1);
    }
    Batch batch;
    batch.segments = segments.data(), batch.tables = tables.data(), batch.count = sequences.size();
    batch.width = table_width, batch.cache = cache, batch.layers = layers;
    std::vector<float> y((size_t)start * a.heads * a.head_size);
    set.attend(a, qkv.data(), batch, y.data(), pool);
    return y;
  };
  auto length = [&](const Sequence& s) { return (int)(s.qkv.size() / width); };
  std::vector<float> first;
  for (const Set& set : sets)
    for (const Pool* pool : {&kHere, &kThreads}) {
      memset(cache, 0xff, cache_bytes);  // scales that are not numbers
      std::vector<std::pair<int, int>> ranges;
      ranges.resize(sequences.size());
      for (bool more = true; more;) {  // the pasts, in random chunks
        more = false;
        for (size_t i = 0; i < sequences.size(); i++) {
          int from = ranges[i].second, to = coin() ? from : std::min(sequences[i].past, from + pick(1, 90));
          ranges[i] = {from, to};
          more |= to < sequences[i].past;
        }
        run(set, *pool, ranges);
      }
      for (size_t i = 0; i < sequences.size(); i++) ranges[i] = {sequences[i].past, length(sequences[i])};
      std::vector<float> y = run(set, *pool, ranges);
      if (first.empty()) first = y;
      expect(same(y, first), what + " differs on " + set.name);
    }
  free(cache);

  size_t at = 0;  // the reference, on keys and values that were not quantized
  for (Sequence& s : sequences) {
    int n = length(s);
    std::vector<double> x(s.qkv.begin(), s.qkv.end());
    for (int t = 0; t < n; t++)
      for (int h = 0; h < a.heads + a.kv_heads; h++) {
        double* v = &x[(size_t)t * width + (size_t)h * a.head_size];
        const float* norm = h < a.heads ? a.q_norm : a.k_norm;
        double square = 0;
        for (int i = 0; i < a.head_size; i++) square += v[i] * v[i] / a.head_size;
        for (int i = 0; norm && i < a.head_size; i++) v[i] *= norm[i] / sqrt(square + a.epsilon);
        for (int i = 0; i < a.rotary / 2; i++) {
          double &p = a.interleaved ? v[2 * i] : v[i], &q = a.interleaved ? v[2 * i + 1] : v[i + a.rotary / 2];
          double c = cosine[(size_t)t * a.rotary / 2 + i], d = sine[(size_t)t * a.rotary / 2 + i], u = p;
          p = u * c - q * d, q = q * c + u * d;
        }
      }
    double worst = 0;
    for (int t = s.past; t < n; t++)
      for (int h = 0; h < a.heads; h++) {
        int kv = h / a.group(), from = a.window ? std::max(0, t - a.window + 1) : 0;
        std::vector<double> weight(t + 1);
        double top = -1e300, sum = 0;
        for (int k = from; k <= t; k++) {
          double score = 0;
          for (int i = 0; i < a.head_size; i++)
            score += x[(size_t)t * width + h * a.head_size + i] * x[(size_t)k * width + (a.heads + kv) * a.head_size + i];
          top = std::max(top, weight[k] = score * a.scale);
        }
        for (int k = from; k <= t; k++) sum += weight[k] = exp(weight[k] - top);
        for (int i = 0; i < a.head_size; i++, at++) {
          double y = 0;
          for (int k = from; k <= t; k++)
            y += weight[k] / sum * x[(size_t)k * width + (a.heads + a.kv_heads + kv) * a.head_size + i];
          worst = std::max(worst, fabs(y - first[at]));
        }
      }
    if (!(worst < 0.35)) return expect(false, what + ": off by " + std::to_string(worst));
  }
}

// ---- tokens

static void check_embed() {
  Embedding e;
  e.hidden = pick(1, 200), e.vocabulary = pick(1, 60);
  e.rotate = coin();
  int depth = round_up(e.hidden, kDepth), tokens = pick(1, 50), past = pick(0, 9);
  std::vector<int8_t> weight((size_t)round_up(e.vocabulary, kBlock) * depth);
  std::vector<float> scale = normal(round_up(e.vocabulary, kBlock)), positions = normal((size_t)60 * e.hidden), first;
  for (int8_t& level : weight) level = pick(-127, 127);
  e.weight = weight.data(), e.scale = scale.data(), e.positions = coin() ? positions.data() : nullptr, e.context = 60;
  std::vector<int64_t> ids(tokens);
  for (int64_t& id : ids) id = pick(0, e.vocabulary - 1);
  int32_t segment[] = {past, 0, tokens};
  Batch batch;
  batch.segments = segment, batch.count = 1;
  for (const Set& set : sets) {
    std::vector<float> x((size_t)tokens * e.hidden);
    set.embed(e, ids.data(), batch, x.data(), tokens, kThreads);
    if (first.empty()) first = x;
    expect(same(x, first), std::string("embed differs on ") + set.name);
  }
  for (int t = 0; t < tokens; t++) {
    std::vector<double> row(depth);
    for (int k = 0; k < depth; k++)
      row[k] = weight[((size_t)ids[t] / kBlock * depth + k / 4 * 4) * kBlock + ids[t] % kBlock * 4 + k % 4] * scale[ids[t]];
    if (e.rotate) row = rotated(row, depth);
    for (int k = 0; k < e.hidden; k++) {
      double y = row[k] + (e.positions ? positions[(size_t)(past + t) * e.hidden + k] : 0);
      expect(fabs(first[(size_t)t * e.hidden + k] - y) < 1e-4 * fabs(scale[ids[t]] * 127) + 1e-6, "embed");
    }
  }
}

static void check_select() {
  int vocabulary = coin() ? pick(1, 200) : pick(4000, 9000), rows = pick(1, 4);
  std::vector<float> logits = normal((size_t)rows * vocabulary, 3), temperature(rows), total_first;
  if (coin()) for (float& x : logits) x = std::round(x);  // many equal ones
  for (float& t : temperature) t = coin() ? 0.f : 0.25f * pick(1, 8);
  std::vector<int32_t> first;
  for (const Set& set : sets) {
    std::vector<int32_t> candidates(rows * kCandidates);
    std::vector<float> total(rows);
    set.select(logits.data(), temperature.data(), rows, vocabulary, candidates.data(), total.data(), kThreads);
    if (first.empty()) first = candidates, total_first = total;
    expect(first == candidates && same(total, total_first), std::string("select differs on ") + set.name);
  }
  for (int r = 0; r < rows; r++) {
    const float* row = &logits[(size_t)r * vocabulary];
    std::vector<int> order(vocabulary);
    for (int i = 0; i < vocabulary; i++) order[i] = i;
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return row[a] > row[b]; });
    int wanted = temperature[r] == 0 ? 1 : std::min(vocabulary, kCandidates);
    for (int i = 0; i < kCandidates; i++)
      expect(first[r * kCandidates + i] == (i < wanted ? order[i] : -1), "select, candidate " + std::to_string(i));
    double total = 0;
    for (int i = 0; i < vocabulary; i++) total += exp((row[i] - row[order[0]]) / temperature[r]);
    expect(temperature[r] == 0 || fabs(total_first[r] - total) < 1e-4 * total, "select, total");
  }
}

int main(int, char** arguments) {
  int rounds = atoi(arguments[1]);
  for (int i = 0; i < rounds; i++) check_linear(), check_add_normed(), check_attention(), check_embed(), check_select();
  for (const Set& set : sets) printf("%s ", set.name);
  printf("%d rounds, %d failures\n", rounds, failures);
  return failures != 0;
}
