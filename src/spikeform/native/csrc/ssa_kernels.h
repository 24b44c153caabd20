// Spiking self-attention of one key/value head: neurons, recurrence, output neurons; see layers/self_attention.py.
//
// The recurrence by events: a key's spike adds the value's row to one row of S, a query's spike reads one. A spike
// costs E additions, a silent element nothing. A head with a window meets the keys in it one by one: few of them. Scores as popcounts of these bits, and S moving on by chunks of 64, took
// 1.4 to 2.5 times the time for heads of 64 and 1.0 to 1.3 times that for heads of 128, 10% to 20% of elements firing.

#include "lanes.h"

// Which lanes of a vector are meant.
#if WIDTH == 16
typedef __mmask16 M;
SF_INLINE M reaches(F a, F b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GE_OQ); }
SF_INLINE F only(M m, F a) { return (F)_mm512_maskz_mov_ps(m, (__m512)a); }
SF_INLINE uint64_t bits_of(M m) { return m; }
#else
typedef I M;
SF_INLINE M reaches(F a, F b) { return a >= b; }
SF_INLINE F only(M m, F a) { return (F)(m & (I)a); }
#if WIDTH == 8
SF_INLINE uint64_t bits_of(M m) { return uint32_t(_mm256_movemask_ps((__m256)m)); }
#else
SF_INLINE uint64_t bits_of(M m) {
    uint64_t found = 0;
    for (int i = 0; i < WIDTH; i++) found |= uint64_t(m[i] & 1) << i;
    return found;
}
#endif
#endif

constexpr int64_t COLUMNS = 4 * WIDTH;  // of S that a pass over the positions takes

struct Lif {
    F threshold, tau, inverse;
    bool exact, leaks, hard;  // exact: dividing by tau is multiplying by its inverse; tau = 0 leaks nothing
};

SF_INLINE Lif lif(float threshold, const SpikingSizes& n, float tau) {
    int exponent;
    const bool power = frexpf(tau, &exponent) == 0.5f;
    return {all(threshold), all(tau), all(1.0f / tau), power, tau != 0.0f, n.hard != 0};
}

// One step; the membrane ``v`` moves on. ``minus`` is set for signed neurons alone.
template <bool SIGNED>
SF_INLINE M fire(const Lif& rule, F& v, F current, M* minus) {
    const F apart = current - v;
    const F u = !rule.leaks ? v + current : v + (rule.exact ? apart * rule.inverse : apart / rule.tau);
    const M plus = reaches(u, rule.threshold);
    *minus = M{};
    if (SIGNED) *minus = reaches(-rule.threshold, u);
    if (rule.hard)
        v = u * (all(1.0f) - only(SIGNED ? plus | *minus : plus, all(1.0f)));
    else
        v = SIGNED ? u - (only(plus, rule.threshold) - only(*minus, rule.threshold)) : u - only(plus, rule.threshold);
    return plus;
}

// Spikes of one token: words of bits, those of step t at ``to + t * step``, minus ones ``words`` behind; or, with ROWS,
// floats, those of step t at ``rows + t * stride``. N vectors from element ``i`` on: each step waits for the one before
// it, and neighbours fill the time.
template <int N, bool SIGNED, bool ROWS, class X>
SF_INLINE void encode_block(const Lif& rule, const X* x, int64_t i, float gain, const SpikingSizes& n, uint64_t* to,
                            int64_t step, int64_t words, float* rows, int64_t stride) {
    F current[N], v[N] = {};
    for (int j = 0; j < N; j++) current[j] = load(x + i + j * WIDTH, n.size - i - j * WIDTH) * all(gain);
    for (int64_t t = 0; t < n.steps; t++) {
        uint64_t up = 0, down = 0;
        for (int j = 0; j < N; j++) {
            M minus;
            const M plus = fire<SIGNED>(rule, v[j], current[j], &minus);
            if (ROWS) {
                F sent = only(plus, all(1.0f));
                if (SIGNED) sent -= only(minus, all(1.0f));
                store(rows + t * stride + i + j * WIDTH, sent);
            } else {
                up |= bits_of(plus) << (j * WIDTH);
                if (SIGNED) down |= bits_of(minus) << (j * WIDTH);
            }
        }
        if (!ROWS) {
            uint64_t* place = to + t * step + i / 64;
            const int at = i % 64;
            place[0] = (at ? place[0] : 0) | up << at;
            if (SIGNED) place[words] = (at ? place[words] : 0) | down << at;
        }
    }
}

