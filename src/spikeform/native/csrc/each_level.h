// Includes the file that SF_KERNELS names once for each instruction set; see common.h. SF_LEVEL says which.
#include "common.h"

#define SF_LEVEL 0
namespace spikeform::portable {
#include SF_KERNELS
}
#undef SF_LEVEL

#if SF_X86
#define SF_LEVEL 1
SF_BEGIN_TARGET(SF_AVX2)
namespace spikeform::avx2 {
#include SF_KERNELS
}
SF_END_TARGET
#undef SF_LEVEL

#define SF_LEVEL 2
SF_BEGIN_TARGET(SF_AVX512)
namespace spikeform::avx512 {
#include SF_KERNELS
}
SF_END_TARGET
#undef SF_LEVEL
#endif
#undef SF_KERNELS
