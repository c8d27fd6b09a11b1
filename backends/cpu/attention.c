// Causal attention within segments, forward and backward, for vectors of 512 bits.
//
// Scores are made in squares of BLOCK queries and BLOCK keys and never kept; squares in which no query sees a
// key are passed over. Numbers are stored as float32 or bfloat16, everything between is float32. A task is
// one segment of one key head with all queries that share it, so no two threads write to one place. See
// swiglu.c for how this is compiled.

#include <math.h>
#include <omp.h>

#include "numbers.h"

#define BLOCK (2 * PARTS)
#define LANES 16 // numbers in a vector: widths are padded to it with zeros
#define ROWS 4   // of a product that stay in registers, with up to VECTORS vectors each
#define VECTORS 4

typedef float vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

// Where a tensor [tokens, heads, width] lies; numbers of a row are neighbours.
typedef struct {
    const void *numbers;
    int64_t token_stride, head_stride, width;
} Tensor;

// c += a·b for [ROWS, depth]·[depth, vectors·LANES].
static inline __attribute__((always_inline)) void registers(const int vectors, int64_t depth, const float *a,
                                                            int64_t row, int64_t column, const float *b,
                                                            int64_t b_row, float *c, int64_t c_row) {
    vector sum[ROWS][VECTORS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) sum[r][v] = *(vector *)(c + r * c_row + v * LANES);
    for (int64_t k = 0; k < depth; k++) {
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) {
            float factor = a[r * row + k * column];
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) sum[r][v] += factor * *(const vector *)(b + k * b_row + v * LANES);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) *(vector *)(c + r * c_row + v * LANES) = sum[r][v];
}

// c[rows, width] += a[rows, depth]·b[depth, width]; a's rows and columns lie ``row`` and ``column`` apart, rows is
// a multiple of ROWS and width one of LANES.
static void add_product(int64_t rows, int64_t width, int64_t depth, const float *a, int64_t row, int64_t column,
                        const float *b, int64_t b_row, float *c, int64_t c_row) {
    for (int64_t first = 0; first < width; first += VECTORS * LANES) {
        int64_t vectors = (width - first) / LANES;
        for (int64_t r = 0; r < rows; r += ROWS) {
            const float *a_r = a + r * row, *b_r = b + first;
            float *c_r = c + r * c_row + first;
            if (vectors == 1) registers(1, depth, a_r, row, column, b_r, b_row, c_r, c_row);
            else if (vectors == 2) registers(2, depth, a_r, row, column, b_r, b_row, c_r, c_row);
            else if (vectors == 3) registers(3, depth, a_r, row, column, b_r, b_row, c_r, c_row);
            else registers(4, depth, a_r, row, column, b_r, b_row, c_r, c_row);
        }
    }
}

