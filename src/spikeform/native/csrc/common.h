// What every source file shares: types, the instruction sets, threads, scratch memory.
//
// Kernels are written once, in a file that each_level.h includes once for each instruction set, inside a namespace of
// that set (portable, avx2, avx512) and with that set switched on; SF_PICK(f) is f of the set in use.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#define SF_X86 1
#include <immintrin.h>
#endif

#define SF_API extern "C" __attribute__((visibility("default")))
#define SF_INLINE static inline __attribute__((always_inline))

#define SF_DO(x) _Pragma(#x)
#if defined(__clang__)
#define SF_BEGIN_TARGET(set) SF_DO(clang attribute push(__attribute__((target(set))), apply_to = function))
#define SF_END_TARGET SF_DO(clang attribute pop)
#else
#define SF_BEGIN_TARGET(set) SF_DO(GCC push_options) SF_DO(GCC target(set))
#define SF_END_TARGET SF_DO(GCC pop_options)
#endif
#define SF_AVX2 "avx2,fma,bmi2"
#define SF_AVX512 "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,bmi2"

namespace spikeform {

enum Level { PORTABLE = 0, AVX2 = 1, AVX512 = 2 };
extern int level_in_use;

enum Kind { FP32 = 0, BF16 = 1 };  // of real tensors, as Python says it
struct bf16 {
    uint16_t bits;
};

static inline float real(float x) { return x; }
static inline float real(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}
static inline void put(float* place, float x) { *place = x; }
// Round to nearest, ties to even, as PyTorch does; the quiet NaN stays one.
static inline void put(bf16* place, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    place->bits = uint16_t(x != x ? 0x7fc0 : rounded);
}

enum Rounding { NEAREST = 0, FLOOR = 1, STRICT = 2 };  // the order of neurons.oat.ROUNDINGS

// A multi-threshold population: one sub-neuron (MT), or a second one for what reaches the first one's threshold (OAT).
struct Oat {
    float normal, unit[2], limit;
    bool gated;
    int rounding;
};

static inline Oat oat(const float* threshold, int64_t populations, int64_t limit, int64_t resolution, int64_t rounding) {
    Oat p;
    p.gated = populations == 2;
    p.normal = p.gated ? threshold[0] : std::numeric_limits<float>::quiet_NaN();  // which nothing reaches
    p.unit[0] = threshold[0] / float(resolution);
    p.unit[1] = p.gated ? threshold[1] / float(resolution) : p.unit[0];
    p.limit = float(limit);
    p.rounding = int(rounding);
    return p;
}

static inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// run(begin, end) over 0..count on so many threads, in pieces of a multiple of `grain`, a few for each thread: one that a
// neighbour holds up leaves its share to the others. On the caller's thread alone where there is only one piece.
template <class Run>
static inline void parallel(int64_t count, int64_t grain, int64_t threads, const Run& run) {
    const int64_t grains = (count + grain - 1) / grain;
    threads = std::min(threads, grains);
    if (threads <= 1) {
        if (count > 0) run(int64_t(0), count);
        return;
    }
    const int64_t pieces = std::min(threads * 4, grains);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t t = 0; t < pieces; t++) {
        int64_t begin = grains * t / pieces * grain, end = std::min(grains * (t + 1) / pieces * grain, count);
        if (begin < end) run(begin, end);
    }
}

// Memory of the calling thread, kept between calls; 64-byte aligned. One block for each slot.
struct Scratch {
    void* block = nullptr;
    size_t size = 0;
    ~Scratch() { std::free(block); }
};
template <class T>
static inline T* scratch(int slot, size_t count) {
    static thread_local Scratch kept[12];
    Scratch& own = kept[slot];
    size_t wanted = (count * sizeof(T) + 4095) / 4096 * 4096;
    if (own.size < wanted) {
        std::free(own.block);
        own.block = std::aligned_alloc(64, wanted);
        own.size = own.block ? wanted : 0;
        if (!own.block) std::abort();
    }
    return static_cast<T*>(own.block);
}

// Large pages for weights that are read over and over: reading them is up to 1.7 times as fast. Once for each place.
void use_large_pages(const void* place, int64_t bytes);

}  // namespace spikeform

#if SF_X86
#define SF_PICK(f)                                                                                    \
    (spikeform::level_in_use == spikeform::AVX512 ? spikeform::avx512::f                              \
                                                  : spikeform::level_in_use == spikeform::AVX2 ? spikeform::avx2::f \
                                                                                               : spikeform::portable::f)
#else
#define SF_PICK(f) spikeform::portable::f
#endif
