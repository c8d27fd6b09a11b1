// SwiGLU between the experts' two products, forward and backward, each in one pass over memory.
//
// Numbers are stored as float32 or bfloat16 and computed in float32. The backward pass can also write the
// gradients transposed: a product whose first factor is transposed takes 16-bit matrix units nearly twice as
// long, and whoever has the numbers in registers transposes them for little.
//
// Compiled on first use by native.py, for the processor it runs on. No -ffast-math: NaN and inf pass through.

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "numbers.h"

#define LANES 32 // of a block: rows and columns
#define STRIP 64 // rows computed before they are transposed
typedef uint16_t block_row __attribute__((vector_size(2 * LANES)));

// exp(x) to about one unit in the last place, for x brought to -80 … 80: no exponent overflows.
static inline float exponential(float x) {
    x = x < -80.0f ? -80.0f : x;
    x = x > 80.0f ? 80.0f : x;
    const float shift = 12582912.0f; // 1.5·2²³: adding it rounds to an integer
    float n = (x * 1.44269504f + shift) - shift;
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return p * power;
}

// 1/x for 1 ≤ x < 2¹²⁰, by Newton's method from a guess within 12 %: a third of a division's time.
static inline float reciprocal(float x) {
    int32_t bits;
    memcpy(&bits, &x, 4);
    bits = 0x7ef311c7 - bits;
    float y;
    memcpy(&y, &bits, 4);
    y = y * (2.0f - x * y);
    y = y * (2.0f - x * y);
    return y * (2.0f - x * y);
}

static inline float sigmoid(float x) {
    float s = reciprocal(1.0f + exponential(-x));
    return x == x ? s : x;
}

// Its derivative's factor 1 − sigmoid(x), which the difference would round away for large x.
static inline float complement(float x, float s) { return exponential(-x) * s; }

// Transposes a block in place, halving the distance between the rows that are exchanged (Eklundh, 1972).
static inline void transpose(block_row *rows) {
    for (int distance = LANES / 2; distance; distance /= 2) {
        block_row upper, lower;
        for (int lane = 0; lane < LANES; lane++) {
            int swapped = (lane & distance) != 0;
            upper[lane] = swapped ? LANES + lane - distance : lane;
            lower[lane] = swapped ? LANES + lane : lane + distance;
        }
        for (int row = 0; row < LANES; row++) {
            if (row & distance) continue;
            block_row a = rows[row], b = rows[row + distance];
            rows[row] = __builtin_shuffle(a, b, upper);
            rows[row + distance] = __builtin_shuffle(a, b, lower);
        }
    }
}

#define FORWARD(NAME, TYPE, FROM, TO)                                                                        \
    void NAME(int64_t count, const TYPE *restrict gate, const TYPE *restrict up, TYPE *restrict hidden,      \
              int threads) {                                                                                 \
        _Pragma("omp parallel for num_threads(threads) if (threads > 1)")                                    \
        for (int64_t start = 0; start < count; start += 4096) {                                              \
            int64_t end = start + 4096 < count ? start + 4096 : count;                                       \
            for (int64_t i = start; i < end; i++) {                                                          \
                float g = FROM(gate[i]);                                                                     \
                hidden[i] = TO(g * sigmoid(g) * FROM(up[i]));                                                \
            }                                                                                                \
        }                                                                                                    \
    }

// What one number needs: h = silu(g)·u, and from d, the gradient of h, those of g and u.
#define GRADIENTS(FROM, TO, g, u, d, h, dg, du)                                                              \
    float s = sigmoid(g), silu = g * s;                                                                      \
    h = TO(silu * u);                                                                                        \
    du = TO(d * silu);                                                                                       \
    dg = TO(d * u * (s + silu * complement(g, s)));