static inline int64_t padded(int64_t width) { return (width + LANES - 1) / LANES * LANES; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// BLOCK rows of a head from ``token`` on as float32, padded; those from ``end`` on are zeros.
static void take(int narrow, Tensor from, int64_t head, int64_t token, int64_t end, float *to) {
    int64_t wide = padded(from.width), there = least(end - token, BLOCK);
    memset(to, 0, BLOCK * wide * sizeof(float));
    for (int64_t t = 0; t < there; t++) {
        int64_t first = (token + t) * from.token_stride + head * from.head_stride;
        const uint16_t *halves = (const uint16_t *)from.numbers + first;
        float *row = to + t * wide;
        if (narrow)
            for (int64_t i = 0; i < from.width; i++) row[i] = from_bfloat16(halves[i]);
        else
            memcpy(row, (const float *)from.numbers + first, from.width * sizeof(float));
    }
}

// The same rows transposed: [width, BLOCK].
static void turn(int64_t width, const float *rows, float *turned) {
    for (int64_t i = 0; i < width; i++)
        for (int64_t t = 0; t < BLOCK; t++) turned[i * BLOCK + t] = rows[t * padded(width) + i];
}

static void give(int narrow, const float *from, int64_t head, int64_t token, int64_t end, Tensor to) {
    int64_t wide = padded(to.width), there = least(end - token, BLOCK);
    for (int64_t t = 0; t < there; t++) {
        int64_t first = (token + t) * to.token_stride + head * to.head_stride;
        uint16_t *halves = (uint16_t *)to.numbers + first;
        const float *row = from + t * wide;
        if (narrow)
            for (int64_t i = 0; i < to.width; i++) halves[i] = to_bfloat16(row[i]);
        else
            memcpy((float *)to.numbers + first, row, to.width * sizeof(float));
    }
}

// What of a square is computed: its queries, rounded up to ROWS, and as many keys where it is on the diagonal.
typedef struct {
    int queries, keys, diagonal;
} Square;

static inline Square square_of(int64_t query, int64_t key, int64_t end) {
    int queries = (least(end - query, BLOCK) + ROWS - 1) / ROWS * ROWS;
    return (Square){queries, query == key ? queries : BLOCK, query == key};
}

// How many keys of a square its query ``row`` sees.
static inline int seen(Square square, int row) { return square.diagonal ? row + 1 : BLOCK; }

// On the diagonal, products leave out what lies above it, in strips of LANES rows.
#define STRIPS(SQUARE, FIRST, ROWS_OF_STRIP, ROWS_IN_ALL)                                                    \
    for (int FIRST = 0, step = (SQUARE).diagonal ? LANES : BLOCK, ROWS_OF_STRIP;                             \
         ROWS_OF_STRIP = least(step, (ROWS_IN_ALL) - FIRST), FIRST < (ROWS_IN_ALL); FIRST += step)

// Scores [queries, keys] of queries and turned keys, not yet scaled; those above the diagonal are open.
static void scores_of(Square square, int64_t width, const float *q, const float *keys_turned, float *scores) {
    memset(scores, 0, square.queries * BLOCK * sizeof(float));
    STRIPS(square, first, rows, square.queries) {
        int64_t keys = square.diagonal ? first + LANES : BLOCK, d = padded(width);
        add_product(rows, keys, width, q + first * d, d, 1, keys_turned, BLOCK, scores + first * BLOCK, BLOCK);
    }
}

// to[queries, width] += square·from[keys, width]; what is above the diagonal is 0.
static void add_over_keys(Square square, const float *of, int64_t width, const float *from, float *to) {
    STRIPS(square, first, rows, square.queries) {
        int64_t keys = square.diagonal ? first + rows : BLOCK;
        add_product(rows, width, keys, of + first * BLOCK, BLOCK, 1, from, width, to + first * width, width);
    }
}

// to[keys, width] += squareᵀ·from[queries, width].
static void add_over_queries(Square square, const float *of, int64_t width, const float *from, float *to) {
    STRIPS(square, first, rows, square.keys) {
        int64_t before = square.diagonal ? first : 0, queries = square.queries - before;
        const float *seen_by = of + before * BLOCK + first;
        add_product(rows, width, queries, seen_by, 1, BLOCK, from + before * width, width, to + first * width, width);
    }
}

// Offsets of what a task keeps in its scratch; ``scratch`` in attention.py adds the same up.
typedef struct {
    float *q, *scores, *out, *largest, *sum, *keys_turned, *values;                      // forward
    float *grad_out, *score_grads, *grad_q, *keys, *values_turned, *grad_k, *grad_v;    // backward too
} Scratch;

static Scratch scratch_of(float *at, int64_t longest, int64_t width, int64_t value_width) {
    int64_t blocks = (longest + BLOCK - 1) / BLOCK * BLOCK, d = padded(width), w = padded(value_width);
    Scratch s;
    s.q = at, at += BLOCK * d;
    s.scores = at, at += BLOCK * BLOCK;
    s.out = at, at += BLOCK * w;
    s.largest = at, at += BLOCK;
    s.sum = at, at += BLOCK;
    s.keys_turned = at, at += blocks * d;
    s.values = at, at += blocks * w;
    s.grad_out = at, at += BLOCK * w;
    s.score_grads = at, at += BLOCK * BLOCK;
    s.grad_q = at, at += BLOCK * d;
    s.keys = at, at += blocks * d;
    s.values_turned = at, at += blocks * w;
    s.grad_k = at, at += blocks * d;
    s.grad_v = at, at += blocks * w;
    return s;
}

// A square's scores become exp(score − largest); the row's largest, sum and result so far follow.
static void soften(Square square, float scale, int64_t value_width, Scratch s) {
    int64_t w = padded(value_width);
    for (int i = 0; i < square.queries; i++) {
        float *restrict row = s.scores + i * BLOCK, part[PARTS], largest = s.largest[i];
        int keys = seen(square, i);
        for (int j = keys; j < BLOCK; j++) row[j] = -INFINITY;
        for (int lane = 0; lane < PARTS; lane++)
            part[lane] = row[PARTS + lane] > row[lane] ? row[PARTS + lane] : row[lane];
        for (int half = PARTS / 2; half; half /= 2)
            for (int lane = 0; lane < half; lane++)
                part[lane] = part[half + lane] > part[lane] ? part[half + lane] : part[lane];
        largest = part[0] * scale > largest ? part[0] * scale : largest;
        for (int j = 0; j < BLOCK; j++) row[j] = exponential(row[j] * scale - largest);
        for (int j = keys; j < BLOCK; j++) row[j] = 0;
        for (int lane = 0; lane < PARTS; lane++) part[lane] = row[lane] + row[PARTS + lane];
        if (largest != s.largest[i]) {
            float kept = exponential(s.largest[i] - largest);
            s.largest[i] = largest;
            s.sum[i] *= kept;
            for (int64_t k = 0; k < w; k++) s.out[i * w + k] *= kept;
        }
        s.sum[i] += total(part);
    }
}

void attention(int64_t segments, const int64_t *offsets, int64_t heads, int64_t groups, int64_t width,
               int64_t value_width, int64_t longest, float scale, int narrow, const int64_t *strides,
               const void *q_numbers, const void *k_numbers, const void *v_numbers, void *out_numbers,
               float *log_sum, float *scratch, int64_t scratch_size, int threads) {
    Tensor q = {q_numbers, strides[0], strides[1], width}, k = {k_numbers, strides[2], strides[3], width};
    Tensor v = {v_numbers, strides[4], strides[5], value_width};
    Tensor out = {out_numbers, heads * value_width, value_width, value_width};
    int64_t d = padded(width), w = padded(value_width), shared = heads / groups;
    _Pragma("omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)")
    for (int64_t task = 0; task < segments * groups; task++) {
        int64_t slot = omp_get_thread_num();
        Scratch s = scratch_of(scratch + slot * scratch_size, longest, width, value_width);
        int64_t group = task % groups, start = offsets[task / groups], end = offsets[task / groups + 1];
        for (int64_t key = start; key < end; key += BLOCK) {
            take(narrow, k, group, key, end, s.q);
            turn(width, s.q, s.keys_turned + (key - start) * d);
            take(narrow, v, group, key, end, s.values + (key - start) * w);
        }
        for (int64_t head = group * shared; head < (group + 1) * shared; head++)
            for (int64_t query = start; query < end; query += BLOCK) {
                take(narrow, q, head, query, end, s.q);
                memset(s.out, 0, BLOCK * w * sizeof(float));
                for (int64_t i = 0; i < BLOCK; i++) s.largest[i] = -INFINITY, s.sum[i] = 0;
                for (int64_t key = start; key <= query; key += BLOCK) {
                    Square square = square_of(query, key, end);
                    scores_of(square, width, s.q, s.keys_turned + (key - start) * d, s.scores);
                    soften(square, scale, value_width, s);
                    add_over_keys(square, s.scores, w, s.values + (key - start) * w, s.out);
                }
                for (int64_t i = 0; i < least(end - query, BLOCK); i++) {
                    for (int64_t x = 0; x < w; x++) s.out[i * w + x] /= s.sum[i];
                    log_sum[(query + i) * heads + head] = s.largest[i] + logf(s.sum[i]);
                }
                give(narrow, s.out, head, query, end, out);
            }
    }
}

// In a square, scores become probabilities, and the gradients of probabilities those of scores:
// p·(grad − Σ grad·p) · scale; ``shift`` is that sum less the gradient of the logarithm of the sum.
static void harden(Square square, float scale, const float *log_sum, const float *shift, Scratch s) {
    for (int i = 0; i < square.queries; i++) {
        float *restrict row = s.scores + i * BLOCK, *restrict grads = s.score_grads + i * BLOCK;
        float of_row = log_sum[i], less = shift[i];
        int keys = seen(square, i);
        for (int j = 0; j < BLOCK; j++) {
            float p = exponential(row[j] * scale - of_row);
            row[j] = p = j < keys ? p : 0.0f;
            grads[j] = p * (grads[j] - less) * scale;
        }
    }
}

void attention_backward(int64_t segments, const int64_t *offsets, int64_t heads, int64_t groups, int64_t width,
                        int64_t value_width, int64_t longest, float scale, int narrow, const int64_t *strides,
                        const void *q_numbers, const void *k_numbers, const void *v_numbers,
                        const void *out_numbers, const float *log_sum, const void *grad_numbers,
                        const float *grad_log_sum, void *grad_q_numbers, void *grad_k_numbers,
                        void *grad_v_numbers, float *scratch, int64_t scratch_size, int threads) {
    Tensor q = {q_numbers, strides[0], strides[1], width}, k = {k_numbers, strides[2], strides[3], width};
    Tensor v = {v_numbers, strides[4], strides[5], value_width};
    Tensor out = {out_numbers, heads * value_width, value_width, value_width}, grad = out;
    Tensor grad_q = {grad_q_numbers, heads * width, width, width};
    Tensor grad_k = {grad_k_numbers, groups * width, width, width};
    Tensor grad_v = {grad_v_numbers, groups * value_width, value_width, value_width};
    int64_t d = padded(width), w = padded(value_width), shared = heads / groups;
    grad.numbers = grad_numbers;
    _Pragma("omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)")
    for (int64_t task = 0; task < segments * groups; task++) {
        int64_t slot = omp_get_thread_num();
        Scratch s = scratch_of(scratch + slot * scratch_size, longest, width, value_width);
        int64_t group = task % groups, start = offsets[task / groups], end = offsets[task / groups + 1];
        for (int64_t key = start; key < end; key += BLOCK) {
            float *keys = s.keys + (key - start) * d, *values = s.values + (key - start) * w;
            take(narrow, k, group, key, end, keys);
            turn(width, keys, s.keys_turned + (key - start) * d);
            take(narrow, v, group, key, end, values);
            turn(value_width, values, s.values_turned + (key - start) * w);
            memset(s.grad_k + (key - start) * d, 0, BLOCK * d * sizeof(float));
            memset(s.grad_v + (key - start) * w, 0, BLOCK * w * sizeof(float));
        }
        for (int64_t head = group * shared; head < (group + 1) * shared; head++)
            for (int64_t query = start; query < end; query += BLOCK) {
                take(narrow, q, head, query, end, s.q);
                take(narrow, out, head, query, end, s.out);
                take(narrow, grad, head, query, end, s.grad_out);
                memset(s.grad_q, 0, BLOCK * d * sizeof(float));
                memset(s.sum, 0, BLOCK * sizeof(float));
                memset(s.largest, 0, BLOCK * sizeof(float));
                for (int64_t i = 0; i < least(end - query, BLOCK); i++) {
                    int64_t place = (query + i) * heads + head;
                    float shift = grad_log_sum ? -grad_log_sum[place] : 0.0f;
                    for (int64_t x = 0; x < w; x++) shift += s.out[i * w + x] * s.grad_out[i * w + x];
                    s.sum[i] = shift, s.largest[i] = log_sum[place];
                }
                for (int64_t key = start; key <= query; key += BLOCK) {
                    int64_t of_k = (key - start) * d, of_v = (key - start) * w;
                    Square square = square_of(query, key, end);
                    scores_of(square, width, s.q, s.keys_turned + of_k, s.scores);
                    scores_of(square, value_width, s.grad_out, s.values_turned + of_v, s.score_grads);
                    harden(square, scale, s.largest, s.sum, s);
                    add_over_queries(square, s.scores, w, s.grad_out, s.grad_v + of_v);
                    add_over_keys(square, s.score_grads, d, s.keys + of_k, s.grad_q);
                    add_over_queries(square, s.score_grads, d, s.q, s.grad_k + of_k);
                }
                give(narrow, s.grad_q, head, query, end, grad_q);
            }
        for (int64_t key = start; key < end; key += BLOCK) {
            give(narrow, s.grad_k + (key - start) * d, group, key, end, grad_k);
            give(narrow, s.grad_v + (key - start) * w, group, key, end, grad_v);
        }
    }
}
