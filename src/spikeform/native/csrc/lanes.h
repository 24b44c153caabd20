// One vector of floats, as wide as the instruction set has it: WIDTH lanes.
//
// Part of a kernel file (see common.h): no include guard, since each instruction set has its own copy; and no standard
// templates, since an instance compiled for a wide set could be linked into code that runs everywhere.

#undef WIDTH
#if SF_LEVEL == 2
#define WIDTH 16
#elif SF_LEVEL == 1
#define WIDTH 8
#else
#define WIDTH 4
#endif

typedef float F __attribute__((vector_size(4 * WIDTH)));
typedef int32_t I __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t U __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH)));
typedef int16_t Shorts __attribute__((vector_size(2 * WIDTH)));
typedef int8_t Bytes __attribute__((vector_size(WIDTH)));

SF_INLINE F all(float value) { return value - F{}; }
SF_INLINE I all(int value) { return value - I{}; }

// Narrow integers, widened and narrowed: compilers take a vector apart to convert it, where one instruction will do.
#if WIDTH == 16
SF_INLINE I wide(Bytes b) { return (I)_mm512_cvtepi8_epi32((__m128i)b); }
SF_INLINE I wide(Shorts h) { return (I)_mm512_cvtepi16_epi32((__m256i)h); }
SF_INLINE U wide(Halves h) { return (U)_mm512_cvtepu16_epi32((__m256i)h); }
SF_INLINE Halves narrow(U v) { return (Halves)_mm512_cvtepi32_epi16((__m512i)v); }
#elif WIDTH == 8
SF_INLINE I wide(Bytes b) {
    int64_t bits;
    memcpy(&bits, &b, sizeof bits);
    return (I)_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(bits));
}
SF_INLINE I wide(Shorts h) { return (I)_mm256_cvtepi16_epi32((__m128i)h); }
SF_INLINE U wide(Halves h) { return (U)_mm256_cvtepu16_epi32((__m128i)h); }
SF_INLINE Halves narrow(U v) {
    __m256i low = _mm256_and_si256((__m256i)v, _mm256_set1_epi32(0xFFFF)), both = _mm256_packus_epi32(low, low);
    return (Halves)_mm256_castsi256_si128(_mm256_permute4x64_epi64(both, 0x08));
}
#else
SF_INLINE I wide(Bytes b) { return __builtin_convertvector(b, I); }
SF_INLINE I wide(Shorts h) { return __builtin_convertvector(h, I); }
SF_INLINE U wide(Halves h) { return __builtin_convertvector(h, U); }
SF_INLINE Halves narrow(U v) { return __builtin_convertvector(v, Halves); }
#endif

