// Spiking self-attention for spikeform.layers.cpu: a task is one key/value head of one sequence.
#include "ssa.h"

#define SF_KERNELS "ssa_kernels.h"
#include "each_level.h"

using namespace spikeform;

namespace {
constexpr int64_t WORTH_THREADS = 1000000;  // additions: some tens of microseconds
}

SF_API void spikeform_ssa_attention(const int64_t* sizes, const void* q, const void* k, const void* v, const void* seen,
                                    void* state, void* recent, const int64_t* windows, const void* number,
                                    const float* query, const float* key,
                                    const float* value, const float* output, void* out, float tau, float threshold,
                                    float last, int64_t threads) {
    const SpikingSizes& n = *reinterpret_cast<const SpikingSizes*>(sizes);
    const SpikingTensors x = {q,
                              k,
                              v,
                              static_cast<const uint8_t*>(seen),
                              static_cast<float*>(state),
                              static_cast<int8_t*>(recent),
                              windows,
                              static_cast<const int64_t*>(number),
                              query,
                              key,
                              value,
                              output,
                              out,
                              tau,
                              threshold,
                              last};
    const int64_t pairs = n.batch * n.groups;
    // A fifth of all elements fire, or fewer.
    if (n.steps * n.length * n.batch * (n.heads + n.groups) * n.size * (n.size + 60) / 5 < WORTH_THREADS) threads = 1;
    parallel(pairs, 1, threads, [&](int64_t begin, int64_t end) {
        float* space = scratch<float>(0, size_t(spiking_space(n)));
        for (int64_t i = begin; i < end; i++) SF_PICK(ssa)(n, x, i / n.groups, i % n.groups, space);
    });
}
