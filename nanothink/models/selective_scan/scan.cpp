// The selective scan for CPUs, forward and backward, float32. compiled.py builds it, after vectors.h and threads.h.
//
// Work is cut into (sequence, segment of SEGMENT channels); units are independent and threads take them one
// by one. How it is cut does not depend on the number of threads, so neither do the results. Within
// a unit, channels advance W at a time, one channel a vector lane, with the N states of a channel in
// the first-level cache. The backward pass goes through the chunks of time backwards: it computes the states
// of a chunk again from the saved one at its start, then their gradients.
//
// Shapes, all contiguous: u, delta, y (B, T, D); A (N, D); B, C (B, T, N); D (D); state, last (B, N, D);
// starts (B, ceil(T / chunk), N, D).

#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

constexpr int CHUNK = 32;     // steps between saved states
constexpr int SEGMENT = 128;  // channels of a unit of work
static_assert(SEGMENT % W == 0, "a segment is whole vectors");

struct Shape {
  int64_t batch, length, width, n_states;
  int64_t chunks() const { return (length + CHUNK - 1) / CHUNK; }
  int64_t segments() const { return (width + SEGMENT - 1) / SEGMENT; }
};

template <class Unit>
void for_each_unit(const Shape& s, int n_threads, const Unit& unit) {
  for_pieces(s.batch * s.segments(), n_threads,
             [&](int64_t i) { unit(i / s.segments(), i % s.segments()); });
}

// N is known at compile time for the usual number of states, so that loops over it unroll; 0: at run time.
template <int N_STATES>
void forward(const Shape& s, const float* u, const float* delta, const float* A, const float* B,
             const float* C, const float* D, const float* state, float* y, float* last, float* starts,
             int n_threads) {
  const int64_t N = N_STATES ? N_STATES : s.n_states, T = s.length, width = s.width;
  for_each_unit(s, n_threads, [&](int64_t b, int64_t segment) {
    const int64_t end = std::min(width, (segment + 1) * SEGMENT);
    std::vector<vec> h(N), a(N);
    for (int64_t d = segment * SEGMENT; d < end; d += W) {
      const int lanes = static_cast<int>(std::min<int64_t>(W, end - d));
      for (int64_t n = 0; n < N; ++n) {
        a[n] = load(A + n * width + d, lanes) * splat(LOG2_E);
        h[n] = load(state + (b * N + n) * width + d, lanes);
      }
      const vec skip = load(D + d, lanes);
      for (int64_t t = 0; t < T; ++t) {
        if (starts && t % CHUNK == 0) {
          float* to = starts + (b * s.chunks() + t / CHUNK) * N * width + d;
          for (int64_t n = 0; n < N; ++n) store(to + n * width, h[n], lanes);
        }
        const int64_t row = b * T + t;
        const float *Bt = B + row * N, *Ct = C + row * N;
        const vec dt = load(delta + row * width + d, lanes), ut = load(u + row * width + d, lanes);
        const vec du = dt * ut;
        vec sum_even = skip * ut, sum_odd{};
        for (int64_t n = 0; n + 1 < N; n += 2) {
          h[n] = exp2(dt * a[n]) * h[n] + du * splat(Bt[n]);
          h[n + 1] = exp2(dt * a[n + 1]) * h[n + 1] + du * splat(Bt[n + 1]);
          sum_even += h[n] * splat(Ct[n]);
          sum_odd += h[n + 1] * splat(Ct[n + 1]);
        }
        if (N % 2) {
          h[N - 1] = exp2(dt * a[N - 1]) * h[N - 1] + du * splat(Bt[N - 1]);
          sum_even += h[N - 1] * splat(Ct[N - 1]);
        }
        store(y + row * width + d, sum_even + sum_odd, lanes);
      }
      for (int64_t n = 0; n < N; ++n) store(last + (b * N + n) * width + d, h[n], lanes);
    }
  });
}

