// SwiGLU between the experts' two products, forward and backward, each in one pass over memory.
//
// Numbers are stored as float32 or bfloat16 and computed in float32. The backward pass can also write the
// gradients transposed: a product whose first factor is transposed takes 16-bit matrix units nearly twice as
// long, and whoever has the numbers in registers transposes them for little.
//
// Compiled on first use by compiler.py, for the processor it runs on. No -ffast-math: NaN and inf pass through.

#include "numbers.h"
#include "transpose.h"

#define STRIP 64 // rows computed before they are transposed

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
