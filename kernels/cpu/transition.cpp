// The log-probabilities of kernels/transition.py, a run of elements at a time.

namespace {

constexpr int64_t FOLDED = 1024;    // elements that are folded into one partial sum

// The sum of `count` terms, a power of two: the second half is added to the first until one is left.
inline double folded(double* terms, int64_t count) {
  for (int64_t half = count / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; i++) terms[i] += terms[half + i];
  }
  return terms[0];
}

// What the deviations of a run from its mean add to the negative log-probability.
inline void deviate(double weight, const float* __restrict next, const float* __restrict mean,
                    double* __restrict terms, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    const double deviation = double(next[i]) - double(mean[i]);
    terms[i] = weight * (deviation * deviation);
  }
}

// The same where the network returned the standard deviation as v.
inline void deviate_learned(const Row& row, double weight, const float* __restrict v, const float* __restrict next,
                            const float* __restrict mean, double* __restrict terms, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    const float exponent = row.half_log_min + (v[i] * 0.5f + 0.5f) * row.half_log_span;
    const double deviation = (double(next[i]) - double(mean[i])) * double(exponential(-exponent));
    terms[i] = weight * (deviation * deviation) + double(exponent);
  }
}

struct Transition {
  Images x, next, out, uncond;  // the last may be nothing
  const int64_t* rows;
  const float* table;
  const double* transitions;  // [R, 2]
  const float* guidance;
  int64_t channels, pixels, table_rows;
  bool learned;

  // The sum of the terms of one run of an image [C, P], a channel's part of it at a time.
  double run(int64_t image, int64_t at) const {
    alignas(64) double terms[FOLDED] = {};
    const int64_t begin = at * FOLDED, end = std::min(begin + FOLDED, channels * pixels);
    const Row row = row_of(table, table_rows, rows[image]);
    const double weight = rows[image] < table_rows ? transitions[2 * rows[image]] : double(NOTHING);
    for (int64_t element = begin; element < end;) {
      const int64_t channel = element / pixels, pixel = element % pixels;
      const int64_t count = std::min(end - element, pixels - pixel);
      part(row, weight, image, channel, pixel, count, terms + (element - begin));
      element += count;
    }
    return folded(terms, FOLDED);
  }

 private:
  void part(const Row& row, double weight, int64_t image, int64_t channel, int64_t pixel, int64_t count,
            double* terms) const {
    float buffers[4][FOLDED], start[FOLDED], mean[FOLDED];
    const float* state = x.read(image, channel, pixel, count, buffers[0]);
    const float* eps = out.read(image, channel, pixel, count, buffers[1]);
    if (uncond.data != nullptr && guidance[image] != 1.0f && row.unguided == 0.0f) {
      const float* without = uncond.read(image, channel, pixel, count, buffers[2]);
      guide(without, guidance[image], eps, buffers[3], count);
      eps = buffers[3];
    }
    move<false, false>(row, state, eps, nullptr, start, mean, nullptr, count);
    const float* reached = next.read(image, channel, pixel, count, buffers[2]);
    if (learned) {
      const float* v = out.read(image, channels + channel, pixel, count, buffers[1]);
      deviate_learned(row, weight, v, reached, mean, terms, count);
    } else {
      deviate(weight, reached, mean, terms, count);
    }
  }
};

}  // namespace

// The log-probability of the step that every lane made. Forms are those of `Images`; with C = 1 all images are plain
// runs of P. `sums` [B, runs] is zeros.
extern "C" void transition_logprob(const void* x, const void* next, const void* out, const void* uncond,
                                   double* sums, double* result, const int64_t* rows, const float* table,
                                   const double* transitions, const float* guidance, int64_t images, int64_t channels,
                                   int64_t pixels, int64_t runs, int64_t table_rows, int64_t learned, int64_t x_form,
                                   int64_t next_form, int64_t out_form, int64_t uncond_form) {
  const int64_t returned = learned ? 2 * channels : channels, elements = channels * pixels;
  const Transition transition{Images::of(x, x_form, channels, pixels),
                              Images::of(next, next_form, channels, pixels),
                              Images::of(out, out_form, returned, pixels),
                              Images::of(uncond, uncond_form, returned, pixels),
                              rows, table, transitions, guidance, channels, pixels, table_rows, learned != 0};
  const int64_t used = (elements + FOLDED - 1) / FOLDED;
  at::parallel_for(0, images * used, GRAIN / FOLDED, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; item++) {
      const int64_t image = item / used, at = item % used;
      if (rows[image] >= 0) sums[image * runs + at] = transition.run(image, at);
    }
  });
  for (int64_t image = 0; image < images; image++) {
    if (rows[image] < 0) {
      result[image] = 0.0;
      continue;
    }
    const double normalizer = rows[image] < table_rows ? transitions[2 * rows[image] + 1] : double(NOTHING);
    result[image] = -folded(sums + image * runs, runs) - normalizer * double(elements);
  }
}
