// The three ops on packed rows; `native.py` compiles and calls them.
//
// A line is a row of all heads, N * D elements. A step is up to 16 rows of a segment that lie in the same windows, as
// block and stride are multiples of 16. Work is cut into items, runs of lines or of windows for a few heads; steps are
// taken in order, their heads inside, so that memory is read as it lies. Neither the items nor any order of summation
// depends on the number of threads. Sums are kept in fp32 (fp64 for fp64) and rounded once. No product is made outside
// a window, so that an infinity stays in its windows.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>
#ifdef __F16C__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t STEP = 16;         // rows
constexpr int64_t LINE = 64;         // bytes that memory moves at a time
constexpr int64_t COLUMNS = 1024;    // elements of a line in an item: as many heads as fit, at least one
constexpr int64_t WINDOWS = 32;      // of an item of the forward
constexpr int64_t ROWS = 256;        // of an item of a gradient
constexpr int64_t MOST_PARTS = 256;  // of the rows, each with sums of its own for dWeight
constexpr int64_t GRAIN = 1 << 17;   // elements of x that are worth waking a thread

// Vectors fill a register: larger ones, GCC takes apart in memory. While the forward goes through the rows, the sums of
// up to SHARERS windows stay in registers, SHARED vectors of each.
#if defined(__AVX512F__)
constexpr int64_t REGISTER = 64, SHARERS = 4, SHARED = 4;  // bytes, windows, vectors
#elif defined(__AVX__)
constexpr int64_t REGISTER = 32, SHARERS = 4, SHARED = 2;
#else
constexpr int64_t REGISTER = 16, SHARERS = 4, SHARED = 2;
#endif
constexpr int64_t VECTORS = 8;            // of sums or of a row in registers, in the gradients
constexpr int64_t FLOATS = REGISTER / 4;  // D, and the number of weights, are multiples of it

typedef float Floats __attribute__((vector_size(FLOATS * 4), aligned(4)));
typedef double Doubles __attribute__((vector_size(FLOATS * 4), aligned(8)));
typedef uint16_t Shorts __attribute__((vector_size(FLOATS * 2), aligned(2)));
typedef uint32_t Words __attribute__((vector_size(FLOATS * 4), aligned(4)));

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

// What elements are summed in, one by one and a register at a time.
template <class T> struct Wide {
  using One = float;
  using Vector = Floats;
};
template <> struct Wide<double> {
  using One = double;
  using Vector = Doubles;
};
template <class T> using One = typename Wide<T>::One;
template <class T> using Vector = typename Wide<T>::Vector;
template <class T> constexpr int64_t LANES = REGISTER / sizeof(One<T>);

template <class To, class From> inline To bits(const From &from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

#ifdef __AVX512F__  // where GCC 12 takes three instructions for what is one
inline Words load_words(const void *p) { return (Words)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)); }
inline void store_words(void *p, Words v) { _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16((__m512i)v)); }
#else
inline Words load_words(const void *p) { return __builtin_convertvector(*(const Shorts *)p, Words); }
inline void store_words(void *p, Words v) { *(Shorts *)p = __builtin_convertvector(v, Shorts); }
#endif

inline Floats load(const float *p) { return *(const Floats *)p; }
inline Doubles load(const double *p) { return *(const Doubles *)p; }
inline Floats load(const BFloat *p) { return bits<Floats>(load_words(p) << 16); }

inline void store(float *p, const Floats &v) { *(Floats *)p = v; }
inline void store(double *p, const Doubles &v) { *(Doubles *)p = v; }
inline void store(BFloat *p, const Floats &v) {
  const Words u = bits<Words>(v);
  store_words(p, (u + 0x7fff + (u >> 16 & 1)) >> 16);  // ties to even; no NaN that sums of bf16 make is rounded away
}

