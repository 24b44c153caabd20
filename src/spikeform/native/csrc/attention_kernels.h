// Attention of a few query rows of one key/value head on its packed codes: scores, softmax, probabilities, context.
//
// Rows are heads x queries of the group, head by head. Keys go by blocks: decoded, turned round, multiplied. All scores
// of the rows are kept, since a neuron fires when its whole input is known.

#include "lanes.h"
#include "encode.h"
#include "activations.h"
#include "population.h"

constexpr int64_t KEYS = 2 * WIDTH;

// What a task works with; rows are ``pitch`` apart, scores ``span``.
struct Task {
    int64_t batch, group, first, rows, pitch, span;
    float *q, *scores, *context, *block, *turned, *column, *key_unit, *value_unit, *row_unit;
    int64_t begin, end;  // keys outside have no part in it
};

SF_INLINE Task task_of(const Sizes& n, int64_t batch, int64_t group, int64_t first, int64_t rows, float* space) {
    Task t = {};
    t.batch = batch, t.group = group, t.first = first, t.rows = rows;
    t.pitch = (n.size + WIDTH - 1) / WIDTH * WIDTH, t.span = (n.keys + KEYS - 1) / KEYS * KEYS;
    float** parts[] = {&t.q, &t.context, &t.scores, &t.block, &t.turned, &t.column, &t.key_unit, &t.value_unit};
    const int64_t counts[] = {rows * t.pitch, rows * t.pitch, rows * t.span, KEYS * t.pitch,
                              KEYS * t.pitch, t.span,         t.span,        t.span};
    for (int i = 0; i < 8; i++) *parts[i] = space, space += counts[i];
    t.row_unit = space;
    return t;
}

// Head and query of a row of the task.
SF_INLINE void place_of(const Sizes& n, const Task& t, int64_t row, int64_t* head, int64_t* query) {
    *head = t.group * (n.heads / n.groups) + (t.first + row) / n.length;
    *query = (t.first + row) % n.length;
}

SF_INLINE int64_t at(const int64_t* stride, int64_t batch, int64_t head, int64_t row) {
    return batch * stride[0] + head * stride[1] + row * stride[2];
}

// Scores begin as the mask. Finds the blocks that some row sees; a row that sees none has row_unit 0, the others 1.
static void mask_rows(const Sizes& n, const Tensors& x, Task& t) {
    const F lowest = all(-HUGE_VALF);
    for (int64_t s = 0; s < t.span; s += WIDTH) store(t.column + s, lowest);
    for (int64_t r = 0; r < t.rows; r++) {
        int64_t head, query;
        place_of(n, t, r, &head, &query);
        const int64_t from = at(n.mask_stride, t.batch, head, query);
        float* row = t.scores + r * t.span;
        F seen = lowest;
        for (int64_t s = 0; s < t.span; s += WIDTH) {
            const int64_t count = n.keys - s;
            F m = {};
            if (x.mask && count > 0)
                m = n.mask_kind == BF16 ? load((const bf16*)x.mask + from + s, count)
                                        : load((const float*)x.mask + from + s, count);
            m = up_to(count, m, -HUGE_VALF);
            store(row + s, m);
            store(t.column + s, most(load(t.column + s), m));
            seen = most(seen, m);
        }
        t.row_unit[r] = highest(seen) > x.hidden ? 1.0f : 0.0f;
    }
    t.begin = t.span, t.end = 0;
    for (int64_t s = 0; s < t.span; s += KEYS) {
        bool any = highest(most(load(t.column + s), load(t.column + s + WIDTH))) > x.hidden;
        t.column[s] = any ? 1.0f : 0.0f;
        if (any) t.end = s + KEYS;
        if (any && t.begin > s) t.begin = s;
    }
}

