// The three ops on packed rows; `native.py` compiles and calls them.
//
// A row has all heads, N * D elements. Work is cut into items: a run of windows (forward) or of rows (gradients), for a
// few heads. An item goes through its rows in steps of up to 16 rows that lie in the same windows, and in each step
// through its heads, so that memory is read in the order in which it lies. The order of every sum is the same for any
// number of threads. Sums are kept in fp32 (fp64 for fp64) and rounded once. No product is made outside a
// window, so that an infinity stays in its windows.

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#ifdef __F16C__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t STEP = 16;             // rows
constexpr int64_t CACHE_LINE = 64;       // bytes that memory moves at a time
constexpr int64_t ITEM_ELEMENTS = 1024;  // of a row: an item has as many heads as fit, at least one
constexpr int64_t ITEM_WINDOWS = 32;     // forward, or fewer where not all threads would have an item
constexpr int64_t ITEM_ROWS = 256;       // gradients
constexpr int64_t MOST_PARTS = 256;      // dWeight has its sums for each of so many runs of rows, then adds them up
constexpr int64_t GRAIN = 1 << 17;       // elements of x that are worth waking a thread

// A vector fills one register, since GCC takes larger ones apart in memory. While the forward goes through the rows,
// the sums of up to SHARERS windows stay in registers, SHARED vectors of each.
#if defined(__AVX512F__)
constexpr int64_t REGISTER = 64, SHARERS = 4, SHARED = 4;  // bytes, windows, vectors
#elif defined(__AVX__)
constexpr int64_t REGISTER = 32, SHARERS = 4, SHARED = 2;
#else
constexpr int64_t REGISTER = 16, SHARERS = 4, SHARED = 2;
#endif
constexpr int64_t VECTORS = 8;            // so many of a row, or of sums, stay in registers in the gradients
constexpr int64_t FLOATS = REGISTER / 4;  // D and the number of weights, block * N, are multiples of it

// Callers may pass tensors from any address on: vectors in memory have no alignment.
typedef float Floats __attribute__((vector_size(FLOATS * 4), aligned(1)));
typedef double Doubles __attribute__((vector_size(FLOATS * 4), aligned(1)));
typedef uint16_t Shorts __attribute__((vector_size(FLOATS * 2), aligned(1)));
typedef uint32_t Words __attribute__((vector_size(FLOATS * 4), aligned(1)));
typedef int32_t Ints __attribute__((vector_size(FLOATS * 4), aligned(1)));

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

// The type that elements are summed in: one of them, and as many as fill a register.
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

#ifdef __AVX512F__  // one instruction each, where GCC 12 makes three of the code below
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
// Drops 16 bits and rounds to nearest. What is added carries into the bits that stay if those that go are more than
// half of the last one that stays, or just half and that one is odd: so ties go to even. Example: 0x3f808000 is a tie
// and becomes 0x3f80, 0x3f818000 is one and becomes 0x3f82. A NaN stays one: in sums of bf16 its lower 16 bits are 0,
// so that nothing carries.
inline void store(BFloat *p, const Floats &v) {
  const Words u = bits<Words>(v);
  store_words(p, (u + 0x7fff + (u >> 16 & 1)) >> 16);
}

