// The vectors of one instruction set: 64 bytes of weights against int8 codes, and fused multiply-adds of reals.
//
// Part of a kernel file (see common.h): no include guard. OFFSET: what load_bytes adds to each weight.

#if SF_LEVEL == 2

constexpr int ROWS = 4;
constexpr int32_t OFFSET = 128;
using Ints = __m512i;
using Floats = __m512;
using Block = __m512i;

SF_INLINE void prefetch(const uint8_t* place) { _mm_prefetch(reinterpret_cast<const char*>(place), _MM_HINT_T1); }
SF_INLINE Ints ints_zero() { return _mm512_setzero_si512(); }
SF_INLINE Ints ints_add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
SF_INLINE int32_t ints_sum(Ints x) { return _mm512_reduce_add_epi32(x); }
SF_INLINE void ints_sum_four(Ints a, Ints b, Ints c, Ints d, int32_t* out) {
    const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    const __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), sum);
}
SF_INLINE Block load_bytes(const uint8_t* w) {
    return _mm512_xor_si512(_mm512_loadu_si512(w), _mm512_set1_epi8(char(0x80)));
}
SF_INLINE void load_nibbles(const uint8_t* w, Block& low, Block& high) {
    const __m512i mask = _mm512_set1_epi8(15), both = _mm512_loadu_si512(w);
    low = _mm512_and_si512(both, mask);
    high = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
}
SF_INLINE Ints dot_bytes(Ints sum, Block w, const int8_t* c) {
    return _mm512_dpbusd_epi32(sum, w, _mm512_loadu_si512(c));
}
SF_INLINE Ints dot_unsigned(Ints sum, Block w, const int8_t* c) { return dot_bytes(sum, w, c); }
SF_INLINE Floats floats_zero() { return _mm512_setzero_ps(); }
SF_INLINE Floats floats_add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
SF_INLINE float floats_sum(Floats x) { return _mm512_reduce_add_ps(x); }
template <int M>
SF_INLINE void fma_block(Floats* sums, const bf16* w, const float* x, int64_t pitch) {
    const __m512i both = _mm512_loadu_si512(w);
    const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(int(0xffff0000))));
    for (int m = 0; m < M; m++) {
        sums[m] = _mm512_fmadd_ps(even, _mm512_loadu_ps(x + m * pitch), sums[m]);
        sums[m] = _mm512_fmadd_ps(odd, _mm512_loadu_ps(x + m * pitch + 16), sums[m]);
    }
}
template <int M>
SF_INLINE void fma_block(Floats* sums, const float* w, const float* x, int64_t pitch) {
    const __m512 own = _mm512_loadu_ps(w);
    for (int m = 0; m < M; m++) sums[m] = _mm512_fmadd_ps(own, _mm512_loadu_ps(x + m * pitch), sums[m]);
}

#elif SF_LEVEL == 1

constexpr int ROWS = 2;
constexpr int32_t OFFSET = 0;
using Ints = __m256i;
using Floats = __m256;
struct Block {
    __m256i half[2];
};

SF_INLINE void prefetch(const uint8_t* place) { _mm_prefetch(reinterpret_cast<const char*>(place), _MM_HINT_T1); }
SF_INLINE Ints ints_zero() { return _mm256_setzero_si256(); }
SF_INLINE Ints ints_add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
SF_INLINE int32_t ints_sum(Ints x) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}
SF_INLINE __m256i load32(const void* place) { return _mm256_loadu_si256(static_cast<const __m256i*>(place)); }
SF_INLINE Block load_bytes(const uint8_t* w) { return {{load32(w), load32(w + 32)}}; }
SF_INLINE void load_nibbles(const uint8_t* w, Block& low, Block& high) {
    const __m256i mask = _mm256_set1_epi8(15);
    for (int h = 0; h < 2; h++) {
        const __m256i both = load32(w + 32 * h);
        low.half[h] = _mm256_and_si256(both, mask);
        high.half[h] = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
    }
}
SF_INLINE __m256i widen(__m256i x, int h) {
    return _mm256_cvtepi8_epi16(h ? _mm256_extracti128_si256(x, 1) : _mm256_castsi256_si128(x));
}
// In 16 bits: sums of two u8 x s8 products, as maddubs forms them, would saturate.
SF_INLINE Ints dot_bytes(Ints sum, const Block& w, const int8_t* c) {
    for (int h = 0; h < 2; h++) {
        const __m256i codes = load32(c + 32 * h);
        for (int i = 0; i < 2; i++)
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(widen(w.half[h], i), widen(codes, i)));
    }
    return sum;
}
// Weights 0..15: here they do not.
SF_INLINE Ints dot_unsigned(Ints sum, const Block& w, const int8_t* c) {
    __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(w.half[0], load32(c)), _mm256_maddubs_epi16(w.half[1], load32(c + 32)));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
