// The table walker of kernels/step.py, a run of elements at a time.

namespace {

// One row of a table, the columns of kernels/coefficients.py in their order.
struct Row {
  float x0_x, x0_out, clip, next_x0, next_x, next_out, sigma, half_log_min, half_log_span;
  float next_prev, known_x, known_sigma, threshold, threshold_max;
  float net_scale, next_prev2, next_prev3, keep_x, keep_x0, unguided, rescale;

  // The weight of what was kept `age` rows before the row before.
  float next_kept(int64_t age) const { return age == 0 ? next_prev : age == 1 ? next_prev2 : next_prev3; }
};

// A row beyond the table gives NaN, and so does one that takes the whole image: with a threshold or with rescale.
inline Row row_of(const float* table, int64_t rows, int64_t row) {
  Row result;
  float* columns = &result.x0_x;
  if (row < rows) {
    std::memcpy(columns, table + row * int64_t(sizeof(Row) / sizeof(float)), sizeof(Row));
    if (result.threshold > 0.0f || result.rescale != 0.0f || result.clip != result.clip) result.x0_x = NOTHING;
  } else {
    std::fill(columns, columns + sizeof(Row) / sizeof(float), NOTHING);
  }
  return result;
}

// e^x, within 0.5001 units in the last place: 2^(x / ln 2) in float64, of whose exponent the whole part is k and the
// rest Taylor's polynomial. Far below and above, it is 0 and infinite; NaN stays NaN.
inline float exponential(float x) {
  double y = double(x) * 1.4426950408889634;
  y = y > 300.0 ? 300.0 : y;
  y = y < -300.0 ? -300.0 : y;
  const double shifted = y + 0x1.8p52;  // has no fraction bits: the lowest ones are k
  const double g = (y - (shifted - 0x1.8p52)) * 0.69314718055994531;
  double p = 1.0 / 3628800.0;
  p = p * g + 1.0 / 362880.0;
  p = p * g + 1.0 / 40320.0;
  p = p * g + 1.0 / 5040.0;
  p = p * g + 1.0 / 720.0;
  p = p * g + 1.0 / 120.0;
  p = p * g + 1.0 / 24.0;
  p = p * g + 1.0 / 6.0;
  p = p * g + 0.5;
  p = p * g + 1.0;
  p = p * g + 1.0;
  return float(p * bits_of<double>((bits_of<uint64_t>(shifted) + 1023) << 52));
}

// eps with guidance (Ho & Salimans 2022); exactly the conditional one where the scale is 1.
inline void guide(const float* __restrict uncond, float scale, const float* __restrict out, float* __restrict guided,
                  int64_t count) {
  for (int64_t i = 0; i < count; i++) guided[i] = uncond[i] + scale * (out[i] - uncond[i]);
}

// The predicted x0 where `start` is given, the next state without history, which may take the place of x, with KEEPS
// what the row leaves in the history, and with NOISY noise z.
template <bool KEEPS, bool NOISY>
inline void move(const Row& row, const float* x, const float* out, const float* z, float* start, float* next,
                 float* kept, int64_t count) {
  const float low = -row.clip, high = row.clip;
#pragma GCC ivdep  // what is written lies apart from what is read, or in the very same place
  for (int64_t i = 0; i < count; i++) {
    float x0 = row.x0_x * x[i] + row.x0_out * out[i];
    x0 = x0 < low ? low : x0;  // NaN stays NaN
    x0 = x0 > high ? high : x0;
    if (start != nullptr) start[i] = x0;
    if (KEEPS) kept[i] = row.keep_x * x[i] + row.keep_x0 * x0;
    const float moved = row.next_x0 * x0 + row.next_x * x[i] + row.next_out * out[i];
    next[i] = NOISY ? moved + row.sigma * z[i] : moved;
  }
}

inline void add(float factor, const float* __restrict term, float* __restrict sum, int64_t count) {
  for (int64_t i = 0; i < count; i++) sum[i] += factor * term[i];
}

inline void scale(float factor, const float* __restrict from, float* __restrict to, int64_t count) {
  for (int64_t i = 0; i < count; i++) to[i] = factor * from[i];
}

// Adds noise whose standard deviation the network returned as v.
inline void add_learned(const Row& row, const float* __restrict v, const float* __restrict z, float* __restrict sum,
                        int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    const float exponent = row.half_log_min + (v[i] * 0.5f + 0.5f) * row.half_log_span;
    sum[i] += row.sigma * exponential(exponent) * z[i];
  }
}

