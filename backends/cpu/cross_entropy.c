// What the cross entropy does with a slice of logits, [tokens, classes] of the classes from ``first`` on:
// statistics forward, gradients backward, each in one pass over memory.
//
// Logits are stored as float32 or bfloat16, everything else is float32. See swiglu.c for how this is compiled.

#include <math.h>

#include "numbers.h"
#include "transpose.h"

// exp(x) for x ≤ 0, as what it is a share of sees it: below 2e-35 nothing.
static inline float share(float x) { return x < -80.0f ? 0.0f : exponential(x); }

// Per token over the classes seen so far, this slice's added: the largest logit and the first class that has
// it, Σ exp(logit − largest), Σ logit where ``smoothed``, and the label's logit once it is seen.
#define STATISTICS(NAME, TYPE, FROM)                                                                         \
    void NAME(int64_t tokens, int64_t classes, int64_t first, int smoothed, const TYPE *restrict logits,     \
              const int64_t *restrict labels, float *restrict largest, int64_t *restrict predicted,          \
              float *restrict exp_sum, float *restrict logit_sum, float *restrict target, int threads) {     \
        _Pragma("omp parallel for num_threads(threads) if (threads > 1)")                                    \
        for (int64_t token = 0; token < tokens; token++) {                                                   \
            const TYPE *row = logits + token * classes;                                                      \
            float part[PARTS], most = -INFINITY, sum = 0;                                                    \
            for (int lane = 0; lane < PARTS; lane++) part[lane] = -INFINITY;                                 \
            int64_t i = 0;                                                                                   \
            for (; i + PARTS <= classes; i += PARTS)                                                         \
                for (int lane = 0; lane < PARTS; lane++) {                                                   \
                    float logit = FROM(row[i + lane]);                                                       \
                    part[lane] = logit > part[lane] ? logit : part[lane];                                    \
                }                                                                                            \
            for (int lane = 0; lane < PARTS; lane++) most = part[lane] > most ? part[lane] : most;           \
            for (; i < classes; i++) most = FROM(row[i]) > most ? FROM(row[i]) : most;                       \
            if (most > largest[token]) {                                                                     \
                exp_sum[token] *= share(largest[token] - most);                                              \
                largest[token] = most;                                                                       \
                for (i = 0; FROM(row[i]) != most; i++) continue;                                             \
                predicted[token] = first + i;                                                                \
            }                                                                                                \
            most = largest[token];                                                                           \
            for (int lane = 0; lane < PARTS; lane++) part[lane] = 0;                                         \
            for (i = 0; i + PARTS <= classes; i += PARTS)                                                    \
                for (int lane = 0; lane < PARTS; lane++) part[lane] += share(FROM(row[i + lane]) - most);    \
            for (; i < classes; i++) sum += share(FROM(row[i]) - most);                                      \
            exp_sum[token] += sum + total(part);                                                             \
            for (i = 0, sum = 0; smoothed && i < classes; i++) sum += FROM(row[i]);                          \
            logit_sum[token] += sum;                                                                         \
            int64_t place = labels[token] - first;                                                           \
            if (0 <= place && place < classes) target[token] = FROM(row[place]);                             \
        }                                                                                                    \
    }

// Rows ``top`` … ``end`` − 1 of grad·(softmax − smoothed target): ``uniform`` on every class, and
// 1 − ``smoothing`` more on the label's.
#define GRADIENT_ROWS(NAME, TYPE, FROM, TO)                                                                  \
    static void NAME(int64_t top, int64_t end, int64_t classes, int64_t first, float smoothing,              \
                     float uniform, const TYPE *restrict logits, const int64_t *restrict labels,             \
                     const float *restrict log_sum, const float *restrict grad, TYPE *restrict to) {         \
        for (int64_t token = top; token < end; token++) {                                                    \
            const TYPE *row = logits + token * classes;                                                      \
            TYPE *out = to + token * classes;                                                                \
            float g = grad[token], shift = log_sum[token];                                                   \
            for (int64_t i = 0; i < classes; i++) out[i] = TO((share(FROM(row[i]) - shift) - uniform) * g);  \
            int64_t i = labels[token] - first;                                                               \
            if (0 <= i && i < classes)                                                                       \
                out[i] = TO((share(FROM(row[i]) - shift) - uniform - (1.0f - smoothing)) * g);               \
        }                                                                                                    \
    }

STATISTICS(cross_entropy_statistics_float32, float, from_float)
STATISTICS(cross_entropy_statistics_bfloat16, uint16_t, from_bfloat16)
GRADIENT_ROWS(gradient_rows_float32, float, from_float, to_float)
GRADIENT_ROWS(gradient_rows_bfloat16, uint16_t, from_bfloat16, to_bfloat16)

void cross_entropy_gradients_float32(int64_t tokens, int64_t classes, int64_t first, float smoothing,
                                     float uniform, const float *logits, const int64_t *labels,
                                     const float *log_sum, const float *grad, float *to, int threads) {
    _Pragma("omp parallel for num_threads(threads) if (threads > 1)")
    for (int64_t top = 0; top < tokens; top += LANES)
        gradient_rows_float32(top, top + LANES < tokens ? top + LANES : tokens, classes, first, smoothing,
                              uniform, logits, labels, log_sum, grad, to);
}

void cross_entropy_gradients_bfloat16(int64_t tokens, int64_t classes, int64_t first, float smoothing,
                                      float uniform, const uint16_t *logits, const int64_t *labels,
                                      const float *log_sum, const float *grad, uint16_t *to,
                                      uint16_t *transposed, int threads) {
    _Pragma("omp parallel for num_threads(threads) if (threads > 1)")
    for (int64_t top = 0; top < tokens; top += LANES) {
        int64_t end = top + LANES < tokens ? top + LANES : tokens;
        gradient_rows_bfloat16(top, end, classes, first, smoothing, uniform, logits, labels, log_sum, grad, to);
        transpose_strip(top, end, tokens, classes, to, transposed); // the strip is still in the cache
    }
}
