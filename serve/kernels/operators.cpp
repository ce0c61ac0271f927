// The operators as ONNX Runtime sees them: attributes and constants are checked when a session is made, what varies
// with every run when it runs. Errors are statuses.
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"
#include "ort_abi.h"

void* const* ort::api = nullptr;

namespace pawl {

uint8_t* scratch(Purpose purpose, size_t bytes) {
  struct Memory {
    uint8_t* data = nullptr;
    size_t size = 0;
    ~Memory() { free(data); }
  };
  static thread_local Memory memory[kPurposes];
  Memory& m = memory[purpose];
  if (bytes > m.size) {
    free(m.data);
    m.size = (bytes + bytes / 2 + 4095) / 4096 * 4096;
    m.data = (uint8_t*)aligned_alloc(64, m.size);
    if (!m.data) m.size = 0, throw std::bad_alloc();
  }
  return m.data;
}

int processors() {
  static const int count = [] {
    cpu_set_t set;
    return sched_getaffinity(0, sizeof set, &set) ? 1 : CPU_COUNT(&set);
  }();
  return count;
}

namespace {

struct InstructionSet {
  const char* name;
  bool (*usable)();
  decltype(&avx2::linear) linear;
  decltype(&avx2::add_normed) add_normed;
  decltype(&avx2::attend) attend;
  decltype(&avx2::embed) embed;
  decltype(&avx2::select) select;
};

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
}
bool has_amx() {
#if defined(PAWL_EMULATE_TILES)
  return has_avx512();
#else
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // the kernel gives large register state on request
  return has_avx512() && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-int8") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#endif
}

#define PAWL_SET(ISA, usable) {#ISA, usable, ISA::linear, ISA::add_normed, ISA::attend, ISA::embed, ISA::select}
const InstructionSet kSets[] = {  // best first
    PAWL_SET(amx, has_amx),
    PAWL_SET(avx512, has_avx512),
    PAWL_SET(avxvnni, [] { return has_avx2() && __builtin_cpu_supports("avxvnni") != 0; }),
    PAWL_SET(avx2, has_avx2),
};

// The best usable one, or the one that PAWL_INSTRUCTION_SET names; null if there is none.
const InstructionSet* instruction_set() {
  static const InstructionSet* const chosen = []() -> const InstructionSet* {
    const char* wanted = getenv("PAWL_INSTRUCTION_SET");
    for (const InstructionSet& set : kSets)
      if ((!wanted || !strcmp(wanted, set.name)) && set.usable()) return &set;
    return nullptr;
  }();
  return chosen;
}

// ---- creation: attributes and constants

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Info {
  const OrtKernelInfo* info;

  int64_t integer(const char* name) const {
    int64_t value = 0;
    if (!ort::succeeds(ort::kKernelInfoGetAttributeInt64, info, name, &value))
      throw Failure(std::string("attribute ") + name + " is missing");
    return value;
  }
  int size(const char* name, int64_t least, int64_t most) const {
    int64_t value = integer(name);
    if (value < least || value > most)
      throw Failure(std::string(name) + " is " + std::to_string(value) + "; it must be from " + std::to_string(least) +
                    " to " + std::to_string(most));
    return (int)value;
  }
  float real(const char* name) const {
    float value = 0;
    if (!ort::succeeds(ort::kKernelInfoGetAttributeFloat, info, name, &value))
      throw Failure(std::string("attribute ") + name + " is missing");
    return value;
  }
  ort::Tensor maybe(size_t index) const {
    int constant = 0;
    const OrtValue* value = nullptr;
    if (!ort::succeeds(ort::kKernelInfoGetConstantInput, info, index, &constant, &value) || !constant) return {};
    return ort::tensor(value);
  }
  // A constant of `count` elements, at its place in the mapped file; null if it may be absent and is.
  template <class T> const T* constant(size_t index, const char* name, size_t count, bool required = true) const {
    ort::Tensor t = maybe(index);
    if (!t.present && !required) return nullptr;
    if (!t.present || t.count() != count)
      throw Failure(std::string("input ") + name + (t.present ? " has " + std::to_string(t.count()) : " is not a constant") +
                    "; " + std::to_string(count) + " elements are expected");
    return (const T*)t.data;
  }
};

constexpr int64_t kMostSize = 1 << 24;

void run_task(void* context, void (*task)(void*, size_t), size_t count, void* user) {
  ort::succeeds(ort::kKernelContextParallelFor, (const OrtKernelContext*)context, task, count, (size_t)0, user);
}

void check(bool holds, const char* message) {
  if (!holds) throw Failure(message);
}

// Segments and block tables, checked against everything that they index.
Batch batch_of(const ort::Tensor& segments, int64_t tokens, int64_t positions) {
  check(segments.present && segments.rank == 2 && segments.dims[1] == 3, "segments must be [segments, 3]");
  Batch b;
  b.segments = (const int32_t*)segments.data;
  b.count = (int)segments.dims[0];
  int64_t next = 0;
  for (int s = 0; s < b.count; s++) {
    check(b.past(s) >= 0 && b.tokens(s) >= 0 && b.start(s) == next, "segments must follow each other, none negative");
    check((int64_t)b.past(s) + b.tokens(s) <= positions, "a segment reaches beyond the longest context");
    next += b.tokens(s);
  }
  check(next == tokens, "segments do not cover the tokens");
  return b;
}

struct LinearKernel {
  Linear l;

