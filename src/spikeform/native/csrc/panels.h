// Products of many int8 planes with row-major int8 weights [N, K].
//
// Planes lie across the lanes of a vector, LANES of them in a panel; a word, a few neighbouring weights of a row, is
// spread over all lanes. So weights are read from where they are, without a second copy in another order, and sums need
// no adding up across lanes. A tile is up to WIDE panels beside one another, word by word.
//
// Part of a kernel file (see common.h): no include guard.

constexpr int64_t NEAR = 6;      // weight rows that a step takes
constexpr int64_t DEPTH = 2048;  // bytes of a row before the next rows take their turn: the tile stays in a near cache

#if SF_LEVEL == 2

// A word is four weights, each 128 more than it is: unsigned.
constexpr int64_t LANES = 16, WIDE = 4, WORD = 4;
using Sums = __m512i;
using Codes = int8_t;

SF_INLINE Sums sums_of(const int32_t* from) { return _mm512_loadu_si512(from); }
SF_INLINE void put_sums(int32_t* to, Sums x) { _mm512_storeu_si512(to, x); }
SF_INLINE Sums codes_at(const Codes* from) { return _mm512_load_si512(from); }
SF_INLINE Sums spread(const void* word) {
    int32_t x;
    std::memcpy(&x, word, 4);
    return _mm512_set1_epi32(x);
}
SF_INLINE Sums multiply_add(Sums sum, Sums codes, Sums word) { return _mm512_dpbusd_epi32(sum, word, codes); }

// Rows and columns of 16 x 16 words change places.
SF_INLINE void transpose(__m512i* x) {
    __m512i y[16];
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            x[i + 2 * j] = _mm512_unpacklo_epi64(y[i + j], y[i + 2 + j]);
            x[i + 2 * j + 1] = _mm512_unpackhi_epi64(y[i + j], y[i + 2 + j]);
        }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 2; j++) {
            y[8 * j + i] = _mm512_shuffle_i32x4(x[8 * j + i], x[8 * j + 4 + i], 0x88);
            y[8 * j + 4 + i] = _mm512_shuffle_i32x4(x[8 * j + i], x[8 * j + 4 + i], 0xdd);
        }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 2; j++) {
            x[4 * j + i] = _mm512_shuffle_i32x4(y[4 * j + i], y[8 + 4 * j + i], 0x88);
            x[8 + 4 * j + i] = _mm512_shuffle_i32x4(y[4 * j + i], y[8 + 4 * j + i], 0xdd);
        }
}

// Planes (`count` of LANES, zero from K to a multiple of 64) into a panel: a vector for each word, `step` codes apart.
static void fill_panel(const int8_t* const* planes, int64_t count, int64_t K, Codes* panel, int64_t step) {
    for (int64_t k = 0; k < K; k += 64) {
        __m512i x[16];
        for (int64_t i = 0; i < 16; i++)
            x[i] = i < count ? _mm512_loadu_si512(planes[i] + k) : _mm512_setzero_si512();
        transpose(x);
        for (int64_t i = 0; i < 16; i++) _mm512_store_si512(panel + (k / 4 + i) * step, x[i]);
    }
}

// A row of weights as `line` takes it: `own` has room for that, but here it stays where it is.
SF_INLINE const uint8_t* ready(const uint8_t* row, int64_t, uint8_t*) { return row; }
constexpr int64_t BYTES = 1;  // of a weight that is ready
// A line of such a row as `spread` takes it. By way of memory: a flip for each word would take the products' turn.
SF_INLINE const uint8_t* line(const uint8_t* place, uint8_t* own) {
    _mm512_store_si512(own, _mm512_xor_si512(_mm512_loadu_si512(place), _mm512_set1_epi8(char(0x80))));
    return own;
}

// Sums [rows, pitch] of LANES planes with up to 16 weight rows, into out [LANES, gap], `count` of them.
SF_INLINE void turn(const int32_t* sums, int64_t pitch, int64_t rows, const int32_t* totals, int64_t count,
                    int32_t* out, int64_t gap) {
    __m512i x[16];
    for (int64_t r = 0; r < 16; r++) x[r] = r < rows ? sums_of(sums + r * pitch) : _mm512_setzero_si512();
    transpose(x);
    for (int64_t i = 0; i < count; i++) {
        const __m512i less = _mm512_slli_epi32(_mm512_set1_epi32(totals[i]), 7);
        _mm512_mask_storeu_epi32(out + i * gap, __mmask16((1u << rows) - 1), _mm512_sub_epi32(x[i], less));
    }
}

#else

// A word is two weights in 16 bits, and so are codes.
constexpr int64_t LANES = 8, WIDE = 2, WORD = 2;
using Codes = int16_t;