// Puts what is known, with noise z or without, in the place of the next state. Free is what is NaN.
inline void keep(const Row& row, const float* __restrict known, const float* __restrict z, float* __restrict next,
                 int64_t count) {
  if (z == nullptr) {
    for (int64_t i = 0; i < count; i++) next[i] = known[i] == known[i] ? row.known_x * known[i] : next[i];
  } else {
    for (int64_t i = 0; i < count; i++) {
      const float fixed = row.known_x * known[i] + row.known_sigma * z[i];
      next[i] = known[i] == known[i] ? fixed : next[i];
    }
  }
}

inline bool all_finite(const float* values, int64_t count) {
  int32_t largest = 0;
  for (int64_t i = 0; i < count; i++) largest = std::max(largest, bits_of<int32_t>(values[i]) & 0x7FFFFFFF);
  return largest < 0x7F800000;
}

struct Step {
  Images x, out, uncond, noise, known;  // the last three may be nothing
  float* next;
  void* copy;
  float* x0;
  float* history;  // [entries, B, C, P]
  int64_t* flags;
  const int64_t* rows;
  const float* table;
  const int64_t *timesteps, *seeds, *indices;
  const float* guidance;
  int64_t images, channels, pixels, table_rows, copy_type, copies, entries;
  bool learned, fill;

  void run(int64_t image, int64_t channel, int64_t pixel, int64_t count) const {
    float buffers[6][RUN];
    const int64_t element = channel * pixels + pixel, start = image * channels * pixels + element;
    const float* state = x.read(image, channel, pixel, count, buffers[0]);
    const int64_t at = rows[image];
    if (at < 0) {
      if (fill) write_run(state, next, FLOAT32, start, count);
      return;
    }
    const Row row = row_of(table, table_rows, at);
    const float* eps = out.read(image, channel, pixel, count, buffers[1]);
    if (uncond.data != nullptr && guidance[image] != 1.0f && row.unguided == 0.0f) {
      const float* without = uncond.read(image, channel, pixel, count, buffers[2]);
      guide(without, guidance[image], eps, buffers[3], count);
      eps = buffers[3];
    }
    const bool noisy = row.sigma != 0.0f, renoised = known.data != nullptr && row.known_sigma != 0.0f;
    Noise drawn;
    const float* z = nullptr;
    if (noisy || renoised) z = noise_of(image, channel, pixel, count, at, drawn, buffers[4]);

    float *next_run = next + start, *x0_run = x0 == nullptr ? nullptr : x0 + start;
    const bool keeps = entries > 0 && (row.keep_x != 0.0f || row.keep_x0 != 0.0f);
    const bool at_once = noisy && z != nullptr && !learned && !weighs_history(row);
    const auto moves = keeps ? at_once ? move<true, true> : move<true, false>
                             : at_once ? move<false, true> : move<false, false>;
    moves(row, state, eps, z, x0_run, next_run, buffers[5], count);
    for (int64_t age = 0; age < entries; age++) {
      if (row.next_kept(age) != 0.0f) add(row.next_kept(age), kept(age) + start, next_run, count);
    }
    if (keeps) keep_run(buffers[5], start, count);
    if (noisy && z != nullptr && !at_once) {
      if (learned) {
        add_learned(row, out.read(image, channels + channel, pixel, count, buffers[1]), z, next_run, count);
      } else {
        add(row.sigma, z, next_run, count);
      }
    }
    if (known.data != nullptr) {
      keep(row, known.read(image, channel, pixel, count, buffers[2]), renoised ? z : nullptr, next_run, count);
    }

    const float* shown = next_run;
    if (copies > 0 && row.net_scale != 1.0f) {
      scale(row.net_scale, next_run, buffers[0], count);
      shown = buffers[0];
    }
    for (int64_t i = 0; i < copies; i++) {
      write_run(shown, copy, copy_type, i * images * channels * pixels + start, count);
    }
    if (flags != nullptr && !all_finite(next_run, count)) flag(flags + image, at);
  }

