// Instruction sets. Every kernel source is compiled once for each, in a namespace of that name, and
// the best one that this processor runs is called. Kernel sources and the headers that they share
// must not use inline functions of the standard library: the linker keeps one copy of each, and
// that could be the one compiled for AVX-512.
#pragma once

#ifndef SIMMIM_TARGET
#define SIMMIM_TARGET baseline
#endif

namespace simmim {

enum class Target { baseline, avx2, avx512 };

// The best target that was built and that this processor runs, or the one forced.
Target target();

// Makes `target` return `forced` from now on; false if it was not built or cannot run here.
bool force_target(Target forced);

// True if this processor multiplies bfloat16 matrices faster than float32 ones.
bool has_fast_bfloat16();

}  // namespace simmim

#ifdef SIMMIM_X86
#define SIMMIM_DECLARE(signature) \
    namespace simmim::baseline {  \
    signature;                    \
    }                             \
    namespace simmim::avx2 {      \
    signature;                    \
    }                             \
    namespace simmim::avx512 {    \
    signature;                    \
    }
#define SIMMIM_CALL(name, ...)                                                            \
    (::simmim::target() == ::simmim::Target::avx512 ? ::simmim::avx512::name(__VA_ARGS__) \
     : ::simmim::target() == ::simmim::Target::avx2 ? ::simmim::avx2::name(__VA_ARGS__)   \
                                                    : ::simmim::baseline::name(__VA_ARGS__))
#else
#define SIMMIM_DECLARE(signature) \
    namespace simmim::baseline {  \
    signature;                    \
    }
#define SIMMIM_CALL(name, ...) ::simmim::baseline::name(__VA_ARGS__)
#endif