  LinearKernel(const Info& info, int bits) {
    l.bits = bits;
    l.inputs = info.size("inputs", 1, kMostSize);
    l.outputs = info.size("outputs", 1, kMostSize);
    l.norm = info.size("norm", kNoNorm, kLayerNorm);
    l.activation = info.size("activation", kNoActivation, kGeGlu);
    l.epsilon = info.real("epsilon");
    l.rotate = info.size("rotate", 0, 1);
    size_t blocks = (size_t)l.blocks() * l.parts(), depth = l.depth(), bias = (size_t)l.outputs * l.parts();
    l.scale = info.constant<float>(2, "scale", blocks * kBlock);
    if (bits == 8) {
      l.weight = info.constant<uint8_t>(1, "weight", blocks * depth * kBlock);
      l.sums = info.constant<int32_t>(3, "sums", blocks * kBlock);
    } else {
      l.group = info.size("group", 32, 64);
      check(l.group != 0 && kDepth % l.group == 0, "group must be 32 or 64");
      size_t groups = depth / l.group;
      l.weight = info.constant<uint8_t>(1, "weight", blocks * depth * kBlock / 2);
      l.grid = info.constant<uint8_t>(3, "grid", blocks * groups * kBlock);
    }
    l.norm_weight = info.constant<float>(4, "norm", l.inputs, l.norm != kNoNorm);
    l.norm_bias = info.constant<float>(5, "norm_bias", l.inputs, false);
    l.bias = info.constant<float>(6, "bias", bias, false);
  }

  void run(OrtKernelContext* context, const Pool& pool) const {
    ort::Tensor x = ort::input(context, 0), residual = ort::input(context, 7);
    check(x.present && x.rank == 2 && x.dims[1] == l.inputs, "x must be [rows, inputs]");
    check(!residual.present || (residual.rank == 2 && residual.dims[0] == x.dims[0] && residual.dims[1] == l.outputs),
          "residual must be [rows, outputs]");
    float* y = ort::output<float>(context, 0, {x.dims[0], l.outputs});
    instruction_set()->linear(l, (const float*)x.data, (const float*)residual.data, y, (int)x.dims[0], pool);
  }
};
struct Linear8Kernel : LinearKernel {
  explicit Linear8Kernel(const Info& info) : LinearKernel(info, 8) {}
};
struct Linear4Kernel : LinearKernel {
  explicit Linear4Kernel(const Info& info) : LinearKernel(info, 4) {}
};

struct AddNormedKernel {
  RmsNorm norm;

  explicit AddNormedKernel(const Info& info) {
    ort::Tensor weight = info.maybe(1);
    check(weight.present && weight.rank == 1, "weight must be a constant [hidden]");
    norm.size = (int)weight.dims[0];
    norm.weight = (const float*)weight.data;
    norm.epsilon = info.real("epsilon");
  }

  void run(OrtKernelContext* context, const Pool& pool) const {
    ort::Tensor x = ort::input(context, 0), residual = ort::input(context, 2);
    for (const ort::Tensor& rows : {x, residual})
      check(rows.present && rows.rank == 2 && rows.dims[0] == x.dims[0] && rows.dims[1] == norm.size,
            "x and residual must be [rows, hidden]");
    float* y = ort::output<float>(context, 0, {x.dims[0], norm.size});
    instruction_set()->add_normed(norm, (const float*)x.data, (const float*)residual.data, y, (int)x.dims[0], pool);
  }
};

struct EmbedKernel {
  Embedding e;

  explicit EmbedKernel(const Info& info) {
    e.hidden = info.size("hidden", 1, kMostSize);
    e.rotate = info.size("rotate", 0, 1);
    ort::Tensor scale = info.maybe(2), positions = info.maybe(4);
    check(scale.present && scale.rank == 1, "scale must be a constant [vocabulary]");
    e.vocabulary = (int)scale.dims[0];
    e.scale = (const float*)scale.data;
    e.weight = info.constant<int8_t>(1, "weight", (size_t)e.vocabulary * round_up(e.hidden, kDepth));
    if (!positions.present) return;
    check(positions.rank == 2 && positions.dims[1] == e.hidden, "positions must be [context, hidden]");
    e.positions = (const float*)positions.data;
    e.context = (int)positions.dims[0];
  }

