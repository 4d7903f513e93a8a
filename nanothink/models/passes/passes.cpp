// Elementwise passes of a training step on a CPU, each in one walk through its memory. __init__.py builds this file,
// after vectors.h and threads.h, and calls it. Memory is float32 or bfloat16 (`Number`); all arithmetic is float32.
//
// R rows of a width, contiguous. How rows are cut does not depend on the number of threads, so neither do results.

#include <algorithm>
#include <cmath>
#include <vector>

namespace {

constexpr int64_t PIECE = 1 << 14;  // numbers that a thread takes at a time

int64_t rows_of_piece(int64_t width) { return std::max<int64_t>(1, PIECE / width); }

// Call f(begin, end) for pieces of n rows of a width.
template <class F>
void for_rows(int64_t n, int64_t width, int64_t n_threads, const F& f) {
  const int64_t rows = rows_of_piece(width);
  for_pieces((n + rows - 1) / rows, n_threads,
             [&](int64_t i) { f(i * rows, std::min(n, (i + 1) * rows)); });
}

// A row of logits x becomes factor (softmax - one_hot) in place if there is a factor. Its negative log-likelihood
// and the logarithm of its greatest probability. `room` holds the width in whole vectors.
template <class Number>
void softmax_row(Number* x, int64_t width, int64_t target, const float* factor, float* nats, float* peak, float* room) {
  vec most = splat(-INFINITY), bad{};
  for_vectors(width, [&](int64_t i, int lanes) {
    vec v = load(x + i, lanes);
    for (int lane = lanes; lane < W; ++lane) v[lane] = -INFINITY;
    most = v > most ? v : most;
    bad = v != v ? v : bad;  // a comparison with NaN would lose it
    store(room + i, v);
  });
  const float top = greatest(most) + sum(bad);
  vec totals[4] = {};
  const int64_t padded = (width + W - 1) / W * W;
  for (int64_t i = 0; i < padded; i += 4 * W)
    for (int k = 0; k < 4 && i + k * W < padded; ++k) {
      const vec e = exp2((load(room + i + k * W) - splat(top)) * splat(LOG2_E));
      store(room + i + k * W, e);
      totals[k] += e;
    }
  const float total = sum((totals[0] + totals[1]) + (totals[2] + totals[3])), log_total = std::log(total);
  *nats = log_total + (top - wide(x[target]));
  *peak = -log_total;
  if (!factor) return;
  const float scale = *factor / total, at_target = room[target] * scale - *factor;
  for_vectors(width, [&](int64_t i, int lanes) { store(x + i, load(room + i) * splat(scale), lanes); });
  store(x + target, splat(at_target), 1);
}

template <class Number>
void softmax(int64_t n_rows, int64_t width, Number* x, const int64_t* targets, const float* factors, float* nats,
             float* peaks, int64_t n_threads) {
  for_rows(n_rows, width, n_threads, [&](int64_t begin, int64_t end) {
    static thread_local std::vector<float> room;
    room.resize(width + W);
    for (int64_t r = begin; r < end; ++r)
      softmax_row(x + r * width, width, targets[r], factors ? factors + r : nullptr, nats + r, peaks + r, room.data());
  });
}

// total += x, rows of which are `stride` apart in total.
template <class Number>
void add(int64_t n_rows, int64_t width, int64_t stride, float* total, const Number* x, int64_t n_threads) {
  for_rows(n_rows, width, n_threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      for_vectors(width, [&](int64_t i, int lanes) {
        float* to = total + r * stride + i;
        store(to, load(to, lanes) + load(x + r * width + i, lanes), lanes);
      });
  });
}

