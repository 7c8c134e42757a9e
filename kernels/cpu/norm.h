// Group normalisation, affine part and SiLU over NHWC: two passes. `factors` reads the pixels and makes one factor and
// one term for each channel of each image; `Input::fill` applies them to the pixels that somebody asks for.

namespace {

// Images of which every pixel has the channels of x and then those of skip: a concatenation that is never stored.
struct Source {
  const Element* x;
  int64_t channels;
  const Element* skip;
  int64_t skip_channels;
  int64_t total() const { return channels + skip_channels; }
  // The channels from c of a pixel; *stride is the distance to the next pixel.
  const Element* at(int64_t pixel, int64_t c, int64_t* stride) const {
    *stride = c < channels ? channels : skip_channels;
    return c < channels ? x + pixel * channels + c : skip + pixel * skip_channels + (c - channels);
  }
};

// y = norm(x + time) * weight + bias, and of that y * (1 + scale) + shift.
struct Norm {
  const Element *weight, *bias;  // [C]
  const Element *time, *scale, *shift;  // rows of C for each image, or null
  int64_t time_stride, scale_stride, shift_stride;
  int64_t groups;
  double eps;
};

constexpr int64_t RUN = 64;

// Per channel over the pixels: means, and means of squared distances from them. Distances are taken from the mean of
// the first run, so that neither a mean far from zero nor a pixel far from the others costs digits; sums are sums of
// runs, which round less.
template <int N>
void moments(const Element* from, int64_t stride, int64_t pixels, float* mean, float* variance) {
  Vec near[N], sum[N], squares[N];
  const int64_t run = std::min(RUN, pixels);
  for (int i = 0; i < N; i++) {
    near[i] = sum[i] = squares[i] = Vec(0.0f);
    for (int64_t p = 0; p < run; p++) near[i] = near[i] + load(from + p * stride + i * LANES);
    near[i] = near[i] / Vec(static_cast<float>(run));
  }
  for (int64_t start = 0; start < pixels; start += RUN) {
    Vec part[N], part_squares[N];
    for (int i = 0; i < N; i++) part[i] = part_squares[i] = Vec(0.0f);
    for (int64_t p = start; p < std::min(start + RUN, pixels); p++) {
      for (int i = 0; i < N; i++) {
        const Vec d = load(from + p * stride + i * LANES) - near[i];
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
    (near[i] + m).store(mean + i * LANES);
    at::vec::maximum(squares[i] * share - m * m, Vec(0.0f)).store(variance + i * LANES);
  }
}

// From the moments of the channels of whole groups to their factors and terms, in place: moments of a group in
// float64 (Chan et al. 1979, equation 2.1).
inline void combine_groups(const Norm& q, int64_t image, int64_t begin, int64_t width, int64_t each, float* mean,
                           float* variance) {
  for (int64_t group = 0; group < width; group += each) {
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
}

// Channels of a piece of work: whole vectors and whole groups, at least 64 where there are so many.
inline int64_t piece_width(int64_t channels, int64_t groups) {
  int64_t least = LANES;
  while (least % (channels / groups) != 0) least += LANES;
  for (int64_t width = least; width < channels; width += least) {
    if (channels % width == 0 && width >= 4 * LANES) return width;
  }
  return channels;
}

// norm(x) of channel c of image n is x * factor[n, c] + term[n, c]; both [B, C].
inline void factors(const Source& source, const Norm& norm, int64_t batch, int64_t pixels, float* factor, float* term) {
  const int64_t channels = source.total(), width = piece_width(channels, norm.groups), pieces = channels / width;
  at::parallel_for(0, batch * pieces, 1, [&](int64_t from, int64_t to) {
    for (int64_t item = from; item < to; item++) {
      const int64_t image = item / pieces, begin = item % pieces * width;
      float *mean = factor + image * channels + begin, *variance = term + image * channels + begin;
      for (int64_t c = 0; c < width;) {
        int64_t stride;
        const Element* x = source.at(image * pixels, begin + c, &stride);
        const int64_t left = (begin + c < source.channels ? source.channels : channels) - begin - c;
        if (std::min(left, width - c) >= 4 * LANES) {
          moments<4>(x, stride, pixels, mean + c, variance + c);
          c += 4 * LANES;
        } else {
          moments<1>(x, stride, pixels, mean + c, variance + c);
          c += LANES;
        }
      }
      combine_groups(norm, image, begin, width, channels / norm.groups, mean, variance);
    }
  });
}

// `count` pixels of 16 N channels: x * factor + term, activated or not.
template <int N>
void apply(const Element* from, int64_t from_stride, Element* to, int64_t to_stride, int64_t count,
           const float* factor, const float* term, bool silu) {
  Vec a[N], b[N];
  for (int i = 0; i < N; i++) {
    a[i] = Vec::loadu(factor + i * LANES);
    b[i] = Vec::loadu(term + i * LANES);
  }
  for (int64_t p = 0; p < count; p++) {
    for (int i = 0; i < N; i++) {
      const Vec y = at::vec::fmadd(load(from + p * from_stride + i * LANES), a[i], b[i]);
      store(to + p * to_stride + i * LANES, silu ? activate(y) : y);
    }
  }
}

// What a kernel reads: images, normalised and activated on the way if there are factors.
struct Input {
  Source source;
  const float *factor, *term;  // [B, C], or null
  bool silu;

  // Writes `count` pixels of an image, from `pixel` of the whole batch, as rows of all channels.
  void fill(int64_t image, int64_t pixel, int64_t count, Element* to) const {
    const int64_t channels = source.total();
    for (int64_t c = 0; c < channels;) {
      int64_t stride;
      const Element* from = source.at(pixel, c, &stride);
      const int64_t left = (c < source.channels ? source.channels : channels) - c;
      if (factor == nullptr) {
        for (int64_t p = 0; p < count; p++) {
          std::memcpy(to + p * channels + c, from + p * stride, left * sizeof(Element));
        }
        c += left;
        continue;
      }
      const float *a = factor + image * channels + c, *b = term + image * channels + c;
      if (left >= 4 * LANES) {
        apply<4>(from, stride, to + c, channels, count, a, b, silu);
        c += 4 * LANES;
      } else {
        apply<1>(from, stride, to + c, channels, count, a, b, silu);
        c += LANES;
      }
    }
  }
};

}  // namespace
