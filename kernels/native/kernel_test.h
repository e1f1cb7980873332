// What C++ tests of kernels share.
#pragma once

#include <cstdio>
#include <cstdlib>

#include "target.h"

namespace simmim::test {

inline int failures = 0;

inline void check(bool ok, const char* what) {
    if (!ok) {
        std::fprintf(stderr, "FAILED: %s\n", what);
        ++failures;
    }
}

// From -0.5 to 0.5.
inline float uniform() {
    return static_cast<float>(std::rand()) / static_cast<float>(RAND_MAX) - 0.5f;
}

// Runs `test` with every instruction set that this processor has; returns main's exit status.
inline int with_every_target(void (*test)()) {
    for (const Target target : {Target::baseline, Target::avx2, Target::avx512}) {
        if (!force_target(target)) continue;
        std::srand(7);
        test();
    }
    return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}

}  // namespace simmim::test