template <bool SIGNED, bool ROWS, class X>
SF_INLINE void encode(const Lif& rule, const X* x, float gain, const SpikingSizes& n, uint64_t* to, int64_t step,
                      int64_t words, float* rows, int64_t stride) {
    int64_t i = 0;
    for (; i + 3 * WIDTH < n.size; i += 4 * WIDTH)
        encode_block<4, SIGNED, ROWS>(rule, x, i, gain, n, to, step, words, rows, stride);
    for (; i < n.size; i += WIDTH)
        encode_block<1, SIGNED, ROWS>(rule, x, i, gain, n, to, step, words, rows, stride);
}

// N vectors of the columns: ``row`` added to the rows of S whose bit is set, or taken from them.
template <int N, bool MINUS>
SF_INLINE void add_rows(float* s, int64_t stride, const uint64_t* bits, int64_t words, const F* row) {
    for (int64_t w = 0; w < words; w++)
        for (uint64_t left = bits[w]; left; left &= left - 1) {
            float* to = s + (64 * w + __builtin_ctzll(left)) * stride;
            for (int i = 0; i < N; i++) {
                const F old = load(to + i * WIDTH);
                store(to + i * WIDTH, MINUS ? old - row[i] : old + row[i]);
            }
        }
}

// The sum of the rows whose bit is set.
template <int N, bool MINUS>
SF_INLINE void sum_rows(const float* s, int64_t stride, const uint64_t* bits, int64_t words, F* sum) {
    for (int64_t w = 0; w < words; w++)
        for (uint64_t left = bits[w]; left; left &= left - 1) {
            const float* from = s + (64 * w + __builtin_ctzll(left)) * stride;
            for (int i = 0; i < N; i++) {
                const F own = load(from + i * WIDTH);
                sum[i] = MINUS ? sum[i] - own : sum[i] + own;
            }
        }
}

// What a task works with for one step: S, spikes (of a head with a window, those before stand first), where counts go.
struct Step {
    float* s;
    int64_t pitch, positions, repeat, words;
    const uint64_t *k, *q;
    const float* v;
    float* counts;
};

// All positions, in N vectors of the columns from ``i`` on; ``s`` is where S has them.
template <int N, bool SIGNED>
SF_INLINE void recur(const Step& x, float* s, int64_t stride, int64_t i) {
    const int64_t planes = 2 * x.words;
    for (int64_t p = 0; p < x.positions; p++) {
        F row[N];
        for (int j = 0; j < N; j++) row[j] = load(x.v + p * x.pitch + i + j * WIDTH);
        add_rows<N, false>(s, stride, x.k + p * planes, x.words, row);
        if (SIGNED) add_rows<N, true>(s, stride, x.k + p * planes + x.words, x.words, row);
        for (int64_t r = 0; r < x.repeat; r++) {
            const int64_t at = r * x.positions + p;
            F sum[N] = {};
            sum_rows<N, false>(s, stride, x.q + at * planes, x.words, sum);
            if (SIGNED) sum_rows<N, true>(s, stride, x.q + at * planes + x.words, x.words, sum);
            for (int j = 0; j < N; j++) store(x.counts + at * x.pitch + i + j * WIDTH, sum[j]);
        }
    }
}

// How often spikes of a query and a key meet, those of unlike signs counted as less than nothing.
template <bool SIGNED>
SF_INLINE int64_t meeting(const uint64_t* q, const uint64_t* k, int64_t words) {
    int64_t found = 0;
    for (int64_t w = 0; w < words; w++) {
        found += __builtin_popcountll(q[w] & k[w]);
        if (SIGNED) {
            const uint64_t down = q[words + w], other = k[words + w];
            found += __builtin_popcountll(down & other);
            found -= __builtin_popcountll(q[w] & other) + __builtin_popcountll(down & k[w]);
        }
    }
    return found;
}

