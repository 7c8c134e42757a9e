// The forward process of kernels/q_sample.py, its posterior of kernels/posterior.py, and noise alone.

namespace {

// An entry of a schedule's table; NaN outside.
inline float entry(const float* table, int64_t entries, int64_t t) { return t >= 0 && t < entries ? table[t] : NOTHING; }

inline void weigh(float a, const float* __restrict x, float b, const float* __restrict y, float* __restrict sum,
                  int64_t count) {
  for (int64_t i = 0; i < count; i++) sum[i] = a * x[i] + b * y[i];
}

}  // namespace

// x_t = signal[t] x_start + scale[t] noise, [B, C, P]; noise is drawn, and written to noise_out, where none is given.
extern "C" void q_sample(const void* x_start, const void* noise, void* x_t, float* noise_out, const int64_t* t,
                         const float* signal, const float* scale, const int64_t* seeds, const int64_t* indices,
                         int64_t images, int64_t channels, int64_t pixels, int64_t entries, int64_t type,
                         int64_t x_form, int64_t noise_form) {
  const Images x = Images::of(x_start, x_form, channels, pixels), z = Images::of(noise, noise_form, channels, pixels);
  for_runs(images, channels, pixels, noise == nullptr ? GRAIN_OF_NOISE : GRAIN,
           [&](int64_t image, int64_t channel, int64_t pixel, int64_t count) {
             float buffers[3][RUN];
             Noise drawn;
             const int64_t element = channel * pixels + pixel, start = image * channels * pixels + element;
             const float* eps;
             if (noise != nullptr) {
               eps = z.read(image, channel, pixel, count, buffers[0]);
             } else {
               const Key key{uint64_t(seeds[image]), uint32_t(t[image]), uint32_t(indices[image]), STREAM_FORWARD};
               eps = drawn.draw(key, element, count,
                                {x.after(image, channel, pixel, count), behind(x_t, type, start, count),
                                 behind(noise_out, FLOAT32, start, count)});
               write_run(eps, noise_out, FLOAT32, start, count);
             }
             float* sum = place(x_t, type, start, buffers[2]);
             weigh(entry(signal, entries, t[image]), x.read(image, channel, pixel, count, buffers[1]),
                   entry(scale, entries, t[image]), eps, sum, count);
             write_run(sum, x_t, type, start, count);
           });
}

// mean = coef1[t] x_start + coef2[t] x_t, [B, C, P], and the entries of two more tables at t, [B].
extern "C" void q_posterior(const void* x_start, const void* x_t, void* mean, float* variance, float* log_variance,
                            const int64_t* t, const float* coef1, const float* coef2, const float* variances,
                            const float* log_variances, int64_t images, int64_t channels, int64_t pixels,
                            int64_t entries, int64_t type, int64_t x_start_form, int64_t x_t_form) {
  for (int64_t image = 0; image < images; image++) {
    variance[image] = entry(variances, entries, t[image]);
    log_variance[image] = entry(log_variances, entries, t[image]);
  }
  const Images x0 = Images::of(x_start, x_start_form, channels, pixels);
  const Images x = Images::of(x_t, x_t_form, channels, pixels);
  for_runs(images, channels, pixels, GRAIN, [&](int64_t image, int64_t channel, int64_t pixel, int64_t count) {
    float buffers[3][RUN];
    const int64_t start = (image * channels + channel) * pixels + pixel;
    float* sum = place(mean, type, start, buffers[2]);
    weigh(entry(coef1, entries, t[image]), x0.read(image, channel, pixel, count, buffers[0]),
          entry(coef2, entries, t[image]), x.read(image, channel, pixel, count, buffers[1]), sum, count);
    write_run(sum, mean, type, start, count);
  });
}

// Standard normals [B, E].
extern "C" void normal(const int64_t* seeds, const int64_t* indices, const int64_t* timesteps, float* z,
                       int64_t images, int64_t elements, int64_t stream) {
  for_runs(images, 1, elements, GRAIN_OF_NOISE, [&](int64_t image, int64_t, int64_t element, int64_t count) {
    Noise drawn;
    const Key key{uint64_t(seeds[image]), uint32_t(timesteps[image]), uint32_t(indices[image]), uint32_t(stream)};
    const int64_t start = image * elements + element;
    write_run(drawn.draw(key, element, count, {behind(z, FLOAT32, start, count)}), z, FLOAT32, start, count);
  });
}