#if defined(__AVX512F__)
inline Floats load(const Half *p) { return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
inline void store(Half *p, const Floats &v) { _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph((__m512)v, 0)); }
#elif defined(__F16C__)
inline Floats load(const Half *p) { return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
inline void store(Half *p, const Floats &v) { _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph((__m256)v, 0)); }
#else
inline Floats load(const Half *p) {
  const Words half = load_words(p);
  const Words magnitude = (half & 0x7fff) << 13;
  const Words scaled = bits<Words>(bits<Floats>(magnitude) * 0x1p112f);  // right for subnormals too
  return bits<Floats>((magnitude >= 0x0f800000 ? scaled | 0x7f800000 : scaled) | (half & 0x8000) << 16);
}
inline void store(Half *p, const Floats &v) {
  const Words u = bits<Words>(v), magnitude = u & 0x7fffffff;
  // below 2^-14 the sum's last bit is the result's; from there on the exponent is 112 less; ties to even both times
  const Words small = bits<Words>(bits<Floats>(magnitude) + 0.5f) - 0x3f000000;
  const Words normal = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  Words half = magnitude < 0x38800000 ? small : normal;
  half = magnitude >= 0x47800000 ? Words{} + 0x7c00 : half;  // infinity
  half = magnitude > 0x7f800000 ? Words{} + 0x7e00 : half;   // NaN
  store_words(p, half | (u >> 16 & 0x8000));
}
#endif

struct Problem {
  const int64_t *rows, *windows;  // where each segment's begin, and their numbers
  int64_t segments, block, stride, n, d;
  int threads;

  int64_t line() const { return n * d; }
};

// Rows [row, row + count), and the windows [first, end), each of which holds them all. In window v, the first row's tap
// is tap - (v - first) * stride.
struct Step {
  int64_t row, count, first, end, tap;
};

int64_t segment_of(const int64_t *begins, int64_t segments, int64_t i) {
  return std::upper_bound(begins, begins + segments + 1, i) - begins - 1;
}

// f(step) for all rows of [from, to), in order.
template <class F> void steps(const Problem &p, int64_t from, int64_t to, F f) {
  for (int64_t s = segment_of(p.rows, p.segments, from); from < to; s++)
    for (const int64_t until = std::min(to, p.rows[s + 1]); from < until;) {
      const int64_t offset = from - p.rows[s];
      const int64_t first = offset < p.block ? 0 : (offset - p.block) / p.stride + 1;
      const int64_t end = std::min(offset / p.stride + 1, p.windows[s + 1] - p.windows[s]);
      const int64_t count = std::min(until - from, STEP - offset % STEP);
      f(Step{from, count, p.windows[s] + first, p.windows[s] + std::max(first, end), offset - first * p.stride});
      from += count;
    }
}

// f(begin, constant size) for chunks of [begin, end): of SIZE as long as they fit, then of half of it, down to 1.
template <int SIZE, class F> void chunks(int64_t begin, int64_t end, F f) {
  for (; begin + SIZE <= end; begin += SIZE) f(begin, std::integral_constant<int, SIZE>());
  if constexpr (SIZE > 1) chunks<SIZE / 2>(begin, end, f);
}

// `count` rows of a head, [count, D], wide and close together.
template <class T> void widen(const T *from, int64_t count, int64_t n, const Problem &p, std::vector<One<T>> &to) {
  for (int64_t i = 0; i < count; i++)
    for (int64_t e = 0; e < p.d; e += LANES<T>) store(&to[i * p.d + e], load(from + i * p.line() + n * p.d + e));
}

// Fetches the rows of a head that the step after this one reads or writes; the processor does not guess where they are.
// Into the second cache, as all heads' would not fit in the first; measured in docs/performance.md.
template <class T> void prefetch_after(const Step &step, const T *lines, int64_t n, const Problem &p) {
  for (int64_t row = step.row + STEP; row < step.row + 2 * STEP; row++)
    for (int64_t e = 0; e < p.d; e += LINE / sizeof(T)) __builtin_prefetch(lines + row * p.line() + n * p.d + e, 0, 2);
}

// Weights [block, N] as [N, block].
template <class T> std::vector<One<T>> taps_by_head(const T *weight, const Problem &p) {
  std::vector<One<T>> wide(p.block * p.n), taps(p.block * p.n);
  for (int64_t i = 0; i < p.block * p.n; i += LANES<T>) store(&wide[i], load(weight + i));
  for (int64_t i = 0; i < p.block; i++)
    for (int64_t n = 0; n < p.n; n++) taps[n * p.block + i] = wide[i * p.n + n];
  return taps;
}

// Heads of an item.
int64_t heads(const Problem &p) { return std::max<int64_t>(COLUMNS / p.d, 1); }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int threads(const Problem &p, int64_t items) {
  return std::clamp<int64_t>(p.rows[p.segments] * p.line() / GRAIN, 1, std::min<int64_t>(p.threads, items));
}