#if SF_LEVEL == 1
using Sums = __m256i;
SF_INLINE Sums sums_of(const int32_t* from) { return load32(from); }
SF_INLINE void put_sums(int32_t* to, Sums x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), x); }
SF_INLINE Sums codes_at(const Codes* from) { return load32(from); }
SF_INLINE Sums spread(const void* word) {
    int32_t x;
    std::memcpy(&x, word, 4);
    return _mm256_set1_epi32(x);
}
SF_INLINE Sums multiply_add(Sums sum, Sums codes, Sums word) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(codes, word));
}
#else
struct Sums {
    int32_t lane[8];
};
struct Pairs {
    int16_t half[16];
};
SF_INLINE Sums sums_of(const int32_t* from) {
    Sums out;
    std::memcpy(&out, from, sizeof(out));
    return out;
}
SF_INLINE void put_sums(int32_t* to, const Sums& x) { std::memcpy(to, &x, sizeof(x)); }
SF_INLINE Pairs codes_at(const Codes* from) {
    Pairs out;
    std::memcpy(&out, from, sizeof(out));
    return out;
}
SF_INLINE Pairs spread(const void* word) {
    Pairs out;
    for (int i = 0; i < 8; i++) std::memcpy(out.half + 2 * i, word, 4);
    return out;
}
SF_INLINE Sums multiply_add(Sums sum, const Pairs& codes, const Pairs& word) {
    for (int i = 0; i < 8; i++)
        sum.lane[i] += int32_t(codes.half[2 * i]) * word.half[2 * i] +
                       int32_t(codes.half[2 * i + 1]) * word.half[2 * i + 1];
    return sum;
}
#endif

static void fill_panel(const int8_t* const* planes, int64_t count, int64_t K, Codes* panel, int64_t step) {
    for (int64_t i = 0; i < LANES; i++)
        for (int64_t k = 0; k < round_up(K, WORD); k++)
            panel[k / 2 * step + 2 * i + k % 2] = i < count ? planes[i][k] : Codes(0);
}
SF_INLINE const uint8_t* ready(const uint8_t* row, int64_t K, uint8_t* own) {
    int16_t* wide = reinterpret_cast<int16_t*>(own);
    for (int64_t k = 0; k < K; k++) wide[k] = int8_t(row[k]);
    return own;
}
constexpr int64_t BYTES = 2;
SF_INLINE const uint8_t* line(const uint8_t* place, uint8_t*) { return place; }
SF_INLINE void turn(const int32_t* sums, int64_t pitch, int64_t rows, const int32_t*, int64_t count, int32_t* out,
                    int64_t gap) {
    for (int64_t i = 0; i < count; i++)
        for (int64_t r = 0; r < rows; r++) out[i * gap + r] = sums[r * pitch + i];
}

#endif

constexpr int64_t SIZE = WORD * BYTES;  // bytes of a word

// Sums [NEAR, pitch] += V panels times so many bytes of NEAR weight rows; `ahead`: bytes on, weights are asked for.
template <int V>
SF_INLINE void multiply_tile(const uint8_t* const* rows, int64_t bytes, const Codes* tile, int64_t ahead, int32_t* sums,
                             int64_t pitch) {
    constexpr int64_t LINE = 64;
    alignas(64) uint8_t own[NEAR][LINE], last[NEAR][LINE];
    Sums sum[NEAR][V];
    for (int r = 0; r < NEAR; r++)
        for (int v = 0; v < V; v++) sum[r][v] = sums_of(sums + r * pitch + v * LANES);
    auto take = [&](const uint8_t* const* from, int64_t offset, int64_t size) __attribute__((always_inline)) {
        const uint8_t* place[NEAR];
        for (int r = 0; r < NEAR; r++) {
            if (ahead) prefetch(rows[r] + offset + ahead);
            place[r] = line(from[r] + offset, own[r]);
        }
#pragma GCC unroll 2
        for (int64_t j = 0; j < size; j += SIZE) {
            decltype(codes_at(tile)) codes[V];
            for (int v = 0; v < V; v++) codes[v] = codes_at(tile + v * LANES * WORD);
            tile += V * LANES * WORD;
            for (int r = 0; r < NEAR; r++) {
                const auto word = spread(place[r] + j);
                for (int v = 0; v < V; v++) sum[r][v] = multiply_add(sum[r][v], codes[v], word);
            }
        }
    };
    int64_t at = 0;
    for (; at + LINE <= bytes; at += LINE) take(rows, at, LINE);
    if (at < bytes) {
        const uint8_t* from[NEAR];
        std::memset(last, 0, sizeof(last));
        for (int r = 0; r < NEAR; r++) {
            std::memcpy(last[r], rows[r] + at, size_t(bytes - at));
            from[r] = last[r];
        }
        take(from, 0, bytes - at);
    }
    for (int r = 0; r < NEAR; r++)
        for (int v = 0; v < V; v++) put_sums(sums + r * pitch + v * LANES, sum[r][v]);
}

