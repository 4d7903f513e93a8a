// Products of a matrix with a few rows, at the speed of reading the matrix once.
//
// Four rows of the matrix at a time, as they lie in the model, with up to four rows of the input. The four come
// from the four quarters of the matrix: a processor reads ahead in streams that are far apart, and fails to in
// rows that are neighbours (10 ms against 2.8 for 50257 x 384 on an AMD processor).

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace {

constexpr int64_t BLOCK = 4 * W;  // codes of eight bits in a vector

// What ROWS inputs and four rows of a matrix give, which are `apart`: y[r][i apart] (+)= sums[r][i] scales[i apart].
template <int ROWS>
inline void put(const vec (&sums)[ROWS][4], const float* scales, float* y, int64_t y_stride, int64_t apart, bool add) {
  for (int r = 0; r < ROWS; ++r) {
    const quad four = sum4(sums[r][0], sums[r][1], sums[r][2], sums[r][3]);
    for (int i = 0; i < 4; ++i) {
      float* to = y + r * y_stride + i * apart;
      const float total = scales ? four[i] * scales[i * apart] : four[i];
      *to = add ? *to + total : total;
    }
  }
}

// sums[r][i] = w[i apart] . x[r]. Weights are float32, or bfloat16 and widened as they are read.
template <int ROWS, class Weight>
inline void dots(const Weight* w, const float* x, int64_t x_stride, int64_t in, int64_t apart, vec (&sums)[ROWS][4]) {
  for_vectors(in, [&](int64_t c, int lanes) {
    vec weights[4];
    for (int i = 0; i < 4; ++i) weights[i] = load(w + i * apart * in + c, lanes);
    for (int r = 0; r < ROWS; ++r) {
      const vec v = load(x + r * x_stride + c, lanes);
      for (int i = 0; i < 4; ++i) sums[r][i] += weights[i] * v;
    }
  });
}

// The same of codes, four to each lane of a vector: lane l of the k-th part holds column 4 l + k of the block,
// and x has its blocks in that order (`by_part`).
template <int ROWS>
inline void dots(const int8_t* w, const float* x, int64_t x_stride, int64_t in, int64_t apart, vec (&sums)[ROWS][4]) {
  for (int64_t c = 0; c < in; c += BLOCK) {
    ivec codes[4] = {};
    for (int i = 0; i < 4; ++i)
      if (c + BLOCK <= in) std::memcpy(codes + i, w + i * apart * in + c, BLOCK);
      else std::memcpy(codes + i, w + i * apart * in + c, in - c);
    for (int k = 0; k < 4; ++k)
      for (int i = 0; i < 4; ++i) {
        const vec weights = __builtin_convertvector((codes[i] << (24 - 8 * k)) >> 24, vec);
        for (int r = 0; r < ROWS; ++r) sums[r][i] += weights * load(x + r * x_stride + c + k * W);
      }
  }
}

// Rows (rows, in) with the columns of each block in the order of `dots`, filled up with zeros.
const float* by_part(const float* x, int64_t x_stride, int64_t rows, int64_t in, int64_t padded) {
  static thread_local std::vector<float> mixed;
  mixed.assign(rows * padded, 0.f);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < in; ++c)
      mixed[r * padded + c / BLOCK * BLOCK + c % 4 * W + c % BLOCK / 4] = x[r * x_stride + c];
  return mixed.data();
}

// y (rows, out) = or += x (rows, in) times the transpose of w (out, in). Codes have a scale for each row of w.
template <class Number>
void product(const Number* w, const float* scales, const float* x, int64_t x_stride, float* y, int64_t y_stride,
             int64_t rows, int64_t in, int64_t out, bool add) {
  const int64_t quarter = out / 4, padded = (in + BLOCK - 1) / BLOCK * BLOCK;
  const bool coded = sizeof(Number) == 1;
  const float* inputs = coded ? by_part(x, x_stride, rows, in, padded) : x;
  const int64_t stride = coded ? padded : x_stride;
  for (int64_t o = 0; o < quarter; ++o) {
    const float* of_four = scales ? scales + o : nullptr;
    const auto some = [&](auto count, int64_t r) {
      constexpr int ROWS = decltype(count)::value;
      vec sums[ROWS][4] = {};
      dots<ROWS>(w + o * in, inputs + r * stride, stride, in, quarter, sums);
      put<ROWS>(sums, of_four, y + r * y_stride + o, y_stride, quarter, add);
    };
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) some(std::integral_constant<int, 4>(), r);
    if (r + 3 == rows) some(std::integral_constant<int, 3>(), r), r += 3;
    for (; r + 2 <= rows; r += 2) some(std::integral_constant<int, 2>(), r);
    for (; r < rows; ++r) some(std::integral_constant<int, 1>(), r);
  }
  for (int64_t o = 4 * quarter; o < out; ++o)  // at most three
    for (int64_t r = 0; r < rows; ++r) {
      float total = 0;
      for (int64_t c = 0; c < in; ++c) total += wide(w[o * in + c]) * x[r * x_stride + c];
      float* to = y + r * y_stride + o;
      *to = (add ? *to : 0.f) + total * (scales ? scales[o] : 1.f);
    }
}

}  // namespace