// Decodes a block of packed rows: values of a population.
template <class P>
SF_INLINE void decode_oat(const P* rows, int64_t stride, int64_t count, int64_t size, const Oat& neuron, float* out,
                          int64_t pitch) {
    const F normal = all(neuron.unit[0]), outlier = all(neuron.unit[1]);
    for (int64_t s = 0; s < KEYS; s++, out += pitch)
        for (int64_t e = 0; e < size; e += WIDTH) {
            I packed = s < count ? load(rows + s * stride + e, size - e) : I{};
            store(out + e, to_real(packed >> 1) * ((packed & 1) != 0 ? outlier : normal));
        }
}

// The same of a burst: integers in the row's unit.
SF_INLINE void decode_gif(const int8_t* rows, int64_t stride, int64_t count, int64_t size, const float* multiple,
                          float* out, int64_t pitch) {
    for (int64_t s = 0; s < KEYS; s++, out += pitch)
        for (int64_t e = 0; e < size; e += WIDTH) {
            I codes = s < count ? load(rows + s * stride + e, size - e) : I{};
            store(out + e, to_real(codes) * load(multiple + e, size - e));
        }
}

// The unit of each key, behind its codes.
SF_INLINE void units_of(const int8_t* rows, int64_t stride, const Sizes& n, int64_t span, float* out) {
    for (int64_t s = 0; s < span; s++) out[s] = 0.0f;
    for (int64_t s = 0; s < n.keys; s++) memcpy(out + s, rows + s * stride + n.size, sizeof(float));
}

// Scores of ROWS rows and a block of keys: q . k, in units of both where they are integers, times scaling, plus mask.
template <int ROWS>
SF_INLINE void score(const Task& t, int64_t row, int64_t key, int64_t size, bool integers, float scaling) {
    F sums[ROWS][2] = {};
    const float* q = t.q + row * t.pitch;
    for (int64_t e = 0; e < size; e++) {
        const F left = load(t.turned + e * KEYS), right = load(t.turned + e * KEYS + WIDTH);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            const F own = all(q[r * t.pitch + e]);
            sums[r][0] = fused(own, left, sums[r][0]);
            sums[r][1] = fused(own, right, sums[r][1]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
        for (int half = 0; half < 2; half++) {
            float* place = t.scores + (row + r) * t.span + key + half * WIDTH;
            F s = sums[r][half];
            if (integers) s = s * t.row_unit[row + r] * load(t.key_unit + key + half * WIDTH);
            store(place, s * scaling + load(place));
        }
}

static void score_block(const Task& t, int64_t key, int64_t size, bool integers, float scaling) {
    for (int64_t half = 0; half < 2; half++)
        for (int64_t e = 0; e < t.pitch; e += WIDTH)
            transpose(t.block + half * WIDTH * t.pitch + e, t.pitch, t.turned + e * KEYS + half * WIDTH, KEYS);
    int64_t row = 0;
    if (WIDTH == 16)
        for (; row + 8 <= t.rows; row += 8) score<8>(t, row, key, size, integers, scaling);
    for (; row + 4 <= t.rows; row += 4) score<4>(t, row, key, size, integers, scaling);
    for (; row < t.rows; row++) score<1>(t, row, key, size, integers, scaling);
}

// Adds a block's probabilities times its values: ROWS rows, WIDE vectors of channels from ``e`` on.
template <int ROWS, int WIDE>
SF_INLINE void add_values(const Task& t, int64_t row, int64_t key, int64_t e) {
    F sums[ROWS][WIDE];
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < WIDE; c++) sums[r][c] = load(t.context + (row + r) * t.pitch + e + c * WIDTH);
    const float *p = t.scores + row * t.span + key, *v = t.block + e;
    for (int64_t s = 0; s < KEYS; s++, v += t.pitch)
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) {
            const F own = all(p[r * t.span + s]);
#pragma GCC unroll 4
            for (int c = 0; c < WIDE; c++) sums[r][c] = fused(own, load(v + c * WIDTH), sums[r][c]);
        }
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < WIDE; c++) store(t.context + (row + r) * t.pitch + e + c * WIDTH, sums[r][c]);
}