SF_INLINE F load(const float* from) {
    F v;
    memcpy(&v, from, sizeof v);
    return v;
}
SF_INLINE F load(const bf16* from) {
    Halves h;
    memcpy(&h, from, sizeof h);
    return (F)(wide(h) << 16);
}
SF_INLINE I load(const int32_t* from) {
    I v;
    memcpy(&v, from, sizeof v);
    return v;
}
SF_INLINE I load(const int16_t* from) {
    Shorts h;
    memcpy(&h, from, sizeof h);
    return wide(h);
}
SF_INLINE I load(const int8_t* from) {
    Bytes b;
    memcpy(&b, from, sizeof b);
    return wide(b);
}
SF_INLINE void store(float* to, F v) { memcpy(to, &v, sizeof v); }
SF_INLINE void store(bf16* to, F v) {  // to the nearest, ties to even
    const U bits = (U)v;
    const Halves h = narrow((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
    memcpy(to, &h, sizeof h);
}
SF_INLINE void store(int32_t* to, I v) { memcpy(to, &v, sizeof v); }
SF_INLINE void store(int16_t* to, I v) {
    const Halves h = narrow((U)v);
    memcpy(to, &h, sizeof h);
}

// The first ``count`` elements only, where there are fewer than a vector has; the other lanes are zero.
template <class T>
SF_INLINE auto load(const T* from, long count) -> decltype(load(from)) {
    if (count >= WIDTH) return load(from);
    T part[WIDTH] = {};
    for (long i = 0; i < count; i++) part[i] = from[i];
    return load(part);
}
template <class T, class V>
SF_INLINE void store(T* to, V v, long count) {
    if (count >= WIDTH) return store(to, v);
    T part[WIDTH];
    store(part, v);
    for (long i = 0; i < count; i++) to[i] = part[i];
}

#if WIDTH == 16
SF_INLINE F least(F a, F b) { return (F)_mm512_min_ps((__m512)a, (__m512)b); }
SF_INLINE F most(F a, F b) { return (F)_mm512_max_ps((__m512)a, (__m512)b); }
SF_INLINE F fused(F a, F b, F c) { return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
SF_INLINE F root(F a) { return (F)_mm512_sqrt_ps((__m512)a); }
#elif WIDTH == 8
SF_INLINE F least(F a, F b) { return (F)_mm256_min_ps((__m256)a, (__m256)b); }
SF_INLINE F most(F a, F b) { return (F)_mm256_max_ps((__m256)a, (__m256)b); }
SF_INLINE F fused(F a, F b, F c) { return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
SF_INLINE F root(F a) { return (F)_mm256_sqrt_ps((__m256)a); }
#else
SF_INLINE F least(F a, F b) { return a < b ? a : b; }
SF_INLINE F most(F a, F b) { return a > b ? a : b; }
SF_INLINE F fused(F a, F b, F c) { return a * b + c; }
SF_INLINE F root(F a) {
    for (int i = 0; i < WIDTH; i++) a[i] = sqrtf(a[i]);
    return a;
}
#endif

// v in the first ``count`` lanes, ``other`` in those beyond.
SF_INLINE F up_to(int64_t count, F v, float other) {
    if (count >= WIDTH) return v;
    float parts[WIDTH];
    store(parts, v);
    for (int64_t i = count > 0 ? count : 0; i < WIDTH; i++) parts[i] = other;
    return load(parts);
}

SF_INLINE F magnitude(F v) { return (F)((I)v & 0x7FFFFFFF); }
SF_INLINE F with_sign_of(F v, F sign) { return (F)((I)v | ((I)sign & (I)all((int)0x80000000))); }
SF_INLINE F clamp(F v, F low, F high) { return least(most(v, low), high); }
// To the nearest integer, ties to even, for magnitudes below 2^22: adding 1.5 * 2^23 leaves no room for a fraction.
SF_INLINE F nearest(F v) { return (v + 12582912.0f) - 12582912.0f; }
SF_INLINE F whole(F v) { return __builtin_convertvector(__builtin_convertvector(v, I), F); }
SF_INLINE F to_real(I v) { return __builtin_convertvector(v, F); }
SF_INLINE I to_integer(F v) { return __builtin_convertvector(v, I); }

#if WIDTH == 16
SF_INLINE float sum(F v) { return _mm512_reduce_add_ps((__m512)v); }
SF_INLINE float highest(F v) { return _mm512_reduce_max_ps((__m512)v); }
#else
SF_INLINE float sum(F v) {
    float parts[WIDTH];
    store(parts, v);
    for (int half = WIDTH / 2; half; half /= 2)
        for (int i = 0; i < half; i++) parts[i] += parts[i + half];
    return parts[0];
}
SF_INLINE float highest(F v) {
    float parts[WIDTH];
    store(parts, v);
    for (int half = WIDTH / 2; half; half /= 2)
        for (int i = 0; i < half; i++) parts[i] = parts[i] > parts[i + half] ? parts[i] : parts[i + half];
    return parts[0];
}
#endif

// table[index] of each lane.
SF_INLINE F look_up(const float* table, I index) {
#if WIDTH == 16
    return (F)_mm512_i32gather_ps((__m512i)index, table, 4);
#elif WIDTH == 8
    return (F)_mm256_i32gather_ps(table, (__m256i)index, 4);
#else
    F found;
    for (int i = 0; i < WIDTH; i++) found[i] = table[index[i]];
    return found;
#endif
}

// to[c][r] = from[r][c] for a square of WIDTH rows; rows of ``from`` are ``stride`` apart, those of ``to`` ``pitch``.
SF_INLINE void transpose(const float* from, long stride, float* to, long pitch) {
#if WIDTH == 16
    __m512 t[16], u[16];
    for (int i = 0; i < 8; i++) {
        __m512 a = _mm512_loadu_ps(from + 2 * i * stride), b = _mm512_loadu_ps(from + (2 * i + 1) * stride);
        t[2 * i] = _mm512_unpacklo_ps(a, b), t[2 * i + 1] = _mm512_unpackhi_ps(a, b);
    }
    for (int i = 0; i < 16; i++) {  // u[4 g + j], 128-bit part b: column 4 b + j of rows 4 g .. 4 g + 3
        int g = i & ~3, odd = (i & 2) >> 1;
        __m512d a = _mm512_castps_pd(t[g + odd]), b = _mm512_castps_pd(t[g + odd + 2]);
        u[i] = _mm512_castpd_ps(i & 1 ? _mm512_unpackhi_pd(a, b) : _mm512_unpacklo_pd(a, b));
    }
    for (int j = 0; j < 4; j++) {
        __m512 a = _mm512_shuffle_f32x4(u[j], u[4 + j], 0x88), b = _mm512_shuffle_f32x4(u[j], u[4 + j], 0xDD);
        __m512 c = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0x88), d = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0xDD);
        _mm512_storeu_ps(to + j * pitch, _mm512_shuffle_f32x4(a, c, 0x88));
        _mm512_storeu_ps(to + (4 + j) * pitch, _mm512_shuffle_f32x4(b, d, 0x88));
        _mm512_storeu_ps(to + (8 + j) * pitch, _mm512_shuffle_f32x4(a, c, 0xDD));
        _mm512_storeu_ps(to + (12 + j) * pitch, _mm512_shuffle_f32x4(b, d, 0xDD));
    }
#elif WIDTH == 8
    __m256 t[8], u[8];
    for (int i = 0; i < 4; i++) {
        __m256 a = _mm256_loadu_ps(from + 2 * i * stride), b = _mm256_loadu_ps(from + (2 * i + 1) * stride);
        t[2 * i] = _mm256_unpacklo_ps(a, b), t[2 * i + 1] = _mm256_unpackhi_ps(a, b);
    }
    for (int i = 0; i < 8; i++) {
        int g = i & ~3, odd = (i & 2) >> 1;
        __m256d a = _mm256_castps_pd(t[g + odd]), b = _mm256_castps_pd(t[g + odd + 2]);
        u[i] = _mm256_castpd_ps(i & 1 ? _mm256_unpackhi_pd(a, b) : _mm256_unpacklo_pd(a, b));
    }
    for (int j = 0; j < 4; j++) {
        _mm256_storeu_ps(to + j * pitch, _mm256_permute2f128_ps(u[j], u[4 + j], 0x20));
        _mm256_storeu_ps(to + (4 + j) * pitch, _mm256_permute2f128_ps(u[j], u[4 + j], 0x31));
    }
#else
    for (int r = 0; r < WIDTH; r++)
        for (int c = 0; c < WIDTH; c++) to[c * pitch + r] = from[r * stride + c];
#endif
}
