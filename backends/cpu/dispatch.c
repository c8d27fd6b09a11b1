// Dispatch and combine, forward and backward, each in one pass over memory.
//
// Choice k of token s is number k·tokens + s; its row is ``row_of_choice``, ``rows`` or more where it is
// dropped. Numbers are stored as float32 or bfloat16 and added up in float32. See swiglu.c for how this is compiled.

#include "numbers.h"

#define LANES 64 // numbers of a row whose sums stay in the first cache

// The choice every row belongs to; −1 where no token goes.
void choices_of_rows(int64_t choices, int64_t rows, const int64_t *restrict row_of_choice,
                     int64_t *restrict choice_of_row) {
    for (int64_t row = 0; row < rows; row++) choice_of_row[row] = -1;
    for (int64_t choice = 0; choice < choices; choice++)
        if (row_of_choice[choice] < rows) choice_of_row[row_of_choice[choice]] = choice;
}

// y[row] ← x[token]; zeros in rows no token goes to. A row has ``size`` bytes.
void copy_to_rows(int64_t tokens, int64_t rows, int64_t size, const int64_t *restrict choice_of_row,
                  const char *restrict x, char *restrict y, int threads) {
    _Pragma("omp parallel for num_threads(threads) if (threads > 1)")
    for (int64_t row = 0; row < rows; row++) {
        int64_t choice = choice_of_row[row];
        if (choice < 0)
            memset(y + row * size, 0, size);
        else
            memcpy(y + row * size, x + choice % tokens * size, size);
    }
}

// out[token] ← Σ weight · y[row] over its kept choices; without weights the plain sum.
#define SUM_OF_ROWS(NAME, TYPE, FROM, TO)                                                                    \
    void NAME(int64_t tokens, int64_t choices, int64_t rows, int64_t width,                                  \
              const int64_t *restrict row_of_choice, const float *restrict weight, const TYPE *restrict y,   \
              TYPE *restrict out, int threads) {                                                             \
        _Pragma("omp parallel for num_threads(threads) if (threads > 1)")                                    \
        for (int64_t token = 0; token < tokens; token++)                                                     \
            for (int64_t start = 0; start < width; start += LANES) {                                         \
                int64_t lanes = width - start < LANES ? width - start : LANES;                               \
                float sum[LANES] = {0};                                                                      \
                for (int64_t choice = token; choice < choices * tokens; choice += tokens) {                  \
                    int64_t row = row_of_choice[choice];                                                     \
                    if (row >= rows) continue;                                                               \
                    const TYPE *from = y + row * width + start;                                              \
                    float scale = weight ? weight[choice] : 1.0f;                                            \
                    for (int64_t lane = 0; lane < lanes; lane++) sum[lane] += scale * FROM(from[lane]);      \
                }                                                                                            \
                TYPE *to = out + token * width + start;                                                      \
                for (int64_t lane = 0; lane < lanes; lane++) to[lane] = TO(sum[lane]);                       \
            }                                                                                                \
    }

// The gradients of combine: grad_y[row] ← weight · grad[token], grad_weight[choice] ← y[row] · grad[token].
// Those of dropped choices are not written.
#define WEIGHTED_ROWS(NAME, TYPE, FROM, TO)                                                                  \
    void NAME(int64_t tokens, int64_t rows, int64_t width, const int64_t *restrict choice_of_row,            \
              const float *restrict weight, const TYPE *restrict y, const TYPE *restrict grad,               \
              TYPE *restrict grad_y, float *restrict grad_weight, int threads) {                             \
        _Pragma("omp parallel for num_threads(threads) if (threads > 1)")                                    \
        for (int64_t row = 0; row < rows; row++) {                                                           \
            int64_t choice = choice_of_row[row];                                                             \
            TYPE *to = grad_y + row * width;                                                                 \
            if (choice < 0) {                                                                                \
                memset(to, 0, width * sizeof(TYPE));                                                         \
                continue;                                                                                    \
            }                                                                                                \
            const TYPE *from = y + row * width, *g = grad + choice % tokens * width;                         \
            float part[PARTS] = {0}, sum = 0, scale = weight[choice];                                        \
            int64_t i = 0;                                                                                   \
            for (; i + PARTS <= width; i += PARTS)                                                           \
                for (int lane = 0; lane < PARTS; lane++) {                                                   \
                    float of_result = FROM(g[i + lane]);                                                     \
                    part[lane] += FROM(from[i + lane]) * of_result;                                          \
                    to[i + lane] = TO(scale * of_result);                                                    \
                }                                                                                            \
            for (; i < width; i++) {                                                                         \
                sum += FROM(from[i]) * FROM(g[i]);                                                           \
                to[i] = TO(scale * FROM(g[i]));                                                              \
            }                                                                                                \
            sum += total(part);                                                                              \
            grad_weight[choice] = sum;                                                                       \
        }                                                                                                    \
    }

SUM_OF_ROWS(sum_of_rows_float32, float, from_float, to_float)
SUM_OF_ROWS(sum_of_rows_bfloat16, uint16_t, from_bfloat16, to_bfloat16)
WEIGHTED_ROWS(weighted_rows_float32, float, from_float, to_float)
WEIGHTED_ROWS(weighted_rows_bfloat16, uint16_t, from_bfloat16, to_bfloat16)