template <class T> void forward(const T *x, const T *weight, T *y, const Problem &p) {
  const auto taps = taps_by_head(weight, p);
  const int64_t n_windows = p.windows[p.segments], groups = ceil_div(p.n, heads(p));
  const int64_t items = ceil_div(n_windows, WINDOWS) * groups;
#pragma omp parallel num_threads(threads(p, items))
  {
    std::vector<One<T>> sums(WINDOWS * heads(p) * p.d);
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < items; item++) {
      const int64_t n_0 = item % groups * heads(p), n_1 = std::min(n_0 + heads(p), p.n), columns = (n_1 - n_0) * p.d;
      const int64_t v_0 = item / groups * WINDOWS, v_1 = std::min(v_0 + WINDOWS, n_windows);
      std::fill(sums.begin(), sums.end(), 0);
      int64_t from = v_0;
      for (int64_t s = segment_of(p.windows, p.segments, from); from < v_1; s++) {
        const int64_t to = std::min(v_1, p.windows[s + 1]);
        if (from == to) continue;
        const int64_t row = p.rows[s] + (from - p.windows[s]) * p.stride;
        steps(p, row, row + (to - from - 1) * p.stride + p.block, [&](const Step &step) {
          const int64_t first = std::max(step.first, from), end = std::min(step.end, to);
          for (int64_t n = n_0; n < n_1; n++) {
            prefetch_after(step, x, n, p);
            const T *px = x + step.row * p.line() + n * p.d;
            const One<T> *tap = &taps[n * p.block + step.tap];
            chunks<SHARERS>(first, end, [&](int64_t v, auto windows) {
              chunks<SHARED>(0, p.d / LANES<T>, [&](int64_t i_vector, auto vectors) {
                One<T> *out = &sums[(v - v_0) * columns + (n - n_0) * p.d + i_vector * LANES<T>];
                Vector<T> sum[windows()][vectors()];
                for (int a = 0; a < windows; a++)
                  for (int k = 0; k < vectors; k++) sum[a][k] = load(out + a * columns + k * LANES<T>);
                for (int64_t i = 0; i < step.count; i++)
                  for (int k = 0; k < vectors; k++) {
                    const Vector<T> row = load(px + i * p.line() + (i_vector + k) * LANES<T>);
                    for (int a = 0; a < windows; a++) sum[a][k] += tap[i - (v + a - step.first) * p.stride] * row;
                  }
                for (int a = 0; a < windows; a++)
                  for (int k = 0; k < vectors; k++) store(out + a * columns + k * LANES<T>, sum[a][k]);
              });
            });
          }
        });
        from = to;
      }
      for (int64_t v = v_0; v < v_1; v++)
        for (int64_t e = 0; e < columns; e += LANES<T>)
          store(y + v * p.line() + n_0 * p.d + e, load(&sums[(v - v_0) * columns + e]));
    }
  }
}

// For the gradients: f(row, head, tap of the row in its first window, number of windows) for rows [from, to) of heads
// [n_0, n_1). Meanwhile `dys` has those windows' dy, [windows, D], wide; `lines` are what f reads or writes row by row.
template <class T, class F>
void each_row(const T *dy, const T *lines, int64_t from, int64_t to, int64_t n_0, int64_t n_1, const Problem &p,
              std::vector<One<T>> &dys, F f) {
  steps(p, from, to, [&](const Step &step) {
    const int64_t windows = step.end - step.first;
    for (int64_t n = n_0; n < n_1; n++) {
      prefetch_after(step, lines, n, p);
      widen(dy + step.first * p.line(), windows, n, p, dys);
      for (int64_t i = 0; i < step.count; i++) f(step.row + i, n, step.tap + i, windows);
    }
  });
}

