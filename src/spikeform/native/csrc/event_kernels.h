// Products that visit only the active rows of input-major weights [K, N]: four rows at a time, a slab of columns at a
// time, so that the slab's sums stay in the nearest cache.

constexpr int64_t SLAB = 4096;  // bytes of each row in a slab
constexpr int64_t LINE = 64;    // bytes of a cache line, and of a row in a step

SF_INLINE void ask_for(const uint8_t* place, int64_t bytes) {
    for (int64_t b = 0; b < bytes; b += LINE) __builtin_prefetch(place + b, 0, 2);
}

SF_INLINE int32_t term(int32_t sum, int32_t value, int8_t weight) { return sum + value * int32_t(weight); }
SF_INLINE int16_t term(int16_t sum, int16_t value, int8_t weight) { return int16_t(sum + value * int16_t(weight)); }
SF_INLINE float fused(float sum, float value, float weight) {
    return SF_LEVEL ? __builtin_fmaf(value, weight, sum) : sum + value * weight;
}
SF_INLINE float term(float sum, float value, int8_t weight) { return fused(sum, value, float(weight)); }
SF_INLINE float term(float sum, float value, bf16 weight) { return fused(sum, value, real(weight)); }
SF_INLINE float term(float sum, float value, float weight) { return fused(sum, value, weight); }

// sums[j] += sum over active rows of value * row[begin + j], j < count.
template <class Sum, class Weight>
SF_INLINE void visit(const Weight* rows, int64_t N, const int32_t* index, const Sum* value, int64_t active,
                     int64_t begin, int64_t count, Sum* sums) {
    rows += begin;
    int64_t i = 0;
    for (; i + 4 <= active; i += 4) {
        for (int64_t a = i + 4; a < std::min(i + 8, active); a++)
            ask_for(reinterpret_cast<const uint8_t*>(rows + index[a] * N), count * int64_t(sizeof(Weight)));
        const Weight *p = rows + index[i] * N, *q = rows + index[i + 1] * N;
        const Weight *r = rows + index[i + 2] * N, *s = rows + index[i + 3] * N;
        const Sum a = value[i], b = value[i + 1], c = value[i + 2], d = value[i + 3];
        for (int64_t j = 0; j < count; j++)
            sums[j] = term(term(term(term(sums[j], a, p[j]), b, q[j]), c, r[j]), d, s[j]);
    }
    for (; i < active; i++) {
        const Weight* p = rows + index[i] * N;
        for (int64_t j = 0; j < count; j++) sums[j] = term(sums[j], value[i], p[j]);
    }
}

// The same for nibbles, whose zero is 8: `begin` and `count` in bytes, of which each gives one to `low` and one to `high`.
template <class Sum>
SF_INLINE void visit_nibbles(const uint8_t* rows, int64_t stride, const int32_t* index, const Sum* value,
                             int64_t active, int64_t begin, int64_t count, Sum* low, Sum* high) {
    for (int64_t i = 0; i < active; i++) {
        const uint8_t* p = rows + index[i] * stride + begin;
        if (i + 4 < active) ask_for(rows + index[i + 4] * stride + begin, count);
        for (int64_t j = 0; j < count; j++) {
            low[j] = term(low[j], value[i], int8_t((p[j] & 15) - 8));
            high[j] = term(high[j], value[i], int8_t((p[j] >> 4) - 8));
        }
    }
}

#if SF_LEVEL == 2

constexpr int64_t DEEP = 16;  // rows between a load and a store of the sums

// Four rows, byte by byte beside one another, so that one instruction adds four products; see `place_of`.
SF_INLINE void add_four(__m512i* sums, __m512i a, __m512i b, __m512i c, __m512i d, __m512i codes) {
    const __m512i ab_low = _mm512_unpacklo_epi8(a, b), ab_high = _mm512_unpackhi_epi8(a, b);
    const __m512i cd_low = _mm512_unpacklo_epi8(c, d), cd_high = _mm512_unpackhi_epi8(c, d);
    sums[0] = _mm512_dpbusd_epi32(sums[0], _mm512_unpacklo_epi16(ab_low, cd_low), codes);
    sums[1] = _mm512_dpbusd_epi32(sums[1], _mm512_unpackhi_epi16(ab_low, cd_low), codes);
    sums[2] = _mm512_dpbusd_epi32(sums[2], _mm512_unpacklo_epi16(ab_high, cd_high), codes);
    sums[3] = _mm512_dpbusd_epi32(sums[3], _mm512_unpackhi_epi16(ab_high, cd_high), codes);
}

