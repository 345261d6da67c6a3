/* fp16 as integers: the compiler's own half type needs instructions that not every machine has. */
#include "standin.h"

#include <string.h>

static float bits_to_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static uint32_t float_to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

float half_to_float(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, magnitude = half & 0x7fff;
    if (magnitude >= 0x7c00) /* infinity, NaN */
        return bits_to_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    /* Exponent and mantissa shifted into place; the product corrects the bias, subnormals included. */
    float value = bits_to_float(magnitude << 13) * 0x1p112f;
    return bits_to_float(sign | float_to_bits(value));
}

/* Rounds to nearest, ties to even. Values that round to more than 65504 become infinity. */
uint16_t float_to_half(float value) {
    uint32_t bits = float_to_bits(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000)
        return (uint16_t)(sign | 0x7e00);
    if (magnitude >= 0x477ff000)
        return (uint16_t)(sign | 0x7c00);
    if (magnitude < 0x38800000) { /* subnormal: adding 0.5 leaves the rounded mantissa in the low bits */
        float shifted = bits_to_float(magnitude) + 0.5f;
        return (uint16_t)(sign | (float_to_bits(shifted) - 0x3f000000));
    }
    uint32_t rounded = magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1);
    return (uint16_t)(sign | rounded >> 13);
}

void halves_to_floats(const uint16_t *halves, float *floats, size_t count) {
    for (size_t i = 0; i < count; i++)
        floats[i] = half_to_float(halves[i]);
}
