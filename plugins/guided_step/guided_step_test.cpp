// The kernels, over several steps, against float64. Built as it is, and with the mutants.
#include "guided_step/guided_step.cu"

#include <cmath>
#include <vector>

#include "test_values.h"

namespace {

using stg_test::Checks;

constexpr int64_t kSteps = 3, kCapacity = 4, kSlots = 7, kGuard = 64, kMostPasses = 5;

struct Case {
  int64_t videos, length;
  float mean;
  int passes;  // cond is the first, or the second, after uncond
  bool uncond, rescaled, single_step, cfg_zero_star;
  int64_t shift;  // values from an aligned address
  int64_t frames = 1;
  bool of_clean = false;  // what is rescaled are the clean latents that velocities mean

  int64_t size() const { return videos * length; }
  int cond() const { return uncond ? 1 : 0; }
};

// One entry per step; what no step reads is not a number.
struct Tables {
  std::vector<float> weights;  // (steps, passes, frames); the one of cond stays a NaN
  std::vector<float> rescale{0.7f, 0.0f, 1.0f, NAN};
  std::vector<float> noise_level{0.9f, 0.6f, 0.3f, NAN};
  std::vector<float> latents_factor{1.0f, 0.9f, 1.1f, NAN};
  std::vector<float> pred_factor{-0.05f, -0.3f, 0.2f, NAN};
  std::vector<float> initial_factor{0.8f, 0.5f, 0.3f, NAN};
  // Predictions up to the step's own, then the noise, of which the last was never drawn.
  std::vector<float> history_factors{0.4f,  NAN,  NAN,   NAN, 0.2f,  0.0f,  0.0f,  //
                                     -0.3f, 0.6f, NAN,   NAN, -0.1f, -0.4f, 0.0f,  //
                                     0.0f,  0.7f, -0.2f, NAN, 0.3f,  0.5f,  0.0f,  //
                                     NAN,   NAN,  NAN,   NAN, NAN,   NAN,   NAN};

  explicit Tables(const Case& c) : weights(kCapacity * kMostPasses * c.frames, NAN) {
    for (int64_t step = 0; step < kSteps; ++step) {
      for (int pass = 0; pass < c.passes; ++pass) {
        for (int64_t frame = 0; frame < c.frames; ++frame) {
          // Different everywhere; on the second step the first pass is off.
          const float weight = step == 1 && pass == 0 ? 0.0f : -1.5f + 0.4f * pass + 0.3f * step + 0.125f * frame;
          if (pass != c.cond()) weights[(step * kMostPasses + pass) * c.frames + frame] = weight;
        }
      }
    }
  }
};

std::vector<float> normal(int64_t count, uint32_t seed, float mean) {
  std::vector<float> made = stg_test::values(count, seed);
  for (float& value : made) value = 2.0f * value + mean;
  return made;
}

template <class T>
struct State {
  std::vector<T> preds;
  std::vector<float> latents, initial, history;
  Tables tables;
  int64_t counter = 0;
  unsigned finished = 0;
  std::vector<char> workspace;

  explicit State(const Case& c) : tables(c), workspace(stg_guided_step_workspace(c.videos) + kGuard, -1) {
    const int64_t size = c.shift + c.size();
    uint32_t seed = static_cast<uint32_t>(c.length + 7 * c.passes);
    for (float value : normal(c.shift + c.passes * c.size(), ++seed, c.mean)) {
      preds.push_back(stg::Cast<T>::from_float(value));
    }
    latents = normal(size, ++seed, c.mean);
    initial = latents;
    history.assign(c.shift + kSlots * c.size(), NAN);
    for (int64_t j : {kCapacity, kCapacity + 1}) {
      const std::vector<float> noise = normal(c.size(), ++seed, 0.0f);
      std::copy(noise.begin(), noise.end(), history.begin() + c.shift + j * c.size());
    }
  }

  StgGuidedStep parameters(const Case& c) {
    StgGuidedStep p{};
    p.preds = preds.data() + c.shift;
    p.latents = latents.data() + c.shift;
    p.weights = tables.weights.data(), p.rescale = tables.rescale.data();
    p.noise_level = c.of_clean ? tables.noise_level.data() : nullptr;
    p.latents_factor = tables.latents_factor.data(), p.pred_factor = tables.pred_factor.data();
    p.history = history.data() + c.shift, p.initial = initial.data() + c.shift;
    p.initial_factor = tables.initial_factor.data(), p.history_factors = tables.history_factors.data();
    p.capacity = kCapacity, p.slots = kSlots;
    p.counter = &counter, p.finished = &finished, p.workspace = workspace.data();
    p.videos = c.videos, p.length = c.length, p.frames = c.frames, p.weights_stride = kMostPasses * c.frames;
    p.passes = c.passes, p.cond = c.cond(), p.uncond = c.cfg_zero_star ? 0 : -1;
    p.dtype = sizeof(T) == 4 ? kStgFloat32 : kStgBfloat16;
    p.rescaled = c.rescaled, p.single_step = c.single_step;
    return p;
  }
};

double standard_deviation(const double* values, int64_t count) {
  double mean = 0, sum = 0;
  for (int64_t i = 0; i < count; ++i) mean += values[i] / count;
  for (int64_t i = 0; i < count; ++i) sum += (values[i] - mean) * (values[i] - mean);
  return std::sqrt(sum / (count - 1));
}

// The equations in float64: prediction after prediction, and the latents that they lead to.
template <class T>
class Reference {
 public:
  Reference(const Case& c, const State<T>& start)
      : c_(c), start_(start), latents(start.latents.begin() + c.shift, start.latents.end()) {}

