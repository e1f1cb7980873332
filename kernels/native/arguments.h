// What Python passes to a kernel: the struct of its arguments names them, and bindings.cpp makes
// the Python function from that.
#pragma once

#include <cstdint>

namespace simmim {

// A Python list, which lives as long as the call. No member functions: they would be inline, and
// compiled for every instruction set (target.h).
template <class T>
struct List {
    const T* data;
    int64_t size;
};

}  // namespace simmim

// Stands in a struct of arguments, or of results, and lists its members in the order in which
// Python passes them, under their names. Pointers arrive as addresses, arrays as tuples of their
// size; a member that is itself such a struct arrives as a tuple of whole numbers. Only
// bindings.cpp instantiates what this declares.
#define SIMMIM_FIELDS(...)                \
    template <class Take>                 \
    static void names(const Take& take) { \
        take(#__VA_ARGS__);               \
    }                                     \
    template <class Visit>                \
    auto fields(const Visit& visit) {     \
        return visit(__VA_ARGS__);        \
    }

// The same for a struct that derives `Base`, whose members come first.
#define SIMMIM_FIELDS_AFTER(Base, ...)                                                     \
    template <class Take>                                                                  \
    static void names(const Take& take) {                                                  \
        Base::names(take);                                                                 \
        take(#__VA_ARGS__);                                                                \
    }                                                                                      \
    template <class Visit>                                                                 \
    auto fields(const Visit& visit) {                                                      \
        return Base::fields([&](auto&... first) { return visit(first..., __VA_ARGS__); }); \
    }