// Scores (n_rows, width) of queries with keys become weights, in place: the softmax of `scale` times the first
// `first + r % n_queries + 1` of a row, and 0 behind them. logs: logarithms of the sums.
template <class Number>
void causal(int64_t n_rows, int64_t width, int64_t n_queries, int64_t first, float scale, Number* scores, float* logs,
            int64_t n_threads) {
  for_rows(n_rows, width, n_threads, [&](int64_t begin, int64_t end) {
    static thread_local std::vector<float> room;
    room.resize(width + W);
    for (int64_t r = begin; r < end; ++r) {
      Number* x = scores + r * width;
      const int64_t seen = first + r % n_queries + 1;
      vec most = splat(-INFINITY), total{};
      for_vectors(seen, [&](int64_t i, int lanes) {
        vec v = load(x + i, lanes);
        for (int lane = lanes; lane < W; ++lane) v[lane] = -INFINITY;
        most = v > most ? v : most;
        store(room.data() + i, v);
      });
      const float top = greatest(most), factor = scale * LOG2_E;
      for_vectors(seen, [&](int64_t i, int) {
        const vec e = exp2((load(room.data() + i) - splat(top)) * splat(factor));
        store(room.data() + i, e);
        total += e;
      });
      const float all = sum(total);
      logs[r] = std::log(all) + top * scale;
      for_vectors(seen, [&](int64_t i, int lanes) { store(x + i, load(room.data() + i) * splat(1.f / all), lanes); });
      std::fill(x + seen, x + width, Number{});
    }
  });
}

// Backward: the scores become weights again, and the gradients of the weights those of the scores, w (g - inner) scale,
// with inner = sum(w g) of each row.
template <class Number>
void causal_backward(int64_t n_rows, int64_t width, int64_t n_queries, int64_t first, float scale, Number* scores,
                     Number* grads, const float* logs, const float* inner, int64_t n_threads) {
  for_rows(n_rows, width, n_threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      Number *x = scores + r * width, *g = grads + r * width;
      const int64_t seen = first + r % n_queries + 1;
      for_vectors(seen, [&](int64_t i, int lanes) {
        const vec w = exp2((load(x + i, lanes) * splat(scale) - splat(logs[r])) * splat(LOG2_E));
        store(x + i, w, lanes);
        store(g + i, w * (load(g + i, lanes) - splat(inner[r])) * splat(scale), lanes);
      });
      std::fill(x + seen, x + width, Number{});
      std::fill(g + seen, g + width, Number{});
    }
  });
}

// y = silu(gate) up.
template <class Number>
void gate_forward(int64_t n, const Number* gate, const Number* up, Number* y, int64_t n_threads) {
  for_rows(n, 1, n_threads, [&](int64_t begin, int64_t end) {
    for_vectors(end - begin, [&](int64_t i, int lanes) {
      const vec g = load(gate + begin + i, lanes);
      store(y + begin + i, silu(g) * load(up + begin + i, lanes), lanes);
    });
  });
}

// y again, and the gradients of gate and up from that of y, which may lie where grad_y does.
template <class Number>
void gate_backward(int64_t n, const Number* gate, const Number* up, const Number* grad_y, Number* y, Number* grad_gate,
                   Number* grad_up, int64_t n_threads) {
  for_rows(n, 1, n_threads, [&](int64_t begin, int64_t end) {
    for_vectors(end - begin, [&](int64_t k, int lanes) {
      const int64_t i = begin + k;
      const vec g = load(gate + i, lanes), u = load(up + i, lanes), grad = load(grad_y + i, lanes);
      const vec opened = sigmoid(g), through = g * opened;
      store(y + i, through * u, lanes);
      store(grad_up + i, through * grad, lanes);
      store(grad_gate + i, grad * u * (opened + through * (splat(1.f) - opened)), lanes);
    });
  });
}

// Rows (n, heads, width), row r at position r % length. Each head is normalised to a root mean square of 1, weighted, and
// its first 2 half features are rotated by its position if half is not 0. cos, sin (length, half).
struct Norm {
  int64_t n, heads, width, length, half;
  float eps;
  const float *weight, *cos, *sin;

  template <class In>
  float inverse(const In* x) const {
    vec squares{};
    for_vectors(width, [&](int64_t i, int lanes) {
      const vec v = load(x + i, lanes);
      squares += v * v;
    });
    return 1.f / std::sqrt(sum(squares) / width + eps);
  }