  void advance(int64_t step) {
    preds.push_back(guided(step));
    const Tables& t = start_.tables;
    for (size_t i = 0; i < latents.size(); ++i) {
      if (c_.single_step) {
        latents[i] = double(t.latents_factor[step]) * latents[i] + double(t.pred_factor[step]) * preds[step][i];
        continue;
      }
      latents[i] = double(t.initial_factor[step]) * start_.initial[c_.shift + i];
      const float* factors = t.history_factors.data() + step * kSlots;
      for (int64_t j = 0; j <= step; ++j) latents[i] += double(factors[j]) * preds[j][i];
      for (int64_t j = kCapacity; j + 1 < kSlots; ++j) {
        latents[i] += double(factors[j]) * start_.history[c_.shift + j * latents.size() + i];
      }
    }
  }

 private:
  std::vector<double> guided(int64_t step) const {
    const double rescale = c_.rescaled ? start_.tables.rescale[step] : 0.0;
    std::vector<double> cond(latents.size()), pred(latents.size());
    double factor = 1.0;
    for (size_t i = 0; i < pred.size(); ++i) {
      if (c_.cfg_zero_star && i % c_.length == 0) factor = projection(i);
      cond[i] = value(c_.cond(), i);
      double of_cond = 1.0;
      for (int pass = 0; pass < c_.passes; ++pass) {
        if (pass == c_.cond()) continue;
        const int64_t frame = i % c_.length / (c_.length / c_.frames);
        const double weight = start_.tables.weights[(step * kMostPasses + pass) * c_.frames + frame];
        pred[i] += weight * value(pass, i) * (c_.cfg_zero_star && pass == 0 ? factor : 1.0);
        of_cond -= weight;
      }
      pred[i] += of_cond * cond[i];
    }
    for (size_t at = 0; rescale != 0 && at < pred.size(); at += c_.length) {
      const double level = c_.of_clean ? start_.tables.noise_level[step] : 0.0;
      std::vector<double> of_cond(c_.length), of_pred(c_.length);
      for (int64_t i = 0; i < c_.length; ++i) {
        of_cond[i] = c_.of_clean ? latents[at + i] - level * cond[at + i] : cond[at + i];
        of_pred[i] = c_.of_clean ? latents[at + i] - level * pred[at + i] : pred[at + i];
      }
      const double ratio = standard_deviation(of_cond.data(), c_.length) / standard_deviation(of_pred.data(), c_.length);
      const double factor = rescale * ratio + (1 - rescale);
      for (int64_t i = 0; i < c_.length; ++i) {
        pred[at + i] *= factor;
        if (c_.of_clean) pred[at + i] += (1 - factor) * latents[at + i] / level;
      }
    }
    return pred;
  }

  double value(int pass, size_t i) const {
    return double(stg::Cast<T>::to_float(start_.preds[c_.shift + pass * c_.size() + i]));
  }

  // <cond, uncond> / (|uncond|^2 + 1e-8) of the video that starts at a place.
  double projection(size_t start) const {
    double dot = 0, square = 1e-8;
    for (size_t i = start; i < start + c_.length; ++i) {
      dot += value(c_.cond(), i) * value(0, i);
      square += value(0, i) * value(0, i);
    }
    return dot / square;
  }

  Case c_;
  const State<T>& start_;

 public:
  std::vector<double> latents;
  std::vector<std::vector<double>> preds;
};

bool close(const float* got, const std::vector<double>& expected) {
  double worst = 0, largest = 1;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double error = std::fabs(got[i] - expected[i]);
    worst = error > worst || error != error ? error : worst;
    largest = std::fmax(largest, std::fabs(expected[i]));
  }
  return worst <= 4e-6 * largest;
}