// Where add_four leaves the sum of byte j of 64: lanes of 16 bytes, four of each in one vector.
SF_INLINE int64_t place_of(int64_t j) { return j % 16 / 4 * 16 + j / 16 * 4 + j % 4; }

// Bytes begin..begin + count (a multiple of 64) of the active rows, int8 (NIBBLES: 4 bits, low and high). Index and
// codes are filled up to a multiple of DEEP: with row 0, whose code is 0 there. sums: 64 (128) for each 64 bytes.
template <bool NIBBLES>
static void visit_blocks(const uint8_t* rows, int64_t stride, const int32_t* index, const int8_t* codes,
                         int64_t active, int64_t begin, int64_t count, int32_t* sums) {
    constexpr int HALVES = NIBBLES ? 2 : 1;
    const __m512i flip = _mm512_set1_epi8(char(0x80)), mask = _mm512_set1_epi8(15);
    for (int64_t i = 0; i < active; i += DEEP) {
        const uint8_t* place[DEEP];
        const uint8_t* next[DEEP];
        __m512i quads[DEEP / 4];
        for (int64_t r = 0; r < DEEP; r++) {
            place[r] = rows + index[i + r] * stride + begin;
            next[r] = rows + index[i + DEEP < active ? i + DEEP + r : i + r] * stride + begin;
        }
        for (int64_t q = 0; q < DEEP / 4; q++) {
            int32_t four;
            std::memcpy(&four, codes + i + 4 * q, 4);
            quads[q] = _mm512_set1_epi32(four);
        }
        for (int64_t b = 0; b < count; b += LINE) {
            __m512i own[HALVES][4];
            int32_t* to = sums + b * HALVES;
            for (int h = 0; h < HALVES; h++)
                for (int v = 0; v < 4; v++) own[h][v] = _mm512_loadu_si512(to + 64 * h + 16 * v);
#pragma GCC unroll 4
            for (int64_t q = 0; q < DEEP / 4; q++) {
                __m512i w[4];
                for (int r = 0; r < 4; r++) {
                    w[r] = _mm512_loadu_si512(place[4 * q + r] + b);
                    _mm_prefetch(reinterpret_cast<const char*>(next[4 * q + r] + b), _MM_HINT_T1);
                }
                if (NIBBLES) {
                    __m512i low[4], high[4];
                    for (int r = 0; r < 4; r++) {
                        low[r] = _mm512_and_si512(w[r], mask);
                        high[r] = _mm512_and_si512(_mm512_srli_epi16(w[r], 4), mask);
                    }
                    add_four(own[0], low[0], low[1], low[2], low[3], quads[q]);
                    add_four(own[HALVES - 1], high[0], high[1], high[2], high[3], quads[q]);
                } else {
                    for (int r = 0; r < 4; r++) w[r] = _mm512_xor_si512(w[r], flip);
                    add_four(own[0], w[0], w[1], w[2], w[3], quads[q]);
                }
            }
            for (int h = 0; h < HALVES; h++)
                for (int v = 0; v < 4; v++) _mm512_storeu_si512(to + 64 * h + 16 * v, own[h][v]);
        }
    }
}

#endif

constexpr int64_t WORTHY = 8;  // rows between two additions of sums of 16 bits: fewer gain nothing

// As `visit`, of small integers: sums of 16 bits, `group` rows at a time. Measured against 32 bits, |values| <= 4: 1.2
// to 1.9 times as fast with AVX2, 2 to 4 without.
SF_INLINE void visit_short(const int8_t* rows, int64_t N, const Active& a, int64_t group, int64_t begin, int64_t count,
                           int32_t* sums) {
    alignas(64) int16_t part[SLAB];
    for (int64_t i = 0; i < a.count; i += group) {
        std::memset(part, 0, size_t(count) * 2);
        visit(rows, N, a.index + i, a.shorts + i, std::min(group, a.count - i), begin, count, part);
        for (int64_t j = 0; j < count; j++) sums[j] += part[j];
    }
}

