// One row on the thread that calls: what makes it, its codes, its products, a token's place in a cache. What chain.cpp
// puts together; products.cpp, neurons.cpp and attention.cpp have it.
#pragma once

#include "attention.h"

namespace spikeform {

// What makes a row that neurons encode, of one Kind; its meaning is that of the operator of the name.
enum Made { AS_IT_IS = 0, HG_NORM, HG_GATED, RMS_NORM, GATED };
struct Maker {
    int64_t made;
    const void *x, *other;  // other: a gate's factor
    int64_t kind, K, function;
    Norm norm;
    Gates gates;
    Population neuron;
};
void make_row(const Maker& maker, void* out);

// A row that meets weights: by whose neurons, of which kind. Those of GIF have ``levels``, ``steps`` and `multiple`.
enum WeightKind { BYTES = 2, NIBBLES = 3 };  // after those of Kind
struct Encoding {
    int64_t gif, limit, resolution, rounding, populations, weights;
};
struct Matrix {
    const void* weight;
    const float* scale;
    const int16_t* zero;
    const void* bias;
    int64_t bias_kind;
    const float* table;  // thresholds, or multiples [K]
    const int8_t* shift;
    int64_t N;
    void* out;
};
struct Line {
    const int8_t* planes[6];
    int32_t totals[6];
    int64_t slots[6], count;
    float units[2];
    const float* values;
};
constexpr int64_t TILE = 48;  // weight rows whose sums wait for their scale
size_t line_bytes(const Encoding& how, int64_t K);
void encode_line(const Encoding& how, const Matrix& matrix, const void* x, int64_t kind, int64_t K, int8_t* room,
                 Line& line);
// Outputs begin .. end, of out_kind; `residual` is added to what is rounded, or null.
void multiply_line(const Encoding& how, const Matrix& matrix, const Line& line, int64_t K, int64_t begin, int64_t end,
                   const void* residual, int64_t out_kind);

// A head [E] of one token: turned by its position where there is a cos, and where ``cache`` is given packed into it.
struct Head {
    const void *x, *cos, *sin;
    int64_t kind, size;
    void *turned, *cache;
};
void put_head(const Head& head, const Population& neuron, int64_t wide);
void put_head(const Head& head, const Burst& neuron);

}  // namespace spikeform