template <class T>
void check(Checks& checks, const Case& c, int64_t steps, const State<T>& start) {
  State<T> state = start;
  const StgGuidedStep p = state.parameters(c);
  Reference<T> reference(c, start);
  for (int64_t step = 0; step < steps; ++step) {
    reference.advance(step);
    checks.expect(stg_guided_step(&p, nullptr) == cudaSuccess, "not launched", c.length, step);
    checks.expect(state.counter == step + 1 && state.finished == 0, "counter", state.counter, state.finished);
    checks.expect(close(p.latents, reference.latents), "latents differ", c.length, step);
    for (int64_t j = 0; j <= step; ++j) {
      checks.expect(close(p.history + j * c.videos * c.length, reference.preds[j]), "history differs", c.length, j);
    }
  }
  const std::vector<char> guard(state.workspace.end() - kGuard, state.workspace.end());
  checks.expect(guard == std::vector<char>(kGuard, -1), "written behind the workspace", c.videos, c.length);
}

template <class T>
void check(Checks& checks, const Case& c, int64_t steps) {
  check<T>(checks, c, steps, State<T>(c));
}

// Nothing to project on: uncond stays zero.
void check_zero_uncond(Checks& checks) {
  const Case c{2, 37, 1.0f, 3, true, true, true, true, 0};
  State<float> start(c);
  std::fill(start.preds.begin(), start.preds.begin() + c.size(), 0.0f);
  check<float>(checks, c, kSteps, start);
}

// The statistics are folded in an order of their own, whichever block or thread is first.
void check_deterministic(Checks& checks) {
  const Case c{2, 5000, 1.0f, 3, true, true, true, true, 0};
  std::vector<float> first;
  for (const char* order : stg_test::kOrders) {
    stg_test::set_order(order);
    State<float> state(c);
    const StgGuidedStep p = state.parameters(c);
    checks.expect(stg_guided_step(&p, nullptr) == cudaSuccess, "not launched", c.length, 0);
    if (first.empty()) first = state.latents;
    checks.expect(state.latents == first, "another order, other bits", c.videos, c.length);
  }
}

void check_refused(Checks& checks) {
  const Case c{1, 4, 0.0f, 3, true, true, false, false, 0};
  State<float> state(c);
  StgGuidedStep p = state.parameters(c);
  p.history = nullptr;
  checks.expect(stg_guided_step(&p, nullptr) == cudaErrorInvalidValue, "several steps without history", 0, 0);
  p = state.parameters(c);
  p.uncond = p.cond;
  checks.expect(stg_guided_step(&p, nullptr) == cudaErrorInvalidValue, "CFG-Zero* without uncond", 0, 0);
  p = state.parameters(c);
  p.cond = p.passes;
  checks.expect(stg_guided_step(&p, nullptr) == cudaErrorInvalidValue, "no cond", 0, 0);
  p = state.parameters(c);
  p.frames = 3;
  checks.expect(stg_guided_step(&p, nullptr) == cudaErrorInvalidValue, "frames of different lengths", 0, 0);
  p = state.parameters(c);
  p.dtype = 3;
  checks.expect(stg_guided_step(&p, nullptr) == cudaErrorInvalidValue, "a type that there is not", 0, 0);
  p.dtype = kStgFloat32;
  p.videos = 65536;
  checks.expect(stg_guided_step(&p, nullptr) == cudaErrorInvalidConfiguration, "more videos than a grid has", 0, 0);
}

}  // namespace

int main() {
  Checks checks;
  check_refused(checks);
  check_deterministic(checks);
  check_zero_uncond(checks);
  for (int64_t length : {2, 3, 4, 7, 64, 1002, 1024, 2053}) {
    for (int options = 0; options < 8 && checks.failed == 0; ++options) {
      const bool a = options & 1, b = options & 2, d = options & 4;
      // Every second length has CFG-Zero*, with and without rescale.
      const bool zero_star = a && length % 2 != 0, rescaled = zero_star ? b : a || b != d;
      // From 1 to 5 passes. The spread of a few values around 100 is lost in rounding.
      const int passes = (a ? 2 : 1) + static_cast<int>(b ? 1 + length % 3 : 0);
      const Case c{1 + (length + options) % 3, length, a == b && length > 7 ? 100.0f : 0.0f, passes, a, rescaled, a != d, zero_star,
                   d ? 1 : 0, length % 7 == 0 ? 7 : length % 6 == 0 ? 6 : 1, rescaled && (options + length / 2) % 2 == 0};
      stg_test::set_order(stg_test::kOrders[(length + options) % 3]);
      check<float>(checks, c, kSteps);
      if (b != d) check<__nv_bfloat16>(checks, c, kSteps);
    }
  }
  // More values than the threads of the largest grid take in a turn.
  stg_test::set_order("reverse");
  const Case large{1, kMaxBlocks * kThreads * kVector + 1025, 1.0f, 3, true, true, false, true, 1};
  if (checks.failed == 0) check<float>(checks, large, 1);
  return checks.result();
}