#if defined(__AVX512F__)
inline Floats load(const Half *p) { return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
inline void store(Half *p, const Floats &v) { _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph((__m512)v, 0)); }
#elif defined(__F16C__)
inline Floats load(const Half *p) { return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
inline void store(Half *p, const Floats &v) { _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph((__m256)v, 0)); }
#else
inline Floats load(const Half *p) {
  const Words half = load_words(p), magnitude = half & 0x7fff;
  const Words subnormal = (Ints)magnitude < 0x400, special = (Ints)magnitude >= 0x7c00;  // all bits set where true
  // The exponent is 112 more in fp32. A subnormal is read as if it had a leading 1, worth 2^-14, which is taken away
  // again: as an fp32 subnormal it would count as 0 after torch.set_flush_denormal(True).
  const Floats scaled = bits<Floats>((magnitude << 13) + 0x38000000 + (subnormal & 0x00800000));
  const Floats value = scaled - bits<Floats>(subnormal & 0x38800000);
  return bits<Floats>(bits<Words>(value) | (special & 0x7f800000) | (half & 0x8000) << 16);
}
inline void store(Half *p, const Floats &v) {
  const Words u = bits<Words>(v);
  const Ints magnitude = (Ints)(u & 0x7fffffff);
  // Below 2^-14 the last bit of the sum with 0.5 is worth 2^-24, as the result's is, so that the addition rounds. From
  // 2^-14 on the exponent is 112 less and 13 bits go. Ties go to even in both.
  const Ints small = bits<Ints>(bits<Floats>(magnitude) + 0.5f) - 0x3f000000;
  const Ints normal = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  Ints half = magnitude < 0x38800000 ? small : normal;
  half = magnitude >= 0x47800000 ? Ints{} + 0x7c00 : half;  // infinity
  half = magnitude > 0x7f800000 ? Ints{} + 0x7e00 : half;   // NaN
  store_words(p, (Words)half | (u >> 16 & 0x8000));
}
#endif

// `native.py` has the same struct.
struct Problem {
  const int64_t *rows, *windows;  // [segments + 1]: the first of each segment; at the end, how many there are
  int64_t segments, block, stride, n, d;
  int threads;

  int64_t row_size() const { return n * d; }
};

// Rows [row, row + count) of one segment, at most 16, and the windows [first, end). Each of these windows holds all of
// these rows, and no other window holds any of them, as block and stride are multiples of 16. The first of the rows is
// tap `tap` of window `first`, tap - stride of the next window, and tap - (v - first) * stride of window v.
// Example: block 32, stride 16, one segment of 80 rows. Its rows 16 to 31 are Step{16, 16, 0, 2, 16}: they are taps 16
// to 31 of window 0, and taps 0 to 15 of window 1.
struct Step {
  int64_t row, count, first, end, tap;
};

int64_t segment_of(const int64_t *begins, int64_t segments, int64_t i) {
  return std::upper_bound(begins, begins + segments + 1, i) - begins - 1;
}

// Calls f(step) for the rows [from, to) in order. A step ends where its segment ends, and every 16 rows of the segment.
// Example: segments of 80 and 40 rows. steps(p, 64, 100, f) calls f for the rows 64 to 79, 80 to 95, and 96 to 99.
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

// Cuts [begin, end) into chunks of SIZE as long as they fit, then of half of that, and so on down to 1, and calls
// f(begin of the chunk, its size) for each. The size is a constant of the type, so that loops over it are unrolled.
// Example: chunks<4>(0, 7, f) calls f(0, 4), f(4, 2), f(6, 1).
template <int SIZE, class F> void chunks(int64_t begin, int64_t end, F f) {
  for (; begin + SIZE <= end; begin += SIZE) f(begin, std::integral_constant<int, SIZE>());
  if constexpr (SIZE > 1) chunks<SIZE / 2>(begin, end, f);
}

// Copies one head of `count` rows to [count, D], without the other heads in between, as numbers to sum with.
template <class T> void widen(const T *from, int64_t count, int64_t n, const Problem &p, One<T> *to) {
  for (int64_t i = 0; i < count; i++)
    for (int64_t e = 0; e < p.d; e += LANES<T>) store(&to[i * p.d + e], load(from + i * p.row_size() + n * p.d + e));
}

// Asks for one head of the 16 rows from here on, those after the step at work, since the processor does not guess where
// they are. They go to the second cache: those of all heads would not fit in the first. Measured in
// docs/performance.md.
template <class T> void prefetch(const T *head, int64_t row_size, const Problem &p) {
  for (int64_t i = 0; i < STEP; i++)
    for (int64_t e = 0; e < p.d; e += CACHE_LINE / sizeof(T)) __builtin_prefetch(head + i * row_size + e, 0, 2);
}

// Weights [block, N] as [N, block], as numbers to sum with.
template <class T> void taps_by_head(const T *weight, const Problem &p, One<T> *taps) {
  int64_t i_tap = 0, n = 0;
  for (int64_t i = 0; i < p.block * p.n; i += LANES<T>) {
    One<T> wide[LANES<T>];
    store(wide, load(weight + i));
    for (const One<T> one : wide) {
      taps[n * p.block + i_tap] = one;
      if (++n == p.n) n = 0, i_tap++;
    }
  }
}

