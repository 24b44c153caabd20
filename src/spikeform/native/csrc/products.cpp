// Products of encoded rows with row-major weights: synapses/fused.py has their meaning.
#include "rows.h"

#define SF_KERNELS "products_kernels.h"
#include "each_level.h"

#include <vector>

using namespace spikeform;

namespace {

constexpr int64_t LIMBS = 3;        // bytes of a code, at most
constexpr int64_t ROWS = 256;       // rows of x in a pass over the weights
constexpr int64_t FEW = 8;          // rows up to which outliers are worth no gathering
constexpr int64_t GROUP = 4;        // rows of a pass over real weights
constexpr int64_t WORTH = 1 << 16;  // weight bytes below which another thread costs more than it brings

// Bytes from plane to plane: whole blocks, and no power of two, which would put all planes into the same cache sets.
int64_t pitch_of(int64_t K, int64_t block) { return round_up(K, block); }
int64_t threads_for(int64_t bytes, int64_t threads) { return std::max<int64_t>(1, std::min(threads, bytes / WORTH)); }

// A real tensor of either kind.
struct Reals {
    void* place;
    int64_t kind;
    const float* floats(int64_t at) const { return static_cast<const float*>(place) + at; }
    const bf16* halves(int64_t at) const { return static_cast<const bf16*>(place) + at; }
};

// A bias as fp32, or null.
const float* floats_of(const void* bias, int64_t kind, int64_t N) {
    if (!bias || kind == FP32) return static_cast<const float*>(bias);
    float* wide = scratch<float>(11, size_t(N));
    for (int64_t n = 0; n < N; n++) wide[n] = real(static_cast<const bf16*>(bias)[n]);
    return wide;
}

// int8 rows that share a pass over the weights: limbs of codes, each of a row of x and a sub-neuron.
struct Planes {
    struct Of {
        int64_t row, slot;  // slot: 3 sub-neuron + limb
    };
    std::vector<const int8_t*> codes;
    std::vector<int32_t> totals;
    std::vector<Of> of;

    void add(const int8_t* place, int32_t total, int64_t row, int64_t slot) {
        codes.push_back(place);
        totals.push_back(total);
        of.push_back({row, slot});
    }
};

// Weights of a product: int8 [N, K], or nibbles [N, K / 2] with their zeros [N].
struct Weights {
    const uint8_t* place;
    const int16_t* zero;
    int64_t K, N;
    int64_t stride() const { return zero ? K / 2 : K; }
};

// What integer sums become.
struct Finish {
    const float *scale, *bias, *rows;  // rows: unit of each row of x, or null: units are `units`
    float units[2];
    bool gated;
    Reals out;
};

// The planes of a product whose number is worth laying them out in panels; the rest is taken plane by plane.
class Paneled {
  public:
    // slot: of the scratch memory for the panels.
    Paneled(const Planes& planes, bool packed, int64_t K, int slot, int64_t threads) : planes_(planes), K_(K) {
        together_ = packed ? 0 : SF_PICK(paneled)(count());
        panels_ = scratch<uint8_t>(slot, size_t(SF_PICK(panel_bytes)(together_, K)));
        const int64_t number = SF_PICK(panels_of)(together_);
        parallel(number, 1, threads_for(together_ * K, threads), [&](int64_t begin, int64_t end) {
            for (int64_t p = begin; p < end; p++) SF_PICK(panel)(planes_.codes.data(), together_, K_, p, panels_);
        });
    }
    int64_t count() const { return int64_t(planes_.codes.size()); }

    // Sums of all planes with weight rows, into out [planes, TILE]. next: whether as many rows follow.
    // K: where planes and weight rows may be taken to end, both zero there.
    void dot(const uint8_t* weight, int64_t stride, int64_t K, const int16_t* zero, int64_t rows, bool next,
             int32_t* out) const {
        const int32_t* totals = planes_.totals.data();
        if (together_) SF_PICK(dot_panels)(weight, stride, K_, rows, next, panels_, together_, totals, out, TILE);
        if (together_ == count()) return;
        const auto run = zero ? SF_PICK(dot_int4) : SF_PICK(dot_int8);
        run(weight, stride, zero, K, rows, planes_.codes.data() + together_, count() - together_, totals + together_,
            out + together_ * TILE, TILE);
    }

