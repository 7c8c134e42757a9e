// Group normalisation, affine part and SiLU over NHWC: see group_norm_cpu.py. An image and a run of its groups of
// channels is a piece of work: one pass over its pixels for the moments, one for the result.

#include <cmath>

namespace {

struct Problem {
  const BFloat16 *x, *skip;  // [B, P, in_x], [B, P, in_skip] or null
  const BFloat16 *weight, *bias;  // [C]
  const BFloat16 *time, *scale, *shift;  // rows of C, or null
  BFloat16* y;  // [B, P, C]
  int64_t batch, pixels, in_x, in_skip, groups, width;  // width: channels of a piece of work
  int64_t time_stride, scale_stride, shift_stride;
  double eps;
  bool silu;

  // Channel c of the first pixel of an image, and how far apart its pixels are.
  const BFloat16* pixel(int64_t image, int64_t c, int64_t& stride) const {
    stride = c < in_x ? in_x : in_skip;
    return c < in_x ? x + image * pixels * in_x + c : skip + image * pixels * in_skip + c - in_x;
  }
};

// Per channel over the pixels: means, and means of squared distances from them. Distances are taken from the first
// pixel, so that a mean far from zero costs no digits.
template <int N>
void moments(const BFloat16* from, int64_t stride, int64_t pixels, float* mean, float* variance) {
  Vec first[N], sum[N], squares[N];
  for (int i = 0; i < N; i++) {
    first[i] = load(from + i * LANES);
    sum[i] = squares[i] = Vec(0.0f);
  }
  for (int64_t p = 0; p < pixels; p++) {
    for (int i = 0; i < N; i++) {
      const Vec d = load(from + p * stride + i * LANES) - first[i];
      sum[i] = sum[i] + d;
      squares[i] = at::vec::fmadd(d, d, squares[i]);
    }
  }
  const Vec share(1.0f / pixels);
  for (int i = 0; i < N; i++) {
    const Vec m = sum[i] * share;
    (first[i] + m).store(mean + i * LANES);
    (squares[i] * share - m * m).store(variance + i * LANES);
  }
}

template <int N>
void apply(const BFloat16* from, int64_t stride, BFloat16* to, int64_t to_stride, int64_t pixels, const float* factor,
           const float* term, bool silu) {
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
      store(to + p * to_stride + i * LANES, y);
    }
  }
}

void normalise(const Problem& q, int64_t image, int64_t begin, std::vector<float>& memory) {
  const int64_t channels = q.in_x + q.in_skip, each = channels / q.groups;
  memory.resize(std::max<size_t>(memory.size(), 2 * q.width));
  float *mean = memory.data(), *variance = mean + q.width;  // then the factor and the term of every channel
  const auto by_vectors = [&](const auto& four, const auto& one) {
    for (int64_t c = 0; c < q.width;) {
      int64_t stride;
      const BFloat16* from = q.pixel(image, begin + c, stride);
      const int64_t last = begin + c < q.in_x ? std::min(begin + q.width, q.in_x) - begin : q.width;
      for (; last - c >= 4 * LANES; c += 4 * LANES, from += 4 * LANES) four(from, stride, c);
      for (; c < last; c += LANES, from += LANES) one(from, stride, c);
    }
  };
  by_vectors(
      [&](const BFloat16* from, int64_t stride, int64_t c) { moments<4>(from, stride, q.pixels, mean + c, variance + c); },
      [&](const BFloat16* from, int64_t stride, int64_t c) { moments<1>(from, stride, q.pixels, mean + c, variance + c); });
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
  BFloat16* to = q.y + image * q.pixels * channels + begin;
  by_vectors(
      [&](const BFloat16* from, int64_t stride, int64_t c) {
        apply<4>(from, stride, to + c, channels, q.pixels, mean + c, variance + c, q.silu);
      },
      [&](const BFloat16* from, int64_t stride, int64_t c) {
        apply<1>(from, stride, to + c, channels, q.pixels, mean + c, variance + c, q.silu);
      });
}

}  // namespace

extern "C" void group_norm_silu(
    const BFloat16* x, const BFloat16* skip, const BFloat16* weight, const BFloat16* bias, const BFloat16* time,
    const BFloat16* scale, const BFloat16* shift, BFloat16* y, int64_t batch, int64_t pixels, int64_t in_x,
    int64_t in_skip, int64_t groups, int64_t width, int64_t time_stride, int64_t scale_stride, int64_t shift_stride,
    double eps, bool silu) {
  const Problem q{x, skip, weight, bias, time, scale, shift, y, batch, pixels, in_x, in_skip, groups, width,
                  time_stride, scale_stride, shift_stride, eps, silu};
  const int64_t pieces = (in_x + in_skip) / width;
  at::parallel_for(0, batch * pieces, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> memory;
    for (int64_t item = begin; item < end; item++) normalise(q, item / pieces, item % pieces * width, memory);
  });
}
