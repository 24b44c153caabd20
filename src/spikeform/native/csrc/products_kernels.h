// Products of a few rows with row-major weights [N, K]: one pass over the weights, whatever the number of rows.
#include "codes_kernels.h"
#include "simd.h"
#include "panels.h"

constexpr int64_t BLOCK = 64;    // bytes of weights that a step takes
constexpr int64_t AHEAD = 4096;  // how far before the weights are asked for

// Planes are int8 rows that share one pass: limbs of codes. Weights are taken as they are, plus OFFSET of the set.

// P planes with R rows. One row at a time is what the memory's own prefetching follows best; where more than eight
// planes keep the arithmetic busy, several rows share what is loaded of four of them. STEPS chains hide the latency.
template <int P, int R, bool PACKED>
SF_INLINE void dot_group(const uint8_t* weight, int64_t stride, const int8_t* const* planes, int64_t blocks,
                         int64_t ahead, int32_t* out, int64_t gap) {
    constexpr int STEPS = R > 1 || P > 3 ? 1 : P == 1 ? 4 : 2;
    constexpr int64_t SPAN = PACKED ? 2 * BLOCK : BLOCK;  // codes of a block
    const int8_t* codes[P];
    for (int p = 0; p < P; p++) codes[p] = planes[p];
    Ints sums[STEPS][R][P];
    for (int s = 0; s < STEPS; s++)
        for (int r = 0; r < R; r++)
            for (int p = 0; p < P; p++) sums[s][r][p] = ints_zero();
    auto step = [&](Ints(*own)[P], int64_t b) __attribute__((always_inline)) {
        for (int r = 0; r < R; r++) {
            const uint8_t* place = weight + r * stride + b * BLOCK;
            if (R == 1) prefetch(place + ahead);
            if (PACKED) {
                Block low, high;
                load_nibbles(place, low, high);
                for (int p = 0; p < P; p++) {
                    own[r][p] = dot_unsigned(own[r][p], low, codes[p] + b * SPAN);
                    own[r][p] = dot_unsigned(own[r][p], high, codes[p] + b * SPAN + BLOCK);
                }
            } else {
                const Block block = load_bytes(place);
                for (int p = 0; p < P; p++) own[r][p] = dot_bytes(own[r][p], block, codes[p] + b * SPAN);
            }
        }
    };
    int64_t b = 0;
    for (; b + STEPS <= blocks; b += STEPS)
        for (int s = 0; s < STEPS; s++) step(sums[s], b + s);
    for (; b < blocks; b++) step(sums[0], b);
    for (int p = 0; p < P; p++) {
        for (int s = 1; s < STEPS; s++)
            for (int r = 0; r < R; r++) sums[0][r][p] = ints_add(sums[0][r][p], sums[s][r][p]);
        if constexpr (R == 4)
            ints_sum_four(sums[0][0][p], sums[0][1][p], sums[0][2][p], sums[0][3][p], out + p * gap);
        else
            for (int r = 0; r < R; r++) out[p * gap + r] = ints_sum(sums[0][r][p]);
    }
}

template <int P, int R, bool PACKED>
SF_INLINE void dot_rows(const uint8_t* weight, int64_t stride, int64_t rows, const int8_t* const* planes,
                        int64_t blocks, int64_t ahead, int32_t* out, int64_t gap) {
    int64_t n = 0;
    if (R > 1)
        for (; n + R <= rows; n += R)
            dot_group<P, R, PACKED>(weight + n * stride, stride, planes, blocks, ahead, out + n, gap);
    for (; n < rows; n++) dot_group<P, 1, PACKED>(weight + n * stride, stride, planes, blocks, ahead, out + n, gap);
}

