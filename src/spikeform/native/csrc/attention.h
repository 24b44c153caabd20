// What an attention on codes is given: addresses, sizes, strides (in elements) and neurons.
#pragma once

#include "parameters.h"

namespace spikeform {

// B batch, H query heads, G key/value heads, L queries, S keys, E head size. What Python sends, in this order.
struct Sizes {
    int64_t batch, heads, groups, length, keys, size;
    int64_t q_stride[3], k_stride[3], v_stride[3], mask_stride[3];  // batch, head, row
    int64_t q_kind, mask_kind, out_kind;
};

struct Tensors {
    const void *q, *k, *v, *mask;  // mask may be null
    void* out;
    float scaling, hidden;  // a mask hides a key where it is not above ``hidden``
};

struct OatNeurons {
    Population query, key, value, probability;
    Gates gates;   // bits = 0: a real softmax
    int64_t wide;  // packed codes are int32, else int16
};

struct GifNeurons {
    Burst query;                                 // tables [E]
    const float *key_multiple, *value_multiple;  // [G, E]
    int64_t peak;                                // the largest code of a probability
};

// Tasks of an attention: a few query rows of one key/value head each.
struct Tasks {
    int64_t pairs, rows, per, blocks;
    int64_t count() const { return pairs * blocks; }
};
Tasks tasks_of(const Sizes& n, int64_t threads);
void attend(const Sizes& n, const Tensors& x, const OatNeurons& neurons, const Tasks& tasks, int64_t i);
void attend(const Sizes& n, const Tensors& x, const GifNeurons& neurons, const Tasks& tasks, int64_t i);

// Query rows that one task holds at most.
constexpr int64_t QUERY_ROWS = 64;

// Floats that a task needs, for any instruction set.
inline int64_t attention_space(int64_t rows, int64_t keys, int64_t size) {
    const int64_t wide = size + 16, long_ = keys + 32;
    return rows * (2 * wide + long_ + 1) + 2 * 32 * wide + 3 * long_ + 64;
}

}  // namespace spikeform