  private:
    const Planes& planes_;
    int64_t K_, together_;
    uint8_t* panels_;
};

// All planes times all weights; `extra` planes go with the weights' `columns` only.
void integer_product(const Planes& planes, const Planes& extra, const std::vector<int64_t>& columns, Weights weights,
                     const Finish& finish, int64_t from, int64_t rows, int64_t threads) {
    const int64_t stride = weights.stride(), K = weights.K, N = weights.N;
    const int64_t few = int64_t(columns.size()), narrow = round_up(few, 64);
    const Paneled main(planes, weights.zero, K, 3, threads), side(extra, false, few, 7, threads);
    const int64_t own = main.count(), more = side.count();
    use_large_pages(weights.place, N * stride);
    const int64_t useful = threads_for(N * stride * std::max<int64_t>(own / 4, 1), threads);
    parallel(N, TILE, useful, [&](int64_t begin, int64_t end) {
        int32_t* sums = scratch<int32_t>(4, size_t((own + more) * TILE));
        uint8_t* part = scratch<uint8_t>(5, size_t(TILE * narrow));
        if (more) std::memset(part, 0, size_t(TILE * narrow));
        const int32_t** whole = scratch<const int32_t*>(6, size_t(rows * 2 * LIMBS));
        std::fill(whole, whole + rows * 2 * LIMBS, nullptr);
        for (int64_t p = 0; p < own; p++) whole[planes.of[p].row * 2 * LIMBS + planes.of[p].slot] = sums + p * TILE;
        for (int64_t p = 0; p < more; p++)
            whole[extra.of[p].row * 2 * LIMBS + extra.of[p].slot] = sums + (own + p) * TILE;
        for (int64_t n = begin; n < end; n += TILE) {
            const int64_t size = std::min(TILE, end - n);
            const uint8_t* place = weights.place + n * stride;
            main.dot(place, stride, K, weights.zero ? weights.zero + n : nullptr, size, n + TILE < N, sums);
            if (more) {
                for (int64_t r = 0; r < size; r++)
                    for (int64_t c = 0; c < few; c++) part[r * narrow + c] = place[r * stride + columns[c]];
                side.dot(part, narrow, narrow, nullptr, size, false, sums + own * TILE);
            }
            for (int64_t m = 0; m < rows; m++) {
                const float unit = finish.rows ? finish.rows[m] : finish.units[0];
                const float* bias = finish.bias ? finish.bias + n : nullptr;
                const int64_t at = (from + m) * N + n;
                if (finish.out.kind == BF16)
                    SF_PICK(finish_bf16)(whole + m * 2 * LIMBS, size, finish.scale + n, unit, finish.units[1],
                                         finish.gated, bias, static_cast<bf16*>(finish.out.place) + at);
                else
                    SF_PICK(finish_fp32)(whole + m * 2 * LIMBS, size, finish.scale + n, unit, finish.units[1],
                                         finish.gated, bias, static_cast<float*>(finish.out.place) + at);
            }
        }
    });
}

void codes_of(const Oat& p, Reals x, int64_t at, int64_t K, int32_t* normal, int32_t* beyond) {
    if (x.kind == BF16)
        SF_PICK(oat_codes_bf16)(p, x.halves(at), K, normal, beyond);
    else
        SF_PICK(oat_codes_fp32)(p, x.floats(at), K, normal, beyond);
}

// Planes of rows from..from + rows; outliers' too where there are few rows, else the columns that hold any.
void encode(const Oat& p, Reals x, int64_t from, int64_t rows, int64_t K, Planes& planes, Planes& extra,
            std::vector<int64_t>& columns, int64_t threads) {
    const int64_t pitch = pitch_of(K, 64), limbs = p.limit <= 127 ? 1 : p.limit <= 32639 ? 2 : 3;
    const bool together = rows <= FEW;
    const int64_t room = limbs * (together ? 2 : 1);
    int8_t* places = scratch<int8_t>(0, size_t(rows * room * pitch));
    std::vector<int64_t> needed(size_t(rows * 2), 0);
    std::vector<int32_t> totals(size_t(rows * 2 * LIMBS));
    std::vector<uint8_t> hit(size_t(K), 0);
    parallel(rows, 1, threads_for(rows * K * 8, threads), [&](int64_t begin, int64_t end) {
        int32_t* normal = scratch<int32_t>(1, size_t(2 * K));
        for (int64_t m = begin; m < end; m++) {
            int8_t* place = places + m * room * pitch;
            codes_of(p, x, (from + m) * K, K, normal, normal + K);
            needed[m * 2] = SF_PICK(split_limbs)(normal, K, place, pitch, &totals[m * 2 * LIMBS]);
            if (p.gated && together)
                needed[m * 2 + 1] = SF_PICK(split_limbs)(normal + K, K, place + limbs * pitch, pitch,
                                                         &totals[m * 2 * LIMBS + LIMBS]);
            else if (p.gated)
                SF_PICK(note_used)(normal + K, K, hit.data());
        }
    });
    for (int64_t m = 0; m < rows; m++)
        for (int64_t r = 0; r < 2; r++)
            for (int64_t l = 0; l < needed[m * 2 + r]; l++)
                planes.add(places + (m * room + r * limbs + l) * pitch, totals[(m * 2 + r) * LIMBS + l], m,
                           r * LIMBS + l);
    for (int64_t k = 0; k < K; k++)
        if (hit[k]) columns.push_back(k);
    if (columns.empty()) return;
    const int64_t count = int64_t(columns.size()), narrow = round_up(count, 64);
    int8_t* outliers = scratch<int8_t>(2, size_t(rows * limbs * narrow));
    parallel(rows, 1, threads_for(rows * count * 8, threads), [&](int64_t begin, int64_t end) {
        int32_t* normal = scratch<int32_t>(1, size_t(2 * count));
        float* chosen = scratch<float>(4, size_t(count));  // of either kind
        for (int64_t m = begin; m < end; m++) {
            const int64_t at = (from + m) * K;
            for (int64_t c = 0; c < count; c++)
                if (x.kind == BF16)
                    reinterpret_cast<bf16*>(chosen)[c] = x.halves(at)[columns[c]];
                else
                    chosen[c] = x.floats(at)[columns[c]];
            codes_of(p, {chosen, x.kind}, 0, count, normal, normal + count);
            needed[m] = SF_PICK(split_limbs)(normal + count, count, outliers + m * limbs * narrow, narrow,
                                             &totals[m * LIMBS]);
        }
    });
    for (int64_t m = 0; m < rows; m++)
        for (int64_t l = 0; l < needed[m]; l++)
            extra.add(outliers + (m * limbs + l) * narrow, totals[m * LIMBS + l], m, LIMBS + l);
}

}  // namespace

