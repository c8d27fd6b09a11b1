// RMSNorm and the rotary embedding, forward and backward, each in one pass over memory.
//
// Numbers are stored as float32 or bfloat16 and computed in float32. See swiglu.c for how this is compiled.

#include <math.h>

#include "numbers.h"

#define RMS_NORM(NAME, TYPE, FROM, TO)                                                                       \
    void NAME(int64_t rows, int64_t width, float eps, const TYPE *restrict x, const TYPE *restrict weight,   \
              TYPE *restrict y, float *restrict scale, int threads) {                                        \
        _Pragma("omp parallel for num_threads(threads) if (threads > 1)")                                    \
        for (int64_t row = 0; row < rows; row++) {                                                           \
            const TYPE *from = x + row * width;                                                              \
            TYPE *to = y + row * width;                                                                      \
            float part[PARTS] = {0}, sum = 0;                                                                \
            int64_t i = 0;                                                                                   \
            for (; i + PARTS <= width; i += PARTS)                                                           \
                for (int lane = 0; lane < PARTS; lane++)                                                     \
                    part[lane] += FROM(from[i + lane]) * FROM(from[i + lane]);                               \
            for (; i < width; i++) sum += FROM(from[i]) * FROM(from[i]);                                     \
            sum += total(part);                                                                              \
            float s = scale[row] = 1.0f / sqrtf(sum / width + eps);                                          \
            for (i = 0; i < width; i++) to[i] = TO(FROM(from[i]) * s * FROM(weight[i]));                     \
        }                                                                                                    \
    }

// grad_x = s·w·g − x·s³·mean(w·g·x); the weight's gradient is a sum over rows, of which every thread makes
// a part: grad_weight is [threads, width], zero before.
#define RMS_NORM_BACKWARD(NAME, TYPE, FROM, TO)                                                              \
    void NAME(int64_t rows, int64_t width, const TYPE *restrict x, const TYPE *restrict weight,              \
              const float *restrict scale, const TYPE *restrict grad, TYPE *restrict grad_x,                 \
              float *restrict grad_weight, int threads) {                                                    \
        int64_t share = (rows + threads - 1) / threads;                                                      \
        _Pragma("omp parallel for num_threads(threads) if (threads > 1)")                                    \
        for (int thread = 0; thread < threads; thread++) {                                                   \
            float *sums = grad_weight + thread * width;                                                      \
            int64_t end = (thread + 1) * share < rows ? (thread + 1) * share : rows;                         \
            for (int64_t row = thread * share; row < end; row++) {                                           \
                const TYPE *from = x + row * width, *g = grad + row * width;                                 \
                TYPE *to = grad_x + row * width;                                                             \
                float part[PARTS] = {0}, sum = 0, s = scale[row];                                            \
                int64_t i = 0;                                                                               \
                for (; i + PARTS <= width; i += PARTS)                                                       \
                    for (int lane = 0; lane < PARTS; lane++)                                                 \
                        part[lane] += FROM(from[i + lane]) * FROM(g[i + lane]) * FROM(weight[i + lane]);     \
                for (; i < width; i++) sum += FROM(from[i]) * FROM(g[i]) * FROM(weight[i]);                  \
                sum += total(part);                                                                          \
                float shift = sum / width * s * s;                                                           \
                for (i = 0; i < width; i++) {                                                                \
                    float normed = FROM(from[i]) * s, of_result = FROM(g[i]);                                \
                    sums[i] += normed * of_result;                                                           \
                    to[i] = TO(s * of_result * FROM(weight[i]) - normed * shift);                            \
                }                                                                                            \
            }                                                                                                \
        }                                                                                                    \
    }

// Every pair (a, b) of a head to (a·cos − b·sin, b·cos + a·sin), with sin times ``direction``. x has rows
// ``token_stride`` and heads ``head_stride`` apart; y is [tokens, heads, 2·pairs].
#define ROTARY(NAME, TYPE, FROM, TO)                                                                         \
    void NAME(int64_t tokens, int64_t heads, int64_t pairs, int64_t token_stride, int64_t head_stride,       \
              int interleaved, float direction, const TYPE *restrict x, const float *restrict cosine,        \
              const float *restrict sine, TYPE *restrict y, int threads) {                                   \
        _Pragma("omp parallel for num_threads(threads) if (threads > 1)")                                    \
        for (int64_t token = 0; token < tokens; token++) {                                                   \
            const float *cos_row = cosine + token * pairs, *sin_row = sine + token * pairs;                  \
            for (int64_t head = 0; head < heads; head++) {                                                   \
                const TYPE *from = x + token * token_stride + head * head_stride;                            \
                TYPE *to = y + (token * heads + head) * 2 * pairs;                                           \
                if (interleaved)                                                                             \
                    for (int64_t i = 0; i < pairs; i++) {                                                    \
                        float a = FROM(from[2 * i]), b = FROM(from[2 * i + 1]);                              \
                        float c = cos_row[i], s = direction * sin_row[i];                                    \
                        to[2 * i] = TO(a * c - b * s);                                                       \
                        to[2 * i + 1] = TO(b * c + a * s);                                                   \
                    }                                                                                        \
                else                                                                                         \
                    for (int64_t i = 0; i < pairs; i++) {                                                    \
                        float a = FROM(from[i]), b = FROM(from[i + pairs]);                                  \
                        float c = cos_row[i], s = direction * sin_row[i];                                    \
                        to[i] = TO(a * c - b * s);                                                           \
                        to[i + pairs] = TO(b * c + a * s);                                                   \
                    }                                                                                        \
            }                                                                                                \
        }                                                                                                    \
    }

RMS_NORM(rms_norm_float32, float, from_float, to_float)
RMS_NORM(rms_norm_bfloat16, uint16_t, from_bfloat16, to_bfloat16)
RMS_NORM_BACKWARD(rms_norm_backward_float32, float, from_float, to_float)
RMS_NORM_BACKWARD(rms_norm_backward_bfloat16, uint16_t, from_bfloat16, to_bfloat16)
ROTARY(rotary_float32, float, from_float, to_float)
ROTARY(rotary_bfloat16, uint16_t, from_bfloat16, to_bfloat16)
