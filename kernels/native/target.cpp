// Which instruction set the kernels use on this processor.
#include "target.h"

namespace simmim {
namespace {

bool runs(Target target) {
#ifdef SIMMIM_X86
    if (target == Target::avx512) {
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    }
    if (target == Target::avx2) {
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
               __builtin_cpu_supports("f16c");
    }
#endif
    return target == Target::baseline;
}

Target best() {
    return runs(Target::avx512) ? Target::avx512
           : runs(Target::avx2) ? Target::avx2
                                : Target::baseline;
}

Target& current() {
    static Target chosen = best();
    return chosen;
}

}  // namespace

Target target() { return current(); }

bool force_target(Target forced) {
    if (!runs(forced)) {
        return false;
    }
    current() = forced;
    return true;
}

bool has_fast_bfloat16() {
#ifdef SIMMIM_X86
    return __builtin_cpu_supports("avx512bf16");
#else
    return false;
#endif
}

}  // namespace simmim