// Exact sums of `count` planes (zero from K to the next whole block, their own sums in `totals`) with weight rows, into
// out [count, gap]. Packed: nibbles, planes in the order of spread_nibbles, zero [rows] the code that stands for 0; else
// int8 and null. stride: bytes of a row.
template <bool PACKED>
static void dot_planes(const uint8_t* weight, int64_t stride, const int16_t* zero, int64_t K, int64_t rows,
                       const int8_t* const* planes, int64_t count, const int32_t* totals, int32_t* out, int64_t gap) {
    const int64_t used = PACKED ? K / 2 : K, blocks = used / BLOCK, done = blocks * BLOCK;
#define SF_CASE(P, R)                                                                                      \
    case P:                                                                                                \
        dot_rows<P, R, PACKED>(weight, stride, rows, planes + p, blocks, p ? 0 : AHEAD, out + p * gap, gap); \
        break;
    int64_t p = 0;
    switch (count) {
        SF_CASE(1, 1)
        SF_CASE(2, 1)
        SF_CASE(3, 1)
        SF_CASE(4, 1)
        SF_CASE(5, 1)
        SF_CASE(6, 1)
        SF_CASE(7, 1)
        SF_CASE(8, 1)
        default:
            for (; p < count; p += 4)  // after the first of them the weights are in the cache
                switch (std::min<int64_t>(count - p, 4)) {
                    SF_CASE(1, ROWS)
                    SF_CASE(2, ROWS)
                    SF_CASE(3, ROWS)
                    SF_CASE(4, ROWS)
                }
    }
#undef SF_CASE
    for (p = 0; p < count; p++) {
        // Modulo 2^32: only the result has to fit.
        int32_t* to = out + p * gap;
        const uint32_t total = uint32_t(totals[p]);
        for (int64_t n = 0; n < rows; n++)
            to[n] = int32_t(uint32_t(to[n]) - uint32_t(PACKED ? int32_t(zero[n]) : OFFSET) * total);
        if (done == used) continue;
        for (int64_t n = 0; n < rows; n++) {
            const uint8_t* row = weight + n * stride;
            uint32_t rest = 0;
            for (int64_t j = done; j < used; j++)
                if (PACKED)
                    rest += uint32_t(int32_t(row[j] & 15) * planes[p][done + j] +
                                     int32_t(row[j] >> 4) * planes[p][done + j + BLOCK]);
                else
                    rest += uint32_t((int32_t(int8_t(row[j])) + OFFSET) * planes[p][j]);
            to[n] = int32_t(uint32_t(to[n]) + rest);
        }
    }
}

static void dot_int8(const uint8_t* weight, int64_t stride, const int16_t* zero, int64_t K, int64_t rows,
                     const int8_t* const* planes, int64_t count, const int32_t* totals, int32_t* out, int64_t gap) {
    dot_planes<false>(weight, stride, zero, K, rows, planes, count, totals, out, gap);
}
static void dot_int4(const uint8_t* weight, int64_t stride, const int16_t* zero, int64_t K, int64_t rows,
                     const int8_t* const* planes, int64_t count, const int32_t* totals, int32_t* out, int64_t gap) {
    dot_planes<true>(weight, stride, zero, K, rows, planes, count, totals, out, gap);
}

// The order in which load_nibbles meets them: of each 128, elements 0..31, 64..95, 32..63, 96..127.
static void spread_nibbles(const int8_t* from, int64_t K, int8_t* to, int64_t pitch) {
    std::memset(to, 0, size_t(pitch));
    for (int64_t k = 0; k < K; k += 32) {
        int64_t part = (k / 32) % 4;
        std::memcpy(to + k / 128 * 128 + (part == 1 ? 64 : part == 2 ? 32 : part * 32), from + k, 32);
    }
}

