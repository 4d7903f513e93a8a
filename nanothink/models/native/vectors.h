// Vectors of the processor at hand, float32, for every source that is compiled where it is used.
//
// GCC's and Clang's vector extensions and no intrinsics: one text for AVX-512, AVX2, SSE and NEON.

#include <cstdint>
#include <cstring>

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vec __attribute__((vector_size(4 * W)));
typedef int32_t ivec __attribute__((vector_size(4 * W)));
typedef float loose_vec __attribute__((vector_size(4 * W), aligned(4), may_alias));

inline vec splat(float x) { return x - vec{}; }
inline vec load(const float* p) { return *reinterpret_cast<const loose_vec*>(p); }
inline void store(float* p, vec v) { *reinterpret_cast<loose_vec*>(p) = v; }

// The last vector of a row may be cut short: its missing lanes read as zero and are not written.
inline vec load(const float* p, int lanes) {
  if (lanes == W) return load(p);
  vec v{};
  std::memcpy(&v, p, 4 * lanes);
  return v;
}
inline void store(float* p, vec v, int lanes) {
  if (lanes == W) store(p, v);
  else std::memcpy(p, &v, 4 * lanes);
}

// Call f(start, lanes) for each vector of a row of n numbers; the last may be cut short.
template <class F>
inline void for_vectors(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + W <= n; i += W) f(i, W);
  if (i < n) f(i, static_cast<int>(n - i));
}

// A bfloat16 is the upper half of a float32.
typedef uint16_t bfloat16;
inline float wide(bfloat16 bits) {
  const uint32_t whole = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &whole, sizeof x);
  return x;
}
inline float wide(float x) { return x; }
inline float wide(int8_t x) { return x; }
typedef uint16_t half_vec __attribute__((vector_size(2 * W)));
inline vec load(const bfloat16* p, int lanes) {
  half_vec v{};
  std::memcpy(&v, p, 2 * lanes);
  return reinterpret_cast<vec>(__builtin_convertvector(v, ivec) << 16);
}

// Rounded to the nearest, ties to even; a NaN stays one, whatever its bits.
inline void store(bfloat16* p, vec v, int lanes) {
  const ivec bits = reinterpret_cast<ivec>(v);
  const ivec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, nan = (bits >> 16) | 0x40;
  const half_vec halves = __builtin_convertvector(v == v ? rounded : nan, half_vec);
  std::memcpy(p, &halves, 2 * lanes);
}

inline float sum(vec v) {
  float total = 0;
  for (int i = 0; i < W; ++i) total += v[i];
  return total;
}

// NaN if there is one.
inline float greatest(vec v) {
  float most = v[0];
  for (int i = 1; i < W; ++i) most = v[i] > most || v[i] != v[i] ? v[i] : most;
  return most;
}

// 2^x within 2 units in the last place; 0 below -127 and infinity from 128, NaN for NaN. x is split into the
// nearest integer, which becomes the exponent, and a rest in [-1/2, 1/2] for a polynomial of degree 6.
inline vec exp2(vec x) {
  x = x < splat(-127.f) ? splat(-127.f) : x;
  x = x > splat(128.f) ? splat(128.f) : x;
  const vec shifted = x + splat(12582912.f);  // 1.5 * 2^23: the sum's low bits are the nearest integer
  const vec f = x - (shifted - splat(12582912.f));
  vec p = f * splat(1.545316294e-4f) + splat(1.339086336e-3f);
  p = p * f + splat(9.618082557e-3f);
  p = p * f + splat(5.550357114e-2f);
  p = p * f + splat(2.402265076e-1f);
  p = p * f + splat(6.931471880e-1f);
  p = p * f + splat(1.f);
  return reinterpret_cast<vec>(reinterpret_cast<ivec>(p) + (reinterpret_cast<ivec>(shifted) << 23));
}

constexpr float LOG2_E = 1.44269504088896341f;

inline vec sigmoid(vec x) { return splat(1.f) / (splat(1.f) + exp2(x * splat(-LOG2_E))); }
inline vec silu(vec x) { return x / (splat(1.f) + exp2(x * splat(-LOG2_E))); }

inline vec absolute(vec x) { return x < vec{} ? -x : x; }

// log(1 + z) for z in [0, 1]: 2 artanh(s) with s = z / (2 + z) <= 1/3, whose series ends below float32's.
inline vec log1p(vec z) {
  const vec s = z / (splat(2.f) + z), q = s * s;
  vec p = q * splat(1.f / 15) + splat(1.f / 13);
  p = p * q + splat(1.f / 11);
  p = p * q + splat(1.f / 9);
  p = p * q + splat(1.f / 7);
  p = p * q + splat(1.f / 5);
  p = p * q + splat(1.f / 3);
  return (s + s) * (p * q + splat(1.f));
}

inline vec softplus(vec x) {
  return (x > vec{} ? x : vec{}) + log1p(exp2(absolute(x) * splat(-LOG2_E)));
}

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, ivec{__VA_ARGS__})
#endif

typedef float quad __attribute__((vector_size(16)));
typedef float loose_quad __attribute__((vector_size(16), aligned(4), may_alias));

// The sums of four vectors, in 8 shuffles where four calls of sum take 60 additions.
inline quad sum4(vec a, vec b, vec c, vec d) {
#if defined(__AVX512F__)
  const vec ab = SHUFFLE(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
                 SHUFFLE(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  const vec cd = SHUFFLE(c, d, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
                 SHUFFLE(c, d, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  vec s = SHUFFLE(ab, cd, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
          SHUFFLE(ab, cd, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  s += SHUFFLE(s, s, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  s += SHUFFLE(s, s, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
#elif defined(__AVX__)
  const vec ab = SHUFFLE(a, b, 0, 8, 1, 9, 4, 12, 5, 13) + SHUFFLE(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
  const vec cd = SHUFFLE(c, d, 0, 8, 1, 9, 4, 12, 5, 13) + SHUFFLE(c, d, 2, 10, 3, 11, 6, 14, 7, 15);
  vec s = SHUFFLE(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13) + SHUFFLE(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15);
  s += SHUFFLE(s, s, 4, 5, 6, 7, 0, 1, 2, 3);
#else
  const vec ab = SHUFFLE(a, b, 0, 4, 1, 5) + SHUFFLE(a, b, 2, 6, 3, 7);
  const vec cd = SHUFFLE(c, d, 0, 4, 1, 5) + SHUFFLE(c, d, 2, 6, 3, 7);
  const vec s = SHUFFLE(ab, cd, 0, 1, 4, 5) + SHUFFLE(ab, cd, 2, 3, 6, 7);
#endif
  quad four;
  std::memcpy(&four, &s, sizeof four);
  return four;
}

}  // namespace