#define BACKWARD(NAME, TYPE, FROM, TO)                                                                       \
    void NAME(int64_t count, const TYPE *restrict gate, const TYPE *restrict up, TYPE *restrict grad,        \
              TYPE *restrict grad_up, TYPE *restrict hidden, int threads) {                                  \
        _Pragma("omp parallel for num_threads(threads) if (threads > 1)")                                    \
        for (int64_t start = 0; start < count; start += 4096) {                                              \
            int64_t end = start + 4096 < count ? start + 4096 : count;                                       \
            for (int64_t i = start; i < end; i++) {                                                          \
                float g = FROM(gate[i]), u = FROM(up[i]), d = FROM(grad[i]);                                 \
                GRADIENTS(FROM, TO, g, u, d, hidden[i], grad[i], grad_up[i])                                 \
            }                                                                                                \
        }                                                                                                    \
    }

FORWARD(swiglu_float32, float, from_float, to_float)
FORWARD(swiglu_bfloat16, uint16_t, from_bfloat16, to_bfloat16)
BACKWARD(swiglu_backward_float32, float, from_float, to_float)

// Transposes are written past the caches, in whole lines: they are larger than what is near, and to fetch
// what they overwrite takes longer than all arithmetic here.
static inline void stream(uint16_t *to, block_row row) {
#ifdef __AVX512F__
    if ((uintptr_t)to % sizeof row == 0) {
        _mm512_stream_si512((void *)to, (__m512i)row);
        return;
    }
#endif
    memcpy(to, &row, sizeof row);
}

static inline void fence(void) { // before another thread reads what was streamed
#ifdef __AVX512F__
    _mm_sfence();
#endif
}

// Rows ``first`` … ``end`` − 1 of [rows, width], to where they belong in [width, rows].
static void transpose_strip(int64_t first, int64_t end, int64_t rows, int64_t width,
                            const uint16_t *restrict from, uint16_t *restrict to) {
    for (int64_t column = 0; column < width; column += LANES)
        for (int64_t top = first; top < end; top += LANES) {
            int64_t height = end - top < LANES ? end - top : LANES;
            int64_t breadth = width - column < LANES ? width - column : LANES;
            if (height == LANES && breadth == LANES) {
                block_row block[LANES];
                for (int row = 0; row < LANES; row++)
                    memcpy(&block[row], from + (top + row) * width + column, sizeof(block_row));
                transpose(block);
                for (int lane = 0; lane < LANES; lane++)
                    stream(to + (column + lane) * rows + top, block[lane]);
            } else {
                for (int64_t row = top; row < top + height; row++)
                    for (int64_t lane = column; lane < column + breadth; lane++)
                        to[lane * rows + row] = from[row * width + lane];
            }
        }
    fence();
}

void transpose_bfloat16(int64_t rows, int64_t width, const uint16_t *restrict from, uint16_t *restrict to,
                        int threads) {
    _Pragma("omp parallel for num_threads(threads) if (threads > 1)")
    for (int64_t first = 0; first < rows; first += STRIP)
        transpose_strip(first, first + STRIP < rows ? first + STRIP : rows, rows, width, from, to);
}

// As swiglu_backward_float32 for [rows, width], and both gradients once more, transposed.
void swiglu_backward_bfloat16(int64_t rows, int64_t width, const uint16_t *restrict gate,
                              const uint16_t *restrict up, uint16_t *restrict grad,
                              uint16_t *restrict grad_up, uint16_t *restrict hidden,
                              uint16_t *restrict grad_transposed, uint16_t *restrict grad_up_transposed,
                              int threads) {
    _Pragma("omp parallel for num_threads(threads) if (threads > 1)")
    for (int64_t first = 0; first < rows; first += STRIP) {
        int64_t end = first + STRIP < rows ? first + STRIP : rows;
        for (int64_t i = first * width; i < end * width; i++) {
            float g = from_bfloat16(gate[i]), u = from_bfloat16(up[i]), d = from_bfloat16(grad[i]);
            GRADIENTS(from_bfloat16, to_bfloat16, g, u, d, hidden[i], grad[i], grad_up[i])
        }
        transpose_strip(first, end, rows, width, grad, grad_transposed); // a strip is still in the cache
        transpose_strip(first, end, rows, width, grad_up, grad_up_transposed);
    }
}