// grad_A and grad_D come by sequence, (B, N, D) and (B, D); grad_B and grad_C by segment, (segments, B, T, N):
// the caller adds them up, always in the same order.
template <int N_STATES>
void backward(const Shape& s, const float* u, const float* delta, const float* A, const float* B,
              const float* C, const float* D, const float* starts, const float* grad_y,
              const float* grad_last, float* grad_u, float* grad_delta, float* grad_A, float* grad_B,
              float* grad_C, float* grad_D, float* grad_state, int n_threads) {
  const int64_t N = N_STATES ? N_STATES : s.n_states, T = s.length, width = s.width;
  for_each_unit(s, n_threads, [&](int64_t b, int64_t segment) {
    const int64_t begin = segment * SEGMENT, end = std::min(width, begin + SEGMENT);
    const int64_t n_blocks = (end - begin + W - 1) / W;
    std::vector<vec> states((CHUNK + 1) * N), decays(CHUNK * N);     // of one chunk and W channels
    std::vector<vec> sums_B(CHUNK * N), sums_C(CHUNK * N);           // of one chunk, over channels
    std::vector<vec> carried(n_blocks * N), sums_A(n_blocks * N), sums_D(n_blocks), scaled(n_blocks * N);
    for (int64_t i = 0, d = begin; i < n_blocks; ++i, d += W) {
      const int lanes = static_cast<int>(std::min<int64_t>(W, end - d));
      for (int64_t n = 0; n < N; ++n) {
        scaled[i * N + n] = load(A + n * width + d, lanes) * splat(LOG2_E);
        carried[i * N + n] = load(grad_last + (b * N + n) * width + d, lanes);
      }
    }
    for (int64_t c = s.chunks() - 1; c >= 0; --c) {
      const int64_t first = c * CHUNK, steps = std::min<int64_t>(CHUNK, T - first);
      std::fill(sums_B.begin(), sums_B.end(), vec{});
      std::fill(sums_C.begin(), sums_C.end(), vec{});
      for (int64_t i = 0, d = begin; i < n_blocks; ++i, d += W) {
        const int lanes = static_cast<int>(std::min<int64_t>(W, end - d));
        const vec* a = &scaled[i * N];
        for (int64_t n = 0; n < N; ++n)
          states[n] = load(starts + ((b * s.chunks() + c) * N + n) * width + d, lanes);
        for (int64_t k = 0; k < steps; ++k) {
          const int64_t row = b * T + first + k;
          const float* Bt = B + row * N;
          const vec dt = load(delta + row * width + d, lanes);
          const vec du = dt * load(u + row * width + d, lanes);
          const vec* h = &states[k * N];
          vec *next = &states[(k + 1) * N], *decay = &decays[k * N];
          for (int64_t n = 0; n < N; ++n) {
            decay[n] = exp2(dt * a[n]);
            next[n] = decay[n] * h[n] + du * splat(Bt[n]);
          }
        }
        const vec skip = load(D + d, lanes);
        vec *g = &carried[i * N], *sum_A = &sums_A[i * N];
        for (int64_t k = steps - 1; k >= 0; --k) {
          const int64_t row = b * T + first + k;
          const float *Bt = B + row * N, *Ct = C + row * N;
          const vec dt = load(delta + row * width + d, lanes), ut = load(u + row * width + d, lanes);
          const vec gy = load(grad_y + row * width + d, lanes), du = dt * ut;
          const vec *before = &states[k * N], *h = &states[(k + 1) * N], *decay = &decays[k * N];
          vec *sum_B = &sums_B[k * N], *sum_C = &sums_C[k * N];
          vec grad_du{}, sum_Q{};
          for (int64_t n = 0; n < N; ++n) {
            const vec G = g[n] + gy * splat(Ct[n]);
            sum_C[n] += gy * h[n];
            sum_B[n] += G * du;
            grad_du += G * splat(Bt[n]);
            g[n] = decay[n] * G;
            const vec Q = g[n] * before[n];
            sum_Q += Q * a[n];
            sum_A[n] += Q * dt;
          }
          store(grad_delta + row * width + d, sum_Q * splat(1.f / LOG2_E) + grad_du * ut, lanes);
          store(grad_u + row * width + d, grad_du * dt + gy * skip, lanes);
          sums_D[i] += gy * ut;
        }
      }
      for (int64_t k = 0; k < steps; ++k) {
        const int64_t row = (segment * s.batch + b) * T + first + k;
        for (int64_t n = 0; n < N; ++n) {
          grad_B[row * N + n] = sum(sums_B[k * N + n]);
          grad_C[row * N + n] = sum(sums_C[k * N + n]);
        }
      }
    }
    for (int64_t i = 0, d = begin; i < n_blocks; ++i, d += W) {
      const int lanes = static_cast<int>(std::min<int64_t>(W, end - d));
      for (int64_t n = 0; n < N; ++n) {
        store(grad_A + (b * N + n) * width + d, sums_A[i * N + n], lanes);
        store(grad_state + (b * N + n) * width + d, carried[i * N + n], lanes);
      }
      store(grad_D + b * width + d, sums_D[i], lanes);
    }
  });
}

}  // namespace

extern "C" {

int64_t nanothink_scan_chunk() { return CHUNK; }
int64_t nanothink_scan_segment() { return SEGMENT; }

void nanothink_scan_forward(int64_t batch, int64_t length, int64_t width, int64_t n_states, const float* u,
                            const float* delta, const float* A, const float* B, const float* C,
                            const float* D, const float* state, float* y, float* last, float* starts,
                            int n_threads) {
  const Shape s{batch, length, width, n_states};
  (n_states == 16 ? forward<16> : forward<0>)(s, u, delta, A, B, C, D, state, y, last, starts, n_threads);
}

void nanothink_scan_backward(int64_t batch, int64_t length, int64_t width, int64_t n_states, const float* u,
                             const float* delta, const float* A, const float* B, const float* C,
                             const float* D, const float* starts, const float* grad_y,
                             const float* grad_last, float* grad_u, float* grad_delta, float* grad_A,
                             float* grad_B, float* grad_C, float* grad_D, float* grad_state,
                             int n_threads) {
  const Shape s{batch, length, width, n_states};
  (n_states == 16 ? backward<16> : backward<0>)(s, u, delta, A, B, C, D, starts, grad_y, grad_last, grad_u,
                                                grad_delta, grad_A, grad_B, grad_C, grad_D, grad_state,
                                                n_threads);
}
}