// All positions of a head that sees ``window`` keys, the last of them ``before`` places behind where its keys begin.
template <int N, bool SIGNED>
SF_INLINE void gather(const Step& x, int64_t window, int64_t before, int64_t i) {
    const int64_t planes = 2 * x.words;
    for (int64_t p = 0; p < x.positions; p++)
        for (int64_t r = 0; r < x.repeat; r++) {
            const int64_t at = r * x.positions + p;
            F sum[N] = {};
            for (int64_t j = before + p + 1 - window; j <= before + p; j++) {
                const int64_t score = meeting<SIGNED>(x.q + at * planes, x.k + j * planes, x.words);
                if (score)
                    for (int c = 0; c < N; c++) sum[c] += all(float(score)) * load(x.v + j * x.pitch + i + c * WIDTH);
            }
            for (int c = 0; c < N; c++) store(x.counts + at * x.pitch + i + c * WIDTH, sum[c]);
        }
}

template <bool SIGNED>
SF_INLINE void gather_blocks(const Step& x, int64_t window, int64_t before) {
    int64_t i = 0;
    for (; i + COLUMNS <= x.pitch; i += COLUMNS) gather<4, SIGNED>(x, window, before, i);
    for (; i < x.pitch; i += WIDTH) gather<1, SIGNED>(x, window, before, i);
}

// Eight codes of -1, 0 or 1 as bits, the ones and the minus ones.
SF_INLINE void bits_of_codes(const int8_t* codes, uint64_t& up, uint64_t& down) {
    constexpr uint64_t ONES = 0x0101010101010101, GATHER = 0x0102040810204080;
    uint64_t eight;
    memcpy(&eight, codes, 8);
    const uint64_t minus = eight >> 7 & ONES;
    down = minus * GATHER >> 56;
    up = (eight & ONES & ~minus) * GATHER >> 56;
}

// Where a task has the spikes of a head with a window: those of position ``j``, counted from the first of the history.
struct Near {
    uint64_t* keys;
    float* values;
    int64_t span, pitch, words;
    uint64_t* bits(int64_t t, int64_t j) const { return keys + (t * span + j) * 2 * words; }
    float* row(int64_t t, int64_t j) const { return values + (t * span + j) * pitch; }
};

// The history: of the ``window - 1`` last positions as the cache has it, silent before, or silent without a cache.
static void read_recent(const SpikingSizes& n, const int8_t* recent, int64_t batch, int64_t group, int64_t window,
                        const Near& to) {
    const int64_t half = n.steps * n.batch * n.local * n.width * n.size;
    for (int64_t t = 0; t < n.steps; t++) {
        memset(to.bits(t, 0), 0, n.width * 2 * to.words * sizeof(uint64_t));
        memset(to.row(t, 0), 0, n.width * to.pitch * sizeof(float));
        for (int64_t j = n.width + 1 - window; recent && j < n.width; j++) {
            const int8_t* k = recent + (((t * n.batch + batch) * n.local + group) * n.width + j) * n.size;
            uint64_t *bits = to.bits(t, j), up, down;
            float* row = to.row(t, j);
            for (int64_t e = 0; e < n.size; e++) row[e] = k[half + e];
            int64_t e = 0;
            for (; e + 8 <= n.size; e += 8) {
                bits_of_codes(k + e, up, down);
                bits[e / 64] |= up << e % 64;
                bits[to.words + e / 64] |= down << e % 64;
            }
            for (; e < n.size; e++) bits[(k[e] < 0 ? to.words : 0) + e / 64] |= uint64_t(k[e] != 0) << e % 64;
        }
    }
}

// The cache moves on: what it has moves to the front, and the last positions follow, ``from`` places on in the task.
static void keep_recent(const SpikingSizes& n, int8_t* recent, int64_t batch, int64_t group, int64_t from,
                        const Near& near) {
    const int64_t half = n.steps * n.batch * n.local * n.width * n.size;
    const int64_t old = n.length < n.width ? n.width - n.length : 0;
    for (int64_t t = 0; t < n.steps; t++) {
        int8_t* k = recent + ((t * n.batch + batch) * n.local + group) * n.width * n.size;
        memmove(k, k + n.length * n.size, old * n.size);
        memmove(k + half, k + half + n.length * n.size, old * n.size);
        for (int64_t j = old; j < n.width; j++) {
            const uint64_t* bits = near.bits(t, from + j);
            const float* row = near.row(t, from + j);
            for (int64_t e = 0; e < n.size; e++) {
                const int up = bits[e / 64] >> e % 64 & 1, down = bits[near.words + e / 64] >> e % 64 & 1;
                k[j * n.size + e] = int8_t(up - (n.is_signed ? down : 0));
                k[half + j * n.size + e] = int8_t(row[e]);
            }
        }
    }
}