// One row, for chain.cpp.
namespace spikeform {

size_t line_bytes(const Encoding& how, int64_t K) {
    return how.weights < BYTES ? size_t(K) * 8 : size_t(2 * LIMBS * pitch_of(K, 128));
}

void encode_line(const Encoding& how, const Matrix& matrix, const void* x, int64_t kind, int64_t K, int8_t* room,
                 Line& line) {
    const Reals input{const_cast<void*>(x), kind};
    line.count = 0;
    auto add = [&](int64_t slot, const int8_t* plane) { line.slots[line.count] = slot, line.planes[line.count++] = plane; };
    if (how.gif) {
        const bool packed = how.weights == NIBBLES;
        const int64_t pitch = pitch_of(K, packed ? 128 : 64);
        int8_t* codes = packed ? scratch<int8_t>(1, size_t(K)) : room;
        const int64_t levels = how.limit, steps = how.resolution;
        line.units[0] = kind == BF16 ? SF_PICK(gif_bf16)(input.halves(0), K, nullptr, matrix.table, levels, steps, codes,
                                                         line.totals)
                                     : SF_PICK(gif_fp32)(input.floats(0), K, nullptr, matrix.table, levels, steps, codes,
                                                         line.totals);
        if (packed)
            SF_PICK(spread_nibbles)(codes, K, room, pitch);
        else
            std::memset(room + K, 0, size_t(pitch - K));
        add(0, room);
        return;
    }
    const Oat p = oat(matrix.table, how.populations, how.limit, how.resolution, how.rounding);
    line.units[0] = p.unit[0], line.units[1] = p.unit[1];
    if (how.weights < BYTES) {
        float *values = reinterpret_cast<float*>(room), *plain = how.weights == BF16 ? values + K : values;
        if (kind == BF16)
            SF_PICK(oat_values_bf16)(p, input.halves(0), matrix.shift, K, plain);
        else
            SF_PICK(oat_values_fp32)(p, input.floats(0), matrix.shift, K, plain);
        if (how.weights == BF16) SF_PICK(split_pairs)(plain, K, values);
        line.values = values;
        return;
    }
    const int64_t pitch = pitch_of(K, 64);
    int32_t *codes = scratch<int32_t>(1, size_t(2 * K)), totals[2 * LIMBS];
    codes_of(p, input, 0, K, codes, codes + K);
    for (int64_t r = 0; r < (p.gated ? 2 : 1); r++) {
        int8_t* planes = room + r * LIMBS * pitch;
        const int64_t needed = SF_PICK(split_limbs)(codes + r * K, K, planes, pitch, totals + r * LIMBS);
        for (int64_t l = 0; l < needed; l++) {
            line.totals[line.count] = totals[r * LIMBS + l];
            add(r * LIMBS + l, planes + l * pitch);
        }
    }
}

namespace {

template <class T>
void add_residual(const void* residual, int64_t begin, int64_t end, void* out) {
    const T* from = static_cast<const T*>(residual);
    T* to = static_cast<T*>(out);
    for (int64_t n = begin; n < end; n++) put(to + n, real(from[n]) + real(to[n]));
}

}  // namespace

void multiply_line(const Encoding& how, const Matrix& matrix, const Line& line, int64_t K, int64_t begin, int64_t end,
                   const void* residual, int64_t out_kind) {
    const bool half = how.weights == BF16, packed = how.weights == NIBBLES, gated = !how.gif && how.populations == 2;
    const int64_t stride = packed ? K / 2 : how.weights == BYTES ? K : half ? 2 * K : 4 * K;
    int32_t sums[2 * LIMBS * TILE];
    float added[TILE], reals[TILE];
    const int32_t* whole[2 * LIMBS] = {};
    for (int64_t p = 0; p < line.count; p++) whole[line.slots[p]] = sums + p * TILE;
    for (int64_t n = begin; n < end; n += TILE) {
        const int64_t size = std::min(TILE, end - n);
        const uint8_t* place = static_cast<const uint8_t*>(matrix.weight) + n * stride;
        const float* bias = nullptr;
        if (matrix.bias) {
            const Reals from{const_cast<void*>(matrix.bias), matrix.bias_kind};
            for (int64_t j = 0; j < size; j++) added[j] = from.kind == BF16 ? real(*from.halves(n + j)) : *from.floats(n + j);
            bias = added;
        }
        float* floats = static_cast<float*>(matrix.out) + n;
        bf16* halves = static_cast<bf16*>(matrix.out) + n;
        if (how.weights < BYTES) {
            if (half)
                SF_PICK(real_bf16)(reinterpret_cast<const bf16*>(place), K, size, line.values, K, 1, reals, TILE);
            else
                SF_PICK(real_fp32)(reinterpret_cast<const float*>(place), K, size, line.values, K, 1, reals, TILE);
            for (int64_t j = 0; j < size; j++) {
                const float y = bias ? reals[j] + bias[j] : reals[j];
                if (out_kind == BF16)
                    put(halves + j, y);
                else
                    put(floats + j, y);
            }
            continue;
        }
        const auto dot = packed ? SF_PICK(dot_int4) : SF_PICK(dot_int8);
        dot(place, stride, packed ? matrix.zero + n : nullptr, K, size, line.planes, line.count, line.totals, sums, TILE);
        const float *scale = matrix.scale + n, one = line.units[0], two = line.units[1];
        if (out_kind == BF16)
            SF_PICK(finish_bf16)(whole, size, scale, one, two, gated, bias, halves);
        else
            SF_PICK(finish_fp32)(whole, size, scale, one, two, gated, bias, floats);
    }
    if (residual && out_kind == BF16) add_residual<bf16>(residual, begin, end, matrix.out);
    if (residual && out_kind == FP32) add_residual<float>(residual, begin, end, matrix.out);
}

}  // namespace spikeform

