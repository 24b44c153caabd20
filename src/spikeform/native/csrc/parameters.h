// Parameters of neurons as Python passes them.
#pragma once

#include "common.h"

namespace spikeform {

struct Population {  // MT or OAT
    const float* threshold;
    int64_t count, limit, resolution, rounding;
};

struct Gates {  // a fixed-point HG
    int64_t bits, nearest, low, high;
};

struct Burst {  // GIF
    const float *top, *multiple;
    int64_t levels, steps;
};

struct Norm {
    const void *weight, *bias;  // each of a Kind, or null
    int64_t weight_kind, bias_kind, centred;
    float eps, gain_offset;
};

struct FewSpike {
    const float *gates, *theta, *h, *d;  // [R + 1], [R, T] each
    int64_t regions, steps;
};

}  // namespace spikeform

// Runs ``call`` with the type X that a Kind says.
#define SF_OF_KIND(kind, X, call) \
    if (kind == BF16) {           \
        using X = bf16;           \
        call;                     \
    } else {                      \
        using X = float;          \
        call;                     \
    }
