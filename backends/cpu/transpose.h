// Transposing 16-bit numbers in blocks that vector registers hold.

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <stdint.h>
#include <string.h>

#define LANES 32 // of a block: rows and columns
typedef uint16_t block_row __attribute__((vector_size(2 * LANES)));

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
