// Neurons as one pass over memory; see neurons.cpp for what each computes.

#include "lanes.h"
#include "encode.h"
#include "activations.h"
#include "population.h"

// ``count`` elements of a row, or of a flat tensor where there are no shifts.
template <class X, class Y>
static void oat_values_of(const Oat& neuron, const X* x, const int8_t* shift, int64_t count, Y* out) {
    for (int64_t k = 0; k < count; k += WIDTH) {
        F v = load(x + k, count - k);
        if (shift) {  // times 2^-shift
            const I exponent = 127 - load(shift + k, count - k);
            v *= (F)(exponent > 0 ? exponent << 23 : all(0x00400000));
        }
        store(out + k, oat_value(neuron, v), count - k);
    }
}

template <class X, class P>
static void oat_pack_of(const Oat& neuron, const X* x, int64_t count, P* out) {
    for (int64_t k = 0; k < count; k += WIDTH) {
        const F v = load(x + k, count - k);
        F unit;
        const I codes = to_integer(oat_code(neuron, v, &unit));
        store(out + k, codes + codes + (magnitude(v) >= neuron.normal ? all(1) : I{}), count - k);
    }
}

template <int FUNCTION, class X>
static void hg_of(const Bank& neuron, const X* x, int64_t count, X* out) {
    for (int64_t k = 0; k < count; k += WIDTH)
        store(out + k, fire(neuron, apply<FUNCTION>(load(x + k, count - k))), count - k);
}

template <class X>
static void hg_values_of(int64_t function, const Bank& neuron, const X* x, int64_t count, X* out) {
    SF_OF_FUNCTION(function, (hg_of<FUNCTION>(neuron, x, count, out)))
}

template <int FUNCTION, class X>
static void gated_of(const Bank& neuron, const Oat& other, const X* gate, const X* up, int64_t count, X* out) {
    for (int64_t k = 0; k < count; k += WIDTH) {
        const F fired = fire(neuron, apply<FUNCTION>(load(gate + k, count - k)));
        store(out + k, fired * oat_value(other, load(up + k, count - k)), count - k);
    }
}

template <class X>
static void hg_gated_of(int64_t function, const Bank& neuron, const Oat& other, const X* gate, const X* up,
                        int64_t count, X* out) {
    SF_OF_FUNCTION(function, (gated_of<FUNCTION>(neuron, other, gate, up, count, out)))
}

SF_INLINE F parameter(const void* from, int64_t kind, int64_t place, int64_t count) {
    return kind == BF16 ? load((const bf16*)from + place, count) : load((const float*)from + place, count);
}

template <class X>
static void hg_norm_of(const Norm& norm, const Bank& neuron, const Oat& input, const X* x, int64_t size, X* out) {
    F total = {}, squares = {};
    for (int64_t k = 0; norm.centred && k < size; k += WIDTH) total += load(x + k, size - k);
    const float mean = sum(total) / float(size);
    for (int64_t k = 0; k < size; k += WIDTH) {
        const F d = load(x + k, size - k) - mean;
        squares += up_to(size - k, fire(neuron, d * d), 0.0f);
    }
    const float mean_square = sum(squares) / float(size) + norm.eps;
    const float scale = fire(neuron, all(1.0f / sqrtf(mean_square)))[0];
    for (int64_t k = 0; k < size; k += WIDTH) {
        F y = oat_value(input, load(x + k, size - k) - mean) * scale;
        if (norm.weight) y *= parameter(norm.weight, norm.weight_kind, k, size - k) + norm.gain_offset;
        if (norm.bias) y += parameter(norm.bias, norm.bias_kind, k, size - k);
        store(out + k, y, size - k);
    }
}

// As a store to ``X`` leaves it.
SF_INLINE F kept(const float*, F v) { return v; }
SF_INLINE F kept(const bf16*, F v) {
    const U bits = (U)v;
    return (F)((bits + 0x7FFFu + ((bits >> 16) & 1u)) & 0xFFFF0000u);
}

// An RMS norm that is not of spikes: fp32, rounded where PyTorch rounds it.
template <class X>
static void rms_norm_of(const Norm& norm, const X* x, int64_t size, X* out) {
    F squares = {};
    for (int64_t k = 0; k < size; k += WIDTH) {
        const F v = load(x + k, size - k);
        squares += v * v;
    }
    const float scale = 1.0f / sqrtf(sum(squares) / float(size) + norm.eps);
    for (int64_t k = 0; k < size; k += WIDTH)
        store(out + k, kept(x, load(x + k, size - k) * scale) * load((const X*)norm.weight + k, size - k), size - k);
}

// The same of a gate and its other factor.
template <int FUNCTION, class X>
static void gate_of(const X* gate, const X* up, int64_t count, X* out) {
    for (int64_t k = 0; k < count; k += WIDTH)
        store(out + k, kept(gate, apply<FUNCTION>(load(gate + k, count - k))) * load(up + k, count - k), count - k);
}

// Rotary embedding by halves: ``x cos + (-second half, first half) sin``, each rounded.
template <class X>
static void turn_of(const X* x, const X* cos, const X* sin, int64_t size, X* out) {
    const int64_t half = size / 2;
    for (int64_t k = 0; k < half; k += WIDTH) {
        const int64_t count = half - k, e = k + half;
        const F a = load(x + k, count), b = load(x + e, count);
        store(out + k, kept(x, a * load(cos + k, count)) + kept(x, -b * load(sin + k, count)), count);
        store(out + e, kept(x, b * load(cos + e, count)) + kept(x, a * load(sin + e, count)), count);
    }
}

