// Which instruction set is in use; large pages.
#include "common.h"

#include <atomic>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace spikeform {

static int best() {
#if SF_X86
    __builtin_cpu_init();
    bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx512vnni");
    if (wide) return AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) return AVX2;
#endif
    return PORTABLE;
}

int level_in_use = best();

constexpr int64_t LARGE = 1 << 18;  // bytes from which on a large page is worth asking for

void use_large_pages(const void* place, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t PAGE = uintptr_t(1) << 21, SEEN = 4096, NEAR = 8;
    constexpr int COLLAPSE = 25;  // MADV_COLLAPSE, Linux 6.1: now, not when the kernel comes by
    static std::atomic<uint64_t> seen[SEEN];
    if (bytes < LARGE) return;
    const uintptr_t at = reinterpret_cast<uintptr_t>(place);
    // Weights of one size lie at one distance: multiplied, they spread over the table.
    const uint64_t own = (uint64_t(at) + 3 * uint64_t(bytes)) * 0x9e3779b97f4a7c15u;
    for (uint64_t i = 0; i < NEAR; i++) {
        auto& entry = seen[((own >> 40) + i) % SEEN];
        const uint64_t known = entry.load(std::memory_order_relaxed);
        if (known == own) return;
        if (known && i + 1 < NEAR) continue;
        entry.store(own, std::memory_order_relaxed);
        break;
    }
    // Pages that a weight shares with its neighbours, too: of one of a few million bytes they are half.
    for (uintptr_t page = at / PAGE * PAGE; page < at + uintptr_t(bytes); page += PAGE) {
        // Where the system refuses, a page stays as it is.
        madvise(reinterpret_cast<void*>(page), PAGE, MADV_HUGEPAGE);
        madvise(reinterpret_cast<void*>(page), PAGE, COLLAPSE);
    }
#else
    (void)place, (void)bytes;
#endif
}

}  // namespace spikeform

// The level in use, after it is set to `wanted` as far as the machine allows; -1 leaves it.
SF_API int64_t spikeform_level(int64_t wanted) {
    if (wanted >= 0) spikeform::level_in_use = std::min<int>(int(wanted), spikeform::best());
    return spikeform::level_in_use;
}

#ifndef SF_SOURCES
#define SF_SOURCES ""
#endif
// The digest of the sources of which this was built.
SF_API const char* spikeform_sources() { return SF_SOURCES; }
