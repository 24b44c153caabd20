// Attention on packed codes for spikeform.layers.cpu: tasks of a few query rows of one key/value head.
#include "attention.h"

#define SF_KERNELS "attention_kernels.h"
#include "each_level.h"

using namespace spikeform;

namespace {

constexpr int64_t WORTH_THREADS = 1000000;  // multiply-adds: some twenty microseconds

// Task i by run(batch, group, first, rows, space).
template <class Run>
void one(const Sizes& n, const Tasks& t, int64_t i, const Run& run) {
    const int64_t pair = i / t.blocks, first = i % t.blocks * t.per;
    float* space = scratch<float>(0, attention_space(t.per, n.keys, n.size));
    run(pair / n.groups, pair % n.groups, first, std::min(t.per, t.rows - first), space);
}

template <class Neurons>
void all(const Sizes& n, const Tensors& x, const Neurons& neurons, int64_t threads) {
    // A query row meets each key twice; to decode a key costs as much as four rows.
    const int64_t rows = n.groups ? n.heads / n.groups * n.length : 0;
    if (n.batch * n.groups * n.keys * n.size * (2 * rows + 8) < WORTH_THREADS) threads = 1;
    const Tasks t = tasks_of(n, threads);
    parallel(t.count(), 1, threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) attend(n, x, neurons, t, i);
    });
}

}  // namespace

namespace spikeform {

Tasks tasks_of(const Sizes& n, int64_t threads) {
    Tasks t = {n.batch * n.groups, n.groups ? n.heads / n.groups * n.length : 0, 1, 0};
    if (t.pairs * t.rows == 0) return t;
    const int64_t share = std::max<int64_t>(1, (threads + t.pairs - 1) / t.pairs);
    t.per = std::min(QUERY_ROWS, (t.rows + share - 1) / share), t.blocks = (t.rows + t.per - 1) / t.per;
    return t;
}

void attend(const Sizes& n, const Tensors& x, const OatNeurons& neurons, const Tasks& tasks, int64_t i) {
    one(n, tasks, i, [&](int64_t batch, int64_t group, int64_t first, int64_t rows, float* space) {
        SF_PICK(oat_attention)(n, x, neurons, batch, group, first, rows, space);
    });
}

void attend(const Sizes& n, const Tensors& x, const GifNeurons& neurons, const Tasks& tasks, int64_t i) {
    one(n, tasks, i, [&](int64_t batch, int64_t group, int64_t first, int64_t rows, float* space) {
        SF_PICK(gif_attention)(n, x, neurons, batch, group, first, rows, space);
    });
}

}  // namespace spikeform

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
    all(n, x, neurons, threads);
}

SF_API void spikeform_gif_attention(const int64_t* sizes, const void* q, const void* k, const void* v, const void* mask,
                                    void* out, float scaling, float hidden, const float* q_top, const float* q_multiple,
                                    int64_t q_steps, const float* k_multiple, const float* v_multiple, int64_t levels,
                                    int64_t peak, int64_t threads) {
    const Sizes& n = *reinterpret_cast<const Sizes*>(sizes);
    const Tensors x = {q, k, v, mask, out, scaling, hidden};
    const GifNeurons neurons = {{q_top, q_multiple, levels, q_steps}, k_multiple, v_multiple, peak};
    all(n, x, neurons, threads);
}