 private:
  bool weighs_history(const Row& row) const {
    bool weighs = false;
    for (int64_t age = 0; age < entries; age++) weighs |= row.next_kept(age) != 0.0f;
    return weighs;
  }

  float* kept(int64_t age) const { return history + age * images * channels * pixels; }

  // Puts a run first in the history, and what was there one further.
  void keep_run(const float* run, int64_t start, int64_t count) const {
    for (int64_t age = entries - 1; age > 0; age--) write_run(kept(age - 1) + start, kept(age), FLOAT32, start, count);
    write_run(run, kept(0), FLOAT32, start, count);
  }

  const float* noise_of(int64_t image, int64_t channel, int64_t pixel, int64_t count, int64_t at, Noise& drawn,
                        float* buffer) const {
    if (noise.data != nullptr) return noise.read(image, channel, pixel, count, buffer);
    if (seeds == nullptr) return nullptr;
    const int64_t timestep = timesteps[std::min(at, table_rows - 1)];
    const Key key{uint64_t(seeds[image]), uint32_t(timestep), uint32_t(indices[image]), STREAM_STEP};
    const int64_t start = (image * channels + channel) * pixels + pixel;
    const void* copied = copies > 0 ? copy : nullptr;
    return drawn.draw(key, channel * pixels + pixel, count,
                      {x.after(image, channel, pixel, count), out.after(image, channel, pixel, count),
                       behind(next, FLOAT32, start, count), behind(copied, copy_type, start, count)});
  }

  // Several threads may work on an image, and all of them write the same.
  static void flag(int64_t* at, int64_t row) {
    if (__atomic_load_n(at, __ATOMIC_RELAXED) < 0) __atomic_store_n(at, row, __ATOMIC_RELAXED);
  }
};

}  // namespace

// Moves every lane of a batch one row on. Forms are those of `Images`; with C = 1 all images are plain runs of P.
extern "C" void diffusion_step(
    const void* x, const void* out, const void* uncond, const void* noise, const void* known, float* next, void* copy,
    float* x0, float* history, int64_t* flags, const int64_t* rows, const float* table, const int64_t* timesteps,
    const int64_t* seeds, const int64_t* indices, const float* guidance, int64_t images, int64_t channels,
    int64_t pixels, int64_t table_rows, int64_t copy_type, int64_t copies, int64_t entries, int64_t learned,
    int64_t fill, int64_t x_form, int64_t out_form, int64_t uncond_form, int64_t noise_form, int64_t known_form) {
  const int64_t returned = learned ? 2 * channels : channels;
  const Step step{Images::of(x, x_form, channels, pixels),
                  Images::of(out, out_form, returned, pixels),
                  Images::of(uncond, uncond_form, returned, pixels),
                  Images::of(noise, noise_form, channels, pixels),
                  Images::of(known, known_form, channels, pixels),
                  next, copy, x0, history, flags, rows, table, timesteps, seeds, indices, guidance,
                  images, channels, pixels, table_rows, copy_type, copies, entries, learned != 0, fill != 0};
  for_runs(images, channels, pixels, seeds == nullptr ? GRAIN : GRAIN_OF_NOISE,
           [&](int64_t image, int64_t channel, int64_t pixel, int64_t count) {
             step.run(image, channel, pixel, count);
           });
}
