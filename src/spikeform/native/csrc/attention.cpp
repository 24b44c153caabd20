// Attention on packed codes for spikeform.layers.cpu: tasks of a few query rows of one key/value head.
#include "attention.h"

#define SF_KERNELS "attention_kernels.h"
#include "each_level.h"

using namespace spikeform;

namespace {

constexpr int64_t WORTH_THREADS = 1000000;  // multiply-adds: some twenty microseconds

template <class Run>
void tasks(const Sizes& n, int64_t threads, const Run& run) {
    const int64_t pairs = n.batch * n.groups, rows = n.groups ? n.heads / n.groups * n.length : 0;
    if (pairs * rows == 0) return;
    // A query row meets each key twice; to decode a key costs as much as four rows.
    if (pairs * n.keys * n.size * (2 * rows + 8) < WORTH_THREADS) threads = 1;
    const int64_t share = std::max<int64_t>(1, (threads + pairs - 1) / pairs);
    const int64_t per = std::min(QUERY_ROWS, (rows + share - 1) / share), blocks = (rows + per - 1) / per;
    parallel(pairs * blocks, 1, threads, [&](int64_t begin, int64_t end) {
        float* space = scratch<float>(0, attention_space(per, n.keys, n.size));
        for (int64_t i = begin; i < end; i++) {
            const int64_t pair = i / blocks, first = i % blocks * per;
            run(pair / n.groups, pair % n.groups, first, std::min(per, rows - first), space);
        }
    });
}

}  // namespace

SF_API void spikeform_oat_attention(const int64_t* sizes, const void* q, const void* k, const void* v, const void* mask,
                                    void* out, float scaling, float hidden, const float* query, const float* key,
                                    const float* value, const float* probability, int64_t populations, int64_t limit,
                                    int64_t peak, int64_t resolution, int64_t rounding, int64_t bits, int64_t nearest,
                                    int64_t low, int64_t high, int64_t wide, int64_t threads) {
    const Sizes& n = *reinterpret_cast<const Sizes*>(sizes);
    const Tensors x = {q, k, v, mask, out, scaling, hidden};
    const auto of = [&](const float* threshold, int64_t most) {
        return Population{threshold, populations, most, resolution, rounding};
    };
    const OatNeurons neurons = {
        of(query, limit), of(key, limit), of(value, limit), of(probability, peak), {bits, nearest, low, high}, wide};
    tasks(n, threads, [&](int64_t batch, int64_t group, int64_t first, int64_t rows, float* space) {
        SF_PICK(oat_attention)(n, x, neurons, batch, group, first, rows, space);
    });
}

SF_API void spikeform_gif_attention(const int64_t* sizes, const void* q, const void* k, const void* v, const void* mask,
                                    void* out, float scaling, float hidden, const float* q_top, const float* q_multiple,
                                    int64_t q_steps, const float* k_multiple, const float* v_multiple, int64_t levels,
                                    int64_t peak, int64_t threads) {
    const Sizes& n = *reinterpret_cast<const Sizes*>(sizes);
    const Tensors x = {q, k, v, mask, out, scaling, hidden};
    const GifNeurons neurons = {{q_top, q_multiple, levels, q_steps}, k_multiple, v_multiple, peak};
    tasks(n, threads, [&](int64_t batch, int64_t group, int64_t first, int64_t rows, float* space) {
        SF_PICK(gif_attention)(n, x, neurons, batch, group, first, rows, space);
    });
}
