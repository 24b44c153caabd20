// Encoders of a row: real input to codes, as neurons/oat.py and neurons/gif.py define them, bit for bit.
//
// Part of a kernel file (see common.h): no include guard, since each instruction set has its own copy.

// 2^-shift: the input's factor where thresholds of a channel are 2^shift times as large.
SF_INLINE float inverse_power(int8_t shift) {
    int32_t exponent = 127 - int32_t(shift);
    int32_t bits = exponent > 0 ? exponent << 23 : 0x00400000;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

template <int ROUNDING>
SF_INLINE float oat_code(float v, float unit, float limit) {
    float scaled = v / unit, code;
    if (ROUNDING == NEAREST) {
        code = std::rint(scaled);
    } else if (ROUNDING == FLOOR) {
        code = std::trunc(scaled);
    } else {
        float size = std::ceil(std::fabs(scaled)) - 1.0f;
        code = std::copysign(size > 0.0f ? size : 0.0f, scaled);
    }
    code = code < limit ? code : limit;
    return code > -limit ? code : -limit;
}

template <int ROUNDING, bool SHIFTED, class T>
SF_INLINE void oat_row_(const Oat& p, const T* x, const int8_t* shift, int64_t count, float* codes, int32_t* outlier) {
    const float unit0 = p.unit[0], unit1 = p.unit[1], limit = p.limit;
    const float normal = p.normal;
    for (int64_t k = 0; k < count; k++) {
        float v = real(x[k]);
        if (SHIFTED) v *= inverse_power(shift[k]);
        int32_t beyond = std::fabs(v) >= normal;
        codes[k] = oat_code<ROUNDING>(v, beyond ? unit1 : unit0, limit);
        outlier[k] = beyond;
    }
}

// Codes (whole numbers in fp32, signed) of a row, and which sub-neuron sends each, 0 or 1. shift: int8 [count] or null.
template <class T>
SF_INLINE void oat_row(const Oat& p, const T* x, const int8_t* shift, int64_t count, float* codes, int32_t* outlier) {
#define SF_ROW(R)                                              \
    if (shift)                                                 \
        oat_row_<R, true>(p, x, shift, count, codes, outlier); \
    else                                                       \
        oat_row_<R, false>(p, x, shift, count, codes, outlier);
    if (p.rounding == NEAREST) {
        SF_ROW(NEAREST)
    } else if (p.rounding == FLOOR) {
        SF_ROW(FLOOR)
    } else {
        SF_ROW(STRICT)
    }
#undef SF_ROW
}

// decode(encode(x)) of a row, fp32.
template <class T>
SF_INLINE void oat_values_row(const Oat& p, const T* x, const int8_t* shift, int64_t count, float* values) {
    constexpr int64_t TILE = 256;
    int32_t outlier[TILE];
    for (int64_t k = 0; k < count; k += TILE) {
        int64_t size = std::min(TILE, count - k);
        oat_row(p, x + k, shift ? shift + k : nullptr, size, values + k, outlier);
        for (int64_t j = 0; j < size; j++) values[k + j] *= outlier[j] ? p.unit[1] : p.unit[0];
    }
}

// A GIF row: integers in the row's common unit, which is returned; `sum` is theirs. multiple fp32 [count]; top, what
// codes reach, [count] or null: of a unit of `multiple` common ones, levels steps / multiple.
template <class T>
SF_INLINE float gif_row(const T* x, int64_t count, const float* top, const float* multiple, int64_t levels,
                        int64_t steps, int8_t* out, int32_t* sum) {
    constexpr int LANES = 32;
    float low[LANES] = {}, high[LANES] = {};  // zero is always within the range
    int64_t k = 0;
    for (; k + LANES <= count; k += LANES)
        for (int j = 0; j < LANES; j++) {
            float v = real(x[k + j]);
            low[j] = v < low[j] ? v : low[j];
            high[j] = v > high[j] ? v : high[j];
        }
    for (; k < count; k++) {
        float v = real(x[k]);
        low[0] = v < low[0] ? v : low[0];
        high[0] = v > high[0] ? v : high[0];
    }
    for (int j = 1; j < LANES; j++) {
        low[0] = low[j] < low[0] ? low[j] : low[0];
        high[0] = high[j] > high[0] ? high[j] : high[0];
    }
    float unit = (high[0] - low[0]) / float(levels);
    unit = unit > 1e-5f ? unit : 1e-5f;
    unit = (unit < 1e4f ? unit : 1e4f) / float(steps);
    // A channel's unit is unit * multiple, a power of two: its division changes no bit.
    const float from = -low[0] / unit, peak = float(levels * steps);
    int32_t total = 0;
    for (k = 0; k < count; k++) {
        float m = multiple[k], inverse = 1.0f / m, most = top ? top[k] : peak * inverse;
        float zero = std::rint(from * inverse);
        zero = zero < 1e4f ? zero : 1e4f;
        zero = zero < most ? zero : most;
        float code = std::rint(real(x[k]) / unit * inverse), last = most - zero;
        code = code > -zero ? code : -zero;
        code = (code < last ? code : last) * m;
        out[k] = int8_t(int32_t(code));
        total += int32_t(code);
    }
    *sum = total;
    return unit;
}