// Real products: M rows of values (fp32; for bf16 weights, the even ones of each 32, then the odd ones).
template <int M, int R, class W>
SF_INLINE void real_group(const W* weight, int64_t K, const float* values, int64_t pitch, float* out, int64_t gap) {
    constexpr int64_t STEP = sizeof(W) == 2 ? 32 : 16, STEPS = M * R == 1 ? 4 : 1;
    Floats sums[STEPS][R][M];
    for (int s = 0; s < STEPS; s++)
        for (int r = 0; r < R; r++)
            for (int m = 0; m < M; m++) sums[s][r][m] = floats_zero();
    auto step = [&](Floats(*own)[M], int64_t k) __attribute__((always_inline)) {
        for (int r = 0; r < R; r++) {
            const W* place = weight + r * K + k;
            prefetch(reinterpret_cast<const uint8_t*>(place) + AHEAD);
            fma_block<M>(own[r], place, values + k, pitch);
        }
    };
    int64_t k = 0;
    for (; k + STEPS * STEP <= K; k += STEPS * STEP)
        for (int s = 0; s < STEPS; s++) step(sums[s], k + s * STEP);
    for (; k + STEP <= K; k += STEP) step(sums[0], k);
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) {
            for (int s = 1; s < STEPS; s++) sums[0][r][m] = floats_add(sums[0][r][m], sums[s][r][m]);
            float sum = floats_sum(sums[0][r][m]);
            for (int64_t j = k; j < K; j++) sum += real(weight[r * K + j]) * values[m * pitch + j];
            out[m * gap + r] = sum;
        }
}

// A row for one row of values: a single stream. More rows of values: several, which share what is loaded of them.
template <int M, class W>
SF_INLINE void real_rows(const W* weight, int64_t K, int64_t rows, const float* values, int64_t pitch, float* out,
                         int64_t gap) {
    int64_t n = 0;
    if (M > 1)
        for (; n + ROWS <= rows; n += ROWS) real_group<M, ROWS>(weight + n * K, K, values, pitch, out + n, gap);
    for (; n < rows; n++) real_group<M, 1>(weight + n * K, K, values, pitch, out + n, gap);
}

// values [M, pitch] times weight rows, into out [M, gap]; M up to 4.
template <class W>
static void real_sums(const W* weight, int64_t K, int64_t rows, const float* values, int64_t pitch, int64_t M,
                      float* out, int64_t gap) {
    switch (M) {
        case 1: real_rows<1>(weight, K, rows, values, pitch, out, gap); break;
        case 2: real_rows<2>(weight, K, rows, values, pitch, out, gap); break;
        case 3: real_rows<3>(weight, K, rows, values, pitch, out, gap); break;
        default: real_rows<4>(weight, K, rows, values, pitch, out, gap); break;
    }
}

static void real_bf16(const bf16* weight, int64_t K, int64_t rows, const float* values, int64_t pitch, int64_t M,
                      float* out, int64_t gap) {
    real_sums(weight, K, rows, values, pitch, M, out, gap);
}
static void real_fp32(const float* weight, int64_t K, int64_t rows, const float* values, int64_t pitch, int64_t M,
                      float* out, int64_t gap) {
    real_sums(weight, K, rows, values, pitch, M, out, gap);
}

// The even elements of each 32, then the odd ones; what is left over stays.
static void split_pairs(const float* from, int64_t K, float* to) {
    int64_t k = 0;
    for (; k + 32 <= K; k += 32)
        for (int j = 0; j < 16; j++) {
            to[k + j] = from[k + 2 * j];
            to[k + 16 + j] = from[k + 2 * j + 1];
        }
    for (; k < K; k++) to[k] = from[k];
}

static void oat_values_fp32(const Oat& p, const float* x, const int8_t* shift, int64_t K, float* values) {
    oat_values_row(p, x, shift, K, values);
}
static void oat_values_bf16(const Oat& p, const bf16* x, const int8_t* shift, int64_t K, float* values) {
    oat_values_row(p, x, shift, K, values);
}
static float gif_fp32(const float* x, int64_t K, const float* top, const float* multiple, int64_t levels,
                      int64_t steps, int8_t* out, int32_t* sum) {
    return gif_row(x, K, top, multiple, levels, steps, out, sum);
}
static float gif_bf16(const bf16* x, int64_t K, const float* top, const float* multiple, int64_t levels,
                      int64_t steps, int8_t* out, int32_t* sum) {
    return gif_row(x, K, top, multiple, levels, steps, out, sum);
}