// x [M, K] real; weight int8 [N, K]; scale fp32 [N]; bias [N] or null; out [M, N] of the kind of x.
SF_API void spikeform_oat_linear_int(void* x, int64_t kind, int64_t M, int64_t K, const uint8_t* weight, int64_t N,
                                     const float* scale, const void* bias, int64_t bias_kind, const float* threshold,
                                     int64_t populations, int64_t limit, int64_t resolution, int64_t rounding,
                                     void* out, int64_t threads) {
    const Oat p = oat(threshold, populations, limit, resolution, rounding);
    const Finish finish{scale, floats_of(bias, bias_kind, N), nullptr, {p.unit[0], p.unit[1]}, p.gated, {out, kind}};
    for (int64_t from = 0; from < M; from += ROWS) {
        const int64_t rows = std::min(ROWS, M - from);
        Planes planes, extra;
        std::vector<int64_t> columns;
        encode(p, {x, kind}, from, rows, K, planes, extra, columns, threads);
        integer_product(planes, extra, columns, {weight, nullptr, K, N}, finish, from, rows, threads);
    }
}

// weight int8 [N, K], or where `zero` is given nibbles [N, K / 2].
SF_API void spikeform_gif_linear(void* x, int64_t kind, int64_t M, int64_t K, const uint8_t* weight,
                                 const int16_t* zero, int64_t N, const float* scale, const void* bias,
                                 int64_t bias_kind, const float* top, const float* multiple, int64_t levels,
                                 int64_t steps, void* out, int64_t threads) {
    const Reals input{x, kind};
    const int64_t pitch = pitch_of(K, zero ? 128 : 64);
    const float* added = floats_of(bias, bias_kind, N);
    for (int64_t from = 0; from < M; from += ROWS) {
        const int64_t rows = std::min(ROWS, M - from);
        int8_t* places = scratch<int8_t>(0, size_t(rows * pitch));
        float units[ROWS];
        int32_t totals[ROWS];
        parallel(rows, 1, threads_for(rows * K * 8, threads), [&](int64_t begin, int64_t end) {
            int8_t* codes = scratch<int8_t>(1, size_t(K));
            for (int64_t m = begin; m < end; m++) {
                int8_t *plane = places + m * pitch, *to = zero ? codes : plane;
                const int64_t at = (from + m) * K;
                units[m] = kind == BF16
                               ? SF_PICK(gif_bf16)(input.halves(at), K, top, multiple, levels, steps, to, totals + m)
                               : SF_PICK(gif_fp32)(input.floats(at), K, top, multiple, levels, steps, to, totals + m);
                if (zero)
                    SF_PICK(spread_nibbles)(codes, K, plane, pitch);
                else
                    std::memset(plane + K, 0, size_t(pitch - K));
            }
        });
        Planes planes;
        for (int64_t m = 0; m < rows; m++) planes.add(places + m * pitch, totals[m], m, 0);
        integer_product(planes, {}, {}, {weight, zero, K, N}, {scale, added, units, {}, false, {out, kind}}, from, rows,
                        threads);
    }
}

