// Neurons for spikeform.neurons.cpu: contiguous real tensors (fp32 or bf16) to what the neurons send.
#include "rows.h"

#define SF_KERNELS "neurons_kernels.h"
#include "each_level.h"

using namespace spikeform;

namespace {

// Elements that one thread takes at least: to call one costs about ten microseconds.
constexpr int64_t LIGHT = 65536, HEAVY = 16384;

int64_t rows(int64_t elements, int64_t size) { return size > 0 ? (elements + size - 1) / size : 1; }

}  // namespace

#define POPULATION const float *threshold, int64_t populations, int64_t limit, int64_t resolution, int64_t rounding
#define GATES int64_t bits, int64_t nearest, int64_t low, int64_t high

// decode(encode(x)) of a multi-threshold population; shift int8 [size] of the channels, or null.
SF_API void spikeform_oat_values(const void* x, int64_t kind, int64_t count, int64_t size, const int8_t* shift,
                                 POPULATION, void* out, int64_t out_kind, int64_t threads) {
    const Population neuron = {threshold, populations, limit, resolution, rounding};
    const int64_t grain = shift ? rows(LIGHT, size) * size : LIGHT;
    parallel(count, grain, threads, [&](int64_t begin, int64_t end) {
        SF_PICK(oat_values)(neuron, x, kind, shift, size, begin, end, out, out_kind);
    });
}

// 2 code + sub-neuron: int16, or int32 where ``wide``.
SF_API void spikeform_oat_pack(const void* x, int64_t kind, int64_t count, POPULATION, void* out, int64_t wide,
                               int64_t threads) {
    const Population neuron = {threshold, populations, limit, resolution, rounding};
    parallel(count, LIGHT, threads, [&](int64_t begin, int64_t end) {
        SF_PICK(oat_pack)(neuron, x, kind, begin, end, out, wide);
    });
}

SF_API void spikeform_hg_values(const void* x, int64_t kind, int64_t count, int64_t function, GATES, void* out,
                                int64_t threads) {
    const Gates gates = {bits, nearest, low, high};
    parallel(count, LIGHT, threads, [&](int64_t begin, int64_t end) {
        SF_PICK(hg_values)(function, gates, x, kind, begin, end, out);
    });
}

// HG of the gate times the population's value of the other factor.
SF_API void spikeform_hg_gated(const void* gate, const void* up, int64_t kind, int64_t count, int64_t function, GATES,
                               POPULATION, void* out, int64_t threads) {
    const Gates gates = {bits, nearest, low, high};
    const Population neuron = {threshold, populations, limit, resolution, rounding};
    parallel(count, LIGHT, threads, [&](int64_t begin, int64_t end) {
        SF_PICK(hg_gated)(function, gates, neuron, gate, up, kind, begin, end, out);
    });
}

SF_API void spikeform_hg_norm(const void* x, int64_t kind, int64_t count, int64_t size, const void* weight,
                              int64_t weight_kind, const void* bias, int64_t bias_kind, float eps, int64_t centred,
                              float gain_offset, POPULATION, GATES, void* out, int64_t threads) {
    const Norm norm = {weight, bias, weight_kind, bias_kind, centred, eps, gain_offset};
    const Gates gates = {bits, nearest, low, high};
    const Population neuron = {threshold, populations, limit, resolution, rounding};
    parallel(count, rows(LIGHT, size), threads, [&](int64_t begin, int64_t end) {
        SF_PICK(hg_norm)(norm, gates, neuron, x, kind, size, begin, end, out);
    });
}

SF_API void spikeform_few_spike_values(const void* x, int64_t kind, int64_t count, const float* gates,
                                       const float* theta, const float* h, const float* d, int64_t regions,
                                       int64_t steps, void* out, int64_t threads) {
    const FewSpike neuron = {gates, theta, h, d, regions, steps};
    parallel(count, HEAVY / steps, threads, [&](int64_t begin, int64_t end) {
        SF_PICK(few_spike_values)(neuron, x, kind, begin, end, out);
    });
}

// GIF rows of ``size``. With ``units``: integers in the row's unit, and that unit. Without: packed, the unit's bytes
// behind the codes. Row r takes row r / inner % tables of the tables.
SF_API void spikeform_gif_rows(const void* x, int64_t kind, int64_t count, int64_t size, const float* top,
                               const float* multiple, int64_t tables, int64_t inner, int64_t levels, int64_t steps,
                               int8_t* out, float* units, int64_t threads) {
    const Burst burst = {top, multiple, levels, steps};
    parallel(count, rows(LIGHT, size), threads, [&](int64_t begin, int64_t end) {
        SF_PICK(gif_rows)(burst, tables, inner, x, kind, size, begin, end, out, units);
    });
}

// One row, for chain.cpp.
namespace spikeform {

void make_row(const Maker& m, void* out) {
    switch (m.made) {
        case HG_NORM: return SF_PICK(hg_norm)(m.norm, m.gates, m.neuron, m.x, m.kind, m.K, 0, 1, out);
        case HG_GATED: return SF_PICK(hg_gated)(m.function, m.gates, m.neuron, m.x, m.other, m.kind, 0, m.K, out);
        case RMS_NORM: return SF_PICK(rms_norm)(m.norm, m.x, m.kind, m.K, out);
        case GATED: return SF_PICK(gate)(m.function, m.x, m.other, m.kind, m.K, out);
    }
}

namespace {

// The head as it is to be packed.
const void* turned(const Head& head) {
    if (head.cos) SF_PICK(turn)(head.x, head.cos, head.sin, head.kind, head.size, head.turned);
    return head.cos ? head.turned : head.x;
}

}  // namespace

void put_head(const Head& head, const Population& neuron, int64_t wide) {
    const void* x = turned(head);
    if (head.cache) SF_PICK(oat_pack)(neuron, x, head.kind, 0, head.size, head.cache, wide);
}

void put_head(const Head& head, const Burst& neuron) {
    const void* x = turned(head);
    if (head.cache)
        SF_PICK(gif_rows)(neuron, 1, 1, x, head.kind, head.size, 0, 1, static_cast<int8_t*>(head.cache), nullptr);
}

}  // namespace spikeform