SF_INLINE Floats floats_zero() { return _mm256_setzero_ps(); }
SF_INLINE Floats floats_add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
SF_INLINE float floats_sum(Floats x) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
template <int M>
SF_INLINE void fma_block(Floats* sums, const bf16* w, const float* x, int64_t pitch) {
    for (int h = 0; h < 2; h++) {
        const __m256i both = load32(w + 16 * h);
        const __m256 even = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
        const __m256 odd = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(int(0xffff0000))));
        for (int m = 0; m < M; m++) {
            sums[m] = _mm256_fmadd_ps(even, _mm256_loadu_ps(x + m * pitch + 8 * h), sums[m]);
            sums[m] = _mm256_fmadd_ps(odd, _mm256_loadu_ps(x + m * pitch + 16 + 8 * h), sums[m]);
        }
    }
}
template <int M>
SF_INLINE void fma_block(Floats* sums, const float* w, const float* x, int64_t pitch) {
    for (int h = 0; h < 2; h++) {
        const __m256 own = _mm256_loadu_ps(w + 8 * h);
        for (int m = 0; m < M; m++)
            sums[m] = _mm256_fmadd_ps(own, _mm256_loadu_ps(x + m * pitch + 8 * h), sums[m]);
    }
}

#else

constexpr int ROWS = 2;
constexpr int32_t OFFSET = 0;
struct Ints {
    int32_t lane[16];
};
struct Floats {
    float lane[16];
};
struct Block {
    uint8_t byte[64];
};

SF_INLINE void prefetch(const uint8_t* place) { __builtin_prefetch(place, 0, 2); }
SF_INLINE Ints ints_zero() { return {}; }
SF_INLINE Ints ints_add(Ints a, const Ints& b) {
    for (int i = 0; i < 16; i++) a.lane[i] += b.lane[i];
    return a;
}
SF_INLINE int32_t ints_sum(const Ints& x) {
    int32_t sum = 0;
    for (int i = 0; i < 16; i++) sum += x.lane[i];
    return sum;
}
SF_INLINE Block load_bytes(const uint8_t* w) {
    Block out;
    std::memcpy(out.byte, w, 64);
    return out;
}
SF_INLINE void load_nibbles(const uint8_t* w, Block& low, Block& high) {
    for (int i = 0; i < 64; i++) {
        low.byte[i] = w[i] & 15;
        high.byte[i] = w[i] >> 4;
    }
}
SF_INLINE Ints dot_bytes(Ints sum, const Block& w, const int8_t* c) {
    for (int i = 0; i < 64; i++) sum.lane[i % 16] += int32_t(int8_t(w.byte[i])) * c[i];
    return sum;
}
SF_INLINE Ints dot_unsigned(Ints sum, const Block& w, const int8_t* c) { return dot_bytes(sum, w, c); }
SF_INLINE Floats floats_zero() { return {}; }
SF_INLINE Floats floats_add(Floats a, const Floats& b) {
    for (int i = 0; i < 16; i++) a.lane[i] += b.lane[i];
    return a;
}
SF_INLINE float floats_sum(const Floats& x) {
    float sum = 0;
    for (int i = 0; i < 16; i++) sum += x.lane[i];
    return sum;
}
template <int M>
SF_INLINE void fma_block(Floats* sums, const bf16* w, const float* x, int64_t pitch) {
    for (int m = 0; m < M; m++)
        for (int i = 0; i < 16; i++)
            sums[m].lane[i] += real(w[2 * i]) * x[m * pitch + i] + real(w[2 * i + 1]) * x[m * pitch + 16 + i];
}
template <int M>
SF_INLINE void fma_block(Floats* sums, const float* w, const float* x, int64_t pitch) {
    for (int m = 0; m < M; m++)
        for (int i = 0; i < 16; i++) sums[m].lane[i] += w[i] * x[m * pitch + i];
}

#endif