template <class T> void grad_input(const T *dy, const T *weight, T *dx, const Problem &p) {
  const auto taps = taps_by_head(weight, p);
  const int64_t n_rows = p.rows[p.segments], groups = ceil_div(p.n, heads(p)), items = ceil_div(n_rows, ROWS) * groups;
#pragma omp parallel num_threads(threads(p, items))
  {
    std::vector<One<T>> dys(ceil_div(p.block, p.stride) * p.d);
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < items; item++) {
      const int64_t n_0 = item % groups * heads(p), n_1 = std::min(n_0 + heads(p), p.n);
      const int64_t row_0 = item / groups * ROWS;
      const auto weigh = [&](int64_t row, int64_t n, int64_t i_tap, int64_t windows) {
        const One<T> *tap = &taps[n * p.block + i_tap];
        T *out = dx + row * p.line() + n * p.d;
        chunks<VECTORS>(0, p.d / LANES<T>, [&](int64_t i_vector, auto vectors) {
          const int64_t e = i_vector * LANES<T>;
          Vector<T> sum[vectors()] = {};
          for (int64_t v = 0; v < windows; v++)
            for (int k = 0; k < vectors; k++) sum[k] += tap[-v * p.stride] * load(&dys[v * p.d + e + k * LANES<T>]);
          for (int k = 0; k < vectors; k++) store(out + e + k * LANES<T>, sum[k]);
        });
      };
      each_row(dy, dx, row_0, std::min(row_0 + ROWS, n_rows), n_0, n_1, p, dys, weigh);
    }
  }
}

template <class T> void grad_weight(const T *dy, const T *x, T *dw, const Problem &p) {
  const int64_t n_rows = p.rows[p.segments], groups = ceil_div(p.n, heads(p)), weights = p.block * p.n;
  const int64_t part_rows = std::max(ROWS, ceil_div(n_rows, MOST_PARTS)), n_parts = ceil_div(n_rows, part_rows);
  const int64_t items = n_parts * groups;
  std::vector<One<T>> part_sums(n_parts * weights);  // [parts, block, N]
#pragma omp parallel num_threads(threads(p, items))
  {
    std::vector<One<T>> dys(ceil_div(p.block, p.stride) * p.d);
    std::vector<One<T>> sums(heads(p) * p.block * LANES<T>);  // each weight's by lanes
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < items; item++) {
      const int64_t n_0 = item % groups * heads(p), n_1 = std::min(n_0 + heads(p), p.n);
      const int64_t row_0 = item / groups * part_rows;
      std::fill(sums.begin(), sums.end(), 0);
      const auto correlate = [&](int64_t row, int64_t n, int64_t i_tap, int64_t windows) {
        const T *in = x + row * p.line() + n * p.d;
        One<T> *out = &sums[((n - n_0) * p.block + i_tap) * LANES<T>];
        chunks<VECTORS>(0, p.d / LANES<T>, [&](int64_t i_vector, auto vectors) {
          const int64_t e = i_vector * LANES<T>;
          Vector<T> wide[vectors()];
          for (int k = 0; k < vectors; k++) wide[k] = load(in + e + k * LANES<T>);
          for (int64_t v = 0; v < windows; v++) {
            Vector<T> sum = load(out - v * p.stride * LANES<T>);
            for (int k = 0; k < vectors; k++) sum += wide[k] * load(&dys[v * p.d + e + k * LANES<T>]);
            store(out - v * p.stride * LANES<T>, sum);
          }
        });
      };
      each_row(dy, x, row_0, std::min(row_0 + part_rows, n_rows), n_0, n_1, p, dys, correlate);
      for (int64_t n = n_0; n < n_1; n++)
        for (int64_t i = 0; i < p.block; i++) {
          One<T> &sum = part_sums[item / groups * weights + i * p.n + n];
          for (int64_t k = 0; k < LANES<T>; k++) sum += sums[((n - n_0) * p.block + i) * LANES<T> + k];
        }
    }
  }
  for (int64_t i = 0; i < weights; i += LANES<T>) {
    Vector<T> sum = {};
    for (int64_t part = 0; part < n_parts; part++) sum += load(&part_sums[part * weights + i]);
    store(dw + i, sum);
  }
}

}  // namespace

#define OPS(T, NAME)                                                                                                \
  void forward_##NAME(const T *x, const T *w, T *y, const Problem *p) { forward(x, w, y, *p); }                     \
  void grad_input_##NAME(const T *dy, const T *w, T *dx, const Problem *p) { grad_input(dy, w, dx, *p); }           \
  void grad_weight_##NAME(const T *dy, const T *x, T *dw, const Problem *p) { grad_weight(dy, x, dw, *p); }

extern "C" {
OPS(Half, float16)
OPS(BFloat, bfloat16)
OPS(float, float32)
OPS(double, float64)
}