// weight [N, K] real; values are fp32. For few rows.
SF_API void spikeform_oat_linear(void* x, int64_t kind, int64_t M, int64_t K, const void* weight, int64_t weight_kind,
                                 int64_t N, const void* bias, int64_t bias_kind, const float* threshold,
                                 int64_t populations, const int8_t* shift, int64_t limit, int64_t resolution,
                                 int64_t rounding, void* out, int64_t threads) {
    const Oat p = oat(threshold, populations, limit, resolution, rounding);
    const Reals input{x, kind};
    const float* added = floats_of(bias, bias_kind, N);
    const bool half = weight_kind == BF16;
    float* values = scratch<float>(2, size_t(M * K));
    parallel(M, 1, threads_for(M * K * 8, threads), [&](int64_t begin, int64_t end) {
        float* row = scratch<float>(3, size_t(K));
        for (int64_t m = begin; m < end; m++) {
            float* plain = half ? row : values + m * K;
            if (kind == BF16)
                SF_PICK(oat_values_bf16)(p, input.halves(m * K), shift, K, plain);
            else
                SF_PICK(oat_values_fp32)(p, input.floats(m * K), shift, K, plain);
            if (half) SF_PICK(split_pairs)(plain, K, values + m * K);
        }
    });
    use_large_pages(weight, N * K * (half ? 2 : 4));
    parallel(N, TILE, threads_for(N * K * (half ? 2 : 4), threads), [&](int64_t begin, int64_t end) {
        float sums[GROUP * TILE];
        for (int64_t n = begin; n < end; n += TILE) {
            const int64_t size = std::min(TILE, end - n);
            for (int64_t from = 0; from < M; from += GROUP) {  // the weights come again from the cache
                const int64_t rows = std::min(GROUP, M - from);
                const float* of = values + from * K;
                if (half)
                    SF_PICK(real_bf16)(static_cast<const bf16*>(weight) + n * K, K, size, of, K, rows, sums, TILE);
                else
                    SF_PICK(real_fp32)(static_cast<const float*>(weight) + n * K, K, size, of, K, rows, sums, TILE);
                for (int64_t m = 0; m < rows; m++)
                    for (int64_t j = 0; j < size; j++) {
                        const float y = added ? sums[m * TILE + j] + added[n + j] : sums[m * TILE + j];
                        const int64_t at = (from + m) * N + n + j;
                        if (kind == BF16)
                            put(static_cast<bf16*>(out) + at, y);
                        else
                            put(static_cast<float*>(out) + at, y);
                    }
            }
        }
    });
}