  void run(OrtKernelContext* context, const Pool& pool) const {
    ort::Tensor ids = ort::input(context, 0), segments = ort::input(context, 3);
    check(ids.present && ids.rank == 1, "input_ids must be [tokens]");
    Batch batch = batch_of(segments, ids.dims[0], e.positions ? e.context : INT32_MAX);
    const int64_t* id = (const int64_t*)ids.data;
    for (int64_t t = 0; t < ids.dims[0]; t++) check(id[t] >= 0 && id[t] < e.vocabulary, "a token id is out of range");
    float* x = ort::output<float>(context, 0, {ids.dims[0], e.hidden});
    instruction_set()->embed(e, id, batch, x, (int)ids.dims[0], pool);
  }
};

struct AttendKernel {
  Attention a;
  int64_t context_length = INT32_MAX;

  explicit AttendKernel(const Info& info) {
    a.layer = info.size("layer", 0, 1 << 16);
    a.heads = info.size("heads", 1, 1 << 16);
    a.kv_heads = info.size("kv_heads", 1, 1 << 16);
    a.head_size = info.size("head_size", 1, 256);
    check(a.heads % a.kv_heads == 0, "heads must be a multiple of kv_heads");
    a.interleaved = info.size("interleaved", 0, 1);
    a.window = info.size("window", 0, INT32_MAX);
    a.epsilon = info.real("epsilon");
    a.scale = info.real("scale");
    ort::Tensor cos = info.maybe(4);
    if (cos.present) {
      check(cos.rank == 2 && 2 * cos.dims[1] <= a.head_size, "cos must be [context, rotary / 2]");
      context_length = cos.dims[0];
      a.rotary = (int)(2 * cos.dims[1]);
      a.cos = (const float*)cos.data;
      a.sin = info.constant<float>(5, "sin", cos.count());
    }
    a.q_norm = info.constant<float>(6, "q_norm", a.head_size, false);
    a.k_norm = info.constant<float>(7, "k_norm", a.head_size, false);
  }

  void run(OrtKernelContext* context, const Pool& pool) const {
    ort::Tensor qkv = ort::input(context, 0), cache = ort::input(context, 1), tables = ort::input(context, 3);
    check(qkv.present && qkv.rank == 2 && qkv.dims[1] == (int64_t)(a.heads + 2 * a.kv_heads) * a.head_size,
          "qkv must be [tokens, (heads + 2 kv_heads) head_size]");
    check(cache.present && cache.rank == 4 && cache.dims[1] > a.layer && cache.dims[2] == a.kv_heads &&
              cache.dims[3] == (int64_t)a.block_bytes(),
          "cache must be [blocks, layers, kv_heads, block bytes]");
    Batch batch = batch_of(ort::input(context, 2), qkv.dims[0], context_length);
    check(tables.present && tables.rank == 2 && tables.dims[0] == batch.count, "blocks must be [segments, width]");
    batch.tables = (const int32_t*)tables.data;
    batch.width = (int)tables.dims[1];
    batch.cache = (uint8_t*)cache.data;
    batch.layers = (int)cache.dims[1];
    for (int s = 0; s < batch.count; s++) {
      int needed = (batch.past(s) + batch.tokens(s) + kTokens - 1) / kTokens;
      check(needed <= batch.width, "a block table is too short");
      for (int i = 0; i < needed; i++) {
        int32_t number = batch.tables[s * batch.width + i];
        check(number >= 0 && number < cache.dims[0], "a block number is out of range");
      }
    }
    float* y = ort::output<float>(context, 0, {qkv.dims[0], (int64_t)a.heads * a.head_size});
    instruction_set()->attend(a, (const float*)qkv.data, batch, y, pool);
  }
};

struct SelectKernel {
  explicit SelectKernel(const Info&) {}