static void context_block(const Task& t, int64_t key) {
    constexpr int WIDE = WIDTH == 16 ? 4 : 2;
    int64_t e = 0;
    for (; e + WIDE * WIDTH <= t.pitch; e += WIDE * WIDTH) {
        int64_t row = 0;
        for (; row + 4 <= t.rows; row += 4) add_values<4, WIDE>(t, row, key, e);
        for (; row < t.rows; row++) add_values<1, WIDE>(t, row, key, e);
    }
    for (; e < t.pitch; e += WIDTH)
        for (int64_t row = 0; row < t.rows; row++) add_values<1, 1>(t, row, key, e);
}

// Scores of a row to exponentials; returns what makes weights of them that sum to one, or zeros where it sees no key.
// exp and 1/x by HGs where there are.
SF_INLINE float softmax(const Task& t, int64_t r, bool alive, const Bank* neuron) {
    float* row = t.scores + r * t.span;
    F top = all(-std::numeric_limits<float>::max());
    for (int64_t s = t.begin; s < t.end; s += WIDTH) top = most(top, load(row + s));
    const float peak = highest(top);
    F total = {};
    for (int64_t s = t.begin; s < t.end; s += WIDTH) {
        F e = exponential(load(row + s) - peak);
        if (neuron) e = fire(*neuron, e);
        total += e;
        store(row + s, e);
    }
    const float whole = sum(total);
    if (!alive) return 0.0f;
    return neuron ? fire(*neuron, all(1.0f / (whole < 0.5f ? 0.5f : whole)))[0] : 1.0f / whole;
}

static void finish(const Sizes& n, const Tensors& x, const Task& t, bool integers) {
    for (int64_t r = 0; r < t.rows; r++) {
        int64_t head, query;
        place_of(n, t, r, &head, &query);
        const int64_t to = ((t.batch * n.length + query) * n.heads + head) * n.size;
        for (int64_t e = 0; e < n.size; e += WIDTH) {
            F y = load(t.context + r * t.pitch + e);
            if (integers) y *= t.row_unit[r];
            if (n.out_kind == BF16)
                store((bf16*)x.out + to + e, y, n.size - e);
            else
                store((float*)x.out + to + e, y, n.size - e);
        }
    }
}

SF_INLINE void clear(float* from, int64_t count) { memset(from, 0, sizeof(float) * count); }

template <class P>
static void oat_attention_of(const Sizes& n, const Tensors& x, const OatNeurons& neurons, Task t) {
    const Oat query = population(neurons.query), key = population(neurons.key), value = population(neurons.value);
    const Oat probability = population(neurons.probability);
    const Bank gates = bank(neurons.gates.bits ? neurons.gates : Gates{1, 1, 0, 1});
    clear(t.q, t.rows * t.pitch), clear(t.context, t.rows * t.pitch);
    for (int64_t r = 0; r < t.rows; r++) {
        int64_t head, row;
        place_of(n, t, r, &head, &row);
        const int64_t from = at(n.q_stride, t.batch, head, row);
        SF_OF_KIND(n.q_kind, X, for (int64_t e = 0; e < n.size; e += WIDTH)
            store(t.q + r * t.pitch + e, oat_value(query, load((const X*)x.q + from + e, n.size - e))))
    }
    mask_rows(n, x, t);
    const P* k = (const P*)x.k + at(n.k_stride, t.batch, t.group, 0);
    const P* v = (const P*)x.v + at(n.v_stride, t.batch, t.group, 0);
    for (int64_t s = t.begin; s < t.end; s += KEYS)
        if (t.column[s] != 0.0f) {
            decode_oat(k + s * n.k_stride[2], n.k_stride[2], n.keys - s, n.size, key, t.block, t.pitch);
            score_block(t, s, n.size, false, x.scaling);
        }
    for (int64_t r = 0; r < t.rows; r++) {
        const float inverse = softmax(t, r, t.row_unit[r] != 0.0f, neurons.gates.bits ? &gates : nullptr);
        float* row = t.scores + r * t.span;
        for (int64_t s = t.begin; s < t.end; s += WIDTH)
            store(row + s, oat_value(probability, load(row + s) * inverse));
    }
    for (int64_t s = t.begin; s < t.end; s += KEYS)
        if (t.column[s] != 0.0f) {
            decode_oat(v + s * n.v_stride[2], n.v_stride[2], n.keys - s, n.size, value, t.block, t.pitch);
            context_block(t, s);
        }
    finish(n, x, t, false);
}

