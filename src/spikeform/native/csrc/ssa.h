// What spiking self-attention is given: sizes, strides (in elements), neurons.
#pragma once

#include "common.h"

namespace spikeform {

// B batch, H query heads, G key/value heads, L positions, E head size, T steps. What Python sends, in this order.
struct SpikingSizes {
    int64_t batch, heads, groups, length, size, steps;
    int64_t q_stride[3], k_stride[3], v_stride[3];  // batch, head, row
    int64_t kind;                                   // of q, k, v and the output
    int64_t hard, is_signed, normalise;
    int64_t local, width;  // key/value heads with a window, the first ones; the largest window less one
};

struct SpikingTensors {
    const void *q, *k, *v;
    const uint8_t* seen;    // [B, L], or null: all
    float* state;           // [T, B, G - local, E, E], or null: none before, and none is kept
    int8_t* recent;         // spikes of keys and values before [2, T, B, local, width, E], or null as above
    const int64_t* windows;  // [G]
    const int64_t* number;  // keys in it [B], or null: none
    const float *query, *key, *value, *output;  // gains [H], [G], [G], [H]
    void* out;                                  // [B, L, H, E]
    float tau, threshold, last;                 // ``last``: the output neuron's threshold
};

// Positions that a task takes at once: their counts wait for the last step before the output fires.
constexpr int64_t POSITIONS = 32;

// Floats that a task needs, for any instruction set.
inline int64_t spiking_space(const SpikingSizes& n) {
    const int64_t pitch = round_up(n.size, 16), repeat = n.heads / n.groups, positions = std::min(POSITIONS, n.length);
    const int64_t words = (n.size + 63) / 64 * 2 * 2;  // in floats, of both signs
    return n.steps * (pitch * pitch + positions * (repeat + 1) * (pitch + words) + n.width * (pitch + words));
}

}  // namespace spikeform
