// stg_trt::QKNormRope of ONNX as a TensorRT plugin.
//
// Inputs: q and k (rows, tokens, channels) in float32, float16 or bfloat16; their weights (group), cos and
// sin (tokens, table pairs), all float32. Outputs: q and k. Attributes: group, 0 for all channels; eps.
// TensorRT finds the creators through the exported functions; nothing of TensorRT is linked.
#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include <array>
#include <cstring>
#include <new>

#include "qk_norm_rope/qk_norm_rope.h"

namespace {

using namespace nvinfer1;

constexpr char kName[] = "QKNormRope";
constexpr char kVersion[] = "2";
constexpr char kNamespace[] = "stg_trt";

enum Input { kQ, kK, kQWeight, kKWeight, kCos, kSin, kInputs };
constexpr int32_t kOutputs = 2;

struct Attributes {
  int32_t group = 0;
  float eps = -1.0f;  // must be given
};

int32_t dtype_of(DataType type) {
  switch (type) {
    case DataType::kFLOAT:
      return kStgFloat32;
    case DataType::kHALF:
      return kStgFloat16;
    case DataType::kBF16:
      return kStgBfloat16;
    default:
      return -1;
  }
}

class QKNormRope final : public IPluginV3, public IPluginV3OneCore, public IPluginV3OneBuild, public IPluginV3OneRuntime {
 public:
  explicit QKNormRope(Attributes attributes) : attributes_(attributes) {}

  IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
    switch (type) {
      case PluginCapabilityType::kCORE:
        return static_cast<IPluginV3OneCore*>(this);
      case PluginCapabilityType::kBUILD:
        return static_cast<IPluginV3OneBuild*>(this);
      case PluginCapabilityType::kRUNTIME:
        return static_cast<IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }

  IPluginV3* clone() noexcept override { return new (std::nothrow) QKNormRope(attributes_); }

  AsciiChar const* getPluginName() const noexcept override { return kName; }
  AsciiChar const* getPluginVersion() const noexcept override { return kVersion; }
  AsciiChar const* getPluginNamespace() const noexcept override { return kNamespace; }

  int32_t getNbOutputs() const noexcept override { return kOutputs; }

  int32_t getOutputDataTypes(DataType* outputs, int32_t output_count, DataType const* inputs,
                             int32_t input_count) const noexcept override {
    if (output_count != kOutputs || input_count != kInputs) return -1;
    outputs[0] = inputs[kQ];
    outputs[1] = inputs[kK];
    return 0;
  }

  int32_t getOutputShapes(DimsExprs const* inputs, int32_t input_count, DimsExprs const*, int32_t,
                          DimsExprs* outputs, int32_t output_count, IExprBuilder&) noexcept override {
    if (output_count != kOutputs || input_count != kInputs || inputs[kQ].nbDims != 3) return -1;
    outputs[0] = inputs[kQ];
    outputs[1] = inputs[kK];
    return 0;
  }

  bool supportsFormatCombination(int32_t position, DynamicPluginTensorDesc const* tensors, int32_t input_count,
                                 int32_t) noexcept override {
    const PluginTensorDesc& tensor = tensors[position].desc;
    if (tensor.format != TensorFormat::kLINEAR) return false;
    if (position == kQ) return dtype_of(tensor.type) >= 0;
    if (position == kK || position >= input_count) return tensor.type == tensors[kQ].desc.type;
    return tensor.type == DataType::kFLOAT;
  }

  // Rows, and tokens, may still be open here: only what the channels say is checked.
  int32_t configurePlugin(DynamicPluginTensorDesc const* in, int32_t input_count, DynamicPluginTensorDesc const*,
                          int32_t) noexcept override {
    if (input_count != kInputs) return -1;
    PluginTensorDesc tensors[kInputs];
    for (int32_t i = 0; i < kInputs; ++i) tensors[i] = in[i].desc;
    return fits(tensors) ? 0 : -1;
  }

  int32_t onShapeChange(PluginTensorDesc const* in, int32_t, PluginTensorDesc const*, int32_t) noexcept override {
    return fits(in) && in[kCos].dims.d[0] == in[kQ].dims.d[1] ? 0 : -1;
  }