static void oat_attention(const Sizes& n, const Tensors& x, const OatNeurons& neurons, int64_t batch, int64_t group,
                          int64_t first, int64_t rows, float* space) {
    const Task t = task_of(n, batch, group, first, rows, space);
    if (neurons.wide)
        oat_attention_of<int32_t>(n, x, neurons, t);
    else
        oat_attention_of<int16_t>(n, x, neurons, t);
}

// Weights of a row, exponentials times ``inverse``, to codes of which the largest is ``limit``; returns what one unit of
// them is worth.
SF_INLINE float encode_dynamic(const Task& t, int64_t r, float inverse, float limit) {
    float* row = t.scores + r * t.span;
    F top = {};
    for (int64_t s = t.begin; s < t.end; s += WIDTH) {
        F w = load(row + s) * inverse * load(t.value_unit + s);
        store(row + s, w);
        top = most(top, w);
    }
    const float unit = highest(top) / limit, least_unit = std::numeric_limits<float>::min();
    const float own = unit < least_unit ? least_unit : unit;
    for (int64_t s = t.begin; s < t.end; s += WIDTH)
        store(row + s, nearest(clamp(load(row + s) / own, F{}, all(limit))));
    return own;
}

static void gif_attention(const Sizes& n, const Tensors& x, const GifNeurons& neurons, int64_t batch, int64_t group,
                          int64_t first, int64_t rows, float* space) {
    Task t = task_of(n, batch, group, first, rows, space);
    const Burst& burst = neurons.query;
    int8_t* codes = (int8_t*)t.block;
    clear(t.q, t.rows * t.pitch), clear(t.context, t.rows * t.pitch);
    mask_rows(n, x, t);
    float alive[QUERY_ROWS];
    for (int64_t r = 0; r < t.rows; r++) {
        int64_t head, row;
        int32_t total;
        place_of(n, t, r, &head, &row);
        const int64_t from = at(n.q_stride, t.batch, head, row);
        alive[r] = t.row_unit[r];
        SF_OF_KIND(n.q_kind, X, t.row_unit[r] = gif_row((const X*)x.q + from, n.size, burst.top, burst.multiple,
                                                        burst.levels, burst.steps, codes, &total))
        for (int64_t e = 0; e < n.size; e++) t.q[r * t.pitch + e] = float(codes[e]);
    }
    const int8_t* k = (const int8_t*)x.k + at(n.k_stride, t.batch, t.group, 0);
    const int8_t* v = (const int8_t*)x.v + at(n.v_stride, t.batch, t.group, 0);
    units_of(k, n.k_stride[2], n, t.span, t.key_unit), units_of(v, n.v_stride[2], n, t.span, t.value_unit);
    const int64_t table = t.group * n.size;
    for (int64_t s = t.begin; s < t.end; s += KEYS)
        if (t.column[s] != 0.0f) {
            decode_gif(k + s * n.k_stride[2], n.k_stride[2], n.keys - s, n.size, neurons.key_multiple + table, t.block,
                       t.pitch);
            score_block(t, s, n.size, true, x.scaling);
        }
    for (int64_t r = 0; r < t.rows; r++) {
        const float inverse = softmax(t, r, alive[r] != 0.0f, nullptr);
        t.row_unit[r] = encode_dynamic(t, r, inverse, float(neurons.peak));
    }
    for (int64_t s = t.begin; s < t.end; s += KEYS)
        if (t.column[s] != 0.0f) {
            decode_gif(v + s * n.v_stride[2], n.v_stride[2], n.keys - s, n.size, neurons.value_multiple + table,
                       t.block, t.pitch);
            context_block(t, s);
        }
    finish(n, x, t, true);
}