// Columns by blocks. In a copy of S a block lies in one piece of ``rows`` rows, so that it stays in the fastest cache
// while all positions pass.
template <bool SIGNED>
SF_INLINE void recur_blocks(const Step& x, int64_t rows) {
    int64_t i = 0;
    for (; i + COLUMNS <= x.pitch; i += COLUMNS)
        recur<4, SIGNED>(x, rows ? x.s + i * rows : x.s + i, rows ? COLUMNS : x.pitch, i);
    for (; i < x.pitch; i += WIDTH)
        recur<1, SIGNED>(x, rows ? x.s + i * rows : x.s + i, rows ? WIDTH : x.pitch, i);
}

// S of one step between its place and a copy by blocks.
static void copy_state(float* kept, float* copy, int64_t size, int64_t pitch, bool back) {
    for (int64_t i = 0; i < size;) {
        const int64_t wide = i + COLUMNS <= pitch ? COLUMNS : WIDTH, some = size - i < wide ? size - i : wide;
        for (int64_t e = 0; e < size; e++) {
            float *in = kept + e * size + i, *out = copy + i * size + e * wide;
            memcpy(back ? in : out, back ? out : in, some * sizeof(float));
        }
        i += wide;
    }
}

// The output neuron's mean over the steps, for N vectors from element ``i`` on.
template <int N, bool SIGNED, class X>
SF_INLINE void send(const Lif& rule, const float* counts, int64_t step, int64_t i, F divisor, float gain,
                    const SpikingSizes& n, X* out) {
    F v[N] = {}, sum[N] = {};
    for (int64_t t = 0; t < n.steps; t++)
        for (int j = 0; j < N; j++) {
            F c = load(counts + t * step + i + j * WIDTH);
            if (n.normalise) c /= divisor;
            M minus;
            const M plus = fire<SIGNED>(rule, v[j], c * all(gain), &minus);
            sum[j] += only(plus, all(1.0f));
            if (SIGNED) sum[j] -= only(minus, all(1.0f));
        }
    for (int j = 0; j < N; j++) store(out + i + j * WIDTH, sum[j] / all(float(n.steps)), n.size - i - j * WIDTH);
}

