// Decoding on a CPU: a step is a list of operations over fixed buffers, run in order by one call. float32.
// program.py writes the list, compiled.py builds this file (after vectors.h and products.h) and calls it.
//
// One sequence and one token make most steps, so a matrix is read once from memory (products.h) and everything
// else is small: what is written stays in the first cache.
//
// Shapes, all contiguous: B sequences, T new tokens of each, R = B T rows of activations, row b T + t; a row's
// position is that of its sequence's first new token plus t. H heads, G heads of keys, K width of a head, S tokens that a
// cache has room for, E channels, N states. In an operation n are sizes and p pointers, in the order of its
// comment.

#include <algorithm>
#include <cmath>
#include <vector>

namespace {

struct Operation {
  int64_t kind, n[6];
  double number;
  float* p[7];
};

struct Run {
  int64_t batch, n_new;
  bool every;  // predict after every new token
  const int64_t *positions, *tokens;
  int64_t rows() const { return batch * n_new; }
  int64_t position(int64_t row) const { return positions[row / n_new] + row % n_new; }
};

inline float fast_sum(vec v) { return sum4(v, v, v, v)[0]; }

// x (R, D) = the rows of the table that the tokens name. n: D; p: table (V, D), x.
void embed(const Operation& op, const Run& run) {
  const int64_t width = op.n[0];
  for (int64_t r = 0; r < run.rows(); ++r)
    std::memcpy(op.p[1] + r * width, op.p[0] + run.tokens[r] * width, 4 * width);
}

// y = RMSNorm(x), for each part of a row. n: width, parts, stride of x, stride of y; number: epsilon;
// p: x, weight, y.
void norm(const Operation& op, const Run& run) {
  const int64_t width = op.n[0];
  for (int64_t i = 0; i < run.rows() * op.n[1]; ++i) {
    const int64_t r = i / op.n[1], part = i % op.n[1] * width;
    const float* x = op.p[0] + r * op.n[2] + part;
    float* y = op.p[2] + r * op.n[3] + part;
    vec squares{};
    for_vectors(width, [&](int64_t i, int lanes) {
      const vec v = load(x + i, lanes);
      squares += v * v;
    });
    const vec scale = splat(1.f / std::sqrt(fast_sum(squares) / width + static_cast<float>(op.number)));
    for_vectors(width, [&](int64_t i, int lanes) {
      store(y + i, load(x + i, lanes) * scale * load(op.p[1] + i, lanes), lanes);
    });
  }
}

// y = or += x W^T, where W[o][i] = codes[o][i] scales[o] if there are codes. n: in, out, 1 to add, 1 for the last new
// token of each sequence alone unless the run is for every one, 1 if W is bfloat16; p: W, codes or null, scales or null, x (R, in), y (R, out) or (B, out).
void linear(const Operation& op, const Run& run) {
  const bool last = op.n[3] && !run.every;
  const int64_t in = op.n[0], out = op.n[1], rows = last ? run.batch : run.rows();
  const int64_t stride = last ? run.n_new * in : in;
  const float* x = last ? op.p[3] + (run.n_new - 1) * in : op.p[3];
  if (op.p[1])
    product(reinterpret_cast<const int8_t*>(op.p[1]), op.p[2], x, stride, op.p[4], out, rows, in, out, op.n[2]);
  else if (op.n[4])
    product(reinterpret_cast<const bfloat16*>(op.p[0]), nullptr, x, stride, op.p[4], out, rows, in, out, op.n[2]);
  else
    product(op.p[0], nullptr, x, stride, op.p[4], out, rows, in, out, op.n[2]);
}

// y = bias + x W with few inputs. n: in, out, stride of x; p: W (in, out), x, bias, y (R, out).
void spread(const Operation& op, const Run& run) {
  const int64_t in = op.n[0], out = op.n[1];
  for (int64_t r = 0; r < run.rows(); ++r) {
    const float* x = op.p[1] + r * op.n[2];
    for_vectors(out, [&](int64_t i, int lanes) {
      vec even = load(op.p[2] + i, lanes), odd{};
      int64_t k = 0;
      for (; k + 2 <= in; k += 2) {
        even += splat(x[k]) * load(op.p[0] + k * out + i, lanes);
        odd += splat(x[k + 1]) * load(op.p[0] + (k + 1) * out + i, lanes);
      }
      if (k < in) even += splat(x[k]) * load(op.p[0] + k * out + i, lanes);
      store(op.p[3] + r * out + i, even + odd, lanes);
    });
  }
}

// y = silu(gate) x. n: width; p: gate, x, y, (R, width) each.
void gate(const Operation& op, const Run& run) {
  for_vectors(run.rows() * op.n[0], [&](int64_t i, int lanes) {
    store(op.p[2] + i, silu(load(op.p[0] + i, lanes)) * load(op.p[1] + i, lanes), lanes);
  });
}

// Rotate the first 2 half features of each head of x (R, heads, K) by the row's position, first half against
// second. n: heads, K, half, stride of x; p: cosines (S, half), sines, x.
void rotate(const Operation& op, const Run& run) {
  const int64_t heads = op.n[0], width = op.n[1], half = op.n[2];
  for (int64_t r = 0; r < run.rows(); ++r) {
    const int64_t position = run.position(r);
    const float *cosines = op.p[0] + position * half, *sines = op.p[1] + position * half;
    for (int64_t h = 0; h < heads; ++h) {
      float *first = op.p[2] + r * op.n[3] + h * width, *second = first + half;
      for_vectors(half, [&](int64_t i, int lanes) {
        const vec a = load(first + i, lanes), b = load(second + i, lanes);
        const vec c = load(cosines + i, lanes), s = load(sines + i, lanes);
        store(first + i, a * c - b * s, lanes);
        store(second + i, b * c + a * s, lanes);
      });
    }
  }
}

// Put rows into a cache. n: G, K, S, stride of x; p: x (R, G K), cache (B, G, S, K).
void append(const Operation& op, const Run& run) {
  const int64_t heads = op.n[0], width = op.n[1], room = op.n[2];
  for (int64_t r = 0; r < run.rows(); ++r)
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t row = ((r / run.n_new) * heads + h) * room + run.position(r);
      std::memcpy(op.p[1] + row * width, op.p[0] + r * op.n[3] + h * width, 4 * width);
    }
}

