// Spiking self-attention of one key/value head: neurons, recurrence, output neurons; see layers/self_attention.py.
//
// The recurrence by events: a key's spike adds the value's row to one row of S, a query's spike reads one. A spike
// costs E additions, a silent element nothing. Scores as popcounts of these bits, and S moving on by chunks of 64, took
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
    bool exact, hard;  // exact: dividing by tau is multiplying by its inverse
};

SF_INLINE Lif lif(float threshold, const SpikingSizes& n, float tau) {
    int exponent;
    const bool power = frexpf(tau, &exponent) == 0.5f;
    return {all(threshold), all(tau), all(1.0f / tau), power, n.hard != 0};
}

// One step; the membrane ``v`` moves on. ``minus`` is set for signed neurons alone.
template <bool SIGNED>
SF_INLINE M fire(const Lif& rule, F& v, F current, M* minus) {
    const F apart = current - v, u = v + (rule.exact ? apart * rule.inverse : apart / rule.tau);
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

// What a task works with for one step: S, spikes, and where the counts go.
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
    const bool copied = !x.state || pitch != n.size || (pitch > COLUMNS && n.length >= 16);
    float* const kept = x.state ? x.state + (batch * n.groups + group) * n.size * n.size : nullptr;
    const int64_t apart = n.batch * n.groups * n.size * n.size;
    float* s = space;
    space += copied ? n.steps * pitch * pitch : 0;
    if (copied) {
        memset(s, 0, n.steps * pitch * pitch * sizeof(float));
        for (int64_t t = 0; kept && t < n.steps; t++)
            copy_state(kept + t * apart, s + t * pitch * pitch, n.size, pitch, false);
    }
    float *counts = space, *values = counts + n.steps * repeat * chunk * pitch;
    uint64_t* keys = (uint64_t*)(values + n.steps * chunk * pitch);
    uint64_t* queries = keys + n.steps * chunk * planes;
    int64_t number = x.number ? x.number[batch] : 0;
    for (int64_t first = 0; first < n.length; first += chunk) {
        const int64_t here = n.length - first < chunk ? n.length - first : chunk;
        for (int64_t p = 0; p < here; p++) {
            const int64_t row = first + p;
            const X* k = (const X*)x.k + batch * n.k_stride[0] + group * n.k_stride[1] + row * n.k_stride[2];
            const X* v = (const X*)x.v + batch * n.v_stride[0] + group * n.v_stride[1] + row * n.v_stride[2];
            const bool silent = x.seen && !x.seen[batch * n.length + row];
            encode<SIGNED, false>(rule, k, x.key[group], n, keys + p * planes, here * planes, words, nullptr, 0);
            if (silent)
                for (int64_t t = 0; t < n.steps; t++)
                    memset(keys + (t * here + p) * planes, 0, planes * sizeof(uint64_t));
            encode<SIGNED, true>(rule, v, x.value[group], n, nullptr, 0, words, values + p * pitch, here * pitch);
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
                               keys + t * here * planes,
                               queries + t * repeat * here * planes,
                               values + t * here * pitch,
                               counts + t * repeat * here * pitch};
            recur_blocks<SIGNED>(step, copied ? n.size : 0);
        }
        for (int64_t p = 0; p < here; p++) {
            number += !x.seen || x.seen[batch * n.length + first + p];
            const F divisor = all(float(number > 0 ? number : 1));
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
