// Group normalisation, affine part and SiLU over NHWC: see group_norm_cpu.py. An image and a run of its groups of
// channels is a piece of work: one pass over its pixels for the moments, one for the result.

#include <cmath>

namespace {

struct Problem {
  const BFloat16* x;  // [B, P, C]
  const BFloat16 *weight, *bias;  // [C]
  const BFloat16 *time, *scale, *shift;  // rows of C, or null
  BFloat16* y;  // [B, P, C]
  int64_t pixels, channels, groups, width;  // width: channels of a piece of work
  int64_t time_stride, scale_stride, shift_stride;
  double eps;
  bool silu;
};

constexpr int64_t RUN = 64;

// Per channel over the pixels: means, and means of squared distances from them. Distances are taken from the first
// pixel, so that a mean far from zero costs no digits; sums are sums of runs, which round less.
template <int N>
void moments(const BFloat16* from, int64_t stride, int64_t pixels, float* mean, float* variance) {
  Vec first[N], sum[N], squares[N];
  for (int i = 0; i < N; i++) {
    first[i] = load(from + i * LANES);
    sum[i] = squares[i] = Vec(0.0f);
  }
  for (int64_t start = 0; start < pixels; start += RUN) {
    Vec part[N], part_squares[N];
    for (int i = 0; i < N; i++) part[i] = part_squares[i] = Vec(0.0f);
    for (int64_t p = start; p < std::min(start + RUN, pixels); p++) {
      for (int i = 0; i < N; i++) {
        const Vec d = load(from + p * stride + i * LANES) - first[i];
        part[i] = part[i] + d;
        part_squares[i] = at::vec::fmadd(d, d, part_squares[i]);
      }
    }
    for (int i = 0; i < N; i++) {
      sum[i] = sum[i] + part[i];
      squares[i] = squares[i] + part_squares[i];
    }
  }
  const Vec share(1.0f / pixels);
  for (int i = 0; i < N; i++) {
    const Vec m = sum[i] * share;
    (first[i] + m).store(mean + i * LANES);
    at::vec::maximum(squares[i] * share - m * m, Vec(0.0f)).store(variance + i * LANES);
  }
}

template <int N>
void apply(const BFloat16* from, BFloat16* to, int64_t stride, int64_t pixels, const float* factor, const float* term,
           bool silu) {
  Vec a[N], b[N];
  for (int i = 0; i < N; i++) {
    a[i] = Vec::loadu(factor + i * LANES);
    b[i] = Vec::loadu(term + i * LANES);
  }
  const Vec one(1.0f);
  for (int64_t p = 0; p < pixels; p++) {
    for (int i = 0; i < N; i++) {
      Vec y = at::vec::fmadd(load(from + p * stride + i * LANES), a[i], b[i]);
      if (silu) y = y / (one + y.neg().exp_u20());
      store(to + p * stride + i * LANES, y);
    }
  }
}

void normalise(const Problem& q, int64_t image, int64_t begin, std::vector<float>& memory) {
  const int64_t each = q.channels / q.groups, start = image * q.pixels * q.channels + begin;
  memory.resize(std::max<size_t>(memory.size(), 2 * q.width));
  float *mean = memory.data(), *variance = mean + q.width;  // then the factor and the term of every channel
  const auto by_vectors = [&](const auto& four, const auto& one) {
    int64_t c = 0;
    for (; c + 4 * LANES <= q.width; c += 4 * LANES) four(q.x + start + c, c);
    for (; c < q.width; c += LANES) one(q.x + start + c, c);
  };
  by_vectors(
      [&](const BFloat16* from, int64_t c) { moments<4>(from, q.channels, q.pixels, mean + c, variance + c); },
      [&](const BFloat16* from, int64_t c) { moments<1>(from, q.channels, q.pixels, mean + c, variance + c); });
  for (int64_t group = 0; group < q.width; group += each) {
    const auto time = [&](int64_t c) { return q.time ? float(q.time[image * q.time_stride + begin + c]) : 0.0f; };
    double of_means = 0.0, of_squares = 0.0;
    for (int64_t c = group; c < group + each; c++) of_means += mean[c] + time(c);
    of_means /= each;
    for (int64_t c = group; c < group + each; c++) {
      const double d = mean[c] + time(c) - of_means;
      of_squares += variance[c] + d * d;
    }
    const double root = 1.0 / std::sqrt(of_squares / each + q.eps);
    for (int64_t c = group; c < group + each; c++) {
      double a = root * float(q.weight[begin + c]), b = float(q.bias[begin + c]) + (time(c) - of_means) * a;
      if (q.scale) {
        const double factor = 1.0 + float(q.scale[image * q.scale_stride + begin + c]);
        a *= factor;
        b = b * factor + float(q.shift[image * q.shift_stride + begin + c]);
      }
      mean[c] = a;
      variance[c] = b;
    }
  }
  BFloat16* to = q.y + start;
  by_vectors(
      [&](const BFloat16* from, int64_t c) {
        apply<4>(from, to + c, q.channels, q.pixels, mean + c, variance + c, q.silu);
      },
      [&](const BFloat16* from, int64_t c) {
        apply<1>(from, to + c, q.channels, q.pixels, mean + c, variance + c, q.silu);
      });
}

}  // namespace

extern "C" void group_norm_silu(
    const BFloat16* x, const BFloat16* weight, const BFloat16* bias, const BFloat16* time, const BFloat16* scale,
    const BFloat16* shift, BFloat16* y, int64_t batch, int64_t pixels, int64_t channels, int64_t groups, int64_t width,
    int64_t time_stride, int64_t scale_stride, int64_t shift_stride, double eps, bool silu) {
  const Problem q{x, weight, bias, time, scale, shift, y, pixels, channels, groups, width,
                  time_stride, scale_stride, shift_stride, eps, silu};
  const int64_t pieces = channels / width;
  at::parallel_for(0, batch * pieces, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> memory;
    for (int64_t item = begin; item < end; item++) normalise(q, item / pieces, item % pieces * width, memory);
  });
}