// Scores to weights of sum 1, in place; what fills up the last vector becomes 0.
void softmax(float* scores, int64_t n, float scale) {
  const int64_t padded = (n + W - 1) / W * W;
  for (int64_t i = n; i < padded; ++i) scores[i] = -INFINITY;
  vec above = splat(-INFINITY);
  for (int64_t i = 0; i < padded; i += W) {
    const vec v = load(scores + i);
    above = v > above ? v : above;
  }
  const float most = greatest(above);
  vec total{};
  for (int64_t i = 0; i < padded; i += W) {
    vec v = exp2((load(scores + i) - splat(most)) * splat(scale * LOG2_E));
    if (i + W > n)
      for (int64_t lane = n - i; lane < W; ++lane) v[lane] = 0;
    store(scores + i, v);
    total += v;
  }
  const vec inverse = splat(1.f / fast_sum(total));
  for (int64_t i = 0; i < padded; i += W) store(scores + i, load(scores + i) * inverse);
}

// y (K) = sum of n rows of values (n, K), weighted.
void weighted_sum(const float* weights, const float* values, int64_t n, int64_t width, float* y) {
  int64_t k = 0;
  for (; k + 2 * W <= width; k += 2 * W) {
    vec even[2] = {}, odd[2] = {};
    const float* row = values + k;
    int64_t t = 0;
    for (; t + 2 <= n; t += 2, row += 2 * width) {
      const vec a = splat(weights[t]), b = splat(weights[t + 1]);
      even[0] += a * load(row), even[1] += a * load(row + W);
      odd[0] += b * load(row + width), odd[1] += b * load(row + width + W);
    }
    if (t < n) even[0] += splat(weights[t]) * load(row), even[1] += splat(weights[t]) * load(row + W);
    store(y + k, even[0] + odd[0]), store(y + k + W, even[1] + odd[1]);
  }
  for_vectors(width - k, [&](int64_t i, int lanes) {
    vec total{};
    for (int64_t t = 0; t < n; ++t) total += splat(weights[t]) * load(values + t * width + k + i, lanes);
    store(y + k + i, total, lanes);
  });
}

