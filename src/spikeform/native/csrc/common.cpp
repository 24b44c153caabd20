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

void use_large_pages(const void* place, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr int64_t PAGE = int64_t(1) << 21, SEEN = 4096;
    constexpr int COLLAPSE = 25;  // MADV_COLLAPSE, Linux 6.1: now, not when the kernel comes by
    static std::atomic<uintptr_t> seen[SEEN];
    const uintptr_t at = reinterpret_cast<uintptr_t>(place);
    auto& entry = seen[(at >> 12) % SEEN];
    if (bytes < 2 * PAGE || entry.load(std::memory_order_relaxed) == at) return;
    entry.store(at, std::memory_order_relaxed);
    const uintptr_t begin = (at + PAGE - 1) / PAGE * PAGE, end = (at + uintptr_t(bytes)) / PAGE * PAGE;
    // Where the system refuses, pages stay as they are.
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
    madvise(reinterpret_cast<void*>(begin), end - begin, COLLAPSE);
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