int64_t item_heads(const Problem &p) { return std::max<int64_t>(ITEM_ELEMENTS / p.d, 1); }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int threads(const Problem &p, int64_t items) {
  return std::clamp<int64_t>(p.rows[p.segments] * p.row_size() / GRAIN, 1, std::min<int64_t>(p.threads, items));
}

// Memory for numbers that all threads share, and for as many as each thread has alone. It is got before the threads
// start and without an exception, which may leave neither a thread nor C++. Where there is not enough, `missing()` is
// the number of bytes, and an op returns it at once.
template <class One> class Scratch {
 public:
  Scratch(int64_t shared, int64_t own, int threads)
      : shared_(whole_lines(shared)),
        own_(whole_lines(own)),
        bytes_((shared_ + own_ * threads) * sizeof(One)),
        memory_(static_cast<One *>(std::aligned_alloc(CACHE_LINE, bytes_))) {}
  ~Scratch() { std::free(memory_); }
  Scratch(const Scratch &) = delete;

  int64_t missing() const { return memory_ ? 0 : bytes_; }
  One *shared() const { return memory_; }
  One *own() const { return memory_ + shared_ + omp_get_thread_num() * own_; }

 private:
  // So that no two threads write to one line of the cache.
  static int64_t whole_lines(int64_t count) {
    return ceil_div(count * sizeof(One), CACHE_LINE) * CACHE_LINE / sizeof(One);
  }

  const int64_t shared_, own_, bytes_;
  One *const memory_;
};

// Each op returns 0, or how many bytes of memory it did not get; then it has done nothing.

// Rows and windows of packed tensors lie one behind the other.
template <class T> struct Packed {
  const T *x;
  T *y;
  int64_t row_size, head, y_head;  // from one row to the next, from one head to the next

  const T *row(int64_t t) const { return x + t * row_size; }
  T *window(int64_t v) const { return y + v * row_size; }
};

// Where rows in pages are, and the windows' rows in a paged cache; `native.py` has the same struct. Every 16 rows lie one
// behind the other, from offset groups[t / 16] on. The last group is none: it is prefetched, and not read.
struct Pages {
  const int64_t *groups, *windows;  // offsets of elements
  int64_t row_size, head, y_head;
};
template <class T> struct Paged : Pages {
  const T *x;
  T *y;

  const T *row(int64_t t) const { return x + groups[t / STEP]; }  // segments have whole groups: t is a multiple of 16
  T *window(int64_t v) const { return y + windows[v]; }
};