  void run(OrtKernelContext* context, const Pool& pool) const {
    ort::Tensor logits = ort::input(context, 0), temperature = ort::input(context, 1);
    check(logits.present && logits.rank == 2, "logits must be [rows, vocabulary]");
    check(temperature.present && temperature.count() == (size_t)logits.dims[0], "temperature must be [rows]");
    int32_t* candidates = ort::output<int32_t>(context, 0, {logits.dims[0], kCandidates});
    float* total = ort::output<float>(context, 1, {logits.dims[0]});
    instruction_set()->select((const float*)logits.data, (const float*)temperature.data, (int)logits.dims[0],
                              (int)logits.dims[1], candidates, total, pool);
  }
};

// ---- registration

struct Operator : OrtCustomOp {
  const char* name;
  std::vector<int> inputs, outputs;  // element types
  size_t required;                   // inputs that are never absent
};

OrtStatus* explained(const char* name, const std::exception& error) {
  return ort::error(kInvalidArgument, std::string(name) + ": " + error.what());
}

template <class Kernel> Operator make(const char* name, std::vector<int> inputs, size_t required, std::vector<int> outputs) {
  static const char* const name_of_kernel = name;
  Operator o{};
  o.version = kOperatorVersion;
  o.name = name;
  o.inputs = std::move(inputs);
  o.outputs = std::move(outputs);
  o.required = required;
  o.GetName = [](const OrtCustomOp* op) { return ((const Operator*)op)->name; };
  o.GetExecutionProviderType = [](const OrtCustomOp*) { return "CPUExecutionProvider"; };
  o.GetInputType = [](const OrtCustomOp* op, size_t i) { return ((const Operator*)op)->inputs[i]; };
  o.GetInputTypeCount = [](const OrtCustomOp* op) { return ((const Operator*)op)->inputs.size(); };
  o.GetOutputType = [](const OrtCustomOp* op, size_t i) { return ((const Operator*)op)->outputs[i]; };
  o.GetOutputTypeCount = [](const OrtCustomOp* op) { return ((const Operator*)op)->outputs.size(); };
  o.KernelDestroy = [](void* kernel) { delete (Kernel*)kernel; };
  o.GetInputCharacteristic = [](const OrtCustomOp* op, size_t i) { return (int)(i >= ((const Operator*)op)->required); };
  o.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return 0; };
  o.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return 0; };
  for (auto& variadic : o.GetVariadic) variadic = [](const OrtCustomOp*) { return 1; };
  o.CreateKernelV2 = [](const OrtCustomOp* op, void* const*, const OrtKernelInfo* info, void** kernel) -> OrtStatus* {
    try {
      *kernel = new Kernel(Info{info});
      return nullptr;
    } catch (const std::exception& error) {
      return explained(((const Operator*)op)->name, error);
    }
  };
  o.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) -> OrtStatus* {
    try {
      ((const Kernel*)kernel)->run(context, Pool{context, run_task});
      return nullptr;
    } catch (const std::exception& error) {
      return explained(name_of_kernel, error);
    }
  };
  return o;
}

}  // namespace
}  // namespace pawl

// The instruction set in use, "" if this processor has none of them.
extern "C" __attribute__((visibility("default"))) const char* pawl_instruction_set() {
  return pawl::instruction_set() ? pawl::instruction_set()->name : "";
}

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                                const OrtApiBase* base) {
  using namespace pawl;
  ort::api = base->GetApi(kApiVersion);
  if (!ort::api) {  // as old as the first version: its first function makes a status
    void* const* oldest = base->GetApi(1);
    return ((OrtStatus * (*)(int, const char*)) oldest[ort::kCreateStatus])(kFail, "ONNX Runtime is older than 1.17");
  }
  if (!instruction_set()) return ort::error(kFail, "this processor has neither AVX2 nor what PAWL_INSTRUCTION_SET names");
  static const Operator operators[] = {
      make<Linear8Kernel>("Linear8", {kFloat, kInt8, kFloat, kInt32, kFloat, kFloat, kFloat, kFloat}, 4, {kFloat}),
      make<Linear4Kernel>("Linear4", {kFloat, kUint8, kFloat, kUint8, kFloat, kFloat, kFloat, kFloat}, 4, {kFloat}),
      make<AddNormedKernel>("AddNormed", {kFloat, kFloat, kFloat}, 3, {kFloat}),
      make<EmbedKernel>("Embed", {kInt64, kInt8, kFloat, kInt32, kFloat}, 4, {kFloat}),
      make<AttendKernel>("Attend", {kFloat, kUint8, kInt32, kInt32, kFloat, kFloat, kFloat, kFloat}, 4, {kFloat}),
      make<SelectKernel>("Select", {kFloat, kFloat}, 2, {kInt32, kFloat}),
  };
  static OrtCustomOpDomain* domain = nullptr;  // one for all sessions of the process
  static OrtStatus* const failed = [] {
    OrtStatus* status = ort::call<OrtStatus*>(ort::kCreateCustomOpDomain, "pawl", &domain);
    for (const Operator& o : operators)
      if (!status) status = ort::call<OrtStatus*>(ort::kCustomOpDomainAdd, domain, (const OrtCustomOp*)&o);
    return status;
  }();
  if (failed) return ort::error(kFail, "the operators could not be added to their domain");
  return ort::call<OrtStatus*>(ort::kAddCustomOpDomain, options, domain);
}
