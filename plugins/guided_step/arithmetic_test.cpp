// The header that the kernels are made of, against float64. Built as it is, and once per mutant.
#include "guided_step/arithmetic.h"

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

namespace {

struct Case {
  int length;
  float mean;
  bool uncond, skip;
  stg::StepScalars scalars;
};

struct Rows {
  std::vector<float> cond, uncond, skip, latents;
};

Rows random_rows(const Case& c, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(c.mean, 1.0f);
  Rows rows;
  for (std::vector<float>* row : {&rows.cond, &rows.uncond, &rows.skip, &rows.latents}) {
    row->resize(c.length);
    for (float& value : *row) value = normal(generator);
  }
  if (!c.uncond) rows.uncond = rows.cond;
  if (!c.skip) rows.skip = rows.cond;
  return rows;
}

// As the kernels do it: chunks in registers, merged over threads.
std::vector<float> step_float32(const Case& c, const Rows& rows) {
  constexpr int kVector = 4;
  std::vector<float> pred(c.length), next(c.length);
  for (int i = 0; i < c.length; ++i) pred[i] = stg::combine(rows.cond[i], rows.uncond[i], rows.skip[i], c.scalars);
  stg::Moments of_cond = stg::no_moments(), of_pred = stg::no_moments();
  int i = 0;
  for (; i + kVector <= c.length; i += kVector) {
    float a[kVector], b[kVector];
    for (int k = 0; k < kVector; ++k) a[k] = rows.cond[i + k], b[k] = pred[i + k];
    of_cond = stg::merge(of_cond, stg::moments_of(a));
    of_pred = stg::merge(of_pred, stg::moments_of(b));
  }
  for (; i < c.length; ++i) {
    of_cond = stg::merge(of_cond, stg::Moments{1.0f, rows.cond[i], 0.0f});
    of_pred = stg::merge(of_pred, stg::Moments{1.0f, pred[i], 0.0f});
  }
  const float factor = stg::rescale_factor(of_cond, of_pred, c.scalars.rescale);
  for (int j = 0; j < c.length; ++j) next[j] = stg::two_term_step(rows.latents[j], pred[j] * factor, c.scalars);
  return next;
}

double standard_deviation(const std::vector<double>& values) {
  double mean = 0, sum = 0;
  for (double value : values) mean += value / values.size();
  for (double value : values) sum += (value - mean) * (value - mean);
  return std::sqrt(sum / (values.size() - 1));
}

// stg.md's equations, as they stand there.
std::vector<double> step_float64(const Case& c, const Rows& rows) {
  const double cfg = c.scalars.cfg_scale, scale = c.scalars.stg_scale, rescale = c.scalars.rescale;
  std::vector<double> cond(rows.cond.begin(), rows.cond.end()), pred(c.length), next(c.length);
  for (int i = 0; i < c.length; ++i) {
    const double uncond = rows.uncond[i], skip = rows.skip[i];
    pred[i] = uncond + cfg * (cond[i] - uncond) + scale * (cond[i] - skip);
  }
  double factor = 1;
  if (rescale != 0) factor = rescale * standard_deviation(cond) / standard_deviation(pred) + (1 - rescale);
  for (int i = 0; i < c.length; ++i) {
    next[i] = double(c.scalars.latents_factor) * rows.latents[i] + double(c.scalars.pred_factor) * pred[i] * factor;
  }
  return next;
}

bool check(const Case& c, unsigned seed) {
  const Rows rows = random_rows(c, seed);
  const std::vector<float> got = step_float32(c, rows);
  const std::vector<double> expected = step_float64(c, rows);
  double worst = 0, largest = 1;
  for (int i = 0; i < c.length; ++i) {
    worst = std::fmax(worst, std::fabs(got[i] - expected[i]));
    largest = std::fmax(largest, std::fabs(expected[i]));
    if (!std::isfinite(got[i])) worst = INFINITY;
  }
  const bool passed = worst <= 4e-6 * largest;
  if (!passed) std::printf("length %d mean %g: off by %g of %g\n", c.length, c.mean, worst, largest);
  return passed;
}

}  // namespace

int main() {
  int failed = 0, passed = 0;
  for (int length : {2, 3, 4, 5, 63, 64, 1000, 50001}) {
    for (float mean : {0.0f, 1.0f, 100.0f}) {
      for (const stg::StepScalars& scalars :
           {stg::StepScalars{1.0f, 0.0f, 0.0f, 1.0f, -0.05f}, stg::StepScalars{3.0f, 1.0f, 0.0f, 1.0f, -0.05f},
            stg::StepScalars{3.0f, 1.0f, 0.7f, 0.9f, -0.3f}, stg::StepScalars{6.0f, 2.0f, 1.0f, 1.1f, 0.2f}}) {
        for (int rows = 0; rows < 4; ++rows) {
          const bool ok = check(Case{length, mean, (rows & 1) != 0, (rows & 2) != 0, scalars}, length + rows);
          ++(ok ? passed : failed);
        }
      }
    }
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
