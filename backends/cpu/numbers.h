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

// Sums are kept in as many parts, so that they need no order; in the end halves are added to halves, since
// one after the other each addition would wait for the one before.
#define PARTS 32

static inline float total(float *restrict part) {
    for (int half = PARTS / 2; half; half /= 2)
        for (int i = 0; i < half; i++) part[i] += part[half + i];
    return part[0];
}