template <class X>
static void few_spike_values_of(const FewSpike& neuron, const X* x, int64_t count, X* out) {
    const int last = int(neuron.regions) - 1, steps = int(neuron.steps);
    int widest = 1;
    while (2 * widest <= last) widest *= 2;
    for (int64_t k = 0; k < count; k += WIDTH) {
        F v = clamp(load(x + k, count - k), all(neuron.gates[0]), all(neuron.gates[last + 1])), value = {};
        I region = {};  // the last one whose gate is not above v, by halving steps
        for (int step = widest; step; step /= 2) {
            I next = region + step;
            I bounded = next > last ? all(last) : next;
            region = (next <= last) & (look_up(neuron.gates, bounded) <= v) ? next : region;
        }
        region *= steps;
        for (int t = 0; t < steps; t++) {
            auto fires = v > look_up(neuron.theta + t, region);
            value = fires ? value + look_up(neuron.d + t, region) : value;
            v = fires ? v - look_up(neuron.h + t, region) : v;
        }
        store(out + k, value, count - k);
    }
}

template <class X>
static float gif_pack_of(const X* x, int64_t size, const Burst& burst, int8_t* out) {
    int32_t total;
    float unit = gif_row(x, size, burst.top, burst.multiple, burst.levels, burst.steps, out, &total);
    if (burst.steps > 1)  // codes in each channel's own unit
        for (int64_t k = 0; k < size; k++) out[k] = int8_t(float(out[k]) / burst.multiple[k]);
    return unit;
}

// What neurons.cpp calls: elements or rows begin .. end.

static void oat_values(const Population& neuron, const void* x, int64_t kind, const int8_t* shift, int64_t size,
                       int64_t begin, int64_t end, void* out, int64_t out_kind) {
    const Oat p = population(neuron);
    SF_OF_KIND(kind, X, SF_OF_KIND(out_kind, Y, {
        if (!shift) oat_values_of(p, (const X*)x + begin, nullptr, end - begin, (Y*)out + begin);
        for (int64_t at = begin; shift && at < end; at += size)
            oat_values_of(p, (const X*)x + at, shift, size, (Y*)out + at);
    }))
}

static void oat_pack(const Population& neuron, const void* x, int64_t kind, int64_t begin, int64_t end, void* out,
                     int64_t wide) {
    const Oat p = population(neuron);
    SF_OF_KIND(kind, X, {
        if (wide)
            oat_pack_of(p, (const X*)x + begin, end - begin, (int32_t*)out + begin);
        else
            oat_pack_of(p, (const X*)x + begin, end - begin, (int16_t*)out + begin);
    })
}

static void hg_values(int64_t function, const Gates& gates, const void* x, int64_t kind, int64_t begin, int64_t end,
                      void* out) {
    const Bank p = bank(gates);
    SF_OF_KIND(kind, X, hg_values_of(function, p, (const X*)x + begin, end - begin, (X*)out + begin))
}

static void hg_gated(int64_t function, const Gates& gates, const Population& neuron, const void* gate, const void* up,
                     int64_t kind, int64_t begin, int64_t end, void* out) {
    const Bank p = bank(gates);
    const Oat other = population(neuron);
    SF_OF_KIND(kind, X, hg_gated_of(function, p, other, (const X*)gate + begin, (const X*)up + begin, end - begin,
                                    (X*)out + begin))
}

static void hg_norm(const Norm& norm, const Gates& gates, const Population& neuron, const void* x, int64_t kind,
                    int64_t size, int64_t begin, int64_t end, void* out) {
    const Bank p = bank(gates);
    const Oat input = population(neuron);
    SF_OF_KIND(kind, X, {
        for (int64_t r = begin; r < end; r++)
            hg_norm_of(norm, p, input, (const X*)x + r * size, size, (X*)out + r * size);
    })
}

static void few_spike_values(const FewSpike& neuron, const void* x, int64_t kind, int64_t begin, int64_t end,
                             void* out) {
    SF_OF_KIND(kind, X, few_spike_values_of(neuron, (const X*)x + begin, end - begin, (X*)out + begin))
}

// Tables are of ``tables`` rows, each for ``inner`` rows of x at a time.
static void gif_rows(const Burst& burst, int64_t tables, int64_t inner, const void* x, int64_t kind, int64_t size,
                     int64_t begin, int64_t end, int8_t* out, float* units) {
    for (int64_t r = begin; r < end; r++) {
        const int64_t at = r / inner % tables * size;
        const Burst own = {burst.top + at, burst.multiple + at, burst.levels, burst.steps};
        SF_OF_KIND(kind, X, {
            int32_t total;
            const X* from = (const X*)x + r * size;
            if (units) {
                units[r] = gif_row(from, size, own.top, own.multiple, own.levels, own.steps, out + r * size, &total);
            } else {
                int8_t* to = out + r * (size + 4);
                float unit = gif_pack_of(from, size, own, to);
                memcpy(to + size, &unit, sizeof unit);
            }
        })
    }
}

static void rms_norm(const Norm& norm, const void* x, int64_t kind, int64_t size, void* out) {
    SF_OF_KIND(kind, X, rms_norm_of(norm, (const X*)x, size, (X*)out))
}

static void gate(int64_t function, const void* x, const void* up, int64_t kind, int64_t count, void* out) {
    SF_OF_KIND(kind, X, SF_OF_FUNCTION(function, (gate_of<FUNCTION>((const X*)x, (const X*)up, count, (X*)out))))
}

static void turn(const void* x, const void* cos, const void* sin, int64_t kind, int64_t size, void* out) {
    SF_OF_KIND(kind, X, turn_of((const X*)x, (const X*)cos, (const X*)sin, size, (X*)out))
}