// Columns begin..end of int8 rows times integers, out int32.
static void event_int8(const int8_t* rows, int64_t N, const Active& a, int64_t begin, int64_t end, int32_t* out) {
    int64_t n = begin;
#if SF_LEVEL == 2
    alignas(64) int32_t sums[SLAB];
    while (end - n >= LINE) {
        const int64_t count = std::min(SLAB, (end - n) / LINE * LINE);
        std::memset(sums, 0, size_t(count) * 4);
        visit_blocks<false>(reinterpret_cast<const uint8_t*>(rows), N, a.index, a.codes, a.count, n, count, sums);
        const uint32_t less = 128u * uint32_t(a.total);
        for (int64_t j = 0; j < count; j++)
            out[n - begin + j] = int32_t(uint32_t(sums[j / 64 * 64 + place_of(j % 64)]) - less);
        n += count;
    }
#endif
    for (; n < end; n += SLAB) {
        const int64_t count = std::min(SLAB, end - n);
        const int64_t group = a.short_rows();
        std::memset(out + (n - begin), 0, size_t(count) * 4);
        if (group >= WORTHY)
            visit_short(rows, N, a, group, n, count, out + (n - begin));
        else
            visit(rows, N, a.index, a.whole, a.count, n, count, out + (n - begin));
    }
}

// Where the two columns of a byte of a row lie; begin: the first column.
SF_INLINE int64_t column_of(int64_t byte, int64_t begin) { return byte / 32 * 64 + byte % 32 - begin; }

template <class Sum>
SF_INLINE void event_nibbles(const uint8_t* rows, int64_t stride, const Active& a, const Sum* value, int64_t byte,
                             int64_t last, int64_t begin, Sum* out) {
    Sum sums[2 * SLAB];
    for (; byte < last; byte += SLAB) {
        const int64_t count = std::min(SLAB, last - byte);
        for (int64_t j = 0; j < 2 * SLAB; j++) sums[j] = 0;
        visit_nibbles(rows, stride, a.index, value, a.count, byte, count, sums, sums + SLAB);
        for (int64_t j = 0; j < count; j++) {
            out[column_of(byte + j, begin)] = sums[j];
            out[column_of(byte + j, begin) + 32] = sums[SLAB + j];
        }
    }
}

// Of nibbles; begin and end in columns, multiples of 64.
static void event_int4(const uint8_t* rows, int64_t N, const Active& a, int64_t begin, int64_t end, int32_t* out) {
    int64_t byte = begin / 2;
    const int64_t last = end / 2;
#if SF_LEVEL == 2
    const uint32_t less = 8u * uint32_t(a.total);
    alignas(64) int32_t sums[2 * SLAB];
    while (last - byte >= LINE) {
        const int64_t count = std::min(SLAB, (last - byte) / LINE * LINE);
        std::memset(sums, 0, size_t(count) * 8);
        visit_blocks<true>(rows, N / 2, a.index, a.codes, a.count, byte, count, sums);
        for (int64_t j = 0; j < count; j++) {
            const int32_t* from = sums + j / 64 * 128 + place_of(j % 64);
            out[column_of(byte + j, begin)] = int32_t(uint32_t(from[0]) - less);
            out[column_of(byte + j, begin) + 32] = int32_t(uint32_t(from[64]) - less);
        }
        byte += count;
    }
#endif
    event_nibbles(rows, N / 2, a, a.whole, byte, last, begin, out);
}

// Real values, out fp32.
template <class Weight>
SF_INLINE void event_real(const Weight* rows, int64_t N, const Active& a, int64_t begin, int64_t end, float* out) {
    constexpr int64_t COLUMNS = SLAB / int64_t(sizeof(Weight));
    for (int64_t n = begin; n < end; n += COLUMNS) {
        const int64_t count = std::min(COLUMNS, end - n);
        std::memset(out + (n - begin), 0, size_t(count) * 4);
        visit(rows, N, a.index, a.reals, a.count, n, count, out + (n - begin));
    }
}
static void event_real_fp32(const float* rows, int64_t N, const Active& a, int64_t begin, int64_t end, float* out) {
    event_real(rows, N, a, begin, end, out);
}
static void event_real_bf16(const bf16* rows, int64_t N, const Active& a, int64_t begin, int64_t end, float* out) {
    event_real(rows, N, a, begin, end, out);
}
static void event_real_int8(const int8_t* rows, int64_t N, const Active& a, int64_t begin, int64_t end, float* out) {
    event_real(rows, N, a, begin, end, out);
}
static void event_real_int4(const uint8_t* rows, int64_t N, const Active& a, int64_t begin, int64_t end, float* out) {
    event_nibbles(rows, N / 2, a, a.reals, begin / 2, end / 2, begin, out);
}