  // x (width) rotated by the angles of a row, or against them.
  void rotate(float* x, int64_t row, float sign) const {
    const int64_t at = row % length * half;
    for_vectors(half, [&](int64_t i, int lanes) {
      const vec a = load(x + i, lanes), b = load(x + half + i, lanes);
      const vec c = load(cos + at + i, lanes), s = load(sin + at + i, lanes) * splat(sign);
      store(x + i, a * c - b * s, lanes);
      store(x + half + i, b * c + a * s, lanes);
    });
  }
};

template <class In, class Out>
void norm_forward(const Norm& s, const In* x, Out* y, int64_t n_threads) {
  for_rows(s.n, s.heads * s.width, n_threads, [&](int64_t begin, int64_t end) {
    static thread_local std::vector<float> room;
    room.resize(s.width + W);
    for (int64_t i = begin * s.heads; i < end * s.heads; ++i) {
      const vec inverse = splat(s.inverse(x + i * s.width));
      float* to = room.data();
      for_vectors(s.width, [&](int64_t k, int lanes) {
        store(to + k, load(x + i * s.width + k, lanes) * inverse * load(s.weight + k, lanes), lanes);
      });
      if (s.half) s.rotate(to, i / s.heads, 1.f);
      for_vectors(s.width, [&](int64_t k, int lanes) { store(y + i * s.width + k, load(to + k, lanes), lanes); });
    }
  });
}

template <class In, class Out>
void norm_backward(const Norm& s, const In* x, const Out* grad_y, In* grad_x, float* grad_weight, int64_t n_threads) {
  const int64_t rows = rows_of_piece(s.heads * s.width), n_pieces = (s.n + rows - 1) / rows;
  std::vector<float> of_piece(n_pieces * s.width);
  for_rows(s.n, s.heads * s.width, n_threads, [&](int64_t begin, int64_t end) {
    static thread_local std::vector<float> room;
    room.resize(s.width + W);
    float *grad = room.data(), *weights = of_piece.data() + begin / rows * s.width;
    for (int64_t i = begin * s.heads; i < end * s.heads; ++i) {
      const In* from = x + i * s.width;
      for_vectors(s.width, [&](int64_t k, int lanes) { store(grad + k, load(grad_y + i * s.width + k, lanes), lanes); });
      if (s.half) s.rotate(grad, i / s.heads, -1.f);
      const vec inverse = splat(s.inverse(from));
      vec along{};
      for_vectors(s.width, [&](int64_t k, int lanes) {
        const vec unit = load(from + k, lanes) * inverse, g = load(grad + k, lanes);
        store(weights + k, load(weights + k, lanes) + g * unit, lanes);
        along += g * load(s.weight + k, lanes) * unit;
      });
      const vec inward = splat(sum(along) / s.width);
      for_vectors(s.width, [&](int64_t k, int lanes) {
        const vec unit = load(from + k, lanes) * inverse, g = load(grad + k, lanes) * load(s.weight + k, lanes);
        store(grad_x + i * s.width + k, (g - unit * inward) * inverse, lanes);
      });
    }
  });
  std::fill(grad_weight, grad_weight + s.width, 0.f);
  for (int64_t i = 0; i < n_pieces * s.width; ++i) grad_weight[i % s.width] += of_piece[i];
}

// A causal filter a channel over rows (n, width) that are `stride` apart, sequences of `length` after each other, then silu.
// taps (n_taps, width), the oldest input's first.
struct Filter {
  int64_t n, width, length, stride, n_taps;
  const float *taps, *bias;

  template <class Number>
  vec sum_at(const Number* x, int64_t row, int64_t i, int lanes) const {
    vec total = load(bias + i, lanes);
    for (int64_t back = std::min(n_taps - 1, row % length); back >= 0; --back)
      total += load(taps + (n_taps - 1 - back) * width + i, lanes) * load(x + (row - back) * stride + i, lanes);
    return total;
  }
};

template <class Number>
void filter_forward(const Filter& s, const Number* x, Number* y, int64_t n_threads) {
  for_rows(s.n, s.width, n_threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      for_vectors(s.width, [&](int64_t i, int lanes) {
        const vec total = s.sum_at(x, r, i, lanes);
        store(y + r * s.width + i, total * sigmoid(total), lanes);
      });
  });
}

