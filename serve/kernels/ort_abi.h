// The few pieces of ONNX Runtime's C ABI that an operator library needs; its header is not in the Python wheel.
//
// OrtApi is a table of function pointers that only ever grows, so a position holds for every later version. The
// positions are those of onnxruntime_c_api.h; what is asked for exists since version 1.17.
#pragma once
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <new>
#include <string>

struct OrtStatus;
struct OrtKernelContext;
struct OrtKernelInfo;
struct OrtSessionOptions;
struct OrtValue;
struct OrtCustomOpDomain;
struct OrtTensorTypeAndShapeInfo;
struct OrtApiBase {
  void* const* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

constexpr uint32_t kApiVersion = 17, kOperatorVersion = 16;

// As ONNX Runtime declares it, version 16; the two first functions are replaced by their V2.
struct OrtCustomOp {
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp*, void* const*, const OrtKernelInfo*);
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);
  int (*GetInputType)(const OrtCustomOp*, size_t);
  size_t (*GetInputTypeCount)(const OrtCustomOp*);
  int (*GetOutputType)(const OrtCustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void (*KernelCompute)(void*, OrtKernelContext*);
  void (*KernelDestroy)(void*);
  int (*GetInputCharacteristic)(const OrtCustomOp*, size_t);
  int (*GetOutputCharacteristic)(const OrtCustomOp*, size_t);
  int (*GetInputMemoryType)(const OrtCustomOp*, size_t);
  int (*GetVariadic[4])(const OrtCustomOp*);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, void* const*, const OrtKernelInfo*, void** kernel);
  OrtStatus* (*KernelComputeV2)(void* kernel, OrtKernelContext*);
  void* unused[8];  // shape inference, versions, in-place hints: optional
};

enum ElementType { kFloat = 1, kUint8 = 2, kInt8 = 3, kInt32 = 6, kInt64 = 7 };
enum ErrorCode { kFail = 1, kInvalidArgument = 2 };

namespace ort {

enum Slot {  // position in OrtApi
  kCreateStatus = 0,
  kCreateCustomOpDomain = 26,
  kCustomOpDomainAdd = 27,
  kAddCustomOpDomain = 28,
  kGetTensorMutableData = 51,
  kGetDimensionsCount = 61,
  kGetDimensions = 62,
  kGetTensorTypeAndShape = 65,
  kKernelInfoGetAttributeFloat = 85,
  kKernelInfoGetAttributeInt64 = 86,
  kKernelContextGetInput = 90,
  kKernelContextGetOutput = 91,
  kReleaseStatus = 93,
  kReleaseTensorTypeAndShapeInfo = 99,
  kKernelInfoGetConstantInput = 249,
  kKernelContextParallelFor = 274,
};

extern void* const* api;

template <class Result, class... Args> Result call(Slot slot, Args... args) {
  return ((Result(*)(Args...))api[slot])(args...);
}

inline OrtStatus* error(ErrorCode code, const std::string& message) {
  return call<OrtStatus*, int, const char*>(kCreateStatus, code, message.c_str());
}

// True if the call succeeded; the status of a failed one is released.
template <class... Args> bool succeeds(Slot slot, Args... args) {
  OrtStatus* status = call<OrtStatus*>(slot, args...);
  if (status) call<void>(kReleaseStatus, status);
  return !status;
}

struct Tensor {
  bool present = false;  // an empty tensor is, and has no data
  char* data = nullptr;
  int64_t dims[4] = {};
  size_t rank = 0;
  size_t count() const {
    size_t n = 1;
    for (size_t i = 0; i < rank; i++) n *= dims[i];
    return n;
  }
};

inline Tensor tensor(const OrtValue* value) {
  Tensor t;
  OrtTensorTypeAndShapeInfo* shape = nullptr;
  if (!value || !succeeds(kGetTensorTypeAndShape, value, &shape)) return t;
  bool known = succeeds(kGetDimensionsCount, (const OrtTensorTypeAndShapeInfo*)shape, &t.rank) && t.rank <= 4 &&
               succeeds(kGetDimensions, (const OrtTensorTypeAndShapeInfo*)shape, t.dims, t.rank);
  call<void>(kReleaseTensorTypeAndShapeInfo, shape);
  t.present = known && succeeds(kGetTensorMutableData, (OrtValue*)value, (void**)&t.data);
  return t;
}

inline Tensor input(OrtKernelContext* context, size_t index) {
  const OrtValue* value = nullptr;
  return succeeds(kKernelContextGetInput, (const OrtKernelContext*)context, index, &value) ? tensor(value) : Tensor{};
}

template <class T> T* output(OrtKernelContext* context, size_t index, std::initializer_list<int64_t> dims) {
  OrtValue* value = nullptr;
  T* data = nullptr;
  if (!succeeds(kKernelContextGetOutput, context, index, dims.begin(), dims.size(), &value) ||
      !succeeds(kGetTensorMutableData, value, (void**)&data))
    throw std::bad_alloc();
  return data;
}

}  // namespace ort
