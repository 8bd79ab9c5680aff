// The TensorRT plugin without TensorRT: created, serialised, created again, and run on host memory.
#include <NvInfer.h>

#include <cstdio>
#include <vector>

#include "qk_norm_rope/qk_norm_rope.h"
#include "test_values.h"

using namespace nvinfer1;

STG_EXPORT IPluginCreatorInterface* const* getCreators(int32_t& count);

namespace {

constexpr int64_t kRows = 2, kTokens = 3, kChannels = 16, kPairs = 4, kSize = kRows * kTokens * kChannels;
constexpr int32_t kGroup = 4, kInputs = 6, kOutputs = 2;
constexpr float kEps = 0.25f;

PluginTensorDesc tensor(std::vector<int64_t> shape, DataType type = DataType::kFLOAT) {
  PluginTensorDesc desc{};
  desc.dims.nbDims = static_cast<int32_t>(shape.size());
  for (size_t i = 0; i < shape.size(); ++i) desc.dims.d[i] = shape[i];
  desc.type = type;
  desc.format = TensorFormat::kLINEAR;
  return desc;
}

std::vector<PluginTensorDesc> tensors() {
  const PluginTensorDesc rows = tensor({kRows, kTokens, kChannels}), weight = tensor({kGroup});
  const PluginTensorDesc table = tensor({kTokens, kPairs});
  return {rows, rows, weight, weight, table, table, rows, rows};
}

template <class Capability>
Capability* capability(IPluginV3* plugin, PluginCapabilityType type) {
  return static_cast<Capability*>(plugin->getCapabilityInterface(type));
}

void check_build(stg_test::Checks& checks, IPluginV3* plugin) {
  auto* build = capability<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
  std::vector<DynamicPluginTensorDesc> all(kInputs + kOutputs);
  for (size_t i = 0; i < all.size(); ++i) all[i].desc = tensors()[i];
  const auto supported = [&](int32_t at) {
    return build->supportsFormatCombination(at, all.data(), kInputs, kOutputs);
  };
  const auto configured = [&] { return build->configurePlugin(all.data(), kInputs, all.data() + kInputs, kOutputs); };
  for (int32_t i = 0; i < kInputs + kOutputs; ++i) checks.expect(supported(i), "supported", i, 0);
  checks.expect(configured() == 0, "configured", 0, 0);
  all[1].desc.type = DataType::kBF16;
  checks.expect(!supported(1), "k of another type", 1, 0);
  all[4].desc.type = DataType::kHALF;
  checks.expect(!supported(4), "tables in half", 4, 0);
  all[0].desc.type = DataType::kINT32;
  checks.expect(!supported(0), "integers", 0, 0);
  all[3].desc.dims.d[0] = kGroup + 1;
  checks.expect(configured() != 0, "a weight of another size", 3, 0);
  const DataType types[kInputs] = {DataType::kBF16, DataType::kBF16};
  DataType outputs[kOutputs] = {};
  checks.expect(build->getOutputDataTypes(outputs, kOutputs, types, kInputs) == 0, "types", 0, 0);
  checks.expect(outputs[0] == DataType::kBF16 && outputs[1] == DataType::kBF16, "types of q and k", 0, 0);
}

void check_run(stg_test::Checks& checks, IPluginV3* plugin) {
  auto* runtime = capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
  std::vector<PluginTensorDesc> all = tensors();
  checks.expect(runtime->onShapeChange(all.data(), kInputs, all.data() + kInputs, kOutputs) == 0, "shapes", 0, 0);
  std::vector<float> inputs[kInputs], got[2], expected[2];
  const int64_t sizes[kInputs] = {kSize, kSize, kGroup, kGroup, kTokens * kPairs, kTokens * kPairs};
  const void* from[kInputs];
  for (int i = 0; i < kInputs; ++i) from[i] = (inputs[i] = stg_test::values(sizes[i], i)).data();
  for (int side = 0; side < 2; ++side) got[side].resize(kSize), expected[side].resize(kSize);
  void* to[2] = {got[0].data(), got[1].data()};
  checks.expect(runtime->enqueue(all.data(), all.data() + kInputs, from, to, nullptr, nullptr) == 0, "enqueued", 0, 0);
  StgQKNormRope p{};
  p.q = from[0], p.k = from[1], p.q_out = expected[0].data(), p.k_out = expected[1].data();
  p.q_weight = inputs[2].data(), p.k_weight = inputs[3].data(), p.cos = inputs[4].data(), p.sin = inputs[5].data();
  p.rows = kRows, p.tokens = kTokens, p.channels = kChannels, p.group = kGroup, p.table_pairs = kPairs;
  p.eps = kEps;
  checks.expect(stg_qk_norm_rope(&p, nullptr) == 0, "the kernel", 0, 0);
  for (int side = 0; side < 2; ++side) checks.expect(got[side] == expected[side], "the plugin differs", side, 0);
  all[4].dims.d[0] = kTokens + 1;
  const bool refused = runtime->onShapeChange(all.data(), kInputs, all.data() + kInputs, kOutputs) != 0;
  checks.expect(refused, "tables of another length", 4, 0);
}

}  // namespace

int main() {
  stg_test::Checks checks;
  int32_t count = 0;
  auto* creator = static_cast<IPluginCreatorV3One*>(getCreators(count)[0]);
  checks.expect(count == 1 && creator->getFieldNames()->nbFields == 2, "creators", count, 1);
  PluginField fields[] = {PluginField("group", &kGroup, PluginFieldType::kINT32, 1),
                          PluginField("eps", &kEps, PluginFieldType::kFLOAT32, 1)};
  PluginFieldCollection given{2, fields};
  IPluginV3* plugin = creator->createPlugin("QKNormRope", &given, TensorRTPhase::kBUILD);
  check_build(checks, plugin);
  auto* written = capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME)->getFieldsToSerialize();
  IPluginV3* read = creator->createPlugin("QKNormRope", written, TensorRTPhase::kRUNTIME);
  IPluginV3* cloned = read->clone();
  check_run(checks, cloned);
  given.nbFields = 1;
  checks.expect(creator->createPlugin("QKNormRope", &given, TensorRTPhase::kBUILD) == nullptr, "no eps", 0, 0);
  for (IPluginV3* made : {plugin, read, cloned}) delete made;
  return checks.result();
}
