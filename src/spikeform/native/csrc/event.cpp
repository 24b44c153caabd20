// The event executor's product: only the rows of input-major weights whose value is not zero are read.
#include "common.h"

namespace spikeform {

// Active values of a row: their places, and they themselves in the forms that kernels want.
struct Active {
    static constexpr int64_t DEEP = 16;  // index and codes are filled up, with zeros, by so many
    int32_t* index;
    int32_t* whole;   // the values, where they are integers
    int8_t* codes;    // the same
    int16_t* shorts;  // the same
    float* reals;     // the values in any case
    int64_t count = 0;
    int32_t total = 0;  // sum of the integers
    int32_t peak = 0;   // their largest magnitude

    explicit Active(int64_t K)
        : index(scratch<int32_t>(0, size_t(K + DEEP))),
          whole(scratch<int32_t>(1, size_t(K + DEEP))),
          codes(scratch<int8_t>(2, size_t(K + DEEP))),
          shorts(scratch<int16_t>(6, size_t(K + DEEP))),
          reals(scratch<float>(3, size_t(K + DEEP))) {}

    // Through copies of the members: what is stored through an int8_t* might be any of them.
    void read(const int8_t* values, int64_t K) {
        int32_t *const to = index, *const wide = whole;
        int8_t* const narrow = codes;
        int64_t found = 0;
        for (int64_t k = 0; k < K; k++) {
            to[found] = int32_t(k);
            narrow[found] = values[k];
            found += values[k] != 0;
        }
        int32_t sum = 0, most = 0;
        for (int64_t i = 0; i < found; i++) {
            const int32_t value = narrow[i];
            wide[i] = value;
            sum += value;
            most = std::max(most, std::abs(value));
        }
        for (int64_t i = 0; i < found; i++) shorts[i] = int16_t(wide[i]);
        for (int64_t i = 0; i < found; i++) reals[i] = float(wide[i]);
        std::memset(to + found, 0, DEEP * sizeof(int32_t));
        std::memset(narrow + found, 0, DEEP);
        count = found, total = sum, peak = most;
    }
    // Rows, in fours, whose products with int8 weights add up in 16 bits whatever the weights are.
    int64_t short_rows() const { return peak ? 32767 / (128 * peak) / 4 * 4 : 0; }

    void read(const float* values, int64_t K) {
        int32_t* const to = index;
        float* const real = reals;
        int64_t found = 0;
        for (int64_t k = 0; k < K; k++) {
            to[found] = int32_t(k);
            real[found] = values[k];
            found += values[k] != 0.0f;
        }
        count = found;
    }
};

}  // namespace spikeform

#define SF_KERNELS "event_kernels.h"
#include "each_level.h"

using namespace spikeform;

namespace {

constexpr int64_t INT8 = 2;      // a kind beside FP32 and BF16, as Python says it; nibbles are 3
constexpr int64_t GRAIN = 128;            // columns: whole groups of nibbles, and whole lines of int8
constexpr int64_t WORTH = 1 << 19;        // bytes of active weights that another thread is worth

void scale_to(const int32_t* sums, int64_t begin, int64_t end, const float* scale, float* out) {
    for (int64_t n = begin; n < end; n++) out[n] = scale ? float(sums[n - begin]) * scale[n] : float(sums[n - begin]);
}
void scale_to(const float* sums, int64_t begin, int64_t end, const float* scale, float* out) {
    for (int64_t n = begin; n < end; n++) out[n] = scale ? sums[n - begin] * scale[n] : sums[n - begin];
}

}  // namespace

// values [M, K] fp32 or int8; rows [K, N] fp32, bf16, int8 or nibbles [K, N / 2]; scale fp32 [N] or null; out fp32 [M, N].
SF_API void spikeform_event_product(const void* values, int64_t kind, int64_t M, int64_t K, const void* rows,
                                    int64_t rows_kind, int64_t N, const float* scale, float* out, int64_t threads) {
    Active a(K);
    const int64_t bits = rows_kind == FP32 ? 32 : rows_kind == BF16 ? 16 : rows_kind == INT8 ? 8 : 4;
    const bool whole = kind == INT8 && rows_kind >= INT8;
    use_large_pages(rows, K * N / 8 * bits);
    for (int64_t m = 0; m < M; m++, out += N) {
        if (kind == INT8)
            a.read(static_cast<const int8_t*>(values) + m * K, K);
        else
            a.read(static_cast<const float*>(values) + m * K, K);
        const int64_t useful = std::max<int64_t>(1, std::min(threads, a.count * N / 8 * bits / WORTH));
        parallel(N, GRAIN, useful, [&](int64_t begin, int64_t end) {
            if (whole) {
                int32_t* sums = scratch<int32_t>(4, size_t(end - begin));
                if (rows_kind == INT8)
                    SF_PICK(event_int8)(static_cast<const int8_t*>(rows), N, a, begin, end, sums);
                else
                    SF_PICK(event_int4)(static_cast<const uint8_t*>(rows), N, a, begin, end, sums);
                scale_to(sums, begin, end, scale, out);
            } else {
                float* sums = scratch<float>(5, size_t(end - begin));
                if (rows_kind == FP32)
                    SF_PICK(event_real_fp32)(static_cast<const float*>(rows), N, a, begin, end, sums);
                else if (rows_kind == BF16)
                    SF_PICK(event_real_bf16)(static_cast<const bf16*>(rows), N, a, begin, end, sums);
                else if (rows_kind == INT8)
                    SF_PICK(event_real_int8)(static_cast<const int8_t*>(rows), N, a, begin, end, sums);
                else
                    SF_PICK(event_real_int4)(static_cast<const uint8_t*>(rows), N, a, begin, end, sums);
                scale_to(sums, begin, end, scale, out);
            }
        });
    }
}