// Causal attention to a cache that already holds the new tokens. n: H, G, K, S; number: scale of the scores;
// p: queries (R, H, K), keys (B, G, S, K), values (B, G, S, K), y (R, H, K).
void attend(const Operation& op, const Run& run) {
  const int64_t heads = op.n[0], groups = op.n[1], width = op.n[2], room = op.n[3], shared = heads / groups;
  const int64_t longest = *std::max_element(run.positions, run.positions + run.batch) + run.n_new;
  const int64_t stride = (longest + W - 1) / W * W;
  std::vector<float> scores(shared * stride);
  for (int64_t r = 0; r < run.rows(); ++r) {
    const int64_t n_keys = run.position(r) + 1;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t cache = (r / run.n_new * groups + g) * room * width, at = (r * heads + g * shared) * width;
      product(op.p[1] + cache, nullptr, op.p[0] + at, width, scores.data(), stride, shared, width, n_keys, false);
      for (int64_t h = 0; h < shared; ++h) {
        softmax(scores.data() + h * stride, n_keys, static_cast<float>(op.number));
        weighted_sum(scores.data() + h * stride, op.p[2] + cache, n_keys, width, op.p[3] + at + h * width);
      }
    }
  }
}

// Attention to latents (latent_attention.py, "absorbed"), whose caches hold the new tokens. C latent and Q rotary
// width. n: H, K, Q, C, S; number: scale of the scores; p: queries (R, H, K + Q), latents (B, S, C), rotary keys
// (B, S, Q), matrices that expand a latent to a head's key, then its value (H, 2, K, C), y (R, H, K).
void attend_latents(const Operation& op, const Run& run) {
  const int64_t heads = op.n[0], width = op.n[1], rotary = op.n[2], latent = op.n[3], room = op.n[4];
  const int64_t longest = *std::max_element(run.positions, run.positions + run.batch) + run.n_new;
  const int64_t stride = (longest + W - 1) / W * W;
  std::vector<float> scores(heads * stride), absorbed(heads * latent), seen(latent);
  for (int64_t r = 0; r < run.rows(); ++r) {
    const int64_t n_keys = run.position(r) + 1, first = r / run.n_new * room;
    const float *query = op.p[0] + r * heads * (width + rotary), *latents = op.p[1] + first * latent;
    for (int64_t h = 0; h < heads; ++h)
      for_vectors(latent, [&](int64_t i, int lanes) {
        vec total{};
        for (int64_t k = 0; k < width; ++k)
          total += splat(query[h * (width + rotary) + k]) * load(op.p[3] + (h * 2 * width + k) * latent + i, lanes);
        store(absorbed.data() + h * latent + i, total, lanes);
      });
    product(latents, nullptr, absorbed.data(), latent, scores.data(), stride, heads, latent, n_keys, false);
    product(op.p[2] + first * rotary, nullptr, query + width, width + rotary, scores.data(), stride, heads, rotary, n_keys,
            true);
    for (int64_t h = 0; h < heads; ++h) {
      softmax(scores.data() + h * stride, n_keys, static_cast<float>(op.number));
      weighted_sum(scores.data() + h * stride, latents, n_keys, latent, seen.data());
      product(op.p[3] + (h * 2 + 1) * width * latent, nullptr, seen.data(), latent, op.p[4] + (r * heads + h) * width, width,
              1, latent, width, false);
    }
  }
}

// y = shift + x (1 + scale), each the sum of a term of the row and one of the noise level. n: D, stride of the
// rows' terms; p: x (R, D), terms of the rows, terms of the level (shift, then scale, of width D), y (R, D).
void modulate(const Operation& op, const Run& run) {
  const int64_t width = op.n[0];
  for (int64_t r = 0; r < run.rows(); ++r) {
    const float* of_row = op.p[1] + r * op.n[1];
    for_vectors(width, [&](int64_t i, int lanes) {
      const vec shift = load(of_row + i, lanes) + load(op.p[2] + i, lanes);
      const vec scale = load(of_row + width + i, lanes) + load(op.p[2] + width + i, lanes);
      store(op.p[3] + r * width + i, shift + load(op.p[0] + r * width + i, lanes) * (splat(1.f) + scale), lanes);
    });
  }
}

// x += y (1 + gate), gate as above. n: D, stride; p: y (R, D), terms of the rows, terms of the level, x (R, D).
void add_gated(const Operation& op, const Run& run) {
  const int64_t width = op.n[0];
  for (int64_t r = 0; r < run.rows(); ++r)
    for_vectors(width, [&](int64_t i, int lanes) {
      const vec gate = load(op.p[1] + r * op.n[1] + i, lanes) + load(op.p[2] + i, lanes);
      float* to = op.p[3] + r * width + i;
      store(to, load(to, lanes) + load(op.p[0] + r * width + i, lanes) * (splat(1.f) + gate), lanes);
    });
}

