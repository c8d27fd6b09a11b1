// The router's logits for few experts, forward and backward, each in one pass over the tokens.
//
// Tokens are stored as float32 or bfloat16, everything else is float32. See swiglu.c for how this is compiled.

#include "numbers.h"

#define LANES 64 // numbers of a token at a time

#define ROUTER(NAME, TYPE, FROM)                                                                             \
    void NAME(int64_t tokens, int64_t experts, int64_t width, const TYPE *restrict x,                        \
              const float *restrict weight, float *restrict logits, int threads) {                           \
        _Pragma("omp parallel for num_threads(threads) if (threads > 1)")                                    \
        for (int64_t token = 0; token < tokens; token++) {                                                   \
            const TYPE *from = x + token * width;                                                            \
            for (int64_t expert = 0; expert < experts; expert++) {                                           \
                const float *w = weight + expert * width;                                                    \
                float part[PARTS] = {0}, sum = 0;                                                            \
                int64_t i = 0;                                                                               \
                for (; i + PARTS <= width; i += PARTS)                                                       \
                    for (int lane = 0; lane < PARTS; lane++)                                                 \
                        part[lane] += FROM(from[i + lane]) * w[i + lane];                                    \
                for (; i < width; i++) sum += FROM(from[i]) * w[i];                                          \
                sum += total(part);                                                                          \
                logits[token * experts + expert] = sum;                                                      \
            }                                                                                                \
        }                                                                                                    \
    }

// grad_x = grad·weight; the weight's gradient is a sum over tokens, of which every thread makes a part:
// grad_weight is [threads, experts, width], zero before.
#define ROUTER_BACKWARD(NAME, TYPE, FROM, TO)                                                                \
    void NAME(int64_t tokens, int64_t experts, int64_t width, const TYPE *restrict x,                        \
              const float *restrict weight, const float *restrict grad, TYPE *restrict grad_x,               \
              float *restrict grad_weight, int threads) {                                                    \
        int64_t share = (tokens + threads - 1) / threads;                                                    \
        _Pragma("omp parallel for num_threads(threads) if (threads > 1)")                                    \
        for (int thread = 0; thread < threads; thread++) {                                                   \
            float *sums = grad_weight + thread * experts * width;                                            \
            int64_t end = (thread + 1) * share < tokens ? (thread + 1) * share : tokens;                     \
            for (int64_t token = thread * share; token < end; token++)                                       \
                for (int64_t start = 0; start < width; start += LANES) {                                     \
                    int64_t lanes = width - start < LANES ? width - start : LANES;                           \
                    const TYPE *from = x + token * width + start;                                            \
                    TYPE *to = grad_x + token * width + start;                                               \
                    float sum[LANES] = {0};                                                                  \
                    for (int64_t expert = 0; expert < experts; expert++) {                                   \
                        float g = grad[token * experts + expert];                                            \
                        const float *w = weight + expert * width + start;                                    \
                        float *of_weight = sums + expert * width + start;                                    \
                        for (int64_t lane = 0; lane < lanes; lane++) {                                       \
                            sum[lane] += g * w[lane];                                                        \
                            of_weight[lane] += g * FROM(from[lane]);                                         \
                        }                                                                                    \
                    }                                                                                        \
                    for (int64_t lane = 0; lane < lanes; lane++) to[lane] = TO(sum[lane]);                   \
                }                                                                                            \
        }                                                                                                    \
    }

ROUTER(router_float32, float, from_float)
ROUTER(router_bfloat16, uint16_t, from_bfloat16)
ROUTER_BACKWARD(router_backward_float32, float, from_float, to_float)
ROUTER_BACKWARD(router_backward_bfloat16, uint16_t, from_bfloat16, to_bfloat16)