// Where tile `t` begins, in panels, of so many shared out evenly.
SF_INLINE int64_t tile_at(int64_t t, int64_t panels) {
    const int64_t tiles = (panels + WIDE - 1) / WIDE;
    return panels * t / tiles;
}

// How many of `count` planes go by panels: whole panels, and a last one that is more than three quarters full.
static int64_t paneled(int64_t count) {
    const int64_t rest = count % LANES;
    return count <= 8 ? 0 : 4 * rest > 3 * LANES ? count : count - rest;
}
static int64_t panels_of(int64_t count) { return round_up(count, LANES) / LANES; }
static int64_t panel_bytes(int64_t count, int64_t K) {
    return round_up(count, LANES) * round_up(K, 64) * int64_t(sizeof(Codes));
}
// Panel `p` of `count` planes, into its place among all.
static void panel(const int8_t* const* planes, int64_t count, int64_t K, int64_t p, uint8_t* all) {
    const int64_t panels = panels_of(count);
    int64_t t = 0;
    while (tile_at(t + 1, panels) <= p) t++;
    const int64_t begin = tile_at(t, panels), wide = tile_at(t + 1, panels) - begin;
    Codes* tile = reinterpret_cast<Codes*>(all) + begin * LANES * round_up(K, 64);
    fill_panel(planes + p * LANES, std::min(LANES, count - p * LANES), K, tile + (p - begin) * LANES * WORD,
               wide * LANES * WORD);
}

// Exact sums of `count` planes, in panels, their own sums in `totals`, with weight rows, into out [count, gap].
// stride: bytes from row to row; next: whether as many rows follow.
static void dot_panels(const uint8_t* weight, int64_t stride, int64_t K, int64_t rows, bool next, const uint8_t* panels,
                       int64_t count, const int32_t* totals, int32_t* out, int64_t gap) {
    const int64_t number = panels_of(count), pitch = number * LANES, bytes = K * BYTES;
    const int64_t whole = round_up(rows, NEAR), deep = round_up(K, 64);
    int32_t* sums = scratch<int32_t>(8, size_t(whole * pitch));
    std::memset(sums, 0, size_t(whole * pitch) * 4);
    uint8_t* own = scratch<uint8_t>(9, size_t(BYTES > 1 ? rows * bytes : 0));
    const uint8_t** row = scratch<const uint8_t*>(10, size_t(whole));
    for (int64_t r = 0; r < rows; r++) row[r] = ready(weight + r * stride, K, own + r * bytes);
    for (int64_t r = rows; r < whole; r++) row[r] = row[rows - 1];  // whose sums nobody reads
    for (int64_t from = 0; from < bytes; from += DEPTH) {
        const int64_t size = std::min(DEPTH, bytes - from);
        for (int64_t t = 0, begin = 0, end; begin < number; t++, begin = end) {
            end = tile_at(t + 1, number);
            const Codes* tile = reinterpret_cast<const Codes*>(panels) + begin * LANES * deep;
            const int64_t ahead = next && t == 0 && BYTES == 1 ? rows * stride : 0;
            auto run = [&](auto width) {
                constexpr int V = decltype(width)::value;
                for (int64_t r = 0; r < whole; r += NEAR) {
                    const uint8_t* place[NEAR];
                    for (int64_t i = 0; i < NEAR; i++) place[i] = row[r + i] + from;
                    multiply_tile<V>(place, size, tile + from / SIZE * V * LANES * WORD, ahead,
                                     sums + r * pitch + begin * LANES, pitch);
                }
            };
            switch (end - begin) {
                case 1: run(std::integral_constant<int, 1>()); break;
                case 2: run(std::integral_constant<int, 2>()); break;
                case 3: run(std::integral_constant<int, std::min<int>(3, WIDE)>()); break;
                default: run(std::integral_constant<int, std::min<int>(4, WIDE)>()); break;
            }
        }
    }
    for (int64_t p = 0; p < number; p++)
        for (int64_t r = 0; r < rows; r += 16)
            turn(sums + r * pitch + p * LANES, pitch, std::min<int64_t>(16, rows - r), totals + p * LANES,
                 std::min(LANES, count - p * LANES), out + p * LANES * gap + r, gap);
}