// grads: of the taps (n_taps, width), with those of the bias behind them.
template <class Number>
void filter_backward(const Filter& s, const Number* x, const Number* grad_y, Number* grad_x, float* grads,
                     int64_t n_threads) {
  const int64_t rows = rows_of_piece(s.width), n_pieces = (s.n + rows - 1) / rows, size = (s.n_taps + 1) * s.width;
  std::vector<float> of_piece(n_pieces * size);
  for_rows(s.n, s.width, n_threads, [&](int64_t begin, int64_t end) {
    static thread_local std::vector<float> room;  // gradients of the sums, of later rows that read these as well
    room.resize((rows + s.n_taps) * s.width);
    float *inner = room.data(), *partial = of_piece.data() + begin / rows * size;
    for (int64_t r = begin; r < std::min(end + s.n_taps - 1, s.n); ++r)
      for_vectors(s.width, [&](int64_t i, int lanes) {
        const vec total = s.sum_at(x, r, i, lanes), open = sigmoid(total);
        const vec slope = open * (splat(1.f) + total * (splat(1.f) - open));
        store(inner + (r - begin) * s.width + i, load(grad_y + r * s.width + i, lanes) * slope, lanes);
      });
    for (int64_t r = begin; r < end; ++r) {
      const int64_t t = r % s.length;
      for_vectors(s.width, [&](int64_t i, int lanes) {
        const float* own = inner + (r - begin) * s.width + i;
        const vec grad = load(own, lanes);
        vec total{};
        for (int64_t back = 0; back < s.n_taps; ++back) {
          const int64_t tap = (s.n_taps - 1 - back) * s.width + i;
          if (t + back < s.length) total += load(own + back * s.width, lanes) * load(s.taps + tap, lanes);
          if (back > t) continue;
          const vec source = load(x + (r - back) * s.stride + i, lanes);
          store(partial + tap, load(partial + tap, lanes) + grad * source, lanes);
        }
        store(grad_x + r * s.width + i, total, lanes);
        float* of_bias = partial + s.n_taps * s.width + i;
        store(of_bias, load(of_bias, lanes) + grad, lanes);
      });
    }
  });
  std::fill(grads, grads + size, 0.f);
  for (int64_t i = 0; i < n_pieces * size; ++i) grads[i % size] += of_piece[i];
}

// y = softplus(x + bias), rows (n, width).
template <class Number>
void softplus_forward(int64_t n, int64_t width, const Number* x, const float* bias, float* y, int64_t n_threads) {
  for_rows(n, width, n_threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      for_vectors(width, [&](int64_t i, int lanes) {
        store(y + r * width + i, softplus(load(x + r * width + i, lanes) + load(bias + i, lanes)), lanes);
      });
  });
}

// 1 - exp(-y) for y >= 0: its series where a difference would cancel.
inline vec slope_of_softplus(vec y) {
  vec p = splat(1.f) - y * splat(1.f / 8);
  for (int k = 7; k >= 2; --k) p = splat(1.f) - y * splat(1.f / k) * p;
  return y < splat(0.5f) ? y * p : splat(1.f) - exp2(y * splat(-LOG2_E));
}

template <class Number>
void softplus_backward(int64_t n, int64_t width, const float* y, const float* grad_y, Number* grad_x, float* grad_bias,
                       int64_t n_threads) {
  const int64_t rows = rows_of_piece(width), n_pieces = (n + rows - 1) / rows;
  std::vector<float> of_piece(n_pieces * width);
  for_rows(n, width, n_threads, [&](int64_t begin, int64_t end) {
    float* partial = of_piece.data() + begin / rows * width;
    for (int64_t r = begin; r < end; ++r)
      for_vectors(width, [&](int64_t i, int lanes) {
        const int64_t at = r * width + i;
        const vec grad = load(grad_y + at, lanes) * slope_of_softplus(load(y + at, lanes));
        store(grad_x + at, grad, lanes);
        store(partial + i, load(partial + i, lanes) + grad, lanes);
      });
  });
  std::fill(grad_bias, grad_bias + width, 0.f);
  for (int64_t i = 0; i < n_pieces * width; ++i) grad_bias[i % width] += of_piece[i];
}

}  // namespace