// `at` is a `Packed` or a `Paged`: the sums and their order are the same.
template <class T, class At> int64_t forward(const At &at, const T *weight, const Problem &p) {
  const int64_t n_windows = p.windows[p.segments], groups = ceil_div(p.n, item_heads(p));
  const int64_t share = ceil_div(n_windows * groups, threads(p, n_windows * groups));
  const int64_t item_windows = std::min(share, ITEM_WINDOWS);
  const int64_t items = ceil_div(n_windows, item_windows) * groups;
  const int64_t n_sums = item_windows * item_heads(p) * p.d;
  const int n_threads = threads(p, items);
  const Scratch<One<T>> scratch(p.block * p.n, n_sums, n_threads);
  if (scratch.missing()) return scratch.missing();
  One<T> *const taps = scratch.shared();
  taps_by_head(weight, p, taps);
#pragma omp parallel num_threads(n_threads)
  {
    One<T> *const sums = scratch.own();
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < items; item++) {
      const int64_t n_0 = item % groups * item_heads(p), n_1 = std::min(n_0 + item_heads(p), p.n);
      const int64_t width = (n_1 - n_0) * p.d;
      const int64_t v_0 = item / groups * item_windows, v_1 = std::min(v_0 + item_windows, n_windows);
      std::fill_n(sums, n_sums, 0);
      int64_t from = v_0;
      for (int64_t s = segment_of(p.windows, p.segments, from); from < v_1; s++) {
        const int64_t to = std::min(v_1, p.windows[s + 1]);
        if (from == to) continue;
        const int64_t row = p.rows[s] + (from - p.windows[s]) * p.stride;
        steps(p, row, row + (to - from - 1) * p.stride + p.block, [&](const Step &step) {
          const int64_t first = std::max(step.first, from), end = std::min(step.end, to);
          for (int64_t n = n_0; n < n_1; n++) {
            prefetch(at.row(step.row + STEP) + n * at.head, at.row_size, p);
            const T *px = at.row(step.row) + n * at.head;
            const One<T> *tap = &taps[n * p.block + step.tap];
            chunks<SHARERS>(first, end, [&](int64_t v, auto windows) {
              chunks<SHARED>(0, p.d / LANES<T>, [&](int64_t i_vector, auto vectors) {
                One<T> *out = &sums[(v - v_0) * width + (n - n_0) * p.d + i_vector * LANES<T>];
                Vector<T> sum[windows()][vectors()];
                for (int a = 0; a < windows; a++)
                  for (int k = 0; k < vectors; k++) sum[a][k] = load(out + a * width + k * LANES<T>);
                for (int64_t i = 0; i < step.count; i++)
                  for (int k = 0; k < vectors; k++) {
                    const Vector<T> row = load(px + i * at.row_size + (i_vector + k) * LANES<T>);
                    for (int a = 0; a < windows; a++) sum[a][k] += tap[i - (v + a - step.first) * p.stride] * row;
                  }
                for (int a = 0; a < windows; a++)
                  for (int k = 0; k < vectors; k++) store(out + a * width + k * LANES<T>, sum[a][k]);
              });
            });
          }
        });
        from = to;
      }
      for (int64_t v = v_0; v < v_1; v++)
        for (int64_t n = n_0; n < n_1; n++)
          for (int64_t e = 0; e < p.d; e += LANES<T>)
            store(at.window(v) + n * at.y_head + e, load(&sums[(v - v_0) * width + (n - n_0) * p.d + e]));
    }
  }
  return 0;
}

// Calls f(row, head, tap, number of windows) for the rows [from, to) of the heads [n_0, n_1), for the gradients. The
// tap is the row's in the first of its windows. At each call `dys` has dy of those windows, [windows, D], as numbers to
// sum with. `rows` is what f reads or writes row by row: it is prefetched.
// Example: block 32, stride 16, one segment of 80 rows. For the rows [16, 32) of the heads [0, 2) it puts head 0 of
// dy's windows 0 and 1 into `dys`, calls f(16, 0, 16, 2), f(17, 0, 17, 2), ..., f(31, 0, 31, 2), and goes on with head
// 1.
template <class T, class F>
void each_row(const T *dy, const T *rows, int64_t from, int64_t to, int64_t n_0, int64_t n_1, const Problem &p,
              One<T> *dys, F f) {
  steps(p, from, to, [&](const Step &step) {
    const int64_t windows = step.end - step.first;
    for (int64_t n = n_0; n < n_1; n++) {
      prefetch(rows + (step.row + STEP) * p.row_size() + n * p.d, p.row_size(), p);
      widen(dy + step.first * p.row_size(), windows, n, p, dys);
      for (int64_t i = 0; i < step.count; i++) f(step.row + i, n, step.tap + i, windows);
    }
  });
}

template <class T> int64_t grad_input(const T *dy, const T *weight, T *dx, const Problem &p) {
  const int64_t n_rows = p.rows[p.segments], groups = ceil_div(p.n, item_heads(p));
  const int64_t items = ceil_div(n_rows, ITEM_ROWS) * groups;
  const int n_threads = threads(p, items);
  const Scratch<One<T>> scratch(p.block * p.n, ceil_div(p.block, p.stride) * p.d, n_threads);
  if (scratch.missing()) return scratch.missing();
  One<T> *const taps = scratch.shared();
  taps_by_head(weight, p, taps);
#pragma omp parallel num_threads(n_threads)
  {
    One<T> *const dys = scratch.own();
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < items; item++) {
      const int64_t n_0 = item % groups * item_heads(p), n_1 = std::min(n_0 + item_heads(p), p.n);
      const int64_t row_0 = item / groups * ITEM_ROWS;
      const auto weigh = [&](int64_t row, int64_t n, int64_t i_tap, int64_t windows) {
        const One<T> *tap = &taps[n * p.block + i_tap];
        T *out = dx + row * p.row_size() + n * p.d;
        chunks<VECTORS>(0, p.d / LANES<T>, [&](int64_t i_vector, auto vectors) {
          const int64_t e = i_vector * LANES<T>;
          Vector<T> sum[vectors()] = {};
          for (int64_t v = 0; v < windows; v++)
            for (int k = 0; k < vectors; k++) sum[k] += tap[-v * p.stride] * load(&dys[v * p.d + e + k * LANES<T>]);
          for (int k = 0; k < vectors; k++) store(out + e + k * LANES<T>, sum[k]);
        });
      };
      each_row(dy, dx, row_0, std::min(row_0 + ITEM_ROWS, n_rows), n_0, n_1, p, dys, weigh);
    }
  }
  return 0;
}

