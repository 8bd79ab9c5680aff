// The kernels against float64. Built as it is, and with the mutants.
#include "qk_norm_rope/qk_norm_rope.cu"

#include <algorithm>
#include <cmath>
#include <vector>

#include "test_values.h"

namespace {

using stg_test::Checks;
using stg_test::values;

constexpr float kEps = 0.25f;

struct Case {
  int64_t rows, tokens, channels, group, table;  // table: channels that it covers; 0: no rotation
  bool keys, centred, in_place;
};

struct Tensors {
  std::vector<float> in[2], weight[2], bias[2], cos, sin;
};

Tensors tensors_of(const Case& c) {
  Tensors t;
  for (uint32_t side = 0; side < 2; ++side) {
    t.in[side] = values(c.rows * c.tokens * c.channels, side + 1);
    for (float& x : t.in[side]) x = 3.0f * x + 0.7f;
    t.weight[side] = values(c.group, side + 3);
    t.bias[side] = values(c.group, side + 5);
  }
  t.cos = values(c.tokens * c.table / 2, 7);
  t.sin = values(c.tokens * c.table / 2, 8);
  return t;
}

// `shift` floats away from an aligned address.
cudaError_t run(const Case& c, const Tensors& t, int64_t shift, std::vector<float> (&out)[2]) {
  const int64_t size = c.rows * c.tokens * c.channels;
  std::vector<float> in[2];
  float* to[2];
  for (int side = 0; side < 2; ++side) {
    in[side].assign(shift, 0.0f);
    in[side].insert(in[side].end(), t.in[side].begin(), t.in[side].end());
    out[side].assign(shift + size + 16, NAN);
    to[side] = (c.in_place ? in[side] : out[side]).data() + shift;
  }
  StgQKNormRope p{};
  p.q = in[0].data() + shift;
  p.q_out = to[0];
  if (c.keys) p.k = in[1].data() + shift, p.k_out = to[1];
  p.q_weight = t.weight[0].data(), p.k_weight = t.weight[1].data();
  if (c.centred) p.q_bias = t.bias[0].data(), p.k_bias = t.bias[1].data();
  if (c.table) p.cos = t.cos.data(), p.sin = t.sin.data();
  p.rows = c.rows, p.tokens = c.tokens, p.channels = c.channels, p.group = c.group, p.table_pairs = c.table / 2;
  p.eps = kEps;
  p.centred = c.centred;
  const int error = stg_qk_norm_rope(&p, nullptr);
  for (int side = 0; side < 2; ++side) {
    if (c.in_place) std::copy(in[side].begin(), in[side].end(), out[side].begin());
  }
  return static_cast<cudaError_t>(error);
}

// One group of channels: norm, weight, bias; `from` and the result are `group` values.
std::vector<double> normed(const Case& c, const float* from, const Tensors& t, int side) {
  std::vector<double> x(from, from + c.group);
  double mean = 0, squares = 0;
  for (double value : x) mean += value / c.group;
  if (!c.centred) mean = 0;
  for (double& value : x) value -= mean, squares += value * value / c.group;
  for (int64_t i = 0; i < c.group; ++i) {
    x[i] = x[i] / std::sqrt(squares + kEps) * t.weight[side][i] + (c.centred ? t.bias[side][i] : 0.0f);
  }
  return x;
}

std::vector<double> expected(const Case& c, const Tensors& t, int side) {
  std::vector<double> result;
  for (int64_t at = 0; at < c.rows * c.tokens * c.channels; at += c.group) {
    const std::vector<double> x = normed(c, t.in[side].data() + at, t, side);
    for (int64_t i = 0; i < c.group; ++i) {
      if (c.table == 0) {
        result.push_back(x[i]);
        continue;
      }
      const int64_t entry = (at / c.channels % c.tokens * c.table + (at % c.channels + i) % c.table) / 2;
      const double other = i % 2 == 0 ? -x[i + 1] : x[i - 1];
      result.push_back(x[i] * t.cos[entry] + other * t.sin[entry]);
    }
  }
  return result;
}

void check(Checks& checks, const Case& c, int64_t shift) {
  const Tensors t = tensors_of(c);
  std::vector<float> out[2];
  checks.expect(run(c, t, shift, out) == cudaSuccess, "not launched", c.channels, c.group);
  for (int side = 0; side < (c.keys ? 2 : 1); ++side) {
    const std::vector<double> wanted = expected(c, t, side);
    double worst = 0;
    for (size_t i = 0; i < wanted.size(); ++i) {
      const double error = std::fabs(out[side][shift + i] - wanted[i]);
      worst = error > worst || error != error ? error : worst;
    }
    checks.expect(worst < 2e-5, "off by more than 2e-5", c.channels, c.group);
    for (int i = 0; !c.in_place && i < 16; ++i) {
      checks.expect(std::isnan(out[side][shift + wanted.size() + i]), "written behind the end", c.channels, i);
    }
  }
}

void check_valid(Checks& checks) {
  float one;
  StgQKNormRope p{};
  p.q = p.q_out = &one;
  p.cos = p.sin = &one;
  p.rows = p.tokens = 1, p.channels = 64, p.group = p.table_pairs = 32;
  checks.expect(stg::norm_valid(p), "valid", p.channels, p.group);
  for (int64_t group : {0, 48, 16384}) {
    StgQKNormRope other = p;
    other.group = group;
    checks.expect(!stg::norm_valid(other), "a group that does not fit", p.channels, group);
  }
  for (int64_t pairs : {0, 24, 64}) {
    StgQKNormRope other = p;
    other.table_pairs = pairs;
    checks.expect(!stg::norm_valid(other), "a table that does not fit", p.channels, pairs);
  }
  p.k = &one;
  checks.expect(!stg::norm_valid(p), "k without k_out", 0, 0);
}

}  // namespace

int main() {
  Checks checks;
  check_valid(checks);
  // Groups within a warp, over a block, with ragged ends; several groups and blocks; tables of a head, of all.
  const int64_t sizes[][5] = {{1, 1, 8, 8, 8},     {2, 3, 64, 64, 64},  {2, 5, 96, 32, 32},    {3, 3, 24, 8, 24},
                              {1, 300, 16, 8, 16}, {1, 2, 256, 256, 0}, {2, 2, 512, 512, 512}, {2, 20, 40, 40, 8},
                              {2, 3, 36, 12, 12},  {1, 2, 10, 2, 10},   {2, 2, 768, 384, 384}, {1, 3, 21, 7, 0},
                              {1, 2, 36, 12, 2},   {1, 1, 8192, 8192, 0}};
  for (const auto& size : sizes) {
    for (int options = 0; options < 8; ++options) {
      const Case c{size[0], size[1], size[2], size[3], size[4], options % 2 == 1, options / 2 % 2 == 1, options >= 4};
      stg_test::set_order(stg_test::kOrders[(options + size[2]) % 3]);
      for (int64_t shift : {0, 1}) check(checks, c, shift);
    }
  }
  return checks.result();
}
