// Integer codes of a row before its product, and the real outputs after it.
#include "encode.h"

// The limbs of a row of codes: sum of limb[l] 256^l, each within int8, at limbs + l pitch, zero from K to the pitch.
// Returns how many there are: as many as it takes, up to 3. totals: their sums.
static int64_t split_limbs(const int32_t* codes, int64_t K, int8_t* limbs, int64_t pitch, int32_t* totals) {
    int32_t least = 0, most = 0;
    for (int64_t k = 0; k < K; k++) {
        least = codes[k] < least ? codes[k] : least;
        most = codes[k] > most ? codes[k] : most;
    }
    int64_t needed = 3;
    if (least >= -128 && most <= 127)
        needed = least == 0 && most == 0 ? 0 : 1;
    else if (least >= -32896 && most <= 32639)  // what two limbs hold
        needed = 2;
    for (int64_t l = 0; l < needed; l++) {
        int8_t* limb = limbs + l * pitch;
        int32_t total = 0;
        for (int64_t k = 0; k < K; k++) {
            int32_t rest = codes[k];
            for (int64_t i = 0; i < l; i++) rest = (rest - int32_t(int8_t(rest))) >> 8;
            limb[k] = int8_t(rest);
            total += int32_t(limb[k]);
        }
        std::memset(limb + K, 0, size_t(pitch - K));
        totals[l] = total;
    }
    return needed;
}

// used[k] = 1 where codes[k] is not zero; else as it is. Several threads may call it for the same places.
static void note_used(const int32_t* codes, int64_t K, uint8_t* used) {
    constexpr int64_t PIECE = 64;
    for (int64_t from = 0; from < K; from += PIECE) {
        const int64_t to = std::min(from + PIECE, K);
        int32_t any = 0;
        for (int64_t k = from; k < to; k++) any |= codes[k];
        for (int64_t k = from; any && k < to; k++)
            if (codes[k]) __atomic_store_n(used + k, 1, __ATOMIC_RELAXED);
    }
}

// Real outputs of a row from int32 sums of three limbs (null: there is none) of each of two sub-neurons.
// The order of factors is that of synapses/parts.py: the same real numbers bit for bit.
template <class T>
static void finish_row(const int32_t* const* sums, int64_t count, const float* scale, float unit0, float unit1,
                       bool gated, const float* bias, T* out) {
    const int32_t *a = sums[0], *b = gated ? sums[3] : nullptr;
    if (!sums[1] && !(gated && sums[4])) {  // a limb each, as a rule
        auto run = [&](auto first, auto second, auto added) __attribute__((always_inline)) {
            for (int64_t n = 0; n < count; n++) {
                float y = 0.0f;
                if (first) y += float(a[n]) * scale[n] * unit0;
                if (second) y += float(b[n]) * scale[n] * unit1;
                if (added) y += bias[n];
                put(out + n, y);
            }
        };
        using Yes = std::true_type;
        using No = std::false_type;
        if (a && b)
            bias ? run(Yes(), Yes(), Yes()) : run(Yes(), Yes(), No());
        else if (a)
            bias ? run(Yes(), No(), Yes()) : run(Yes(), No(), No());
        else if (b)
            bias ? run(No(), Yes(), Yes()) : run(No(), Yes(), No());
        else
            bias ? run(No(), No(), Yes()) : run(No(), No(), No());
        return;
    }
    constexpr int64_t MOST = 64;
    float y[MOST];
    for (int64_t n = 0; n < count; n++) y[n] = 0.0f;
    for (int branch = 0; branch < (gated ? 2 : 1); branch++) {
        const int32_t *a = sums[3 * branch], *b = sums[3 * branch + 1], *c = sums[3 * branch + 2];
        const float unit = branch ? unit1 : unit0;
        if (a && !b)
            for (int64_t n = 0; n < count; n++) y[n] += float(a[n]) * scale[n] * unit;
        else if (a)
            for (int64_t n = 0; n < count; n++)
                y[n] += float(a[n] + b[n] * int64_t(256) + (c ? c[n] * int64_t(65536) : 0)) * scale[n] * unit;
    }
    if (bias)
        for (int64_t n = 0; n < count; n++) y[n] += bias[n];
    for (int64_t n = 0; n < count; n++) put(out + n, y[n]);
}
static void finish_fp32(const int32_t* const* sums, int64_t count, const float* scale, float unit0, float unit1,
                        bool gated, const float* bias, float* out) {
    finish_row(sums, count, scale, unit0, unit1, gated, bias, out);
}
static void finish_bf16(const int32_t* const* sums, int64_t count, const float* scale, float unit0, float unit1,
                        bool gated, const float* bias, bf16* out) {
    finish_row(sums, count, scale, unit0, unit1, gated, bias, out);
}

// Codes of a row by sub-neuron: `codes[r]` int32 [K], zero where the other one sends.
template <class T>
static void oat_codes(const Oat& p, const T* x, int64_t K, int32_t* normal, int32_t* beyond) {
    constexpr int64_t TILE = 256;
    float codes[TILE];
    int32_t outlier[TILE];
    for (int64_t k = 0; k < K; k += TILE) {
        int64_t size = std::min(TILE, K - k);
        oat_row(p, x + k, static_cast<const int8_t*>(nullptr), size, codes, outlier);
        for (int64_t j = 0; j < size; j++) {
            int32_t code = int32_t(codes[j]);
            normal[k + j] = outlier[j] ? 0 : code;
            beyond[k + j] = outlier[j] ? code : 0;
        }
    }
}
static void oat_codes_fp32(const Oat& p, const float* x, int64_t K, int32_t* normal, int32_t* beyond) {
    oat_codes(p, x, K, normal, beyond);
}
static void oat_codes_bf16(const Oat& p, const bf16* x, int64_t K, int32_t* normal, int32_t* beyond) {
    oat_codes(p, x, K, normal, beyond);
}