// The weight of each expert, w = softmax(bias + W u), and the head's input e^s [w_1 h_1 ; ... ; u]. n: D, experts,
// stride of experts; p: u (R, D), W (experts, D) or null, bias, s, h (experts, R, D), w (R, experts), y.
void route(const Operation& op, const Run& run) {
  const int64_t width = op.n[0], experts = op.n[1];
  const float factor = std::exp(*op.p[3]);
  for (int64_t r = 0; r < run.rows(); ++r) {
    const float* u = op.p[0] + r * width;
    float *weights = op.p[5] + r * experts, *y = op.p[6] + r * (experts + 1) * width;
    std::memcpy(weights, op.p[2], 4 * experts);
    if (op.p[1]) product(op.p[1], nullptr, u, width, weights, experts, 1, width, experts, true);
    const float most = *std::max_element(weights, weights + experts);
    float total = 0;
    for (int64_t e = 0; e < experts; ++e) total += weights[e] = std::exp(weights[e] - most);
    for (int64_t e = 0; e <= experts; ++e) {
      const float* part = e < experts ? op.p[4] + e * op.n[2] + r * width : u;
      if (e < experts) weights[e] /= total;
      const vec scale = splat(e < experts ? weights[e] * factor : factor);
      for_vectors(width, [&](int64_t i, int lanes) { store(y + e * width + i, load(part + i, lanes) * scale, lanes); });
    }
  }
}

// A causal filter a channel over the inputs before and now, then silu. n: E, width of the filter; p: x (R, E),
// taps (width, E) with the oldest input's first, bias (E), inputs before (B, width - 1, E), y (R, E).
void convolve(const Operation& op, const Run& run) {
  const int64_t channels = op.n[0], before = op.n[1] - 1;
  for (int64_t r = 0; r < run.rows(); ++r) {
    const float* x = op.p[0] + r * channels;
    float* kept = op.p[3] + r / run.n_new * before * channels;
    for_vectors(channels, [&](int64_t i, int lanes) {
      const vec now = load(x + i, lanes);
      vec total = load(op.p[2] + i, lanes) + now * load(op.p[1] + before * channels + i, lanes);
      for (int64_t k = 0; k < before; ++k) {
        const vec v = load(kept + k * channels + i, lanes);
        total += v * load(op.p[1] + k * channels + i, lanes);
        if (k > 0) store(kept + (k - 1) * channels + i, v, lanes);
      }
      store(kept + (before - 1) * channels + i, now, lanes);
      store(op.p[4] + r * channels + i, silu(total), lanes);
    });
  }
}

// A step of the selective scan (Mamba's equations, as in selective_scan/). n: E, N, stride of B and C;
// p: u (R, E), Δ before its softplus (R, E), B of each row with C behind it, A log2 e (N, E), D (E),
// state (B, N, E), y (R, E).
void scan(const Operation& op, const Run& run) {
  const int64_t channels = op.n[0], n_states = op.n[1];
  for (int64_t r = 0; r < run.rows(); ++r) {
    const float *B = op.p[2] + r * op.n[2], *C = B + n_states;
    float* state = op.p[5] + r / run.n_new * n_states * channels;
    for_vectors(channels, [&](int64_t i, int lanes) {
      const vec u = load(op.p[0] + r * channels + i, lanes);
      const vec delta = softplus(load(op.p[1] + r * channels + i, lanes)), du = delta * u;
      vec y = load(op.p[4] + i, lanes) * u;
      for (int64_t n = 0; n < n_states; ++n) {
        float* of_state = state + n * channels + i;
        const vec decay = exp2(delta * load(op.p[3] + n * channels + i, lanes));
        const vec h = decay * load(of_state, lanes) + du * splat(B[n]);
        store(of_state, h, lanes);
        y += h * splat(C[n]);
      }
      store(op.p[6] + r * channels + i, y, lanes);
    });
  }
}

using Function = void (*)(const Operation&, const Run&);
constexpr Function FUNCTIONS[] = {embed,    norm, linear,         spread,   gate,      rotate, append, attend,
                                  convolve, scan, attend_latents, modulate, add_gated, route};

}  // namespace

extern "C" void nanothink_decode(const Operation* operations, int64_t n_operations, int64_t batch, int64_t n_new,
                                 int64_t every, const int64_t* positions, const int64_t* tokens) {
  const Run run{batch, n_new, every != 0, positions, tokens};
  for (int64_t i = 0; i < n_operations; ++i) FUNCTIONS[operations[i].kind](operations[i], run);
}