template <class T> int64_t grad_weight(const T *dy, const T *x, T *dw, const Problem &p) {
  const int64_t n_rows = p.rows[p.segments], groups = ceil_div(p.n, item_heads(p)), weights = p.block * p.n;
  const int64_t part_rows = std::max(ITEM_ROWS, ceil_div(n_rows, MOST_PARTS)), n_parts = ceil_div(n_rows, part_rows);
  const int64_t items = n_parts * groups;
  const int64_t n_sums = item_heads(p) * p.block * LANES<T>;
  const int n_threads = threads(p, items);
  const Scratch<One<T>> scratch(n_parts * weights, n_sums + ceil_div(p.block, p.stride) * p.d, n_threads);
  if (scratch.missing()) return scratch.missing();
  One<T> *const part_sums = scratch.shared();  // [parts, block, N]
#pragma omp parallel num_threads(n_threads)
  {
    One<T> *const sums = scratch.own(), *const dys = sums + n_sums;  // each weight's sums, by lanes
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < items; item++) {
      const int64_t n_0 = item % groups * item_heads(p), n_1 = std::min(n_0 + item_heads(p), p.n);
      const int64_t row_0 = item / groups * part_rows;
      std::fill_n(sums, n_sums, 0);
      const auto correlate = [&](int64_t row, int64_t n, int64_t i_tap, int64_t windows) {
        const T *in = x + row * p.row_size() + n * p.d;
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
          One<T> sum = 0;
          for (int64_t k = 0; k < LANES<T>; k++) sum += sums[((n - n_0) * p.block + i) * LANES<T> + k];
          part_sums[item / groups * weights + i * p.n + n] = sum;
        }
    }
  }
  for (int64_t i = 0; i < weights; i += LANES<T>) {
    Vector<T> sum = {};
    for (int64_t part = 0; part < n_parts; part++) sum += load(&part_sums[part * weights + i]);
    store(dw + i, sum);
  }
  return 0;
}

}  // namespace

#define OPS(T, NAME)                                                                                                 \
  int64_t forward_##NAME(const T *x, const T *w, T *y, const Problem *p) {                                           \
    return forward(Packed<T>{x, y, p->row_size(), p->d, p->d}, w, *p);                                               \
  }                                                                                                                  \
  int64_t append_##NAME(const T *x, const T *w, T *cache, const Problem *p, const Pages *a) {                        \
    return forward(Paged<T>{*a, x, cache}, w, *p);                                                                   \
  }                                                                                                                  \
  int64_t grad_input_##NAME(const T *dy, const T *w, T *dx, const Problem *p) { return grad_input(dy, w, dx, *p); }  \
  int64_t grad_weight_##NAME(const T *dy, const T *x, T *dw, const Problem *p) { return grad_weight(dy, x, dw, *p); }

extern "C" {
OPS(Half, float16)
OPS(BFloat, bfloat16)
OPS(float, float32)
OPS(double, float64)

int64_t sizeof_problem() { return sizeof(Problem); }
int64_t sizeof_pages() { return sizeof(Pages); }

// What the vectors above were compiled for, by PyTorch's names.
const char *capability() {
#if defined(__AVX512F__)
  return "AVX512";
#elif defined(__AVX2__)
  return "AVX2";
#else
  return "DEFAULT";
#endif
}
}