  int32_t enqueue(PluginTensorDesc const* in, PluginTensorDesc const*, void const* const* inputs,
                  void* const* outputs, void*, cudaStream_t stream) noexcept override {
    StgQKNormRope norm = {};
    norm.q = inputs[kQ];
    norm.k = inputs[kK];
    norm.q_out = outputs[0];
    norm.k_out = outputs[1];
    norm.q_weight = static_cast<const float*>(inputs[kQWeight]);
    norm.k_weight = static_cast<const float*>(inputs[kKWeight]);
    norm.cos = static_cast<const float*>(inputs[kCos]);
    norm.sin = static_cast<const float*>(inputs[kSin]);
    norm.rows = in[kQ].dims.d[0];
    norm.tokens = in[kQ].dims.d[1];
    norm.channels = in[kQ].dims.d[2];
    norm.group = in[kQWeight].dims.d[0];
    norm.table_pairs = in[kCos].dims.d[1];
    norm.eps = attributes_.eps;
    norm.dtype = dtype_of(in[kQ].type);
    return stg_qk_norm_rope(&norm, stream);
  }

  IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }

  PluginFieldCollection const* getFieldsToSerialize() noexcept override {
    fields_ = {PluginField("group", &attributes_.group, PluginFieldType::kINT32, 1),
               PluginField("eps", &attributes_.eps, PluginFieldType::kFLOAT32, 1)};
    collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
    return &collection_;
  }

 private:
  // q and k alike; one weight per channel of a group; tables for the pairs of all channels or of a part that repeats.
  bool fits(PluginTensorDesc const* tensors) const {
    const Dims& q = tensors[kQ].dims;
    const Dims& k = tensors[kK].dims;
    if (q.nbDims != 3 || k.nbDims != 3 || tensors[kCos].dims.nbDims != 2 || tensors[kSin].dims.nbDims != 2) return false;
    const int64_t channels = q.d[2], group = attributes_.group == 0 ? channels : attributes_.group;
    const int64_t pairs = tensors[kCos].dims.d[1];
    return k.d[1] == q.d[1] && k.d[2] == channels && group > 0 && group % 2 == 0 && channels % group == 0 &&
           tensors[kQWeight].dims.nbDims == 1 && tensors[kQWeight].dims.d[0] == group &&
           tensors[kKWeight].dims.nbDims == 1 && tensors[kKWeight].dims.d[0] == group && pairs > 0 &&
           channels % (2 * pairs) == 0 && tensors[kSin].dims.d[1] == pairs;
  }

  Attributes attributes_;
  std::array<PluginField, 2> fields_;
  PluginFieldCollection collection_;
};

// Of a node's attributes, or of what getFieldsToSerialize wrote.
Attributes attributes_of(PluginFieldCollection const& given) {
  Attributes attributes;
  for (int32_t i = 0; i < given.nbFields; ++i) {
    const PluginField& field = given.fields[i];
    if (std::strcmp(field.name, "group") == 0 && field.type == PluginFieldType::kINT32) {
      attributes.group = *static_cast<const int32_t*>(field.data);
    } else if (std::strcmp(field.name, "eps") == 0 && field.type == PluginFieldType::kFLOAT32) {
      attributes.eps = *static_cast<const float*>(field.data);
    }
  }
  return attributes;
}

class Creator final : public IPluginCreatorV3One {
 public:
  IPluginV3* createPlugin(AsciiChar const*, PluginFieldCollection const* given, TensorRTPhase) noexcept override {
    const Attributes attributes = attributes_of(*given);
    return attributes.eps < 0.0f ? nullptr : new (std::nothrow) QKNormRope(attributes);
  }

  PluginFieldCollection const* getFieldNames() noexcept override { return &collection_; }
  AsciiChar const* getPluginName() const noexcept override { return kName; }
  AsciiChar const* getPluginVersion() const noexcept override { return kVersion; }
  AsciiChar const* getPluginNamespace() const noexcept override { return kNamespace; }

 private:
  std::array<PluginField, 2> fields_{PluginField("group", nullptr, PluginFieldType::kINT32, 1),
                                     PluginField("eps", nullptr, PluginFieldType::kFLOAT32, 1)};
  PluginFieldCollection collection_{static_cast<int32_t>(fields_.size()), fields_.data()};
};

}  // namespace

// IPluginRegistry::loadLibrary looks for these two functions.
STG_EXPORT void setLoggerFinder(ILoggerFinder*) {}

STG_EXPORT IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static Creator creator;
  static IPluginCreatorInterface* const creators[] = {&creator};
  count = 1;
  return creators;
}