// All tokens of key/value head ``group``.
template <bool SIGNED, class X>
static void attend(const SpikingSizes& n, const SpikingTensors& x, int64_t batch, int64_t group, float* space) {
    const int64_t pitch = (n.size + WIDTH - 1) / WIDTH * WIDTH, words = (n.size + 63) / 64, planes = 2 * words;
    const int64_t repeat = n.heads / n.groups, chunk = n.length < POSITIONS ? n.length : POSITIONS;
    const Lif rule = lif(x.threshold, n, x.tau), last = lif(x.last, n, x.tau);
    // Few tokens work on S where it is kept, if its rows are whole vectors; many on a copy by blocks of columns.
    const int64_t window = group < n.local ? x.windows[group] : 0, far = n.groups - n.local;
    const int64_t before = window ? n.width : 0, span = before + chunk;
    const bool copied = !window && (!x.state || pitch != n.size || (pitch > COLUMNS && n.length >= 16));
    float* const kept = x.state && !window ? x.state + (batch * far + group - n.local) * n.size * n.size : nullptr;
    const int64_t apart = n.batch * far * n.size * n.size;
    float* s = space;
    space += copied ? n.steps * pitch * pitch : 0;
    if (copied) {
        memset(s, 0, n.steps * pitch * pitch * sizeof(float));
        for (int64_t t = 0; kept && t < n.steps; t++)
            copy_state(kept + t * apart, s + t * pitch * pitch, n.size, pitch, false);
    }
    float *counts = space, *values = counts + n.steps * repeat * chunk * pitch;
    uint64_t* keys = (uint64_t*)(values + n.steps * span * pitch);
    uint64_t* queries = keys + n.steps * span * planes;
    const Near near = {keys, values, span, pitch, words};
    if (window) read_recent(n, x.recent, batch, group, window, near);
    int64_t number = x.number ? x.number[batch] : 0;
    for (int64_t first = 0; first < n.length; first += chunk) {
        const int64_t here = n.length - first < chunk ? n.length - first : chunk;
        for (int64_t p = 0; p < here; p++) {
            const int64_t row = first + p;
            const X* k = (const X*)x.k + batch * n.k_stride[0] + group * n.k_stride[1] + row * n.k_stride[2];
            const X* v = (const X*)x.v + batch * n.v_stride[0] + group * n.v_stride[1] + row * n.v_stride[2];
            const bool silent = x.seen && !x.seen[batch * n.length + row];
            uint64_t* bits = near.bits(0, before + p);
            float* rows = near.row(0, before + p);
            encode<SIGNED, false>(rule, k, x.key[group], n, bits, span * planes, words, nullptr, 0);
            encode<SIGNED, true>(rule, v, x.value[group], n, nullptr, 0, words, rows, span * pitch);
            for (int64_t t = 0; silent && t < n.steps; t++) {
                memset(bits + t * span * planes, 0, planes * sizeof(uint64_t));
                memset(rows + t * span * pitch, 0, pitch * sizeof(float));
            }
            for (int64_t r = 0; r < repeat; r++) {
                const int64_t head = group * repeat + r;
                const X* q = (const X*)x.q + batch * n.q_stride[0] + head * n.q_stride[1] + row * n.q_stride[2];
                uint64_t* to = queries + (r * here + p) * planes;
                encode<SIGNED, false>(rule, q, x.query[head], n, to, repeat * here * planes, words, nullptr, 0);
            }
        }
        for (int64_t t = 0; t < n.steps; t++) {
            const Step step = {copied ? s + t * pitch * pitch : kept + t * apart,
                               pitch,
                               here,
                               repeat,
                               words,
                               keys + t * span * planes,
                               queries + t * repeat * here * planes,
                               values + t * span * pitch,
                               counts + t * repeat * here * pitch};
            if (window)
                gather_blocks<SIGNED>(step, window, before);
            else
                recur_blocks<SIGNED>(step, copied ? n.size : 0);
        }
        for (int64_t p = 0; p < here; p++) {
            number += !x.seen || x.seen[batch * n.length + first + p];
            const int64_t seen = window && window < number ? window : number;
            const F divisor = all(float(seen > 0 ? seen : 1));
            for (int64_t r = 0; r < repeat; r++) {
                const int64_t head = group * repeat + r;
                X* out = (X*)x.out + ((batch * n.length + first + p) * n.heads + head) * n.size;
                const float* own = counts + (r * here + p) * pitch;
                const float gain = x.output[head];
                int64_t i = 0;
                for (; i + 3 * WIDTH < n.size; i += 4 * WIDTH)
                    send<4, SIGNED>(last, own, repeat * here * pitch, i, divisor, gain, n, out);
                for (; i < n.size; i += WIDTH)
                    send<1, SIGNED>(last, own, repeat * here * pitch, i, divisor, gain, n, out);
            }
        }
        if (window && x.recent && first + here == n.length) keep_recent(n, x.recent, batch, group, here, near);
        for (int64_t t = 0; window && first + here < n.length && t < n.steps; t++) {  // the next positions' history
            memmove(near.bits(t, 0), near.bits(t, here), before * planes * sizeof(uint64_t));
            memmove(near.row(t, 0), near.row(t, here), before * pitch * sizeof(float));
        }
    }
    for (int64_t t = 0; copied && kept && t < n.steps; t++)
        copy_state(kept + t * apart, s + t * pitch * pitch, n.size, pitch, true);
}

static void ssa(const SpikingSizes& n, const SpikingTensors& x, int64_t batch, int64_t group, float* space) {
    if (n.kind == BF16)
        n.is_signed ? attend<true, bf16>(n, x, batch, group, space) : attend<false, bf16>(n, x, batch, group, space);
    else
        n.is_signed ? attend<true, float>(n, x, batch, group, space) : attend<false, float>(n, x, batch, group, space);
}
