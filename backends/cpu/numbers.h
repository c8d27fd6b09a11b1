// How numbers are stored and computed: as float32 or bfloat16, and in float32.

#include <stdint.h>
#include <string.h>

static inline float from_bfloat16(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float number;
    memcpy(&number, &bits, 4);
    return number;
}

static inline uint16_t to_bfloat16(float number) { // to nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &number, 4);
    uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
    return number == number ? rounded >> 16 : 0x7fc0;
}

static inline float from_float(float value) { return value; }
static inline float to_float(float number) { return number; }

// Sums are kept in as many parts, so that they need no order; in the end halves are added to halves, since
// one after the other each addition would wait for the one before.
#define PARTS 32

static inline float total(float *restrict part) {
    for (int half = PARTS / 2; half; half /= 2)
        for (int i = 0; i < half; i++) part[i] += part[half + i];
    return part[0];
}