#define PASSES(Number, name)                                                                                        \
  extern "C" void nanothink_softmax_##name(int64_t n_rows, int64_t width, Number* x, const int64_t* targets,        \
                                           const float* factors, float* nats, float* peaks, int64_t n_threads) {    \
    softmax(n_rows, width, x, targets, factors, nats, peaks, n_threads);                                            \
  }                                                                                                                 \
  extern "C" void nanothink_add_##name(int64_t n_rows, int64_t width, int64_t stride, float* total, const Number* x, \
                                       int64_t n_threads) {                                                         \
    add(n_rows, width, stride, total, x, n_threads);                                                                \
  }                                                                                                                 \
  extern "C" void nanothink_causal_##name(int64_t n_rows, int64_t width, int64_t n_queries, int64_t first, float scale, \
                                          Number* scores, float* logs, int64_t n_threads) {                         \
    causal(n_rows, width, n_queries, first, scale, scores, logs, n_threads);                                        \
  }                                                                                                                 \
  extern "C" void nanothink_causal_back_##name(int64_t n_rows, int64_t width, int64_t n_queries, int64_t first,     \
                                               float scale, Number* scores, Number* grads, const float* logs,       \
                                               const float* inner, int64_t n_threads) {                             \
    causal_backward(n_rows, width, n_queries, first, scale, scores, grads, logs, inner, n_threads);                 \
  }                                                                                                                 \
  extern "C" void nanothink_gate_##name(int64_t n, const Number* gate, const Number* up, Number* y, int64_t n_threads) { \
    gate_forward(n, gate, up, y, n_threads);                                                                        \
  }                                                                                                                 \
  extern "C" void nanothink_gate_back_##name(int64_t n, const Number* gate, const Number* up, const Number* grad_y, \
                                             Number* y, Number* grad_gate, Number* grad_up, int64_t n_threads) {    \
    gate_backward(n, gate, up, grad_y, y, grad_gate, grad_up, n_threads);                                           \
  }                                                                                                                 \
  extern "C" void nanothink_softplus_##name(int64_t n, int64_t width, const Number* x, const float* bias, float* y,  \
                                            int64_t n_threads) {                                                    \
    softplus_forward(n, width, x, bias, y, n_threads);                                                              \
  }                                                                                                                 \
  extern "C" void nanothink_softplus_back_##name(int64_t n, int64_t width, const float* y, const float* grad_y,     \
                                                 Number* grad_x, float* grad_bias, int64_t n_threads) {             \
    softplus_backward(n, width, y, grad_y, grad_x, grad_bias, n_threads);                                           \
  }                                                                                                                 \
  extern "C" void nanothink_filter_##name(const Filter* s, const Number* x, Number* y, int64_t n_threads) {         \
    filter_forward(*s, x, y, n_threads);                                                                            \
  }                                                                                                                 \
  extern "C" void nanothink_filter_back_##name(const Filter* s, const Number* x, const Number* grad_y, Number* grad_x, \
                                               float* grads, int64_t n_threads) {                                   \
    filter_backward(*s, x, grad_y, grad_x, grads, n_threads);                                                       \
  }
PASSES(float, float32)
PASSES(bfloat16, bfloat16)

#define NORM(In, Out, name)                                                                                         \
  extern "C" void nanothink_norm_##name(const Norm* s, const In* x, Out* y, int64_t n_threads) {                    \
    norm_forward(*s, x, y, n_threads);                                                                              \
  }                                                                                                                 \
  extern "C" void nanothink_norm_back_##name(const Norm* s, const In* x, const Out* grad_y, In* grad_x,             \
                                             float* grad_weight, int64_t n_threads) {                               \
    norm_backward(*s, x, grad_y, grad_x, grad_weight, n_threads);                                                   \
  }
NORM(float, float, float32_float32)
NORM(float, bfloat16, float32_bfloat16)
NORM(bfloat16, float, bfloat16_float32)
NORM(bfloat16, bfloat16, bfloat16_bfloat16)
